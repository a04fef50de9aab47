"""The features of Nystrom's method: kernels of a point with m centres, times the inverse root of their own kernel."""

from dataclasses import dataclass

from favorsharp._arrays import namespace_of
from favorsharp._typing import Array
from favorsharp.features.base import SignedFeatureMap
from favorsharp.parameters import embed_key, embed_query


@dataclass(frozen=True, eq=False, repr=False)
class NystromMap(SignedFeatureMap):
    """exp(-|u - c|^2 / 2) root, times a factor of the point; the centres c are the projection.

    u is g1 (x - center_x) for queries and g2 (y - center_y) for keys, and the kernel is exp(u.v) times factors of both
    points. So the products of features are Nystrom's approximation of the kernel.

    Attributes
    ----------
    root : array, shape (*b, m, m)
        The inverse root of the matrix exp(-|c - c'|^2 / 2).
    """

    root: Array

    def query_parts(self, x: Array) -> tuple[Array, Array]:
        """Features without their factor, and its logarithm, (*b, n, m) and (*b, n, 1)."""
        return self._parts(*embed_query(self.parameters, x))

    def key_parts(self, y: Array) -> tuple[Array, Array]:
        """Features without their factor, and its logarithm, (*b, s, m) and (*b, s, 1)."""
        return self._parts(*embed_key(self.parameters, y))

    def _parts(self, u: Array, log_factor: Array) -> tuple[Array, Array]:
        xp = namespace_of(u)
        half = 0.5 * xp.sum(u * u, axis=-1, keepdims=True)
        scores = u @ xp.matrix_transpose(self.projection) - 0.5 * _squares(self.projection)
        top = xp.max(scores, axis=-1, keepdims=True)
        features = xp.exp(scores - top) @ self.root
        if self.parameters.kernel == "gaussian":  # the factor of the point is exp(-|u|^2 / 2)
            return features, top - half
        return features, top + log_factor


def _squares(centres: Array) -> Array:
    """|c|^2 as a row, (*b, 1, m)."""
    xp = namespace_of(centres)
    return xp.matrix_transpose(xp.sum(centres * centres, axis=-1, keepdims=True))
