"""The metric of keys by which landmarks are chosen, as arrays; `favorsharp.landmarks.metric` computes them."""

from dataclasses import dataclass

from favorsharp._arrays import broadcast_shapes, cast, namespace_of
from favorsharp._typing import Array


@dataclass(frozen=True, eq=False)
class Metric:
    """The metric of keys, for scaled points. All arrays are constants in differentiation.

    Attributes
    ----------
    center : array, shape (*b, 1, d)
        The mean of the keys; y stands for a key minus this mean.
    lift : array, shape (*b, d, d)
        L.
    direction : array, shape (*b, 1, d)
        mu_t.
    """

    center: Array
    lift: Array
    direction: Array

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes."""
        return broadcast_shapes(*(x.shape[:-2] for x in (self.center, self.lift, self.direction)))

    def coordinates(self, y: Array) -> tuple[Array, Array]:
        """Coordinates u and log norms s, (*b, s, d) -> (*b, s, d) and (*b, s, 1), of centred keys."""
        xp = namespace_of(y)
        u = y @ self.lift
        return u, xp.sum(y * self.direction, axis=-1, keepdims=True) + xp.sum(u * u, axis=-1, keepdims=True)

    def log_means(self, y: Array) -> Array:
        """Logarithms of the means of keys' kernels over queries, s - |u|^2 / 2, (*b, s, d) -> (*b, s, 1)."""
        u, log_norm = self.coordinates(y)
        return log_norm - 0.5 * namespace_of(y).sum(u * u, axis=-1, keepdims=True)


def centred(y: Array, log_weight: Array | None, metric: Metric, kernel: str, scale: float) -> tuple[Array, Array]:
    """Scaled and centred keys, and their log masses (*b, s, 1): log weights plus the kernel's own factor of a key."""
    xp = namespace_of(y)
    y = cast(y, metric.center.dtype) * scale**0.5 - metric.center
    log_mass = xp.zeros_like(y[..., :1]) if log_weight is None else log_weight[..., None]
    return y, log_mass - 0.5 * xp.sum(y * y, axis=-1, keepdims=True) if kernel == "gaussian" else log_mass


def uncentred(points: Array, log_mass: Array, metric: Metric, kernel: str, scale: float) -> tuple[Array, Array]:
    """Undo `centred`, for landmarks and the logarithms of their masses (*b, m)."""
    if kernel == "gaussian":
        log_mass = log_mass + 0.5 * namespace_of(points).sum(points * points, axis=-1)
    return (points + metric.center) / scale**0.5, log_mass
