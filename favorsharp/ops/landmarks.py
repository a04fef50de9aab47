"""Landmarks, m weighted keys in place of n: their choice from keys, and attention to them (docs: theory, landmarks).

Keys are passed as they are, with log weights; the functions here scale and centre them. All arrays of a metric, the
assignment of keys to landmarks, and seeds are constants in differentiation.
"""

from dataclasses import dataclass

from favorsharp._arrays import broadcast_shapes, cast, namespace_of, on_device_of, without_gradient
from favorsharp._typing import Array
from favorsharp.dispatch import Op
from favorsharp.ops.state import Partial, finish, hide, merge, tiles_of


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


def centred(y: Array, log_weight: Array | None, metric: Metric, kernel: str, scale: float) -> tuple[Array, Array]:
    """Scaled and centred keys, and their log masses (*b, s, 1): log weights plus the kernel's own factor of a key."""
    xp = namespace_of(y)
    y = cast(y, metric.center.dtype) * scale**0.5 - metric.center
    log_mass = xp.zeros_like(y[..., :1]) if log_weight is None else log_weight[..., None]
    return y, log_mass - 0.5 * xp.sum(y * y, axis=-1, keepdims=True) if kernel == "gaussian" else log_mass


def nearness(points: Array, used: Array, metric: Metric, y: Array) -> tuple[Array, Array]:
    """u.u_c - |u_c|^2 / 2 of keys and landmarks, and which landmark is nearest to each key, both (*b, s, m).

    The first is largest for the nearest landmark, and -inf for unused ones.
    """
    xp = namespace_of(points)
    lifted = points @ metric.lift
    toward = lifted @ xp.matrix_transpose(metric.lift)
    squares = xp.matrix_transpose(xp.sum(lifted * lifted, axis=-1, keepdims=True))
    scores = y @ xp.matrix_transpose(toward) + xp.where(used, -0.5 * squares, -xp.inf)
    nearest = xp.argmax(without_gradient(scores), axis=-1, keepdims=True)
    slots = xp.arange(points.shape[-2], dtype=nearest.dtype, **on_device_of(points))
    return scores, nearest == slots


def weights_of(points: Array, used: Array, metric: Metric, y: Array, log_mass: Array) -> Array:
    """The log weight of each key at its own landmark, -inf at the others, (*b, s, m).

    Keys are scaled and centred, and have log masses (*b, s, 1).
    """
    xp = namespace_of(y)
    scores, own = nearness(points, used, metric, y)
    u, log_norm = metric.coordinates(y)
    rest = log_norm - 0.5 * xp.sum(u * u, axis=-1, keepdims=True) + log_mass
    return xp.where(own, scores + rest - xp.matrix_transpose(metric.coordinates(points)[1]), -xp.inf)


def gather(logs: Array, v: Array, total: Partial | None = None) -> Partial:
    """Weighted sums of values, one row for each landmark, added to a total.

    `logs` (*b, s, m) holds the log weight of each key at each landmark, `v` (*b, s, e) the values.
    """
    xp = namespace_of(logs, v)
    ref = xp.max(logs, axis=-2, keepdims=True)
    p = xp.matrix_transpose(xp.exp(logs - xp.where(ref == -xp.inf, 0.0, ref)))
    sums = p @ xp.concat([v, xp.ones_like(v[..., :1])], axis=-1)
    part = Partial(sums[..., :-1], sums[..., -1:], xp.matrix_transpose(ref))
    return part if total is None else merge(total, part)


