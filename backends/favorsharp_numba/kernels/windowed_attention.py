"""The kernel of attention with a window, bidirectional or causal: near keys are scored exactly, far ones by features.

`window_rule.py` says which keys are near, `window_tiles.py` how positions are cut into tiles, and `near_tiles.py` has
what tiles of queries do with near keys.
"""

import numpy as np

from favorsharp_numba.kernels.arguments import ALPHA, NO_MASK, ZERO, place_of
from favorsharp_numba.kernels.near_scores import near_queries
from favorsharp_numba.kernels.near_tiles import keep_keys, read_near_tiles
from favorsharp_numba.kernels.sums import empty_sums, has_seen, keep_stats, read_sums, sums_with_lows, take_keys, weigh
from favorsharp_numba.kernels.tiles import (
    ahead_of,
    load_points,
    log_keys,
    log_queries,
    rest_of_tile,
    store_points,
    turn_queries,
    usable_values,
)
from favorsharp_numba.kernels.window_rule import far_after, far_before
from favorsharp_numba.kernels.window_tiles import (
    SLOTS,
    Values,
    bounds,
    cut_of,
    head_of,
    loaded_at,
    slot_at,
    store_at,
    tile_bounds,
    tile_of,
    window_space,
)
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import max_block, scale_block
from favorsharp_numba.vectors.compiling import inlined
from favorsharp_numba.vectors.items import integer_at, lanes
from favorsharp_numba.vectors.rows import add_rows, copy, fill, invert
from favorsharp_numba.vectors.tops import take_tops


