"""Exact kernels and exact softmax attention in quadratic time, for comparison with the approximations.

`kernel_matrix` and `softmax_attention` are public; the estimators, the modules and the diagnostics call this file too.
"""

import math
from collections.abc import Callable
from functools import partial

from favorsharp._arrays import (
    broadcast_shapes,
    cast,
    compute_dtype,
    namespace_of,
    on_device_of,
    result_dtype,
    statistics_dtype,
    under_own_settings,
)
from favorsharp._autodiff import is_traced, without_gradient
from favorsharp._checks import (
    check_attention,
    check_broadcast,
    check_choice,
    check_floats,
    check_points,
    check_same_size,
    check_scale,
)
from favorsharp._heads import grouped, merge_heads
from favorsharp._nonfinite import finite_or_nan, mix_visible
from favorsharp._typing import Array

KERNELS = ("softmax", "gaussian")
"""The kernels exp(scale x.y) and exp(-scale |x - y|^2 / 2)."""

_TILE_ELEMENTS = 1 << 20
"""Number of scores held at once: 8 MiB of float64."""

_ROUNDING = 1e-6
"""The largest rounding error of a log kernel at which products are used; above it, differences are."""


def kernel_scale(kernel: str, scale: float | None, size: int) -> float:
    """Check the scale; None means d**-0.5 for softmax, as in scaled dot-product attention, and 1 for Gaussian."""
    check_choice("kernel", kernel, KERNELS)
    return check_scale(scale, size**-0.5 if kernel == "softmax" else 1.0)


def log_softmax_kernel(x: Array, y: Array) -> Array:
    """The products x.y of points that are scaled already, (*b, n, d), (*b, s, d) -> (*b, n, s)."""
    return x @ namespace_of(x, y).matrix_transpose(y)


def log_gaussian(x: Array, y: Array, scale: float) -> Array:
    """The log kernel -scale |x - y|^2 / 2 of points that are not scaled, (*b, n, d), (*b, s, d) -> (*b, n, s).

    The result is in the dtype of the inputs, widened to at least float32, or in float64. It is never above 0, and NaN
    for points that are not finite.
    """
    logs = gaussian_rows(x, y, scale)(0, x.shape[-2])
    above = without_gradient(logs)  # derivatives at equal points, also the second ones, stay those of logs
    return logs - namespace_of(logs).where(above > 0, above, 0.0)


def gaussian_rows(x: Array, y: Array, scale: float, *, waits: bool = True) -> Callable[[int, int], Array]:
    """A function that computes rows start to stop of the log kernel; rounding may leave entries slightly above 0.

    Products x.y are fast, but cancel against |x|^2 and |y|^2. They are used in the first dtype in which the rounding
    error is at most `_ROUNDING`. If there is no such dtype, coordinates are subtracted before they are squared. If the
    numbers are traced, or the host must not wait to learn them (`waits`), products are computed in the widest dtype.
    """
    xp = namespace_of(x, y)
    given, wide = compute_dtype(xp, x, y), statistics_dtype(x)
    x, y = cast(x, wide), cast(y, wide)
    finite_x, finite_y = (xp.all(xp.isfinite(z), axis=-1, keepdims=True) for z in (x, y))
    centre = 0.0 if y.shape[-2] == 0 else xp.mean(xp.where(finite_y, y, 0.0), axis=-2, keepdims=True)
    near_x, near_y = x - centre, y - centre  # distances do not change
    unknown = is_traced(x) or is_traced(y) or not waits
    if unknown:
        serving = [] if wide == given else [wide]
    else:
        reach = scale * max(_half_square(near_x), _half_square(near_y))
        serving = [dtype for dtype in (given, wide) if 4 * float(xp.finfo(dtype).eps) * reach <= _ROUNDING]
    if serving:
        queries, keys = (cast(_with_square(z * math.sqrt(scale)), serving[0]) for z in (near_x, near_y))
        keys = xp.concat([keys[..., :-2], keys[..., -1:], keys[..., -2:-1]], axis=-1)
        logs = partial(_products, queries, xp.matrix_transpose(keys))
    else:
        logs = partial(_differences, x, y, scale)
    if serving and not unknown:  # a finite reach means finite points
        return logs
    return lambda a, b: xp.where(finite_x[..., a:b, :] & xp.matrix_transpose(finite_y), logs(a, b), xp.nan)


