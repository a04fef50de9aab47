"""The kernel of attention with a window: near blocks are scored exactly, the others read by features."""

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from favorsharp_numba.kernels.attention import has_seen, keep_stats, key_side, query_side
from favorsharp_numba.kernels.near_scores import (
    add_near,
    near_keys,
    near_queries,
    raise_references,
    score_near,
    weigh_near,
)
from favorsharp_numba.kernels.tiles import (
    ALPHA,
    NO_MASK,
    TILE,
    ZERO,
    ahead_of,
    get,
    integer_at,
    is_finite,
    lanes,
    lanes_of,
    load_keys,
    load_points,
    log_keys,
    log_queries,
    lows_of,
    lows_size,
    place_of,
    put,
    read_sums,
    rest_of_tile,
    store_points,
    take_keys,
    take_keys_scratch,
    turn_queries,
    usable_values,
    values_at,
    weigh,
)
from favorsharp_numba.vectors.compiling import inlined, jit, outlined
from favorsharp_numba.vectors.primitives import max_block, scale_block
from favorsharp_numba.vectors.rows import add_rows, copy, fill, invert, take_tops

SLOTS = 4
"""Heads of queries that are worked on together, and tiles of keys that are kept."""


class Cut(NamedTuple):
    """How positions are cut: a tile is `held` whole blocks, `pad` columns of queries apart; or one of the `pieces` of a
    long block.
    """

    held: int
    pieces: int
    pad: int
    blocks: int
    tiles: int


class Store(NamedTuple):
    """Where in what is kept of a tile of keys, which begins with the points, what lies; its size."""

    factors: int
    norms: int
    finite: int
    size: int


class Slot(NamedTuple):
    """The same of a tile of queries, a column each, which begins with the points; numerators are rows."""

    weights: int
    factors: int
    norms: int
    total: int
    reference: int
    numerator: int
    size: int


class Near(NamedTuple):
    """Keys of one or two tiles, positions start .. stop, the second from `middle` on; values of both, and their steps.

    `finite`: all values are.
    """

    start: int
    middle: int
    stop: int
    first: int
    second: int
    values: int
    other_values: int
    v_step: int
    finite: bool


@register_jitable
def store_of(s):
    factors = TILE * s.d_pad
    norms = factors + 2 * TILE
    return Store(factors, norms, norms + TILE, norms + 2 * TILE)


@register_jitable
def slot_of(s):
    weights = TILE * s.d
    factors = weights + TILE * s.m
    norms = factors + 2 * TILE
    total = norms + 2 * TILE
    reference = total + TILE
    numerator = reference + TILE
    return Slot(weights, factors, norms, total, reference, numerator, numerator + TILE * s.e_pad)


