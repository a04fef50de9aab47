"""First and second moments of queries and keys, from which `fit` computes parameters."""

from dataclasses import dataclass
from functools import reduce, singledispatch
from typing import Any

from favorsharp._arrays import (
    broadcast_shapes,
    cast,
    compute_dtype,
    dtype_name,
    namespace_of,
    statistics_dtype,
    under_own_settings,
)
from favorsharp._autodiff import is_traced
from favorsharp._checks import (
    check_broadcast,
    check_flag,
    check_floats,
    check_group,
    check_mask,
    check_points,
    check_same_size,
)
from favorsharp._chunks import as_chunked, is_chunked, point_blocks, tree_reduce
from favorsharp._typing import Array
from favorsharp.dispatch import Op, is_restricted

_TILE = 8192
"""Number of points that are converted to float64 at once: 4 MiB at d = 64."""


@dataclass(frozen=True, eq=False, repr=False)
class Moments:
    """Counts, means and covariances of queries x and of keys y, each side divided by its own count.

    Attributes
    ----------
    count_x, count_y : array, shape (*b, 1, 1)
        Numbers of visible points.
    mean_x, mean_y : array, shape (*b, 1, d)
    covariance_x, covariance_y : array, shape (*b, d, d)
        Centred second moments, divided by the count.
    dtype : str
        The dtype of the results of a fit: that of the data, float32 at least. The moments themselves are float64
        wherever the device has it.
    cross : array, shape (*b, d, d), or None
        Centred second moment of x with y over weighted pairs, from `attention_moments`, whose counts are total weights.
        None means that all pairs have equal weight, so that it is 0.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k = np.random.default_rng(0).standard_normal((2, 3, 64, 4))
    >>> fs.moments(q, k)
    Moments(d=4, batch=(3,), dtype='float64')
    >>> fs.moments(q, k).covariance_x.shape
    (3, 4, 4)
    """

    count_x: Array
    mean_x: Array
    covariance_x: Array
    count_y: Array
    mean_y: Array
    covariance_y: Array
    dtype: str
    cross: Array | None = None

    @property
    def size(self) -> int:
        """The number of coordinates, d."""
        return int(self.mean_x.shape[-1])

    @property
    def second_x(self) -> Array:
        """Mean of x x^T, uncentred, shape (*b, d, d)."""
        return self.covariance_x + _outer(self.mean_x)

    @property
    def second_y(self) -> Array:
        """Mean of y y^T, uncentred, shape (*b, d, d)."""
        return self.covariance_y + _outer(self.mean_y)

    def __repr__(self) -> str:
        batch = tuple(self.mean_x.shape[:-2])
        return f"Moments(d={self.size}, batch={batch}, dtype={self.dtype!r})"


@under_own_settings
def moments(
    x: Array,
    y: Array,
    /,
    *,
    axis: int | tuple[int, ...] = -2,
    mask_x: Array | None = None,
    mask_y: Array | None = None,
    enable_gqa: bool = False,
) -> Moments:
    """Moments of queries and keys, in one pass over tiles of points.

    Parameters
    ----------
    x : array, shape (*b, n, d)
        Queries, not scaled.
    y : array, shape (*b, s, d)
        Keys, not scaled.
    axis : int or tuple of int
        The axes to average over, which are kept with length 1; the point axis -2 must be one of them. `axis=(0, -2)`
        gives one set of moments for each head of a (B, H, n, d) batch.
    mask_x, mask_y : array of bool, shape (*b, n) and (*b, s), optional
        True where a point counts.
    enable_gqa : bool
        x has g times the heads of y; the g query heads of a key head are pooled.

    Returns
    -------
    Moments

    Raises
    ------
    TypeError, ValueError
        If the arrays are not floating, or if their libraries, devices or shapes do not fit.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k = np.random.default_rng(0).standard_normal((2, 8, 2, 64, 4))
    >>> fs.moments(q, k, axis=(0, -2))  # one set for each of two heads
    Moments(d=4, batch=(1, 2), dtype='float64')
    """
    return gathered(x, y, axis=axis, mask_x=mask_x, mask_y=mask_y, enable_gqa=enable_gqa)


