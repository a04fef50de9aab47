"""The kernels of packed sequences: every sequence of every head is a small problem of its own."""

import numpy as np

from favorsharp_numba.attention_kernels import (
    Problem,
    causal,
    causal_scratch,
    gather_keys,
    read_queries,
    read_scratch,
)
from favorsharp_numba.compiling import inlined, jit
from favorsharp_numba.gradient_kernels import (
    Backward,
    near_gradients,
    near_gradients_scratch,
    sweep,
    sweep_scratch,
)
from favorsharp_numba.tiles import Mask, Points, absorb_scratch, fill, integer_at
from favorsharp_numba.window_kernel import windowed, windowed_scratch


@inlined
def moved(points, start):
    """The points from a position on."""
    return Points(
        points.kind, points.base + start * points.row, points.offsets, points.row, points.column, points.item
    )  # fmt: skip


@inlined
def moved_mask(mask, start):
    """The mask from a position on."""
    return Mask(mask.base + start * mask.step, mask.offsets, mask.step)


@jit
def packed(one, s, p, q, k, v, mask, out, bounds, sequences, query_heads, work, low, high, scratch):
    """Tasks low .. high; sequence i of key head b is task b * sequences + i, and its sums are in scratch.

    `bounds` is the address of where sequences begin. `work` has (e_pad + 2) items for each query, as in `windowed`, and
    stats two: those of a sequence, of all heads, lie together.
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
            p.member_starts, p.key_head_of, scratch - head * p.sums_size, p.sums_size, p.kv_size,
            p.stats + 2 * query_heads * start if p.stats else 0,
        )  # fmt: skip
        queries, keys, values, result = moved(q, start), moved(k, start), moved(v, start), moved(out, start)
        visible = moved_mask(mask, start)
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


def packed_scratch(one, s, sums_size):
    """Items of scratch that `packed` needs."""
    whole = max(
        max(absorb_scratch(one, s), read_scratch(one, s)), max(causal_scratch(one, s), windowed_scratch(one, s))
    )
    return whole + (sums_size + 15) // 16 * 16


@jit
def packed_gradients(
    one, s, p, q, gradient, k, v, out, mask, bounds, sequences, together, heads, low, high, scratch
):  # fmt: skip
    """The backward pass of tasks low .. high: `together` sequences of a head, one of them or all, one after the other.

    Sequences of a head share the sums that the gradients of a map are made of: where these are wanted, a task has all.
    """
    both = p.window > 0 and p.causal == 0
    for i in range(low * together, high * together):
        f, sequence = i // sequences, i % sequences
        start = integer_at(bounds + 8 * sequence)
        length = integer_at(bounds + 8 * sequence + 8) - start
        if length == 0:
            continue
        rows = f * (p.num_keys - length) + start  # to what kernels take for row 0 of head f, row f * length
        own = Backward(
            length, length, p.window, p.causal, p.with_factors, p.query_side, p.key_side, p.map_of,
            p.stats + 2 * heads * start, p.dq + rows * s.d, p.dk + rows * s.d, p.dv + rows * (s.e - 1), p.maps,
            p.maps_size,
        )  # fmt: skip
        queries, gradients, keys, values = moved(q, start), moved(gradient, start), moved(k, start), moved(v, start)
        result, visible = moved(out, start), moved_mask(mask, start)
        for backwards in range(2):
            if both or backwards == 0:
                sweep(
                    one, s, own, 0, backwards, queries, gradients, keys, values, result, visible, f, f + 1, scratch
                )  # fmt: skip
            if both or backwards == 1:
                sweep(
                    one, s, own, 1, backwards, keys, values, queries, gradients, result, visible, f, f + 1, scratch
                )  # fmt: skip
        if p.window > 0:
            near_gradients(one, s, own, queries, keys, values, gradients, result, visible, f, f + 1, scratch)


def packed_gradients_scratch(one, s):
    """Items of scratch that `packed_gradients` needs."""
    return max(sweep_scratch(one, s), near_gradients_scratch(s))
