"""Grouped heads: g query heads share one key head; a group axis is added after the head axis.

The group axis has length g for queries and 1 for keys, values and masks, which broadcast along it. With g = 1 no axis
is added, and these functions return what they are given.
"""

from favorsharp._arrays import broadcast_shapes, namespace_of
from favorsharp._typing import Array


def split_heads(group: int, q: Array) -> Array:
    """Group the query heads by the key head that they read, (*b, h g, n, d) -> (*b, h, g, n, d)."""
    if group == 1:
        return q
    *batch, heads, n, d = q.shape
    return namespace_of(q).reshape(q, (*batch, heads // group, group, n, d))


def merge_heads(group: int, out: Array) -> Array:
    """Undo `split_heads`, (*b, h, g, n, e) -> (*b, h g, n, e)."""
    if group == 1:
        return out
    *batch, heads, _, n, e = out.shape
    return namespace_of(out).reshape(out, (*batch, heads * group, n, e))


def join_queries(group: int, q: Array) -> Array:
    """The queries of one token, grouped by the key head that they read, (*b, h g, 1, d) -> (*b, h, g, d).

    Since all of them see the same keys, they need no group axis.
    """
    if group == 1:
        return q
    *batch, heads, _, d = q.shape
    return namespace_of(q).reshape(q, (*batch, heads // group, group, d))


def part_queries(group: int, out: Array) -> Array:
    """Undo `join_queries`, (*b, h, g, e) -> (*b, h g, 1, e)."""
    if group == 1:
        return out
    *batch, heads, _, e = out.shape
    return namespace_of(out).reshape(out, (*batch, heads * group, 1, e))


def add_mask_axis(mask: Array | None) -> Array | None:
    """Give a mask of the key heads the group axis, (*b, h, s) -> (*b, h, 1, s); a mask (s,) serves all heads."""
    return mask if mask is None or mask.ndim < 2 else mask[..., None, :]


def grouped(
    group: int, q: Array, k: Array, v: Array, key_mask: Array | None
) -> tuple[Array, Array, Array, Array | None]:
    """Queries, keys, values and mask with the group axis, which has length 1 for keys, values and mask."""
    if group == 1:
        return q, k, v, key_mask
    return split_heads(group, q), k[..., None, :, :], v[..., None, :, :], add_mask_axis(key_mask)


def merged_batch(group: int, *batches: tuple[int, ...]) -> tuple[int, ...]:
    """The leading axes of a result with merged heads, from the leading axes of arguments with the group axis."""
    batch = broadcast_shapes(*batches)
    return batch if group == 1 else (*batch[:-2], batch[-2] * batch[-1])