@inlined
def cut_of(one, p, few_heads):
    """Blocks are held together where that is of use and the heads have room."""
    pad = rest_of_tile(p.window, lanes(one))
    held = max(1, TILE // pad) if few_heads else 1
    pieces = 1 if held > 1 else (p.window + TILE - 1) // TILE
    whole = p.num_keys // (held * p.window)
    tiles = whole * pieces + (p.num_keys - whole * held * p.window + TILE - 1) // TILE
    return Cut(held, pieces, pad, (p.num_keys + p.window - 1) // p.window, tiles)


@inlined
def tile_bounds(p, cut, tile):
    """Where the positions of a tile begin and end."""
    start = tile // cut.pieces * cut.held * p.window
    stop = min(p.num_keys, start + cut.held * p.window)
    start += tile % cut.pieces * TILE
    return start, min(stop, start + TILE)


@inlined
def bounds(p, first, last, part):
    """Where the queries of a block of a tile begin and end."""
    start = first + part * p.window
    return max(start, p.first_query), min(last, start + p.window)


@jit
def windowed(one, s, p, q, k, v, mask, out, work, low, high, scratch):
    """Attention with near blocks scored exactly, for key heads low .. high.

    Positions count from the first key; the queries are those of positions first_query and on. A tile holds several
    whole blocks, each of which reads the sums as they are at that block; or a long block is several tiles. What a query
    has read of the blocks before is kept in `work` (e_pad + 2 items a query) until the pass over the blocks after it.
    """
    p_step = s.m_pad + lanes(one)
    points = scratch
    dense = points + TILE * s.d_pad
    features = dense + TILE * s.d_pad
    safe = features + TILE * p_step
    kept = safe + TILE
    at, of = store_of(s), slot_of(s)
    stores = kept + SLOTS
    loaded = stores + SLOTS * at.size
    slots = loaded + SLOTS * TILE * s.e_pad
    of_keys = slots + SLOTS * of.size
    of_near = of_keys + take_keys_scratch(s)
    own_lows = of_near + TILE * (2 * TILE + 3) + s.e_pad
    ones = of_keys + 3 * s.m_pad
    fill(one, ones, max(s.m_pad, s.e_pad), one)
    w = p.window
    usable = usable_values(one, s, v, mask, False)
    v_step = v.row // v.item if usable else s.e_pad
    for head in range(low, high):
        kv = p.sums + head * p.sums_size
        z = kv + p.kv_size
        top = z + s.m_pad
        lows = lows_of(one, s, p, head, own_lows)
        z_lows = lows + p.kv_size
        keys, queries = key_side(s, p, head), query_side(s, p, head)
        members, members_end = integer_at(p.member_starts + 8 * head), integer_at(p.member_starts + 8 * head + 8)
        cut = cut_of(one, p, members_end - members <= SLOTS)
        seen = has_seen(one, s, top)
        entered, logged = -1, -1
        fill(one, kept, SLOTS, -one)
        for step in range(cut.tiles if p.causal else 2 * cut.tiles):
            after = step >= cut.tiles
            if step == cut.tiles:
                fill(one, kv, p.kv_size + s.m_pad, one - one)
                fill(one, lows, p.kv_size + s.m_pad, one - one)
                fill(one, top, s.m_pad, -np.inf * one)
                entered, logged = -1, -1
            tile = 2 * cut.tiles - 1 - step if after else step
            first, last = tile_bounds(p, cut, tile)
            block = tile // cut.pieces * cut.held
            parts = min(cut.held, cut.blocks - block)
            far = block + 2 < cut.blocks if after else seen or block + parts > 2
            final = p.causal or after
            next_query = 2 * first - last if after else last
            next_query -= p.first_query
            for chunk in range(members, members_end, SLOTS):
                heads = min(SLOTS, members_end - chunk)
                for i in range(heads):
                    slot = slots + i * of.size
                    load_blocks(
                        one, s, p, queries, q, integer_at(p.members + 8 * (chunk + i)), first, last, parts, cut.pad,
                        far, points, dense, slot + of.factors, slot,
                    )  # fmt: skip
                    count = (parts - 1) * (cut.pad - w) + last - first
                    if far:
                        log_queries(
                            one, s, queries, slot, count, slot + of.factors, slot + of.weights,
                            ahead_of(k, head, first, last, s.d),
                        )  # fmt: skip
                    else:  # factors are 0, or NaN for a query that is not finite
                        n = rest_of_tile(count, lanes(one))
                        fill(one, slot + of.reference, n, -np.inf * one)
                        copy(one, slot + of.factors, n, slot + of.total)
                        fill(one, slot + of.numerator, count * s.e_pad, one - one)
                    near_queries(one, s, queries, keys, slot, count, slot + of.factors, slot + of.norms)
                for i in range(parts):  # each block of the tile reads the sums
                    part = parts - 1 - i if after else i
                    entering = block + part + 2 if after else block + part - 2
                    if 0 <= entering < cut.blocks and entering != entered:
                        entered = entering
                        source = entering // cut.held * cut.pieces
                        for own in range(source, min(cut.tiles, source + cut.pieces)):
                            start, stop = tile_bounds(p, cut, own)
                            begin, end = max(start, entering * w), min(stop, (entering + 1) * w)
                            store, values = stores + own % SLOTS * at.size, loaded + own % SLOTS * TILE * s.e_pad
                            keep_keys(
                                one, s, keys, k, v, mask, head, own, start, stop, store, dense, values, kept, usable,
                                v_step, of_near,
                            )  # fmt: skip
                            if own != logged:
                                logged = own
                                log_keys(
                                    one, s, keys, store, stop - start, store + at.factors, features, p_step,
                                    ahead_of(
                                        q, integer_at(p.members + 8 * members), next_query, next_query + last - first,
                                        s.d,
                                    ),
                                )  # fmt: skip
                            values = place_of(v, head, start) if usable else values
                            take_keys(
                                one, s, keys, features + (begin - start) * p_step, p_step,
                                values + (begin - start) * v_step, v_step, end - begin, kv, z, top, lows, z_lows, 0,
                                of_keys,
                                ahead_of(v, head, first + part * w, min(last, first + part * w + w), s.e),
                            )  # fmt: skip
                    begin, end = bounds(p, first, last, part)
                    count = end - begin
                    for j in range(heads if count > 0 else 0):
                        slot = slots + j * of.size
                        column, numerator = slot + part * cut.pad, slot + of.numerator + part * cut.pad * s.e_pad
                        total, reference = column + of.total, column + of.reference
                        f = integer_at(p.members + 8 * (chunk + j))
                        if far:
                            weigh(one, s, queries, column + of.weights, count, top, z, reference, safe, total)
                            coming = ahead_of(out, f, begin - p.first_query, end - p.first_query, s.e)
                            read_sums(one, s, column + of.weights, count, kv, 0, numerator, of_near, coming)
                        line = work + (f * p.num_queries + begin - p.first_query) * (s.e_pad + 2)
                        if after:
                            merge_kept(
                                one, s, queries, count, numerator, total, reference, line, ones, of_near
                            )  # fmt: skip
                        elif not final:
                            keep(one, s, count, numerator, total, reference, line)
                if not final:
                    continue
                source = max(0, block - 1) // cut.held * cut.pieces
                source_end = tile + 1
                if not p.causal:
                    last_block = min(cut.blocks - 1, block + parts)
                    source_end = min(cut.tiles, (last_block // cut.held + 1) * cut.pieces)
                while source < source_end:  # then all of them the keys that are near, two tiles at a time
                    both = source + 1 < source_end
                    start, middle = tile_bounds(p, cut, source)
                    stop = middle
                    finite = True
                    for own in range(source, source + 2 if both else source + 1):
                        begin, stop = tile_bounds(p, cut, own)
                        store, values = stores + own % SLOTS * at.size, loaded + own % SLOTS * TILE * s.e_pad
                        keep_keys(
                            one, s, keys, k, v, mask, head, own, begin, stop, store, dense, values, kept, usable,
                            v_step, of_near,
                        )  # fmt: skip
                        finite = finite and get(one, store + at.finite) != 0
                    values = loaded + source % SLOTS * TILE * s.e_pad
                    other_values = loaded + (source + 1) % SLOTS * TILE * s.e_pad
                    if usable:
                        values, other_values = place_of(v, head, start), place_of(v, head, middle)
                    near = Near(
                        start, middle, stop, stores + source % SLOTS * at.size,
                        stores + (source + 1) % SLOTS * at.size, values, other_values, v_step, finite,
                    )  # fmt: skip
                    for j in range(heads):
                        read_near(
                            one, s, p, cut, near, keys, mask, head, first, last, block, parts, slots + j * of.size,
                            of_near,
                        )  # fmt: skip
                    source += 2
                for i in range(heads):
                    f = integer_at(p.members + 8 * (chunk + i))
                    slot = slots + i * of.size
                    for part in range(parts):
                        begin, end = bounds(p, first, last, part)
                        column, count = slot + part * cut.pad, end - begin
                        if count > 0:
                            begin -= p.first_query
                            invert(one, column + of.total, count)
                            keep_stats(one, p, f, begin, count, column + of.total, column + of.reference)
                            store_points(
                                one, out, f, begin, count, s.e, s.e_pad, column + of.total,
                                slot + of.numerator + part * cut.pad * s.e_pad,
                            )  # fmt: skip


@inlined
def load_blocks(one, s, p, side, q, head, first, last, parts, pad, with_factors, points, dense, factors, columns):
    """As `load_queries`, a block of the tile every `pad` columns."""
    for part in range(parts):
        begin, end = bounds(p, first, last, part)
        if begin < end:
            load_points(
                one, q, NO_MASK, head, begin - p.first_query, end - begin, s.d, s.d_pad, side + ALPHA, side + s.center,
                points + part * pad * s.d_pad,
            )  # fmt: skip
    count = (parts - 1) * (pad - p.window) + last - first
    turn_queries(one, s, side, count, with_factors, points, dense, factors, columns)


@outlined
def keep_keys(
    one, s, side, k, v, mask, head, tile, start, stop, store, dense, values, kept, usable, v_step, scratch
):  # fmt: skip
    """Load a tile of keys, and its values where they are not usable as they lie, unless its slot holds it."""
    if get(one, kept + tile % SLOTS) == tile:
        return
    put(one, kept + tile % SLOTS, tile * one)
    at = store_of(s)
    load_keys(one, s, side, k, mask, head, start, stop - start, store, dense, store + at.factors)
    near_keys(one, s, side, stop - start, store + at.factors, store + at.norms)
    values = values_at(one, s, side, v, mask, head, start, stop - start, usable, values)
    finite = is_finite(one, side, values, v_step, stop - start, s.e_pad, scratch)
    put(one, store + at.finite, one if finite else one - one)


@inlined
def keep(one, s, count, numerator, total, reference, line):
    """Put aside what a block of queries has read."""
    copy(one, numerator, count * s.e_pad, line)
    copy(one, total, count, line + count * s.e_pad)
    copy(one, reference, count, line + count * (s.e_pad + 1))


@inlined
def merge_kept(one, s, side, count, numerator, total, reference, line, ones, scratch):
    """Merge what was put aside into what the queries have read since."""
    n = rest_of_tile(count, lanes(one))
    old, top, scale, old_scale = scratch, scratch + TILE, scratch + 2 * TILE, scratch + 3 * TILE
    copy(one, line + count * (s.e_pad + 1), count, old)
    max_block(one, old, 0, 1, n, side + ZERO, 0, reference, top)
    take_tops(one, n, old, top, old_scale)
    take_tops(one, n, reference, top, scale)
    scale_block(one, line, s.e_pad, count, s.e_pad, old_scale, ones, line, s.e_pad)
    scale_block(one, numerator, s.e_pad, count, s.e_pad, scale, ones, numerator, s.e_pad)
    add_rows(one, numerator, count * s.e_pad, line, 0, 1, one)
    copy(one, line + count * s.e_pad, count, old)
    scale_block(one, old, n, 1, n, ones, old_scale, old, n)
    scale_block(one, total, n, 1, n, ones, scale, total, n)
    add_rows(one, total, count, old, 0, 1, one)


@inlined
def near_block(one, p, cut, near, first, last, block, parts, lowest, position):
    """The keys from a position on that are of one block and tile: where they end, the first of the parts that see them,
    how many columns these have from there on, and how many queries of the first come before the first key.
    """
    number = position // p.window
    stop = min((number + 1) * p.window, near.middle if position < near.middle else near.stop)
    low = max(lowest, number - block - (0 if p.causal else 1))
    high = min(parts - 1, number - block + 1)
    begin, end = bounds(p, first, last, high)
    n = (high - low) * cut.pad + rest_of_tile(end - begin, lanes(one))
    begin, end = bounds(p, first, last, low)
    return stop, low, n, position - begin if p.causal else position - stop


@outlined
def read_near(one, s, p, cut, near, side, mask, head, first, last, block, parts, slot, scratch):
    """Add what keys of up to two tiles give to the queries of a tile that see them."""
    at, of = store_of(s), slot_of(s)
    scores = scratch
    largest = scores + 2 * TILE * TILE
    safe = largest + TILE
    lowest = max(0, p.first_query - first) // p.window  # blocks before the first query have none
    start = max(near.start, (block + lowest - 1) * p.window)
    stop = min(near.stop, last if p.causal else (block + parts + 1) * p.window)
    if p.first_query >= last or start >= stop:
        return
    begin, end = bounds(p, first, last, parts - 1)
    n = (parts - 1 - lowest) * cut.pad + rest_of_tile(end - begin, lanes(one))
    seen = lowest * cut.pad
    reference, total, numerator = slot + of.reference, slot + of.total, slot + of.numerator
    copy(one, reference + seen, n, largest + seen)
    position = start
    while position < stop:
        behind, low, width, before = near_block(one, p, cut, near, first, last, block, parts, lowest, position)
        behind = min(behind, stop)
        store, offset = near.first, position - near.start
        if position >= near.middle:
            store, offset = near.second, position - near.middle
        column = low * cut.pad
        score_near(
            one, s, side, slot + column, slot + of.norms + column, width, store + offset * s.d_pad,
            store + at.norms + offset, behind - position, before, mask, head, position,
            scores + (position - start) * TILE + column, largest + column,
        )  # fmt: skip
        position = behind
    raise_references(
        one, s, side, n, largest + seen, numerator + seen * s.e_pad, total + seen, reference + seen, safe
    )  # fmt: skip
    position = start
    while position < stop:
        behind, low, width, before = near_block(one, p, cut, near, first, last, block, parts, lowest, position)
        behind = min(behind, stop)
        column = low * cut.pad
        weigh_near(
            one, side, width, behind - position, before, safe + column - seen,
            scores + (position - start) * TILE + column, total + column,
        )  # fmt: skip
        position = behind
    joined = near.other_values == near.values + (near.middle - near.start) * near.v_step
    for part in range(lowest, parts):
        begin, end = bounds(p, first, last, part)
        low = max(start, (block + part - 1) * p.window)
        high = min(stop, end if p.causal else (block + part + 2) * p.window)
        split = high if joined else min(max(low, near.middle), high)
        for piece in range(2):
            position, behind = (low, split) if piece == 0 else (split, high)
            if position < behind:
                values = near.values + (position - near.start) * near.v_step
                if position >= near.middle:
                    values = near.other_values + (position - near.middle) * near.v_step
                add_near(
                    one, s, end - begin, behind - position, position - begin if p.causal else position - behind,
                    scores + (position - start) * TILE + part * cut.pad, values, near.v_step, near.finite,
                    numerator + part * cut.pad * s.e_pad,
                )  # fmt: skip


def windowed_scratch(one, s):
    """Items of scratch that `windowed` needs."""
    tiles = SLOTS * (store_of(s).size + TILE * s.e_pad + slot_of(s).size + 1)
    tiles += TILE * (2 * s.d_pad + s.m_pad + lanes_of(one) + 1)
    return tiles + take_keys_scratch(s) + TILE * (2 * TILE + 3) + s.e_pad + lows_size(s)
