"""NaN and infinity: a value that is not finite affects the rows that see it, and no other row; none if it is masked."""

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


def masked(lk: Array, mask: Array | None) -> Array:
    """Log key features with -inf for the keys that a mask hides."""
    return lk if mask is None else namespace_of(lk).where(mask[..., None], lk, -namespace_of(lk).inf)


def hide(v: Array, mask: Array | None) -> Array:
    """Values, with 0 for masked ones, which may hold anything, NaN included."""
    return v if mask is None else namespace_of(v).where(mask[..., None], v, 0.0)
