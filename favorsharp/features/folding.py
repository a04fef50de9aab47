"""A dense-exponential map as a few constants for each side, which backends pack into the layouts of their kernels.

With z = root x - center, the log features of a point x are

    z rows^T + column + f(z),    f(z) = offset + linear.z - beta |z|^2 - |z dense|^2

so the constants contain g, both centers and the scale, in float64. They are computed on the device of the arrays, and
no number is read back to the host: choices that depend on numbers are made on the device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from favorsharp._arrays import cast, namespace_of, on_device_of
from favorsharp._autodiff import without_gradient
from favorsharp._typing import Array

__all__ = ["FoldedSide", "fold"]


ROUNDING = {"float32": 2.0**-21, "float64": 2.0**-40}
"""For each dtype that kernels compute in: how far the quadratic form of an orthogonal matrix may be from |z|^2.

That is four roundings of float32; and what a fit leaves in float64, whose matrices are products of several factors.
"""


@dataclass(frozen=True, eq=False)
class FoldedSide:
    """The constants of queries or of keys; the first axis runs over the maps of a batch.

    Attributes
    ----------
    root : float
        Square root of the scale.
    center, linear, near_center : array, shape (count, d)
        Exact scores are z.z' of points centred by `near_center`, minus half of |z|^2 and |z'|^2 for the Gaussian
        kernel.
    offset, beta : array, shape (count,)
    column : array, shape (count, m)
    rows : array, shape (count, m, d)
    dense : array, shape (count, d, d)
        0 if the quadratic form is a multiple of |z|^2 in all maps of the batch; `beta` then holds the factor. This is
        so if g is a multiple of an orthogonal matrix: for `sderf`, and for `optimal` and `aderf` if both sides have
        equal moments.
    """

    root: float
    center: Array
    linear: Array
    near_center: Array
    offset: Array
    beta: Array
    column: Array
    rows: Array
    dense: Array


def fold(
    feature_map: Any, prepared: Callable[[Array], Array] = without_gradient, *, dtype: str = "float64"
) -> tuple[FoldedSide, FoldedSide]:
    """The constants of a dense-exponential map's queries and keys.

    Parameters
    ----------
    feature_map : DenseExponentialMap
        Its leading axes are flattened.
    prepared : callable
        Applied to each array of the map, to put it where the constants are needed.
    dtype : str
        The dtype that the kernels compute in. A quadratic form that differs from a multiple of |z|^2 by the rounding
        of this dtype, or of a fit, counts as one.
    """

    def flat(x: Array) -> Array:
        return _flat(prepared(x), batch)

    p = feature_map.parameters
    batch = tuple(feature_map.batch_shape)
    g1, g2, center_x, center_y = flat(p.g1), flat(p.g2), flat(p.center_x)[:, 0, :], flat(p.center_y)[:, 0, :]
    rows, column = flat(feature_map.rows), flat(feature_map.column)[:, 0, :]
    root, gaussian = math.sqrt(p.scale), p.kernel == "gaussian"
    return (
        _side(root, g1, center_x, center_y, center_y, rows, column, gaussian, ROUNDING[dtype]),
        _side(root, g2, center_y, center_x, center_y, rows, column, gaussian, ROUNDING[dtype]),
    )


def _side(
    root: float,
    g: Array,
    own: Array,
    other: Array,
    near_center: Array,
    rows: Array,
    column: Array,
    gaussian: bool,
    rounding: float,
) -> FoldedSide:
    xp = namespace_of(g)
    if gaussian:
        linear = other - own
        offset, beta = -0.25 * xp.sum(linear * linear, axis=-1), 0.5
    else:
        linear, offset, beta = other, 0.5 * xp.sum(own * other, axis=-1), 0.0
        near_center = xp.zeros_like(own)
    form = xp.matrix_transpose(g) @ g
    first = form[:, :1, :1]
    multiple = first * xp.eye(g.shape[-1], dtype=g.dtype, **on_device_of(g))
    is_multiple = xp.all(xp.abs(form - multiple) <= rounding * first)
    beta = beta + xp.where(is_multiple, 0.5 * first[:, 0, 0], 0.0)
    dense = math.sqrt(0.5) * xp.astype(xp.logical_not(is_multiple), g.dtype) * xp.matrix_transpose(g)
    return FoldedSide(root, own, linear, near_center, offset, beta, column, rows @ g, dense)


def _flat(x: Array, batch: tuple[int, ...]) -> Array:
    """An array of a map in float64, with its leading axes broadcast to the batch and flattened."""
    xp = namespace_of(x)
    wide = cast(x, xp.float64)
    return xp.reshape(xp.broadcast_to(wide, (*batch, *wide.shape[-2:])), (math.prod(batch), *wide.shape[-2:]))
