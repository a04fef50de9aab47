"""Sums over many keys that keep their rounding errors as low parts (docs: design, low parts)."""

from favorsharp._arrays import namespace_of
from favorsharp._typing import Array

PART = 512
"""Keys that are summed separately: a float32 sum over many more keys, one after the other, would lose digits."""


def has_low_parts(kv: Array) -> bool:
    """Whether a state with these sums keeps low parts; float64 sums need none."""
    return bool(kv.dtype != namespace_of(kv).float64)


def sums_of(p: Array, v: Array) -> tuple[Array, Array]:
    """p^T v and the sum of p over the keys, computed as a sum of sums of parts."""
    xp = namespace_of(p)
    length = p.shape[-2]
    if not isinstance(length, int) or length < 2 * PART:  # a symbolic size is not known yet
        return xp.matrix_transpose(p) @ v, xp.sum(p, axis=-2, keepdims=True)
    whole = length // PART * PART
    parts, values = (xp.reshape(x[..., :whole, :], (*x.shape[:-2], whole // PART, PART, x.shape[-1])) for x in (p, v))
    kv = xp.sum(xp.matrix_transpose(parts) @ values, axis=-3)
    z = xp.sum(xp.sum(parts, axis=-2), axis=-2, keepdims=True)
    if whole < length:
        rest, rest_z = sums_of(p[..., whole:, :], v[..., whole:, :])
        kv, z = kv + rest, z + rest_z
    return kv, z


def added(
    scales: tuple[Array, Array], sums: tuple[Array, Array], lows: tuple[Array | None, Array | None]
) -> tuple[Array, Array | None]:
    """The sum of two sums times their scales, and its rounding error, which is 0 if the sum is not finite."""
    old, new = (scale * x for scale, x in zip(scales, sums, strict=True))
    total = old + new
    if not (has_low_parts(old) and has_low_parts(new)):
        return total, None
    xp = namespace_of(total)
    own = total - old
    lost = (old - (total - own)) + (new - own)
    for scale, low in zip(scales, lows, strict=True):
        if low is not None:
            lost = lost + scale * low
    lost = xp.where(xp.isfinite(lost), lost, 0.0)
    whole = total + lost
    rest = lost - (whole - total)
    return whole, xp.where(xp.isfinite(rest), rest, 0.0)
