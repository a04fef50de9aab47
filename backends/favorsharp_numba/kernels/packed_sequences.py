"""The kernels of packed sequences (`cu_seqlens`), forward and backward.

Each sequence of each head is a small problem of its own: a kernel moves the arrays to the beginning of the sequence and
calls the kernel of whole arrays (docs/design/packed-in-one-call.md).
"""

from collections import namedtuple

import numpy as np

from favorsharp_numba.kernels.arguments import Mask, Points, Problem
from favorsharp_numba.kernels.attention import gather_keys, gather_space, read_queries, read_space
from favorsharp_numba.kernels.attention_gradients import sweep, sweep_space
from favorsharp_numba.kernels.causal_attention import causal, causal_space
from favorsharp_numba.kernels.gradient_rows import Backward
from favorsharp_numba.kernels.sums import lows_size
from favorsharp_numba.kernels.window_gradients import near_gradients, near_gradients_space
from favorsharp_numba.kernels.window_tiles import window_space
from favorsharp_numba.kernels.windowed_attention import windowed
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.compiling import inlined
from favorsharp_numba.vectors.items import integer_at
from favorsharp_numba.vectors.rows import fill

PackedSpace = namedtuple("PackedSpace", "sums rest end")


@inlined
def behind_sums(s, sums):
    """Where the sums of a sequence end: kv, z and top, in whole cache lines."""
    return sums + (lows_size(s) + s.m_pad + 15) // 16 * 16


@inlined
def packed_space(s, sums):
    """The parts of the workspace of `packed`: the sums of a sequence, and the rest for the kernels of whole arrays."""
    rest = behind_sums(s, sums)
    end = max(gather_space(s, rest).end, read_space(s, rest).end)
    return PackedSpace(sums, rest, end)


@inlined
def packed_causal_space(s, sums):
    """The parts of the workspace of `packed_causal`."""
    rest = behind_sums(s, sums)
    end = causal_space(s, rest).end
    return PackedSpace(sums, rest, end)


@inlined
def packed_windowed_space(s, sums):
    """The parts of the workspace of `packed_windowed`."""
    rest = behind_sums(s, sums)
    end = window_space(s, rest).end
    return PackedSpace(sums, rest, end)


@inlined
def moved(points, start):
    """The points from a position on."""
    return Points(points.kind, points.base + start * points.row, points.offsets, points.row, points.column, points.item)


@inlined
def moved_mask(mask, start):
    """The mask from a position on."""
    return Mask(mask.base + start * mask.step, mask.offsets, mask.step)


@inlined
def place_in(task, sequences, bounds):
    """The head of a task, and where its sequence begins and ends. Task b * sequences + i is sequence i of head b."""
    line = bounds + 8 * (task % sequences)
    return task // sequences, integer_at(line), integer_at(line + 8)


@inlined
def empty_problem(one, s, p, head, start, stop, query_heads, sums):
    """The problem of a sequence of a key head, with the sums of no keys at the place `sums`.

    The stats of a sequence, two items for each query, lie together for all heads.
    """
    fill(one, sums, p.kv_size + s.m_pad, one - one)
    fill(one, sums + p.kv_size + s.m_pad, s.m_pad, -np.inf * one)
    return Problem(
        stop - start, stop - start, 0, p.window, p.causal, p.transposed, 1, p.query_side, p.key_side, p.map_of,
        p.members, p.member_starts, p.key_head_of, sums - head * p.sums_size, p.sums_size, p.kv_size,
        p.stats + 2 * query_heads * start if p.stats else 0, 0,
    )  # fmt: skip


# Bidirectional, causal and windowed attention have a kernel each, so that a first call compiles only one of them.


