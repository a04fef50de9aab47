"""The kernels of bidirectional attention: sums over keys, and queries that read them.

The host runs each kernel for shares of the key heads or of the query heads (`favorsharp_numba.host.problem`).
"""

from collections import namedtuple

import numpy as np

from favorsharp_numba.kernels.arguments import TILE, key_side, query_side
from favorsharp_numba.kernels.near_scores import (
    add_near,
    near_keys,
    near_queries,
    raise_references,
    score_near,
    weigh_near,
)
from favorsharp_numba.kernels.sums import (
    absorb,
    absorb_space,
    keep_stats,
    lows_size,
    read_sums,
    scale_sums,
    sums_at,
    sums_with_lows,
    weigh,
)
from favorsharp_numba.kernels.tiles import (
    ahead_of,
    load_keys,
    load_queries,
    load_values,
    log_queries,
    rest_of_tile,
    store_points,
)
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.compiling import inlined
from favorsharp_numba.vectors.items import get, integer_at, lanes, put
from favorsharp_numba.vectors.rows import add_rows, copy, fill, invert
from favorsharp_numba.vectors.tops import take_tops

GatherSpace = namedtuple("GatherSpace", "lows absorbing end")


@inlined
def gather_space(s, lows):
    """The parts of the workspace of `gather_keys`; `absorbing` is an `AbsorbSpace`."""
    absorbing = absorb_space(s, lows + lows_size(s))
    return GatherSpace(lows, absorbing, absorbing.end)


@kernel(gather_space)
def gather_keys(one, s, p, k, v, mask, low, high, scratch):
    """Add the keys of the tasks low .. high to their sums. Task b * segments + g is segment g of the keys of head b."""
    w = gather_space(s, scratch)
    for task in range(low, high):
        head, segment = task // p.segments, task % p.segments
        start, stop = p.num_keys * segment // p.segments, p.num_keys * (segment + 1) // p.segments
        sums = sums_with_lows(one, s, p, task, w.lows)
        absorb(one, s, key_side(s, p, head), k, v, mask, head, start, stop, sums, p.transposed, w.absorbing)


MergeSpace = namedtuple("MergeSpace", "new_top scales ones end")


@inlined
def merge_space(s, new_top):
    """The parts of the workspace of `merge_segments`."""
    scales = new_top + s.m_pad
    ones = scales + s.m_pad
    end = ones + max(s.m_pad, s.e_pad)
    return MergeSpace(new_top, scales, ones, end)


@kernel(merge_space)
def merge_segments(one, s, p, low, high, scratch):
    """Merge the sums of the segments of key heads low .. high into the first of each; low parts are left out."""
    w = merge_space(s, scratch)
    fill(one, w.ones, max(s.m_pad, s.e_pad), one)
    for head in range(low, high):
        sums = sums_at(s, p, head * p.segments, 0)
        for segment in range(1, p.segments):
            other = sums_at(s, p, head * p.segments + segment, 0)
            for j in range(s.m_pad):
                put(one, w.new_top + j, max(get(one, sums.top + j), get(one, other.top + j)))
            take_tops(one, s.m_pad, sums.top, w.new_top, w.scales)
            scale_sums(one, s, sums.kv, sums.z, p.transposed, w.scales, w.ones)
            take_tops(one, s.m_pad, other.top, w.new_top, w.scales)
            scale_sums(one, s, other.kv, other.z, p.transposed, w.scales, w.ones)
            add_rows(one, sums.kv, p.kv_size + s.m_pad, other.kv, 0, 1, one)


ReadSpace = namedtuple(
    "ReadSpace",
    "points dense factors columns weights reference safe total numerator norms near_rows near_factors near_norms "
    "near_values scores largest end",
)