@kernel(window_space)
def windowed(one, s, p, q, k, v, mask, out, work, low, high, scratch):
    """Attention with a window, for key heads low .. high.

    Positions count from the first key; the queries are those of the positions from first_query on. A tile of queries
    reads the sums of the far keys before it. If attention is not causal, what the queries have read is kept in `work`
    (e_pad + 2 items a query), and a second pass, in descending order, adds the far keys after each tile. In the last
    pass the near keys are added.
    """
    w = window_space(s, scratch)
    fill(one, w.taking.ones, max(s.m_pad, s.e_pad), one)
    usable = usable_values(one, s, v, mask, False)
    values = Values(usable, v.row // v.item if usable else s.e_pad)
    for number in range(low, high):
        head, sums = head_of(s, p, number), sums_with_lows(one, s, p, number, w.lows)
        cut = cut_of(one, p, head.members_end - head.members <= SLOTS)
        seen = has_seen(one, s, sums.top)
        entered, logged = -1, -1  # the block that the sums took last, and the tile whose features are in the workspace
        fill(one, w.kept, SLOTS, -one)
        for step in range(cut.tiles if p.causal else 2 * cut.tiles):
            if step == cut.tiles:
                empty_sums(one, s, p, sums)
                entered, logged = -1, -1
            tile_number, tile = tile_of(p, cut, step, seen)
            for chunk in range(head.members, head.members_end, SLOTS):
                heads = min(SLOTS, head.members_end - chunk)
                for i in range(heads):
                    f = integer_at(p.members + 8 * (chunk + i))
                    load_slot(one, s, p, cut, head, tile, q, k, f, slot_at(w, i), w)
                for i in range(tile.parts):
                    part = tile.parts - 1 - i if tile.after else i
                    block = tile.block + part
                    entering = far_after(block) if tile.after else far_before(block)
                    if 0 <= entering < cut.blocks and entering != entered:
                        entered = entering
                        logged = enter_block(
                            one, s, p, cut, head, sums, tile, part, entering, logged, q, k, v, mask, values, w
                        )  # fmt: skip
                    begin, end = bounds(p, tile.first, tile.last, part)
                    for j in range(heads if begin < end else 0):
                        f = integer_at(p.members + 8 * (chunk + j))
                        read_far(one, s, p, cut, head, sums, tile, part, begin, end, out, f, work, slot_at(w, j), w)
                if tile.final:
                    read_near_tiles(one, s, p, cut, head, tile, tile_number, k, v, mask, values, heads, w)
                    for i in range(heads):
                        f = integer_at(p.members + 8 * (chunk + i))
                        store_slot(one, s, p, cut, tile, out, f, slot_at(w, i))


@inlined
def load_slot(one, s, p, cut, head, tile, q, k, f, slot, w):
    """Load a tile of queries of one head, and their log features if they read any far keys."""
    for part in range(tile.parts):
        begin, end = bounds(p, tile.first, tile.last, part)
        if begin < end:
            load_points(
                one, q, NO_MASK, f, begin - p.first_query, end - begin, s.d, s.d_pad, head.queries + ALPHA,
                head.queries + s.center, w.points + part * cut.pad * s.d_pad,
            )  # fmt: skip
    count = (tile.parts - 1) * (cut.pad - p.window) + tile.last - tile.first
    turn_queries(one, s, head.queries, count, tile.far, w.points, w.dense, slot.factors, slot.columns)
    if tile.far:
        next_keys = ahead_of(k, head.number, tile.first, tile.last, s.d)
        log_queries(one, s, head.queries, slot.columns, count, slot.factors, slot.weights, next_keys)
    else:  # the factors are 0, or NaN for a query that is not finite
        n = rest_of_tile(count, lanes(one))
        fill(one, slot.reference, n, -np.inf * one)
        copy(one, slot.factors, n, slot.total)
        fill(one, slot.numerator, count * s.e_pad, one - one)
    near_queries(one, s, head.queries, head.keys, slot.columns, count, slot.factors, slot.norms)


@inlined
def enter_block(one, s, p, cut, head, sums, tile, part, entering, logged, q, k, v, mask, values, w):
    """The sums take the keys of a block. Return the tile whose features are now in the workspace."""
    source = entering // cut.held * cut.pieces
    for own in range(source, min(cut.tiles, source + cut.pieces)):
        start, stop = tile_bounds(p, cut, own)
        begin, end = max(start, entering * p.window), min(stop, (entering + 1) * p.window)
        store, loaded = store_at(w, own), loaded_at(s, w, own)
        keep_keys(
            one, s, head.keys, k, v, mask, head.number, own, start, stop, store.points, w.dense, loaded, w.kept,
            values.usable, values.step, w.near.scores,
        )  # fmt: skip
        if own != logged:
            logged = own
            f = integer_at(p.members + 8 * head.members)
            next_queries = ahead_of(q, f, tile.next_query, tile.next_query + tile.last - tile.first, s.d)
            log_keys(
                one, s, head.keys, store.points, stop - start, store.factors, w.features, s.feature_step, next_queries
            )  # fmt: skip
        rows = place_of(v, head.number, start) if values.usable else loaded
        coming = tile.first + part * p.window
        next_values = ahead_of(v, head.number, coming, min(tile.last, coming + p.window), s.e)
        take_keys(
            one, s, head.keys, w.features + (begin - start) * s.feature_step, s.feature_step,
            rows + (begin - start) * values.step, values.step, end - begin, sums, 0, w.taking,
            next_values,
        )  # fmt: skip
    return logged


@inlined
def read_far(one, s, p, cut, head, sums, tile, part, begin, end, out, f, work, slot, w):
    """A block of queries, positions begin .. end, reads the sums; what it has read is kept or merged between passes."""
    count, column = end - begin, part * cut.pad
    total, reference = slot.total + column, slot.reference + column
    numerator = slot.numerator + column * s.e_pad
    if tile.far:
        weights = slot.weights + column
        weigh(one, s, head.queries, weights, count, sums.top, sums.z, reference, w.safe, total)
        target = ahead_of(out, f, begin - p.first_query, end - p.first_query, s.e)
        read_sums(one, s, weights, count, sums.kv, 0, numerator, w.near.scores, target)
    line = work + (f * p.num_queries + begin - p.first_query) * (s.e_pad + 2)
    if tile.after:
        ones = w.taking.ones
        merge_kept(one, s, head.queries, count, numerator, total, reference, line, ones, w.merge)
    elif not tile.final:
        copy(one, numerator, count * s.e_pad, line)
        copy(one, total, count, line + count * s.e_pad)
        copy(one, reference, count, line + count * (s.e_pad + 1))


@inlined
def merge_kept(one, s, side, count, numerator, total, reference, line, ones, w):
    """Merge what a block of queries read in the first pass, which is kept at `line`, into what it has read since."""
    n = rest_of_tile(count, lanes(one))
    copy(one, line + count * (s.e_pad + 1), count, w.old)
    max_block(one, w.old, 0, 1, n, side + ZERO, 0, reference, w.top)
    take_tops(one, n, w.old, w.top, w.old_scale)
    take_tops(one, n, reference, w.top, w.scale)
    scale_block(one, line, s.e_pad, count, s.e_pad, w.old_scale, ones, line, s.e_pad)
    scale_block(one, numerator, s.e_pad, count, s.e_pad, w.scale, ones, numerator, s.e_pad)
    add_rows(one, numerator, count * s.e_pad, line, 0, 1, one)
    copy(one, line + count * s.e_pad, count, w.old)
    scale_block(one, w.old, n, 1, n, ones, w.old_scale, w.old, n)
    scale_block(one, total, n, 1, n, ones, w.scale, total, n)
    add_rows(one, total, count, w.old, 0, 1, one)


@inlined
def store_slot(one, s, p, cut, tile, out, f, slot):
    """Divide what a tile of queries of one head has read by the totals, and store it."""
    for part in range(tile.parts):
        begin, end = bounds(p, tile.first, tile.last, part)
        column, count = part * cut.pad, end - begin
        if count > 0:
            begin -= p.first_query
            total = slot.total + column
            invert(one, total, count)
            keep_stats(one, p, f, begin, count, total, slot.reference + column)
            store_points(one, out, f, begin, count, s.e, s.e_pad, total, slot.numerator + column * s.e_pad)
