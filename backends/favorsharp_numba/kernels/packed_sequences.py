"""The kernels of packed sequences: every sequence of every head is a small problem of its own."""

import numpy as np

from favorsharp_numba.kernels.attention import (
    Problem,
    causal,
    causal_scratch,
    gather_keys,
    gather_scratch,
    read_queries,
    read_scratch,
)
from favorsharp_numba.kernels.attention_gradients import (
    Backward,
    near_gradients,
    near_gradients_scratch,
    sweep,
    sweep_scratch,
)
from favorsharp_numba.kernels.tiles import Mask, Points, fill, integer_at
from favorsharp_numba.kernels.windowed_attention import windowed, windowed_scratch
from favorsharp_numba.vectors.compiling import inlined, jit


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


@inlined
def place_of(task, sequences, bounds):
    """The head of a task, and where its sequence begins and ends: sequence i of head b is task b * sequences + i."""
    line = bounds + 8 * (task % sequences)
    return task // sequences, integer_at(line), integer_at(line + 8)


@inlined
def empty_problem(one, s, p, head, start, stop, query_heads, scratch):
    """The problem of a sequence of a key head, whose sums are in scratch, empty, and what of scratch is left.

    Stats of a sequence, two items for each query, lie together for all heads.
    """
    fill(one, scratch, p.kv_size + s.m_pad, one - one)
    fill(one, scratch + p.kv_size + s.m_pad, s.m_pad, -np.inf * one)
    own = Problem(
        stop - start, stop - start, 0, p.window, p.causal, p.transposed, 1, p.query_side, p.key_side, p.map_of,
        p.members, p.member_starts, p.key_head_of, scratch - head * p.sums_size, p.sums_size, p.kv_size,
        p.stats + 2 * query_heads * start if p.stats else 0, 0,
    )  # fmt: skip
    return own, scratch + (p.sums_size + 15) // 16 * 16


# bidirectional, causal and windowed attention have a kernel each: a first call compiles one of them


@jit
def packed(one, s, p, q, k, v, mask, out, bounds, sequences, query_heads, work, low, high, scratch):
    """Bidirectional attention of tasks low .. high; `bounds` is the address of where sequences begin."""
    no, yes = np.int64(0), np.int64(1)  # of the type in which others give them: read_queries is compiled once
    for task in range(low, high):
        head, start, stop = place_of(task, sequences, bounds)
        if start < stop:
            own, rest = empty_problem(one, s, p, head, start, stop, query_heads, scratch)
            queries, keys, values, result = moved(q, start), moved(k, start), moved(v, start), moved(out, start)
            visible = moved_mask(mask, start)
            gather_keys(one, s, own, keys, values, visible, head, head + 1, rest)
            for member in range(integer_at(p.member_starts + 8 * head), integer_at(p.member_starts + 8 * head + 8)):
                f = integer_at(p.members + 8 * member)
                read_queries(
                    one, s, own, queries, keys, values, visible, no, result, yes, yes, f, f + 1, rest
                )  # fmt: skip


@jit
def packed_causal(one, s, p, q, k, v, mask, out, bounds, sequences, query_heads, work, low, high, scratch):
    """As `packed`, causal attention."""
    for task in range(low, high):
        head, start, stop = place_of(task, sequences, bounds)
        if start < stop:
            own, rest = empty_problem(one, s, p, head, start, stop, query_heads, scratch)
            causal(
                one, s, own, moved(q, start), moved(k, start), moved(v, start), moved_mask(mask, start),
                moved(out, start), head, head + 1, rest,
            )  # fmt: skip


@jit
def packed_windowed(one, s, p, q, k, v, mask, out, bounds, sequences, query_heads, work, low, high, scratch):
    """As `packed`, attention with a window; `work` has (e_pad + 2) items for each query, as in `windowed`."""
    for task in range(low, high):
        head, start, stop = place_of(task, sequences, bounds)
        if start < stop:
            own, rest = empty_problem(one, s, p, head, start, stop, query_heads, scratch)
            windowed(
                one, s, own, moved(q, start), moved(k, start), moved(v, start), moved_mask(mask, start),
                moved(out, start), work + query_heads * start * (s.e_pad + 2), head, head + 1, rest,
            )  # fmt: skip


def packed_scratch(one, s, sums_size):
    """Items of scratch that the forward kernels need."""
    whole = max(
        max(gather_scratch(one, s), read_scratch(one, s)), max(causal_scratch(one, s), windowed_scratch(one, s))
    )
    return whole + (sums_size + 15) // 16 * 16


@inlined
def own_gradients(s, p, f, start, stop, heads):
    """What the backward kernels take for the sequence of a query head."""
    length = stop - start
    rows = f * (p.num_keys - length) + start  # to what kernels take for row 0 of head f, row f * length
    return Backward(
        length, length, p.window, p.causal, p.with_factors, p.query_side, p.key_side, p.map_of,
        p.stats + 2 * heads * start, p.dq + rows * s.d, p.dk + rows * s.d, p.dv + rows * (s.e - 1), p.maps,
        p.maps_size,
    )  # fmt: skip


@jit
def packed_gradients(
    one, s, p, q, gradient, k, v, out, mask, bounds, sequences, together, heads, low, high, scratch
):  # fmt: skip
    """The sweeps of tasks low .. high: `together` sequences of a head, one of them or all, one after the other.

    Sequences of a head share the sums that the gradients of a map are made of: where these are wanted, a task has all.
    """
    no, yes = np.int64(0), np.int64(1)  # of the type in which others give them: sweep is compiled once
    both = p.window > 0 and p.causal == 0
    for task in range(low * together, high * together):
        f, start, stop = place_of(task, sequences, bounds)
        if start < stop:
            own = own_gradients(s, p, f, start, stop, heads)
            queries, gradients, keys, values = moved(q, start), moved(gradient, start), moved(k, start), moved(v, start)
            result, visible = moved(out, start), moved_mask(mask, start)
            for backwards in range(2):
                if both or backwards == 0:
                    sweep(
                        one, s, own, no, backwards, queries, gradients, keys, values, result, visible, f, f + 1,
                        scratch,
                    )  # fmt: skip
                if both or backwards == 1:
                    sweep(
                        one, s, own, yes, backwards, keys, values, queries, gradients, result, visible, f, f + 1,
                        scratch,
                    )  # fmt: skip


@jit
def packed_near_gradients(one, s, p, q, gradient, k, v, out, mask, bounds, sequences, heads, low, high, scratch):
    """Gradients through the keys of windows, of tasks low .. high, a sequence each: windows add nothing to the maps."""
    for task in range(low, high):
        f, start, stop = place_of(task, sequences, bounds)
        if start < stop:
            near_gradients(
                one, s, own_gradients(s, p, f, start, stop, heads), moved(q, start), moved(k, start), moved(v, start),
                moved(gradient, start), moved(out, start), moved_mask(mask, start), f, f + 1, scratch,
            )  # fmt: skip


def packed_gradients_scratch(one, s):
    """Items of scratch that the backward kernels need."""
    return max(sweep_scratch(one, s), near_gradients_scratch(s))
