"""NaN and infinity: a value that is not finite affects the rows that see it, and no other row."""

from favorsharp._arrays import cast, namespace_of
from favorsharp._typing import Array


def mix_visible(weights: Array, visible: Array, v: Array) -> Array:
    """Multiply weights by v, so that a value that is not finite affects only the rows that see it.

    A plain product is not enough: a hidden key has weight 0, but 0 times NaN is NaN.
    """
    xp = namespace_of(weights, v)
    finite = xp.isfinite(v)
    mixed = weights @ xp.where(finite, v, 0.0)
    seen = cast(visible, v.dtype) @ cast(~finite, v.dtype) > 0
    return xp.where(seen, xp.nan, mixed)


def finite_or_nan(x: Array) -> Array:
    """Replace infinities by NaN: minus infinity would be taken for a hidden key, and the error would be missed."""
    xp = namespace_of(x)
    return xp.where(xp.isfinite(x), x, xp.nan)
