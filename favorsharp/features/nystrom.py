"""The feature map of Nystrom's method: kernels of a point with centres, times a matrix."""

from dataclasses import dataclass

from favorsharp._algebra import row_sum
from favorsharp._arrays import cast, library_of, namespace_of, under_own_settings
from favorsharp._typing import Array
from favorsharp.features.base import SignedFeatureMap, written
from favorsharp.ops.tiles import tiles_of
from favorsharp.parameters import embed_key, embed_query

WIDE = 64
"""With more columns, points are not copied beside their square lengths."""


@dataclass(frozen=True, eq=False, repr=False)
class NystromMap(SignedFeatureMap):
    """exp(-|r u - c|^2 / 2) root, times a factor of the point; r^2 is the sharpness, and the projection has centres c.

    u is g1 (x - center_x) for queries and g2 (y - center_y) for keys, and the kernel is exp(u.v) times factors of both
    points. So the products of features are Nystrom's approximation of the kernel. Features that are longer than the
    kernel of the point with itself allows, as they can be far from all points of the fit, are shortened to that length.

    Attributes
    ----------
    projection : array, shape (*b, c, d)
        The centres.
    root : array, shape (*b, c, m)
        A root of a matrix near the inverse of exp(-|c - c'|^2 / 2).
    sharpness : array, shape (*b, 1, 1)
        If it is less than 1, the functions of the centres are wider than the kernel.
    """

    root: Array
    sharpness: Array

    def query_parts(self, x: Array) -> tuple[Array, Array]:
        """Features without their factor, and its logarithm, (*b, n, m) and (*b, n, 1)."""
        return self._parts(*embed_query(self.parameters, x))

    def key_parts(self, y: Array) -> tuple[Array, Array]:
        """Features without their factor, and its logarithm, (*b, s, m) and (*b, s, 1)."""
        return self._parts(*embed_key(self.parameters, y))

    def query(self, x: Array, /, *, out: Array | None = None) -> Array:
        """Features of queries, (*b, n, d) -> (*b, n, m), in the dtype of x; written to `out` if that is given."""
        return super().query(x, out=out) if self.parameters.kernel == "softmax" else self._gaussian("x", x, out)

    def key(self, y: Array, /, *, out: Array | None = None) -> Array:
        """Features of keys, (*b, s, d) -> (*b, s, m), in the dtype of y; written to `out` if that is given."""
        return super().key(y, out=out) if self.parameters.kernel == "softmax" else self._gaussian("y", y, out)

    @under_own_settings
    def _gaussian(self, name: str, x: Array, out: Array | None) -> Array:
        """Features with the Gaussian kernel: g1 and g2 are the identity, and queries and keys have the same ones."""
        self._check_out(name, x, out)
        prepared, wide = self._prepared(name, x)
        p, own = prepared.parameters, namespace_of(x).sqrt(prepared.sharpness)
        root, centre = own * p.scale**0.5, own * p.center_x

        def features(points: Array) -> Array:
            u = points * root - centre
            found = gaussian(u, prepared.projection) @ prepared.root
            xp = namespace_of(found)
            length = xp.sqrt(xp.vecdot(found, found))[..., None]
            return cast(found / xp.maximum(length, xp.ones_like(length)), x.dtype)

        if library_of(x) == "numpy":
            return self._by_tiles(features, wide, x, out)
        bounds = tiles_of(x.shape[-2], self.num_features, self.batch_shape)
        parts = [features(wide[..., start:stop, :]) for start, stop in bounds]
        return written(parts[0] if len(parts) == 1 else namespace_of(x).concat(parts, axis=-2), out)

    def _parts(self, u: Array, log_factor: Array) -> tuple[Array, Array]:
        xp = namespace_of(u)
        half = 0.5 * xp.sum(u * u, axis=-1, keepdims=True)
        scores = (xp.sqrt(self.sharpness) * u) @ xp.matrix_transpose(self.projection) - _halves(self.projection)
        top = xp.max(scores, axis=-1, keepdims=True)
        features = xp.exp(scores - top) @ self.root
        length = xp.sqrt(row_sum(features * features))
        factor = xp.minimum(top - self.sharpness * half, -xp.log(xp.where(length > 0, length, 1.0)))
        # with the Gaussian kernel, the factor of the point is exp(-|u|^2 / 2)
        return features, factor if self.parameters.kernel == "gaussian" else factor + half + log_factor


def gaussian(points: Array, centres: Array) -> Array:
    """exp(-|u - c|^2 / 2), (*b, n, m)."""
    xp = namespace_of(points, centres)
    own, other = (-0.5 * xp.vecdot(a, a)[..., None] for a in (points, centres))
    if points.shape[-1] > WIDE:
        logs = points @ xp.matrix_transpose(centres) + own + xp.matrix_transpose(other)
    else:  # with two more columns on each side, one product makes the whole exponent
        left = xp.concat([points, own, xp.ones_like(own)], axis=-1)
        logs = left @ xp.matrix_transpose(xp.concat([centres, xp.ones_like(other), other], axis=-1))
    return xp.exp(xp.minimum(logs, xp.zeros_like(logs[..., :1])))


def _halves(centres: Array) -> Array:
    """|c|^2 / 2 as a row, (*b, 1, m)."""
    xp = namespace_of(centres)
    return 0.5 * xp.matrix_transpose(xp.sum(centres * centres, axis=-1, keepdims=True))
