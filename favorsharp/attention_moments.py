"""Moments weighted by attention, for fits that are good where attention is large: the public `attention_moments`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from favorsharp._arrays import (
    broadcast_shapes,
    cast,
    namespace_of,
    on_device_of,
    statistics_dtype,
    under_own_settings,
)
from favorsharp._checks import check_flag, check_floats, check_group
from favorsharp._chunks import is_chunked
from favorsharp._typing import Array
from favorsharp.exact import kernel_scale, log_gaussian, log_softmax_kernel
from favorsharp.moments import Moments, averaged_axes, moments, pool_heads

_TILE_ELEMENTS = 1 << 20
"""Number of weights held at once: 8 MiB of float64."""


@under_own_settings
def attention_moments(
    x: Array,
    y: Array,
    /,
    *,
    weighting: float = 1.0,
    kernel: str = "softmax",
    scale: float | None = None,
    is_causal: bool = False,
    axis: int | tuple[int, ...] = -2,
    mask_x: Array | None = None,
    mask_y: Array | None = None,
    enable_gqa: bool = False,
) -> Moments:
    """Moments of queries and keys, each pair weighted by p_ij ** weighting, where p_ij is the attention of i to j.

    It reads every pair of query i and key j, in time O(n s d) and memory O(n + s): use it on a calibration sample of
    some thousand points, not on the sequences themselves.

    Parameters
    ----------
    x : array, shape (*b, n, d)
        Queries, not scaled.
    y : array, shape (*b, s, d)
        Keys, not scaled.
    weighting : float
        0 or more. 1 weights pairs by attention itself; 0 weights all visible pairs equally.
    kernel, scale
        The kernel and the scale of the attention, as in `fit`.
    is_causal : bool
        Query i sees keys 0 .. i; needs n == s.
    axis, mask_x, mask_y, enable_gqa
        As in `moments`.

    Returns
    -------
    Moments
        With `cross`, and with the total weights as counts. `fit` and `combine` take them like other moments.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k = np.random.default_rng(0).standard_normal((2, 64, 4))
    >>> weighted = fs.attention_moments(q, k)
    >>> weighted.cross.shape
    (4, 4)
    >>> fs.fit(weighted).method
    'optimal'
    """
    power = check_weighting(weighting)
    if is_chunked(x, y):
        raise ValueError("attention_moments takes no dask arrays: pass a sample of points in memory")
    data = moments(x, y, axis=axis, mask_x=mask_x, mask_y=mask_y, enable_gqa=enable_gqa)  # checks the arguments too
    factor = kernel_scale(kernel, scale, data.size)
    check_floats(x=x, y=y)
    n, s = x.shape[-2], y.shape[-2]
    if check_flag("is_causal", is_causal) and n != s:
        raise ValueError(f"is_causal needs as many queries as keys: x has n={n}, y has s={s}")
    group = check_group(enable_gqa, x, y, ("x", "y"))
    pairs = _pairs(x, y, data, group, mask_x, mask_y, is_causal)
    sums = _weighted_sums(pairs, lambda x, y: _logits(x, y, data, kernel, factor), power)
    return _shifted(pairs, sums, data, averaged_axes(axis, len(pairs.batch) + 2))


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Queries (*b, n, d) and keys (*b, s, d), centred at their plain means, 0 if hidden; and which pairs are visible.

    Centring avoids differences of large numbers. `positions` (n,) are the positions of the queries in causal calls; the
    g queries of a group are next to each other on the axis n.
    """

    x: Array
    y: Array
    visible_x: Array
    visible_y: Array
    positions: Array | None

    @property
    def batch(self) -> tuple[int, ...]:
        """The leading axes of the pairs."""
        return broadcast_shapes(self.x.shape[:-2], self.y.shape[:-2])

    def visible(self, part: slice) -> Array:
        """Which keys some of the queries see, (*b, n', s)."""
        visible = self.visible_x[..., part, None] & self.visible_y[..., None, :]
        if self.positions is None:
            return visible
        last = namespace_of(self.y).arange(self.y.shape[-2], **on_device_of(self.y))
        return visible & (self.positions[part, None] >= last[None, :])


def _pairs(
    x: Array, y: Array, data: Moments, group: int, mask_x: Array | None, mask_y: Array | None, is_causal: bool
) -> _Pairs:
    """The points in the form for the sums, with the g queries of each key head pooled."""
    xp = namespace_of(x, y)
    positions = xp.arange(x.shape[-2], **on_device_of(x))
    visible_x, visible_y = _visible(mask_x, x), _visible(mask_y, y)
    if group > 1:
        x, visible_x = pool_heads(x, group), pool_heads(visible_x[..., None], group)[..., 0]
        positions = xp.concat([positions] * group)
    dtype = statistics_dtype(x)
    x, y = cast(x, dtype) - data.mean_x, cast(y, dtype) - data.mean_y
    x, y = xp.where(visible_x[..., None], x, 0.0), xp.where(visible_y[..., None], y, 0.0)
    return _Pairs(x, y, visible_x, visible_y, positions if is_causal else None)