@kernel(packed_space)
def packed(one, s, p, q, k, v, mask, out, bounds, sequences, query_heads, work, low, high, scratch):
    """Bidirectional attention for tasks low .. high. `bounds` is the address of the list of where sequences begin."""
    w = packed_space(s, scratch)
    no, yes = np.int64(0), np.int64(1)  # numbers of the type that other calls pass: read_queries is compiled once
    for task in range(low, high):
        head, start, stop = place_in(task, sequences, bounds)
        if start < stop:
            own = empty_problem(one, s, p, head, start, stop, query_heads, w.sums)
            queries, keys, values, result = moved(q, start), moved(k, start), moved(v, start), moved(out, start)
            visible = moved_mask(mask, start)
            gather_keys(one, s, own, keys, values, visible, head, head + 1, w.rest)
            for member in range(integer_at(p.member_starts + 8 * head), integer_at(p.member_starts + 8 * head + 8)):
                f = integer_at(p.members + 8 * member)
                read_queries(
                    one, s, own, queries, keys, values, visible, no, result, yes, yes, f, f + 1, w.rest
                )  # fmt: skip


@kernel(packed_causal_space)
def packed_causal(one, s, p, q, k, v, mask, out, bounds, sequences, query_heads, work, low, high, scratch):
    """As `packed`, for causal attention."""
    w = packed_causal_space(s, scratch)
    for task in range(low, high):
        head, start, stop = place_in(task, sequences, bounds)
        if start < stop:
            own = empty_problem(one, s, p, head, start, stop, query_heads, w.sums)
            causal(
                one, s, own, moved(q, start), moved(k, start), moved(v, start), moved_mask(mask, start),
                moved(out, start), head, head + 1, w.rest,
            )  # fmt: skip


@kernel(packed_windowed_space)
def packed_windowed(one, s, p, q, k, v, mask, out, bounds, sequences, query_heads, work, low, high, scratch):
    """As `packed`, for attention with a window. `work` has e_pad + 2 items for each query, as in `windowed`."""
    w = packed_windowed_space(s, scratch)
    for task in range(low, high):
        head, start, stop = place_in(task, sequences, bounds)
        if start < stop:
            own = empty_problem(one, s, p, head, start, stop, query_heads, w.sums)
            windowed(
                one, s, own, moved(q, start), moved(k, start), moved(v, start), moved_mask(mask, start),
                moved(out, start), work + query_heads * start * (s.e_pad + 2), head, head + 1, w.rest,
            )  # fmt: skip


@inlined
def own_gradients(s, p, f, start, stop, heads):
    """What the backward kernels take for the sequence of a query head.

    They expect row i of head f in row f * num_keys + i of a gradient, so the places are moved to fit.
    """
    length = stop - start
    rows = f * (p.num_keys - length) + start
    return Backward(
        length, length, p.window, p.causal, p.with_factors, p.query_side, p.key_side, p.map_of,
        p.stats + 2 * heads * start, p.dq + rows * s.d, p.dk + rows * s.d, p.dv + rows * (s.e - 1), p.maps,
        p.maps_size,
    )  # fmt: skip


@kernel(sweep_space)
def packed_gradients(
    one, s, p, q, gradient, k, v, out, mask, bounds, sequences, together, heads, low, high, scratch
):  # fmt: skip
    """The gradients through features for tasks low .. high, each of which is `together` sequences of a head.

    That is 1, or all of them if the gradients of a map are wanted: the sequences of a head share the sums of the map.
    """
    no, yes = np.int64(0), np.int64(1)  # numbers of the type that other calls pass: sweep is compiled once
    both = p.window > 0 and p.causal == 0
    for task in range(low * together, high * together):
        f, start, stop = place_in(task, sequences, bounds)
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


@kernel(near_gradients_space)
def packed_near_gradients(one, s, p, q, gradient, k, v, out, mask, bounds, sequences, heads, low, high, scratch):
    """The gradients through near keys for tasks low .. high, a sequence each; they add nothing to the maps."""
    for task in range(low, high):
        f, start, stop = place_in(task, sequences, bounds)
        if start < stop:
            near_gradients(
                one, s, own_gradients(s, p, f, start, stop, heads), moved(q, start), moved(k, start), moved(v, start),
                moved(gradient, start), moved(out, start), moved_mask(mask, start), f, f + 1, scratch,
            )  # fmt: skip
