"""The feature map of FAVOR+, FAVOR++, FAVOR# and `optimal`: exp(u W^T + row + column)."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from favorsharp._arrays import cast, namespace_of
from favorsharp._nonfinite import finite_or_nan
from favorsharp._typing import Array
from favorsharp.features.base import PositiveFeatureMap, written
from favorsharp.ops.exponential_features import exponential_features
from favorsharp.parameters import Parameters, check_data, embed_key, embed_query


@dataclass(frozen=True, eq=False, repr=False)
class DenseExponentialMap(PositiveFeatureMap):
    """Importance-sampled exponential features of transformed, centred inputs (docs: theory).

    Attributes
    ----------
    rows : array, shape (*b, m, d)
        W, distributed as nu = N(0, diag(1 - 4a)), or as the caller's own proposal.
    log_weight : array, shape (*b, 1, m)
        log p(W) / nu(W) with p = N(0, I); half of it goes to each side.
    """

    rows: Array
    log_weight: Array

    family: ClassVar[str] = "exponential"

    @classmethod
    def from_rows(cls, parameters: Parameters, num_features: int, w: Array) -> "DenseExponentialMap":
        """Make the map from standard Gaussian rows w, scaled to the fitted proposal."""
        xp = namespace_of(w)
        a = parameters.a
        spread = 1 - 4 * a
        log_weight = 2 * (a @ xp.matrix_transpose(w * w)) + 0.5 * xp.sum(xp.log(spread), axis=-1, keepdims=True)
        return cls(parameters, num_features, w, w * xp.sqrt(spread), log_weight)

    @property
    def column(self) -> Array:
        """The part of a log feature that depends on the feature alone, shape (*b, 1, m)."""
        return 0.5 * self.log_weight - 0.5 * math.log(self.num_features)

    def query_terms(self, x: Array) -> tuple[Array, Array]:
        """Return u and row of queries: log features are u rows^T + row + column; (*b, n, d) and (*b, n, 1)."""
        u, log_factor = embed_query(self.parameters, x)
        return u, _row(u, log_factor)

    def key_terms(self, y: Array) -> tuple[Array, Array]:
        """Return v and row of keys: log features are v rows^T + row + column; (*b, s, d) and (*b, s, 1)."""
        v, log_factor = embed_key(self.parameters, y)
        return v, _row(v, log_factor)

    def _terms(self, side: str, x: Array) -> tuple[Array, Array]:
        return self.query_terms(x) if side == "query" else self.key_terms(x)

    def _log_features(self, side: str, x: Array) -> Array:
        u, row = self._terms(side, x)
        return u @ namespace_of(u).matrix_transpose(self.rows) + (row + self.column)

    def _features(self, name: str, x: Array, side: str, logarithms: bool, out: Array | None) -> Array:
        """Features of one side, as for every map. A kernel that takes unscaled points computes them in one pass."""
        self._check_out(name, x, out)
        check_data(self.parameters, **{name: x})
        if exponential_features.offers_of_points(x, self, out):
            op: Any = exponential_features
            return op.implementation(x, self).of_points(x, self, side, logarithms=logarithms, out=out)
        if logarithms:
            return super()._features(name, x, side, logarithms, out)
        prepared, wide = self._prepared(name, x)
        u, row = prepared._terms(side, wide)
        return written(cast(exponential_features(u, prepared.rows, row, prepared.column), x.dtype), out)


def _row(u: Array, log_factor: Array) -> Array:
    """The part of a log feature that depends on the point alone; NaN if it exceeds the range of the dtype."""
    return finite_or_nan(log_factor - 0.5 * namespace_of(u).sum(u * u, axis=-1, keepdims=True))
