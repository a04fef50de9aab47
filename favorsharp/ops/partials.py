"""Partial sums of queries over some of their keys, which can be merged (docs: theory, the stabiliser).

All references of attention with a softmax of scores, exact ones or features, are built from these functions.
"""

from dataclasses import dataclass

from favorsharp._arrays import namespace_of
from favorsharp._nonfinite import finite_or_nan, mix_visible
from favorsharp._typing import Array


@dataclass(frozen=True, eq=False)
class Partial:
    """Partial sums of a query over some keys, relative to exp(ref), so that sums over disjoint keys can be merged.

    `num` (*b, n, e), `den` and `ref` (*b, n, 1). `den` is at least 1; it is 0, and `ref` -inf, if no key was visible.
    """

    num: Array
    den: Array
    ref: Array


def pair_partial(lq: Array, lk: Array, v: Array) -> Partial:
    """Partial sums of queries over a few keys by pairwise scores; each key is visible to all, or hidden by -inf."""
    xp = namespace_of(lq)
    c = xp.max(lk, axis=-2, keepdims=True)
    shifted = lq + c
    ref = xp.max(shifted, axis=-1, keepdims=True)
    scores = xp.exp(shifted - finite(ref)) @ xp.matrix_transpose(xp.exp(lk - finite(c)))
    return Partial(scores @ v, xp.sum(scores, axis=-1, keepdims=True), ref)


def exact_partial(logits: Array, visible: Array | None, v: Array, *, mixed: bool = False) -> Partial:
    """Partial sums of queries over keys with exact log scores, (*b, n, s).

    With `mixed`, rows may see different keys; then a value that is not finite must not affect the other rows.
    """
    xp = namespace_of(logits)
    logits = finite_or_nan(logits)
    if visible is not None:
        logits = xp.where(visible, logits, -xp.inf)
    ref = xp.max(logits, axis=-1, keepdims=True)
    p = xp.exp(logits - finite(ref))
    num = mix_visible(p, visible, v) if mixed and visible is not None else p @ v
    return Partial(num, xp.sum(p, axis=-1, keepdims=True), ref)


def merge(a: Partial, b: Partial) -> Partial:
    """Partial sums of queries over the union of two disjoint sets of keys."""
    xp = namespace_of(a.ref, b.ref)
    ref = xp.maximum(a.ref, b.ref)
    safe = finite(ref)
    scale_a, scale_b = xp.exp(a.ref - safe), xp.exp(b.ref - safe)
    return Partial(a.num * scale_a + b.num * scale_b, a.den * scale_a + b.den * scale_b, ref)


def finish(partial: Partial) -> Array:
    """The normalised result; zeros where nothing was visible."""
    xp = namespace_of(partial.num)
    nothing = partial.den == 0
    return xp.where(nothing, 0.0, partial.num / xp.where(nothing, 1.0, partial.den))


def finite(reference: Array) -> Array:
    """The reference, with 0 in place of the -inf of a feature that has seen no key, so that it can be subtracted."""
    xp = namespace_of(reference)
    return xp.where(reference == -xp.inf, 0.0, reference)
