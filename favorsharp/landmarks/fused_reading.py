"""Reads landmarks by torch's own attention on a GPU: the log weights of keys become further coordinates of the keys."""

from favorsharp._arrays import broadcast_shapes, cast, dtype_name, namespace_of, on_device_of
from favorsharp._autodiff import fused_attention
from favorsharp._nonfinite import hide
from favorsharp._typing import Array
from favorsharp.landmarks.settings import Landmarks


def read_fused(
    q: Array, keys: Array, log_weight: Array, values: Array, settings: Landmarks, *, grouped: bool = False
) -> Array:
    """As `read_landmarks` for the softmax kernel, by torch's own attention; each query must see all keys.

    Grouped queries have one more axis than keys, before the last two. Queries of 16 bits are read in their dtype.
    """
    xp = namespace_of(q, keys, values)
    dtype, scale = log_weight.dtype, settings.scale_of(q.shape[-1])
    size = values.shape[-1]
    narrow = dtype_name(q) in ("float16", "bfloat16")
    reading = q.dtype if narrow else dtype
    seen = log_weight != -xp.inf
    some = xp.any(seen, axis=-1)[..., None, None]
    keys, values = hide(keys, seen), cast(hide(values, seen), reading)
    bias = xp.where(seen[..., None], log_weight[..., None], xp.where(some, -xp.inf, 0.0)) / scale
    group = q.shape[-3] if grouped else 1
    x = cast(q, reading)
    x = xp.reshape(x, (*x.shape[:-3], group * x.shape[-2], x.shape[-1])) if grouped else x
    x, keys = _with_bias(x, cast(keys, reading), bias)
    if narrow and values.shape[-1] < keys.shape[-1]:  # FlashAttention takes points and values of one size
        values = _widened(values, keys.shape[-1])
    batch = broadcast_shapes(*(array.shape[:-2] for array in (x, keys, values)))
    x, keys, values = (xp.broadcast_to(z, (*batch, *z.shape[-2:])) for z in (x, keys, values))
    out = fused_attention(x, keys, values, scale)
    out = xp.where(some, cast(out[..., :size], dtype), 0.0)
    return xp.reshape(out, (*batch, group, q.shape[-2], size)) if grouped else out


def _with_bias(x: Array, keys: Array, bias: Array) -> tuple[Array, Array]:
    """Queries and keys whose products are x.y + bias, (*b, n, d), (*b, s, d) and (*b, s, 1).

    Torch's fastest kernels take no bias, so two coordinates of the keys hold it; the second coordinate is the rounding
    error of the first. The number of coordinates becomes a multiple of eight.
    """
    xp = namespace_of(x)
    high = cast(bias, keys.dtype)
    low = cast(xp.where(bias == -xp.inf, 0.0, bias - cast(high, bias.dtype)), keys.dtype)
    width = -(-(x.shape[-1] + 2) // 8) * 8
    ones = xp.ones_like(x[..., :1])
    batch = broadcast_shapes(keys.shape[:-2], bias.shape[:-2])
    keys, high, low = (xp.broadcast_to(z, (*batch, *z.shape[-2:])) for z in (keys, high, low))
    return _widened(xp.concat([x, ones, ones], axis=-1), width), _widened(xp.concat([keys, high, low], axis=-1), width)


def _widened(x: Array, width: int) -> Array:
    """The array with zeros appended along its last axis."""
    xp = namespace_of(x)
    missing = width - x.shape[-1]
    return (
        x
        if missing == 0
        else xp.concat([x, xp.zeros((*x.shape[:-1], missing), dtype=x.dtype, **on_device_of(x))], axis=-1)
    )