def _half_square(x: Array) -> float:
    """The largest |x|^2 / 2 of points, without overflow in the squares; NaN if a point is not finite."""
    if 0 in x.shape:
        return 0.0
    xp, x = namespace_of(x), without_gradient(x)
    size = float(xp.max(xp.abs(x))) or 1.0
    return 0.5 * float(xp.max(xp.sum((x / size) ** 2, axis=-1))) * size * size


def _with_square(x: Array) -> Array:
    """The points with two more coordinates: (x, -|x|^2 / 2, 1)."""
    xp = namespace_of(x)
    return xp.concat([x, -0.5 * xp.sum(x * x, axis=-1, keepdims=True), xp.ones_like(x[..., :1])], axis=-1)


def _products(queries: Array, keys: Array, start: int, stop: int) -> Array:
    return queries[..., start:stop, :] @ keys


def _differences(x: Array, y: Array, scale: float, start: int, stop: int) -> Array:
    """-scale |x - y|^2 / 2 for rows start to stop, one coordinate at a time."""
    xp = namespace_of(x, y)
    fraction, exponent = math.frexp(scale)
    power = exponent // 2
    rest = -0.5 * math.ldexp(fraction, exponent - 2 * power)  # scale is -2 rest 4^power
    x = x[..., start:stop, :]
    if is_traced(x) or is_traced(y):  # compilers do not keep the differences in memory
        return rest * xp.sum(times_power(x[..., :, None, :] - y[..., None, :, :], power) ** 2, axis=-1)
    columns = xp.matrix_transpose(y)
    width = y.shape[-2] * math.prod(broadcast_shapes(x.shape[:-2], y.shape[:-2]))
    rows = max(1, _TILE_ELEMENTS // 8 // max(1, width))
    tiles = []
    for a in range(0, x.shape[-2], rows) or (0,):
        tile, squares = x[..., a : min(a + rows, x.shape[-2]), :], 0.0
        for axis in range(x.shape[-1]):
            apart = tile[..., axis : axis + 1] - columns[..., axis : axis + 1, :]
            squares = squares + times_power(apart, power) ** 2
        tiles.append(rest * squares)
    return tiles[0] if len(tiles) == 1 else xp.concat(tiles, axis=-2)


def times_power(x: Array, power: int) -> Array:
    """Multiply x by 2^power without rounding, in steps whose factors every dtype can represent."""
    while power:
        step = max(-100, min(100, power))
        x, power = x * 2.0**step, power - step
    return x


@under_own_settings
def kernel_matrix(x: Array, y: Array, /, *, kernel: str = "softmax", scale: float | None = None) -> Array:
    """The exact kernel matrix, for small inputs.

    Parameters
    ----------
    x : array, shape (*b, n, d)
    y : array, shape (*b, s, d)
    kernel : {"softmax", "gaussian"}
        exp(scale x.y), or exp(-scale |x - y|^2 / 2).
    scale : float, optional
        Positive and finite. None means d**-0.5 for softmax and 1 for Gaussian.

    Returns
    -------
    array, shape (*b, n, s)
        In the dtype that x and y promote to. A Gaussian kernel is at most 1. The error of its logarithm is at most
        1e-6, plus rounding relative to the logarithm, wherever the points lie and whatever their unit is.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> x, y = np.random.default_rng(0).standard_normal((2, 3, 4))
    >>> np.allclose(fs.kernel_matrix(x, y), np.exp(0.5 * x @ y.T))
    True
    """
    xp = check_floats(x=x, y=y)
    check_points("x", x, "(*b, n, d)")
    check_points("y", y, "(*b, s, d)")
    check_same_size("d", x=(-1, x.shape[-1]), y=(-1, y.shape[-1]))
    check_broadcast("x (*b, n, d), y (*b, s, d)", x=x.shape[:-2], y=y.shape[:-2])
    scale = kernel_scale(kernel, scale, x.shape[-1])
    dtype = compute_dtype(xp, x, y)
    if kernel == "gaussian":
        logs = cast(log_gaussian(x, y, scale), dtype)
    else:
        logs = log_softmax_kernel(*(cast(z, dtype) * math.sqrt(scale) for z in (x, y)))
    return cast(xp.exp(logs), result_dtype(xp, x, y))


@under_own_settings
def gaussian_means(x: Array, y: Array, v: Array, scale: float, log_weight: Array | None = None) -> Array:
    """Exact means of v at each x, weighted by the Gaussian kernel, computed for one tile of x at a time.

    The weights of a row are relative to its largest weight, so far from all points y the result is the value of the
    nearest one.

    Parameters
    ----------
    x : array, shape (*b, n, d)
    y : array, shape (*b, s, d)
        One point or more.
    v : array, shape (*b, s, e)
    scale : float
    log_weight : array, shape (*b, s), optional
        Logarithms of further weights of the points y.

    Returns
    -------
    array, shape (*b, n, e)
        In the dtype of v.
    """
    xp = namespace_of(x, y, v)
    logs_of = gaussian_rows(x, y, scale)
    step = max(1, _TILE_ELEMENTS // max(1, y.shape[-2] * math.prod(broadcast_shapes(x.shape[:-2], y.shape[:-2]))))
    tiles = []
    for start in range(0, x.shape[-2], step) or (0,):
        logs = finite_or_nan(logs_of(start, min(start + step, x.shape[-2])))
        if log_weight is not None:
            logs = logs + cast(log_weight, logs.dtype)[..., None, :]
        weights = xp.exp(cast(logs - xp.max(logs, axis=-1, keepdims=True), v.dtype))
        tiles.append(weights @ v / xp.sum(weights, axis=-1, keepdims=True))
    return tiles[0] if len(tiles) == 1 else xp.concat(tiles, axis=-2)


@under_own_settings
def softmax_attention(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    is_causal: bool = False,
    key_mask: Array | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    """Exact attention softmax(scale q k^T) v, computed for one tile of queries at a time.

    Parameters
    ----------
    q : array, shape (*b, n, d)
    k : array, shape (*b, s, d)
    v : array, shape (*b, s, e)
    is_causal : bool
        Query i sees keys 0 .. i; needs n == s.
    key_mask : array of bool, shape (*b, s), optional
        True where a key is visible.
    scale : float, optional
        Positive and finite; None means d**-0.5.
    enable_gqa : bool
        q has g times the heads of k and v; query head h reads key head h // g.

    Returns
    -------
    array, shape (*b, n, e)
        In the dtype that q, k and v promote to. The output of a query that sees no key is zero.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 64, 8))
    >>> exact = fs.softmax_attention(q, k, v)
    >>> approximate = fs.attention(q, k, v, num_features=4096, rng=0)
    >>> bool(np.linalg.norm(approximate - exact) < 0.2 * np.linalg.norm(exact))
    True
    """
    xp, group = check_attention(q, k, v, is_causal=is_causal, key_mask=key_mask, enable_gqa=enable_gqa)
    dtype, out_dtype = compute_dtype(xp, q, k, v), result_dtype(xp, q, k, v)
    factor = math.sqrt(kernel_scale("softmax", scale, q.shape[-1]))
    q, k, v, key_mask = grouped(group, q, k, v, key_mask)
    n, s = q.shape[-2], k.shape[-2]
    k, v = cast(k, dtype) * factor, cast(v, dtype)
    if key_mask is not None:  # hidden entries may hold any number, NaN too, and must not enter gradients
        k, v = (xp.where(key_mask[..., None], x, 0.0) for x in (k, v))
    batch = broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2], () if key_mask is None else key_mask.shape[:-1])
    rows = max(1, _TILE_ELEMENTS // max(1, s * math.prod(batch)))
    tiles = []
    for start in range(0, n, rows) or (0,):
        stop = min(start + rows, n)
        logits = log_softmax_kernel(cast(q[..., start:stop, :], dtype) * factor, k)
        visible = None if key_mask is None else key_mask[..., None, :]
        if is_causal:
            positions = xp.arange(n, **on_device_of(logits))
            past = positions[start:stop, None] >= positions[None, :]
            visible = past if visible is None else visible & past
        weights, total = _exp_rows(logits, visible)
        mixed = mix_visible(weights, visible, v) if is_causal and visible is not None else weights @ v
        out = xp.where(total == 0, 0.0, mixed / xp.where(total == 0, 1.0, total))
        tiles.append(cast(xp.broadcast_to(out, (*batch, *out.shape[-2:])), out_dtype))
    out = tiles[0] if len(tiles) == 1 else xp.concat(tiles, axis=-2)
    return merge_heads(group, out)


def _exp_rows(logits: Array, visible: Array | None) -> tuple[Array, Array]:
    """exp(logits) of the visible keys, each row divided by its largest entry, and the row sums."""
    xp = namespace_of(logits)
    logits = finite_or_nan(logits)
    if visible is not None:
        logits = xp.where(visible, logits, -xp.inf)
    if logits.shape[-1] == 0:
        return logits, xp.sum(logits, axis=-1, keepdims=True)
    top = xp.max(logits, axis=-1, keepdims=True)
    weights = xp.exp(logits - xp.where(top == -xp.inf, 0.0, top))
    return weights, xp.sum(weights, axis=-1, keepdims=True)