def gathered(
    x: Array,
    y: Array,
    *,
    axis: int | tuple[int, ...] = -2,
    mask_x: Array | None = None,
    mask_y: Array | None = None,
    enable_gqa: bool = False,
    narrow: bool = False,
) -> Moments:
    """As `moments`. With `narrow`, moments may be rounded as in `point_moments` if both sides are the same points."""
    if is_chunked(x, y):
        return _chunked(x, y, axis, mask_x, mask_y, enable_gqa)
    xp = check_floats(x=x, y=y)
    check_points("x", x, "(*b, n, d)")
    check_points("y", y, "(*b, s, d)")
    check_same_size("d", x=(-1, x.shape[-1]), y=(-1, y.shape[-1]))
    check_mask("mask_x", mask_x, "(*b, n)", x=x)
    check_mask("mask_y", mask_y, "(*b, s)", y=y)
    group = check_group(check_flag("enable_gqa", enable_gqa), x, y, ("x", "y"))
    alike = y is x and mask_y is mask_x and group == 1
    if group > 1:
        if mask_x is not None:
            mask_x = pool_heads(
                xp.broadcast_to(mask_x, broadcast_shapes(mask_x.shape, x.shape[:-1]))[..., None], group
            )[..., 0]
        x = pool_heads(x, group)
    side = _strict_moments(x, mask_x, averaged_axes(axis, x.ndim), narrow=narrow and alike)
    other = side if alike else _strict_moments(y, mask_y, averaged_axes(axis, y.ndim))
    return Moments(*side, *other, dtype=dtype_name(compute_dtype(xp, x, y)))


@under_own_settings
def weighted_moments(x: Array, weight: Array) -> Moments:
    """Moments of points (n, d) that are both queries and keys, each counted as often as its weight (n,) says."""
    xp, wide = namespace_of(x, weight), statistics_dtype(x)
    sides = []
    for start in range(0, x.shape[0], _TILE):
        stop = min(start + _TILE, x.shape[0])
        tile, counts = cast(x[start:stop, :], wide), cast(weight[start:stop], wide)[:, None]
        count = xp.sum(counts, axis=-2, keepdims=True)
        mean = xp.sum(counts * tile, axis=-2, keepdims=True) / count
        centred = tile - mean
        sides.append((count, mean, xp.matrix_transpose(counts * centred) @ centred / count))
    side = reduce(_merge, sides)
    return Moments(*side, *side, dtype=dtype_name(compute_dtype(xp, x)))


@singledispatch
def combine(a: Any, b: Any, /) -> Any:
    """Join the moments or states of two sets of points; associative.

    Parameters
    ----------
    a, b : Moments, State or LandmarkState
        Two values of the same type. For states, a's keys come before b's. States of landmarks choose landmarks again
        if they hold too many keys together: `combine` is associative up to that.

    Returns
    -------
    Moments, State or LandmarkState

    Raises
    ------
    TypeError
        If a and b have different types, or are neither Moments nor States.
    ValueError
        If their shapes do not fit, or if two states come from different feature maps.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k = np.random.default_rng(0).standard_normal((2, 64, 4))
    >>> halves = [fs.moments(q[part], k[part]) for part in (slice(32), slice(32, 64))]
    >>> np.allclose(fs.combine(*halves).covariance_x, fs.moments(q, k).covariance_x)
    True
    """
    raise TypeError(f"combine takes two Moments or two States, got {type(a).__name__} and {type(b).__name__}")


