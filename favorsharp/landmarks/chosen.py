"""The choice of landmarks, and the chosen landmarks as a positive feature map with one feature for each landmark.

The log feature of a query x at the landmark c is x.c. A key y belongs to its nearest landmark in the metric. There its
log feature is its log weight, -|u - u_c|^2 / 2 + s - s_c; at all other landmarks it is -inf. So the ops of
`favorsharp.ops` read landmarks as they read features. Their sums over keys are the weights and the weighted values of
the landmarks, and windows, masks and grouped heads work unchanged.

The log mass of a key is the logarithm of the factor with which its kernel counts: 0 for a single key, and its log
weight for a landmark from which landmarks are chosen again; with the Gaussian kernel, minus |y|^2 / 2.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from favorsharp._arrays import broadcast_shapes, cast, namespace_of, on_device_of, under_own_settings, without_gradient
from favorsharp._typing import Array
from favorsharp.landmarks.metric import Metric
from favorsharp.landmarks.seeds import choose_seeds, noise_of
from favorsharp.landmarks.settings import Landmarks
from favorsharp.ops.state import Partial, finish, hide, merge, tiles_of


@dataclass(frozen=True, eq=False)
class LandmarkMap:
    """Chosen landmarks, as a positive feature map in the dtype of the metric.

    Attributes
    ----------
    points : array, shape (*b, m, d)
        The landmarks c, scaled and centred. Unused ones have finite coordinates too.
    used : array of bool, shape (*b, 1, m)
    metric : Metric
    kernel : str
    scale : float
    """

    points: Array
    used: Array
    metric: Metric
    kernel: str
    scale: float

    positive: ClassVar[bool] = True

    @property
    def num_features(self) -> int:
        """The number of landmarks, m."""
        return int(self.points.shape[-2])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes of the landmarks."""
        return tuple(self.points.shape[:-2])

    def log_query(self, x: Array) -> Array:
        """x.c, (*b, n, d) -> (*b, n, m)."""
        return self._query(x) @ namespace_of(x).matrix_transpose(self.points)

    def log_key(self, y: Array) -> Array:
        """The log weight of each key at its own landmark, -inf at the others, (*b, s, d) -> (*b, s, m)."""
        return self.weights_of(*self._key(y))

    def log_kernel(self, x: Array, y: Array) -> Array:
        """The exact log kernel, up to a constant for each query, (*b, n, d), (*b, s, d) -> (*b, n, s)."""
        xp = namespace_of(x, y)
        keys, log_mass = self._key(y)
        return self._query(x) @ xp.matrix_transpose(keys) + xp.matrix_transpose(log_mass)

    def expanded(self) -> "LandmarkMap":
        """The same map with an axis of length 1 before the last two of its arrays."""
        metric = Metric(*(x[..., None, :, :] for x in vars(self.metric).values()))
        return replace(self, points=self.points[..., None, :, :], used=self.used[..., None, :, :], metric=metric)

    def weights_of(self, y: Array, log_mass: Array) -> Array:
        """As `log_key`, for keys that are scaled and centred already, with log masses, (*b, s, d) and (*b, s, 1)."""
        xp = namespace_of(y)
        scores, own = nearness(self.points, self.used, self.metric, y)
        u, log_norm = self.metric.coordinates(y)
        rest = log_norm - 0.5 * xp.sum(u * u, axis=-1, keepdims=True) + log_mass
        return xp.where(own, scores + rest - _log_norms(self.points, self.metric), -xp.inf)

    def _query(self, x: Array) -> Array:
        x = cast(x, self.points.dtype) * self.scale**0.5
        return x - self.metric.center if self.kernel == "gaussian" else x

    def _key(self, y: Array) -> tuple[Array, Array]:
        return centred(y, None, self.metric, self.kernel, self.scale)


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


def _log_norms(points: Array, metric: Metric) -> Array:
    """Log norms s of landmarks, (*b, 1, m)."""
    return namespace_of(points).matrix_transpose(metric.coordinates(points)[1])


@under_own_settings
def choose(
    y: Array, log_mass: Array, visible: Array, metric: Metric, settings: Landmarks, scale: float, event: int = 0
) -> LandmarkMap:
    """Choose landmarks for keys: seeds, then Lloyd steps.

    The last step is differentiable: landmarks are means of keys, where the assignment and the metric are constants.

    Parameters
    ----------
    y : array, shape (*b, s, d)
        Keys, scaled and centred.
    log_mass : array, shape (*b, s, 1)
    visible : array of bool, shape (*b, s)
    metric : Metric
    settings : Landmarks
    scale : float
        Of the kernel.
    event : int
        The same seed gives other random numbers for each event; a stream passes the number of keys seen.
    """
    xp = namespace_of(y)
    y = hide(y, visible)
    fixed = without_gradient(y)
    mass = xp.where(visible[..., None], without_gradient(log_mass), -xp.inf)
    u, log_norm = metric.coordinates(fixed)
    noise = noise_of(settings.seed, event, settings.num_landmarks, y.shape[-1])
    index, needed = choose_seeds(u, (log_norm + mass)[..., 0], fixed, visible, settings.num_landmarks, noise)
    keys = xp.broadcast_to(y, (*index.shape[:-1], *y.shape[-2:]))
    points, used = xp.take_along_axis(keys, index[..., None], axis=-2), needed[..., None, :]
    chosen = LandmarkMap(points, used, metric, settings.kernel, scale)
    for step in range(settings.steps):
        last = step == settings.steps - 1
        points = _means(chosen, y if last else fixed, log_mass if last else mass, visible)
        chosen = replace(chosen, points=points)
    return chosen


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


def _means(chosen: LandmarkMap, y: Array, log_mass: Array, visible: Array) -> Array:
    """The mean of the keys of each landmark, with weights exp(s); the landmark itself if it has no key."""
    xp = namespace_of(y)
    batch = broadcast_shapes(chosen.batch_shape, y.shape[:-2], log_mass.shape[:-2])
    held = without_gradient(chosen.points)
    total = None
    for start, stop in tiles_of(y.shape[-2], chosen.num_features, batch):
        tile = y[..., start:stop, :]
        _, own = nearness(held, chosen.used, chosen.metric, tile)
        logs = chosen.metric.coordinates(tile)[1] + log_mass[..., start:stop, :]
        own = own & visible[..., start:stop, None]
        total = gather(xp.where(own, logs, -xp.inf), tile, total)
    return held if total is None else xp.where(total.den > 0, finish(total), held)