@Op
def landmark_means(
    k: Array, log_weight: Array, points: Array, used: Array, metric: Metric, *, steps: int, kernel: str, scale: float
) -> Array:
    """Lloyd steps: in each, every landmark moves to the mean of the keys that are nearest to it.

    Keys count with the weights exp(s), times exp(log_weight). Only the last step is differentiable.

    Parameters
    ----------
    k : array, shape (*b, s, d)
        One or more keys, not scaled.
    log_weight : array, shape (*b, s)
        -inf for hidden keys, which may hold anything.
    points : array, shape (*b, m, d)
        Landmarks, scaled and centred.
    used : array of bool, shape (*b, 1, m)
        No key belongs to a landmark that is not used.
    metric : Metric
    steps : int
        1 or more.
    kernel : {"softmax", "gaussian"}
    scale : float

    Returns
    -------
    array, shape (*b, m, d)
        Scaled and centred. A landmark without keys stays where it is.
    """
    xp = namespace_of(k, points)
    visible = log_weight != -xp.inf
    y, log_mass = centred(hide(k, visible), xp.where(visible, log_weight, 0.0), metric, kernel, scale)
    points = without_gradient(points)
    for _ in range(steps - 1):
        points = _means(without_gradient(y), without_gradient(log_mass), visible, points, used, metric)
    return _means(y, log_mass, visible, points, used, metric)


def _means(y: Array, log_mass: Array, visible: Array, points: Array, used: Array, metric: Metric) -> Array:
    """The mean of the keys of each landmark, with weights exp(s); the landmark itself if it has no key."""
    xp = namespace_of(y)
    m = points.shape[-2]
    batch = broadcast_shapes(points.shape[:-2], y.shape[:-2], log_mass.shape[:-2])
    total = None
    for start, stop in tiles_of(y.shape[-2], m, batch):
        tile = y[..., start:stop, :]
        _, own = nearness(points, used, metric, tile)
        logs = metric.coordinates(tile)[1] + log_mass[..., start:stop, :]
        total = gather(xp.where(own & visible[..., start:stop, None], logs, -xp.inf), tile, total)
    return points if total is None else xp.where(total.den > 0, finish(total), points)


@Op
def condense(
    k: Array,
    log_weight: Array,
    v: Array,
    points: Array,
    used: Array,
    metric: Metric,
    *,
    kernel: str,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Replace keys by landmarks: every key adds its weight and its value to its nearest landmark.

    Parameters
    ----------
    k : array, shape (*b, s, d)
        One or more keys, not scaled.
    log_weight : array, shape (*b, s)
        -inf for hidden keys, whose points and values may hold anything.
    v : array, shape (*b, s, e)
    points : array, shape (*b, m, d)
        Landmarks, scaled and centred.
    used : array of bool, shape (*b, 1, m)
    metric : Metric
    kernel : {"softmax", "gaussian"}
    scale : float

    Returns
    -------
    points : array, shape (*b, m, d)
        The landmarks, neither scaled nor centred.
    log_weight : array, shape (*b, m)
        -inf for landmarks without keys.
    values : array, shape (*b, m, e)
        Weighted means, in the dtype of `points`.
    """
    xp = namespace_of(k, v)
    visible = log_weight != -xp.inf
    k, v, log_weight = hide(k, visible), hide(cast(v, points.dtype), visible), xp.where(visible, log_weight, 0.0)
    batch = broadcast_shapes(points.shape[:-2], k.shape[:-2], v.shape[:-2], log_weight.shape[:-1])
    total = None
    for start, stop in tiles_of(k.shape[-2], points.shape[-2], batch):
        y, mass = centred(k[..., start:stop, :], log_weight[..., start:stop], metric, kernel, scale)
        logs = weights_of(points, used, metric, y, mass)
        logs = xp.where(visible[..., start:stop, None], logs, -xp.inf)
        total = gather(logs, v[..., start:stop, :], total)
    assert total is not None  # there are keys
    log_mass = (total.ref + xp.log(xp.where(total.den > 0, total.den, 1.0)))[..., 0]
    return *uncentred(points, log_mass, metric, kernel, scale), finish(total)


def uncentred(points: Array, log_mass: Array, metric: Metric, kernel: str, scale: float) -> tuple[Array, Array]:
    """Undo `centred`, for landmarks and the logarithms of their masses (*b, m)."""
    if kernel == "gaussian":
        log_mass = log_mass + 0.5 * namespace_of(points).sum(points * points, axis=-1)
    return (points + metric.center) / scale**0.5, log_mass