@combine.register
@under_own_settings
def _combine_moments(a: Moments, b: Any) -> Moments:
    if not isinstance(b, Moments):
        raise TypeError(f"combine takes two Moments or two States, got Moments and {type(b).__name__}")
    if a.size != b.size:
        raise ValueError(f"combine needs moments of one size: a has d={a.size}, b has d={b.size}")
    check_floats(a=a.mean_x, b=b.mean_x)
    check_broadcast("moments", a=a.mean_x.shape[:-2], b=b.mean_x.shape[:-2])
    if (a.cross is None) != (b.cross is None):
        raise ValueError("combine needs moments of one weighting: one of a and b weighs pairs by attention")
    return Moments(
        *_merge((a.count_x, a.mean_x, a.covariance_x), (b.count_x, b.mean_x, b.covariance_x)),
        *_merge((a.count_y, a.mean_y, a.covariance_y), (b.count_y, b.mean_y, b.covariance_y)),
        dtype=max(a.dtype, b.dtype),  # "float32" < "float64"
        cross=None if a.cross is None else _merge_cross(a, b),
    )


def _chunked(x: Array, y: Array, axis: Any, mask_x: Any, mask_y: Any, enable_gqa: bool) -> Moments:
    """Lazy moments of dask arrays: the moments of each chunk of points, merged by a tree."""
    import dask
    import dask.array as da
    import numpy as np

    if mask_x is not None or mask_y is not None or enable_gqa or axis != -2:
        raise ValueError(
            "moments of dask arrays take no mask_x, mask_y, enable_gqa or axis: gather them chunk by chunk"
        )
    x, y = as_chunked(x=x, y=y)
    wide = moments(
        *(np.zeros((*a.shape[:-2], 0, a.shape[-1]), dtype=a.dtype) for a in (x, y))
    )  # checks dtypes and sizes
    values: list[Array] = []
    for name, a in (("x", x), ("y", y)):
        side = tree_reduce(_merged, [dask.delayed(side_of)(block, None, ()) for block in point_blocks(a)])
        shapes = [getattr(wide, f"{field}_{name}").shape for field in ("count", "mean", "covariance")]
        values += [da.from_delayed(side[i], shape, dtype=np.float64) for i, shape in enumerate(shapes)]
    count_x, mean_x, covariance_x, count_y, mean_y, covariance_y = values
    return Moments(count_x, mean_x, covariance_x, count_y, mean_y, covariance_y, dtype=wide.dtype)


def _merged(sides: list[Any]) -> Any:
    return reduce(_merge, sides)


