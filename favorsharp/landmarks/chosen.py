"""Chosen landmarks as a positive feature map with one feature for each landmark.

The log feature of a query x at the landmark c is x.c. A key y belongs to its nearest landmark in the metric. There its
log feature is its log weight, -|u - u_c|^2 / 2 + s - s_c; at all other landmarks it is -inf. So the ops of
`favorsharp.ops` read landmarks as they read features. Their sums over keys are the weights and the weighted values of
the landmarks, and windows, masks and grouped heads work unchanged.

The log mass of a key is the logarithm of the factor with which its kernel counts: 0 for a single key, and its log
weight for a landmark from which landmarks are chosen again; with the Gaussian kernel, minus |y|^2 / 2.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from favorsharp._arrays import cast, namespace_of
from favorsharp._typing import Array
from favorsharp.ops.landmark_metric import Metric, centred
from favorsharp.ops.landmarks import weights_of


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

    def log_query(self, x: Array, /) -> Array:
        """x.c, (*b, n, d) -> (*b, n, m)."""
        return self._query(x) @ namespace_of(x).matrix_transpose(self.points)

    def log_key(self, y: Array, /) -> Array:
        """The log weight of each key at its own landmark, -inf at the others, (*b, s, d) -> (*b, s, m)."""
        return weights_of(self.points, self.used, self.metric, *self._key(y))

    def log_kernel(self, x: Array, y: Array) -> Array:
        """The exact log kernel, up to a constant for each query, (*b, n, d), (*b, s, d) -> (*b, n, s)."""
        xp = namespace_of(x, y)
        keys, log_mass = self._key(y)
        return self._query(x) @ xp.matrix_transpose(keys) + xp.matrix_transpose(log_mass)

    def expanded(self) -> "LandmarkMap":
        """The same map with an axis of length 1 before the last two of its arrays."""
        metric = Metric(*(x[..., None, :, :] for x in vars(self.metric).values()))
        return replace(self, points=self.points[..., None, :, :], used=self.used[..., None, :, :], metric=metric)

    def _query(self, x: Array) -> Array:
        x = cast(x, self.points.dtype) * self.scale**0.5
        return x - self.metric.center if self.kernel == "gaussian" else x

    def _key(self, y: Array) -> tuple[Array, Array]:
        return centred(y, None, self.metric, self.kernel, self.scale)