def _logits(x: Array, y: Array, data: Moments, kernel: str, factor: float) -> Array:
    """Log kernels of centred queries and keys, up to a constant for each query."""
    if kernel == "gaussian":
        return log_gaussian(x + (data.mean_x - data.mean_y), y, factor)
    transposed = namespace_of(y).matrix_transpose
    shift = transposed(factor * (y @ transposed(data.mean_x)))
    return log_softmax_kernel(factor**0.5 * x, factor**0.5 * y) + shift


def _weighted_sums(pairs: _Pairs, logits: Callable[[Array, Array], Array], power: float) -> tuple[Array, Array, Array]:
    """The weights of queries (*b, n, 1) and of keys (*b, 1, s), and the weighted sum of x y' (*b, d, d)."""
    xp = namespace_of(pairs.x, pairs.y)
    n, s = pairs.x.shape[-2], pairs.y.shape[-2]
    zeros = partial(xp.zeros, dtype=pairs.x.dtype, **on_device_of(pairs.x))
    rows, columns, cross = [zeros((*pairs.batch, 0, 1))], zeros((*pairs.batch, 1, s)), zeros((*pairs.batch, 1, 1))
    step = max(1, _TILE_ELEMENTS // max(1, s * math.prod(pairs.batch)))
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        x = pairs.x[..., part, :]
        weights = _weights(logits(x, pairs.y), pairs.visible(part), power)
        rows.append(xp.sum(weights, axis=-1, keepdims=True))
        columns = columns + xp.sum(weights, axis=-2, keepdims=True)
        cross = cross + xp.matrix_transpose(x) @ (weights @ pairs.y)
    return xp.concat(rows, axis=-2), columns, cross


def _shifted(pairs: _Pairs, sums: tuple[Array, Array, Array], data: Moments, axes: tuple[int, ...]) -> Moments:
    """The moments from sums around the plain means of `data`, averaged over axes."""
    xp = namespace_of(pairs.x, pairs.y)
    transposed = xp.matrix_transpose
    x, y, (row, columns, cross) = pairs.x, pairs.y, sums
    total = _summed(columns, (*axes, -1))
    safe = xp.where(total > 0, total, 1.0)
    step_x = _summed(transposed(row) @ x, axes) / safe
    step_y = _summed(columns @ y, axes) / safe
    return Moments(
        total,
        data.mean_x + step_x,
        _summed(transposed(x * row) @ x, axes) / safe - transposed(step_x) @ step_x,
        total,
        data.mean_y + step_y,
        _summed(transposed(y) @ (transposed(columns) * y), axes) / safe - transposed(step_y) @ step_y,
        dtype=data.dtype,
        cross=_summed(cross, axes) / safe - transposed(step_x) @ step_y,
    )


def check_weighting(weighting: Any) -> float:
    """Check that weighting is a finite number of 0 or more, and return it as a float."""
    if isinstance(weighting, bool) or not isinstance(weighting, int | float):
        raise TypeError(f"weighting must be a finite number of 0 or more, got {type(weighting).__name__}")
    if not (math.isfinite(weighting) and weighting >= 0):
        raise ValueError(f"weighting must be a finite number of 0 or more, got {weighting}")
    return float(weighting)


def _visible(mask: Array | None, x: Array) -> Array:
    xp = namespace_of(x)
    shape = x.shape[:-1]
    if mask is None:
        return xp.ones(shape, dtype=xp.bool, **on_device_of(x))
    return xp.broadcast_to(mask, broadcast_shapes(mask.shape, shape))


def _weights(logits: Array, visible: Array, power: float) -> Array:
    """The weight p ** power of every pair; 0 for hidden pairs."""
    xp = namespace_of(logits)
    logits = xp.where(visible, logits, -xp.inf)
    top = xp.max(logits, axis=-1, keepdims=True)
    logits = logits - xp.where(top == -xp.inf, 0.0, top)
    total = xp.sum(xp.exp(logits), axis=-1, keepdims=True)
    log_p = logits - xp.log(xp.where(total > 0, total, 1.0))
    return xp.where(visible, xp.exp(power * xp.where(visible, log_p, 0.0)), 0.0)


def _summed(x: Array, axes: tuple[int, ...]) -> Array:
    return namespace_of(x).sum(x, axis=axes, keepdims=True) if axes else x