def averaged_axes(axis: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """The axes to average over besides the point axis, as sorted negative numbers."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if not all(isinstance(a, int) and -ndim <= a < ndim for a in axes):
        raise ValueError(f"axis must name axes of a {ndim}-dimensional array, got {axis!r}")
    negative = {a if a < 0 else a - ndim for a in axes}
    if -2 not in negative or -1 in negative:
        raise ValueError(f"axis must hold the point axis -2 and not the coordinate axis -1, got {axis!r}")
    return tuple(sorted(negative - {-2}))


def pool_heads(x: Array, group: int) -> Array:
    """(*b, heads, n, d) -> (*b, heads / group, group n, d)."""
    *batch, heads, n, d = x.shape
    return namespace_of(x).reshape(x, (*batch, heads // group, group * n, d))


_Side = tuple[Array, Array, Array]


@Op
def point_moments(x: Array, mask: Array | None, *, narrow: bool = False) -> tuple[Array, Array, Array]:
    """The moments of the visible points; points that are not finite count as hidden.

    Parameters
    ----------
    x : array, shape (*b, n, d)
    mask : array of bool, shape (*b, n), or None
        True where a point is visible.
    narrow : bool
        Whether an implementation may multiply float32 points in float32, and add up some thousand products in float32.
        The error of an entry of the covariance is then up to 4e-6 times the standard deviations of its two coordinates.

    Returns
    -------
    count : array, shape (*b, 1, 1)
    mean : array, shape (*b, 1, d)
    covariance : array, shape (*b, d, d)
        Centred second moments, divided by the count. All three are float64 wherever the device has it, and 0 if no
        point is visible.
    """
    finite = namespace_of(x).all(namespace_of(x).isfinite(x), axis=-1)
    return side_of(x, finite if mask is None else finite & mask)


def _strict_moments(x: Array, mask: Array | None, axes: tuple[int, ...], narrow: bool = False) -> _Side:
    """Count, mean and covariance of one side; NaN if a visible point is not finite. `narrow`: as in `point_moments`."""
    if axes or is_traced(x) or is_restricted():  # a backend that the caller names for attention need not have this op
        return side_of(x, mask, axes)
    xp = namespace_of(x)
    count, mean, covariance = point_moments(x, mask, narrow=narrow)
    visible = x.shape[-2] if mask is None else xp.sum(cast(mask, count.dtype), axis=-1)[..., None, None]
    return count, *(xp.where(count == visible, part, xp.nan) for part in (mean, covariance))


def side_of(x: Array, mask: Array | None, axes: tuple[int, ...] = ()) -> tuple[Array, Array, Array]:
    """Count, mean and covariance of one side, tile by tile."""
    wide = statistics_dtype(x)
    n = x.shape[-2]
    bounds = ((start, min(start + _TILE, n)) for start in range(0, n, _TILE) or (0,))
    tiles = (
        _tile(cast(x[..., start:stop, :], wide), None if mask is None else mask[..., start:stop], axes)
        for start, stop in bounds
    )
    return reduce(_merge, tiles)


def _tile(x: Array, mask: Array | None, axes: tuple[int, ...]) -> _Side:
    xp = namespace_of(x)
    if mask is None:
        visible = xp.ones_like(x[..., :1], dtype=xp.bool)
    else:
        visible = xp.broadcast_to(mask, broadcast_shapes(mask.shape, x.shape[:-1]))[..., None]
    x = xp.where(visible, x, 0.0)  # masked points may hold any value, NaN included
    over = (*axes, -2)
    count = xp.sum(cast(visible, x.dtype), axis=over, keepdims=True)
    safe = xp.maximum(count, xp.ones_like(count))
    mean = xp.sum(x, axis=over, keepdims=True) / safe
    centred = xp.where(visible, x - mean, 0.0)
    scatter = xp.matrix_transpose(centred) @ centred
    covariance = (xp.sum(scatter, axis=axes, keepdims=True) if axes else scatter) / safe
    return count, mean, covariance


def _merge(a: _Side, b: _Side) -> _Side:
    """Pairwise update of mean and covariance, without differences of large numbers (Chan, Golub, LeVeque 1983)."""
    (count_a, mean_a, covariance_a), (count_b, mean_b, covariance_b) = a, b
    xp = namespace_of(mean_a)
    count = count_a + count_b
    share = count_b / xp.where(count > 0, count, 1.0)
    step = mean_b - mean_a
    mean = mean_a + share * step
    # an empty side has share 0 or 1, so its zeros have no effect
    covariance = covariance_a + share * (covariance_b - covariance_a) + share * (1 - share) * _outer(step)
    empty = count_a == 0
    return count, xp.where(empty, mean_b, mean), xp.where(empty, covariance_b, covariance)


def _merge_cross(a: Moments, b: Moments) -> Array:
    """Merge `cross` as `_merge` merges covariances; weights belong to pairs, so both sides have the same count."""
    cross_a: Array = a.cross
    cross_b: Array = b.cross
    xp = namespace_of(cross_a, cross_b)
    count = a.count_x + b.count_x
    share = b.count_x / xp.where(count > 0, count, 1.0)
    steps = xp.matrix_transpose(b.mean_x - a.mean_x) @ (b.mean_y - a.mean_y)
    merged = cross_a + share * (cross_b - cross_a) + share * (1 - share) * steps
    return xp.where(a.count_x == 0, cross_b, merged)


def _outer(mean: Array) -> Array:
    return namespace_of(mean).matrix_transpose(mean) @ mean
