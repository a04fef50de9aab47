"""The kernel of packed sequences: every sequence of every key head is a small problem of its own."""

import numpy as np

from favorsharp_numba.attention_kernels import (
    Problem,
    causal,
    causal_scratch,
    gather_keys,
    read_queries,
    read_scratch,
    windowed,
    windowed_scratch,
)
from favorsharp_numba.compiling import jit
from favorsharp_numba.tiles import Mask, Points, absorb_scratch, fill, integer_at


@jit
def moved(points, start):
    """The points from a position on."""
    return Points(
        points.kind, points.base + start * points.row, points.offsets, points.row, points.column, points.item
    )  # fmt: skip


@jit
def packed(one, s, p, q, k, v, mask, out, bounds, sequences, query_heads, work, low, high, scratch):
    """Tasks low .. high; sequence i of key head b is task b * sequences + i, and its sums are in scratch.

    `bounds` is the address of where sequences begin. `work` has (e_pad + 2) items for each query, as in `windowed`.
    """
    rest = scratch + (p.sums_size + 15) // 16 * 16
    for task in range(low, high):
        head, sequence = task // sequences, task % sequences
        start = integer_at(bounds + 8 * sequence)
        length = integer_at(bounds + 8 * sequence + 8) - start
        if length == 0:
            continue
        fill(one, scratch, p.kv_size + s.m_pad, one - one)
        fill(one, scratch + p.kv_size + s.m_pad, s.m_pad, -np.inf * one)
        own = Problem(
            length, length, 0, p.window, p.causal, p.transposed, 1, p.query_side, p.key_side, p.map_of, p.members,
            p.member_starts, p.key_head_of, scratch - head * p.sums_size, p.sums_size, p.kv_size, 0,
        )  # fmt: skip
        queries, keys, values, result = moved(q, start), moved(k, start), moved(v, start), moved(out, start)
        visible = Mask(mask.base + start * mask.step, mask.offsets, mask.step)
        if p.window > 0:
            own_work = work + query_heads * start * (s.e_pad + 2)
            windowed(one, s, own, queries, keys, values, visible, result, own_work, head, head + 1, rest)
        elif p.causal:
            causal(one, s, own, queries, keys, values, visible, result, head, head + 1, rest)
        else:
            gather_keys(one, s, own, keys, values, visible, head, head + 1, rest)
            for member in range(integer_at(p.member_starts + 8 * head), integer_at(p.member_starts + 8 * head + 8)):
                f = integer_at(p.members + 8 * member)
                read_queries(one, s, own, queries, keys, values, visible, 0, result, 1, 1, f, f + 1, rest)


@jit
def packed_scratch(one, s, sums_size):
    """Items of scratch that `packed` needs."""
    whole = max(
        max(absorb_scratch(one, s), read_scratch(one, s)), max(causal_scratch(one, s), windowed_scratch(one, s))
    )
    return whole + (sums_size + 15) // 16 * 16