@inlined
def read_space(s, points):
    """The parts of the workspace of `read_queries`. `scores` is also the scratch memory of `read_sums`, which needs e
    tiles; that may exceed `scores` and `largest`.
    """
    dense = points + TILE * s.d_pad
    factors = dense + TILE * s.d_pad
    columns = factors + 2 * TILE
    weights = columns + s.d * TILE
    reference = weights + s.m * TILE
    safe = reference + TILE
    total = safe + 2 * TILE
    numerator = total + TILE
    norms = numerator + TILE * s.e_pad
    near_rows = norms + 2 * TILE
    near_factors = near_rows + TILE * s.d_pad
    near_norms = near_factors + 2 * TILE
    near_values = near_norms + TILE
    scores = near_values + TILE * s.e_pad
    largest = scores + TILE * TILE
    end = scores + max(s.e, TILE + 1) * TILE
    return ReadSpace(
        points, dense, factors, columns, weights, reference, safe, total, numerator, norms, near_rows, near_factors,
        near_norms, near_values, scores, largest, end,
    )  # fmt: skip


@kernel(read_space)
def read_queries(one, s, p, q, k, v, mask, recent, out, normalised, per_head, low, high, scratch):
    """Queries read the sums of their key head. Task = query head * per_head + a share of its queries.

    The first `recent` keys of k are not in the sums, and are scored exactly.
    """
    w = read_space(s, scratch)
    for task in range(low, high):
        head, share = task // per_head, task % per_head
        key_head = integer_at(p.key_head_of + 8 * head)
        side = query_side(s, p, key_head)
        sums = sums_at(s, p, key_head * p.segments, 0)
        stop = p.num_queries * (share + 1) // per_head
        for start in range(p.num_queries * share // per_head, stop, TILE):
            count = min(TILE, stop - start)
            with_factors = recent > 0 or not normalised
            load_queries(one, s, side, q, head, start, count, with_factors, w.points, w.dense, w.factors, w.columns)
            target = ahead_of(out, head, start, start + count, s.e)
            log_queries(one, s, side, w.columns, count, w.factors, w.weights, target)
            weigh(one, s, side, w.weights, count, sums.top, sums.z, w.reference, w.safe, w.total)
            next_queries = ahead_of(q, head, start + count, min(stop, start + count + TILE), s.d)
            read_sums(one, s, w.weights, count, sums.kv, p.transposed, w.numerator, w.scores, next_queries)
            if recent > 0:
                read_recent(one, s, side, key_side(s, p, key_head), k, v, mask, key_head, recent, count, w)
            if normalised:
                invert(one, w.total, count)
                keep_stats(one, p, head, start, count, w.total, w.reference)
            else:
                for t in range(count):
                    put(one, w.total + t, np.exp2(get(one, w.reference + t)))
            store_points(one, out, head, start, count, s.e, s.e_pad, w.total, w.numerator)


@inlined
def read_recent(one, s, side, keys, k, v, mask, key_head, recent, count, w):
    """Add the exact scores of the recent keys to what a tile of queries has read."""
    near_queries(one, s, side, keys, w.columns, count, w.factors, w.norms)
    n = rest_of_tile(count, lanes(one))
    for start in range(0, recent, TILE):
        size = min(TILE, recent - start)
        load_keys(one, s, keys, k, mask, key_head, start, size, w.near_rows, w.dense, w.near_factors)
        load_values(one, s, keys, v, mask, key_head, start, size, w.near_values)
        near_keys(one, s, keys, size, w.near_factors, w.near_norms)
        copy(one, w.reference, n, w.largest)
        score_near(
            one, s, keys, w.columns, w.norms, n, w.near_rows, w.near_norms, size, -size, mask, key_head, start,
            w.scores, w.largest,
        )  # fmt: skip
        raise_references(one, s, keys, n, w.largest, w.numerator, w.total, w.reference, w.safe)
        weigh_near(one, keys, n, size, -size, w.safe, w.scores, w.total)
        add_near(one, s, count, size, -size, w.scores, w.near_values, s.e_pad, False, w.numerator)
