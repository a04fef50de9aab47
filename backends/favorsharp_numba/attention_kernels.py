"""Kernels of bidirectional and causal attention.

Each works on some of the key heads, or of the queries, of a problem; `run.py` shares the rest out among threads. What
the keys of a head amount to is a block of *sums*: kv, z (m_pad) and top (m_pad), the same as a `State` but to base 2.
"""

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from favorsharp_numba.compiling import inlined, jit
from favorsharp_numba.primitives import (
    exp_block,
    fill_before,
    max_block,
    product,
    product_add_ahead,
    scale_block,
    sum_block,
)
from favorsharp_numba.rows import add_rows, copy, fill, invert, take_tops
from favorsharp_numba.tiles import (
    ALPHA,
    GROUP,
    NO_MASK,
    ONE,
    ROWS,
    TILE,
    ZERO,
    absorb,
    add_keys,
    ahead_of,
    fill_near_scratch,
    get,
    integer_at,
    is_finite,
    is_hidden,
    lanes,
    lanes_of,
    load_keys,
    load_points,
    load_queries,
    log_keys,
    log_queries,
    near_keys,
    near_queries,
    near_scratch,
    panel,
    put,
    raise_top,
    read_near,
    read_sums,
    rescale,
    rest_of_tile,
    scale_sums,
    store_points,
    take_keys,
    take_keys_scratch,
    turn_queries,
    weigh,
)

SMALL_RISE = 40
"""How far the top of a feature may rise within a causal tile before the tile is cut: 2**-40 loses nothing."""
SMALLEST_TOTAL = 2.0**-60
"""The smallest sum of weights that a causal row is normalised by; below, its tile is cut."""


class Problem(NamedTuple):
    """The numbers and addresses that every kernel takes.

    Maps: packed constants of queries and keys (places) with the map of each key head at an address. Queries of key head
    b: `members[member_starts[b]] ...`; q and out are indexed by query head, k, v and mask by key head.
    `stats`, where it is not 0, takes 1 / total and the reference of every query, for a backward pass.
    """

    num_keys: int
    num_queries: int
    first_query: int
    window: int
    causal: int
    transposed: int
    segments: int
    query_side: int
    key_side: int
    map_of: int
    members: int
    member_starts: int
    key_head_of: int
    sums: int
    sums_size: int
    kv_size: int
    stats: int


@inlined
def query_side(s, p, head):
    return p.query_side + integer_at(p.map_of + 8 * head) * s.total


@inlined
def key_side(s, p, head):
    return p.key_side + integer_at(p.map_of + 8 * head) * s.total


@inlined
def keep_stats(one, p, head, start, count, inverse, reference):
    """Put aside what a backward pass needs of a tile of queries."""
    if p.stats:
        line = p.stats + 2 * (head * p.num_queries + start)
        for t in range(count):
            top = get(one, reference + t)
            put(one, line + 2 * t, get(one, inverse + t))
            put(one, line + 2 * t + 1, top if top != -np.inf else one - one)


@jit
def gather_keys(one, s, p, k, v, mask, low, high, scratch):
    """The sums of segments low .. high; segment g of key head b is task b * segments + g."""
    for task in range(low, high):
        head, segment = task // p.segments, task % p.segments
        start, stop = p.num_keys * segment // p.segments, p.num_keys * (segment + 1) // p.segments
        kv = p.sums + task * p.sums_size
        z = kv + p.kv_size
        absorb(one, s, key_side(s, p, head), k, v, mask, head, start, stop, kv, z, z + s.m_pad, p.transposed, scratch)


@jit
def merge_segments(one, s, p, low, high, scratch):
    """Merge the segments of key heads low .. high into the first of each."""
    new_top, scales, ones = scratch, scratch + s.m_pad, scratch + 2 * s.m_pad
    fill(one, ones, max(s.m_pad, s.e_pad), one)
    for head in range(low, high):
        kv = p.sums + head * p.segments * p.sums_size
        z = kv + p.kv_size
        top = z + s.m_pad
        for segment in range(1, p.segments):
            other = kv + segment * p.sums_size
            other_z = other + p.kv_size
            for j in range(s.m_pad):
                put(one, new_top + j, max(get(one, top + j), get(one, other_z + s.m_pad + j)))
            rescale(one, s, top, new_top, kv, z, p.transposed, scales, ones)
            rescale(one, s, other_z + s.m_pad, new_top, other, other_z, p.transposed, scales, ones)
            add_rows(one, kv, p.kv_size + s.m_pad, other, 0, 1, one)


@jit
def read_queries(one, s, p, q, k, v, mask, recent, out, normalised, per_head, low, high, scratch):
    """Queries read the sums of their key head; task = query head * per_head + a share of its queries.

    The first `recent` keys of k are not in the sums, and are scored exactly.
    """
    points = scratch
    dense = points + TILE * s.d_pad
    factors = dense + TILE * s.d_pad
    columns = factors + 2 * TILE
    weights = columns + s.d * TILE
    reference = weights + s.m * TILE
    safe = reference + TILE
    total = safe + TILE
    numerator = total + TILE
    norms = numerator + TILE * s.e_pad
    near_rows = norms + 2 * TILE
    near_factors = near_rows + TILE * s.d_pad
    near_norms = near_factors + 2 * TILE
    near_values = near_norms + TILE
    extra = near_values + TILE * s.e_pad
    for task in range(low, high):
        head, share = task // per_head, task % per_head
        key_head = integer_at(p.key_head_of + 8 * head)
        side = query_side(s, p, key_head)
        kv = p.sums + key_head * p.segments * p.sums_size
        z = kv + p.kv_size
        stop = p.num_queries * (share + 1) // per_head
        for start in range(p.num_queries * share // per_head, stop, TILE):
            count = min(TILE, stop - start)
            with_factors = recent > 0 or not normalised
            load_queries(one, s, side, q, head, start, count, with_factors, points, dense, factors, columns)
            log_queries(one, s, side, columns, count, factors, weights, ahead_of(out, head, start, start + count, s.e))
            weigh(one, s, side, weights, count, z + s.m_pad, z, reference, safe, total)
            after = min(stop, start + count + TILE)
            next_queries = ahead_of(q, head, start + count, after, s.d)
            read_sums(one, s, weights, count, kv, p.transposed, numerator, extra, next_queries)
            if recent > 0:
                keys = key_side(s, p, key_head)
                near_queries(one, s, side, keys, columns, count, factors, norms)
                fill_near_scratch(one, s, extra)
                for near in range(0, recent, TILE):
                    size = min(TILE, recent - near)
                    load_keys(
                        one, s, keys, k, v, mask, key_head, near, size, near_rows, dense, near_factors, near_values
                    )
                    near_keys(one, s, keys, size, near_factors, near_norms)
                    read_near(
                        one, s, keys, columns, norms, 0, count, near_rows, near_norms, near_values, False, near, size,
                        mask, key_head, 0, numerator, total, reference, extra,
                    )  # fmt: skip
            if normalised:
                invert(one, total, count)
                keep_stats(one, p, head, start, count, total, reference)
            else:
                for t in range(count):
                    put(one, total + t, np.exp2(get(one, reference + t)))
            store_points(one, out, head, start, count, s.e, s.e_pad, total, numerator)


def read_scratch(one, s):
    """Items of scratch that `read_queries` needs."""
    return TILE * (3 * s.d_pad + s.d + s.m + 10 + 2 * s.e_pad) + max(s.e * TILE, near_scratch(s))


@inlined
def has_seen(one, s, top):
    """Whether any key is in sums of this top."""
    largest = -np.inf
    for j in range(s.m):
        largest = max(largest, get(one, top + j))
    return largest > -np.inf


SLOTS = 4
"""Heads of queries that `windowed` works on together, and tiles of keys that it keeps."""


@register_jitable
def slot_size(s):
    """Items kept of a tile of queries."""
    return TILE * (s.d + s.m + s.e_pad + 6)


@register_jitable
def store_size(s):
    """Items kept of a tile of keys."""
    return TILE * (s.d_pad + s.e_pad + 4)


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
    # of a tile of keys: points, factors, norms, whether all values are finite, and values
    stores = kept + SLOTS
    factors_at = TILE * s.d_pad
    near_norms_at = factors_at + 2 * TILE
    finite_at = near_norms_at + TILE
    values_at = finite_at + TILE
    # of a tile of queries, a column each: points, log features, factors, norms, total, reference; and the numerator
    slots = stores + SLOTS * store_size(s)
    weights_at = TILE * s.d
    slot_factors_at = weights_at + TILE * s.m
    norms_at = slot_factors_at + 2 * TILE
    total_at = norms_at + 2 * TILE
    reference_at = total_at + TILE
    numerator_at = reference_at + TILE
    of_keys = slots + SLOTS * slot_size(s)
    of_near = of_keys + take_keys_scratch(s)
    ones = of_keys + 3 * s.m_pad
    fill(one, ones, max(s.m_pad, s.e_pad), one)
    fill_near_scratch(one, s, of_near)
    w, length = p.window, p.num_keys
    blocks, pad = (length + w - 1) // w, rest_of_tile(w, lanes(one))
    for head in range(low, high):
        kv = p.sums + head * p.sums_size
        z = kv + p.kv_size
        top = z + s.m_pad
        keys, queries = key_side(s, p, head), query_side(s, p, head)
        members, members_end = integer_at(p.member_starts + 8 * head), integer_at(p.member_starts + 8 * head + 8)
        held = max(1, TILE // pad) if members_end - members <= SLOTS else 1
        pieces = 1 if held > 1 else (w + TILE - 1) // TILE
        whole = length // (held * w)
        tiles = whole * pieces + (length - whole * held * w + TILE - 1) // TILE
        seen = has_seen(one, s, top)
        entered, logged = -1, -1
        fill(one, kept, SLOTS, -one)
        for step in range(tiles if p.causal else 2 * tiles):
            after = step >= tiles
            if step == tiles:
                fill(one, kv, p.kv_size + s.m_pad, one - one)
                fill(one, top, s.m_pad, -np.inf * one)
                entered, logged = -1, -1
            tile = 2 * tiles - 1 - step if after else step
            first, last = tile_bounds(p, held, pieces, tile)
            block = tile // pieces * held
            parts = min(held, blocks - block)
            far = block + 2 < blocks if after else seen or block + parts > 2
            final = p.causal or after
            next_query = 2 * first - last if after else last
            next_query -= p.first_query
            for chunk in range(members, members_end, SLOTS):
                heads = min(SLOTS, members_end - chunk)
                for i in range(heads):
                    slot = slots + i * slot_size(s)
                    load_blocks(
                        one, s, p, queries, q, integer_at(p.members + 8 * (chunk + i)), first, last, parts, pad, far,
                        points, dense, slot + slot_factors_at, slot,
                    )  # fmt: skip
                    count = (parts - 1) * (pad - w) + last - first
                    if far:
                        log_queries(
                            one, s, queries, slot, count, slot + slot_factors_at, slot + weights_at,
                            ahead_of(k, head, first, last, s.d),
                        )  # fmt: skip
                    else:  # factors are 0, or NaN for a query that is not finite
                        n = rest_of_tile(count, lanes(one))
                        fill(one, slot + reference_at, n, -np.inf * one)
                        copy(one, slot + slot_factors_at, n, slot + total_at)
                        fill(one, slot + numerator_at, count * s.e_pad, one - one)
                    near_queries(one, s, queries, keys, slot, count, slot + slot_factors_at, slot + norms_at)
                # each block of the tile reads the sums; then all of them the keys that are near
                for i in range(parts + 1 if final else parts):
                    near = i == parts
                    part = parts - 1 - i if after else i
                    entering = block + part + 2 if after else block + part - 2
                    if near:
                        source_end = min(blocks - 1, block + parts) // held * pieces + pieces
                        source_end = tile + 1 if p.causal else min(tiles, source_end)
                        source = max(0, block - 1) // held * pieces
                    elif 0 <= entering < blocks and entering != entered:
                        entered = entering
                        source = entering // held * pieces
                        source_end = min(tiles, source + pieces)
                    else:
                        source = source_end = 0
                    while source < source_end:
                        start, stop = tile_bounds(p, held, pieces, source)
                        store = stores + source % SLOTS * store_size(s)
                        if get(one, kept + source % SLOTS) != source:
                            put(one, kept + source % SLOTS, source * one)
                            load_keys(
                                one, s, keys, k, v, mask, head, start, stop - start, store, dense, store + factors_at,
                                store + values_at,
                            )  # fmt: skip
                            near_keys(one, s, keys, stop - start, store + factors_at, store + near_norms_at)
                            finite = is_finite(one, keys, store + values_at, s.e_pad, stop - start, of_near)
                            put(one, store + finite_at, one if finite else one - one)
                        if not near:
                            if source != logged:
                                logged = source
                                log_keys(
                                    one, s, keys, store, stop - start, store + factors_at, features, p_step,
                                    ahead_of(
                                        q, integer_at(p.members + 8 * members), next_query, next_query + last - first,
                                        s.d,
                                    ),
                                )  # fmt: skip
                            begin, end = max(start, entering * w), min(stop, (entering + 1) * w)
                            take_keys(
                                one, s, keys, features + (begin - start) * p_step, p_step,
                                store + values_at + (begin - start) * s.e_pad, end - begin, kv, z, top, 0, of_keys,
                                ahead_of(v, head, first + part * w, min(last, first + part * w + w), s.e),
                            )  # fmt: skip
                        for part in range(parts if near else 0):
                            begin, end = bounds(p, first, last, part)
                            near_begin = max(start, (block + part - 1) * w)
                            near_end = min(stop, end if p.causal else (block + part + 2) * w)
                            offset = near_begin - start
                            for j in range(heads if begin < end and near_begin < near_end else 0):
                                slot = slots + j * slot_size(s)
                                column = slot + part * pad
                                read_near(
                                    one, s, keys, column, column + norms_at, begin, end - begin,
                                    store + offset * s.d_pad, store + near_norms_at + offset,
                                    store + values_at + offset * s.e_pad, get(one, store + finite_at) != 0,
                                    near_begin, near_end - near_begin, mask, head, p.causal,
                                    slot + numerator_at + part * pad * s.e_pad, column + total_at,
                                    column + reference_at, of_near,
                                )  # fmt: skip
                        source += 1
                    if near:
                        continue
                    begin, end = bounds(p, first, last, part)
                    count = end - begin
                    for j in range(heads if count > 0 else 0):
                        slot = slots + j * slot_size(s)
                        column, numerator = slot + part * pad, slot + numerator_at + part * pad * s.e_pad
                        total, reference = column + total_at, column + reference_at
                        f = integer_at(p.members + 8 * (chunk + j))
                        if far:
                            weigh(one, s, queries, column + weights_at, count, top, z, reference, safe, total)
                            coming = ahead_of(out, f, begin - p.first_query, end - p.first_query, s.e)
                            read_sums(one, s, column + weights_at, count, kv, 0, numerator, of_near, coming)
                        line = work + (f * p.num_queries + begin - p.first_query) * (s.e_pad + 2)
                        if after:
                            merge_kept(
                                one, s, queries, count, numerator, total, reference, line, ones, of_near
                            )  # fmt: skip
                        elif not final:
                            keep(one, s, count, numerator, total, reference, line)
                for i in range(heads if final else 0):
                    f = integer_at(p.members + 8 * (chunk + i))
                    slot = slots + i * slot_size(s)
                    for part in range(parts):
                        begin, end = bounds(p, first, last, part)
                        column, count = slot + part * pad, end - begin
                        if count > 0:
                            begin -= p.first_query
                            invert(one, column + total_at, count)
                            keep_stats(one, p, f, begin, count, column + total_at, column + reference_at)
                            store_points(
                                one, out, f, begin, count, s.e, s.e_pad, column + total_at,
                                slot + numerator_at + part * pad * s.e_pad,
                            )  # fmt: skip


@inlined
def tile_bounds(p, held, pieces, tile):
    """Where the positions of a tile begin and end: `held` blocks of them, or the block's that it is a piece of."""
    start = tile // pieces * held * p.window
    stop = min(p.num_keys, start + held * p.window)
    start += tile % pieces * TILE
    return start, min(stop, start + TILE)


@inlined
def bounds(p, first, last, part):
    """Where the queries of a block of a tile begin and end."""
    start = first + part * p.window
    return max(start, p.first_query), min(last, start + p.window)


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


def windowed_scratch(one, s):
    """Items of scratch that `windowed` needs."""
    tiles = SLOTS * (store_size(s) + slot_size(s) + 1) + TILE * (2 * s.d_pad + s.m_pad + lanes_of(one) + 1)
    return tiles + take_keys_scratch(s) + near_scratch(s)


@jit
def causal(one, s, p, q, k, v, mask, out, low, high, scratch):
    """Attention of a query to the keys up to its own, for key heads low .. high.

    A tile's keys and the sums before it share one top, which may exceed what an early query of the tile can see. Where
    that would cost accuracy (a large rise, a small total), the tile is taken in shorter pieces: in a piece of one point
    the top is attained by a key that its query sees.
    """
    p_step = s.m_pad + lanes(one)
    points = scratch
    dense = points + TILE * s.d_pad
    factors = dense + TILE * s.d_pad
    values = factors + 2 * TILE
    features = values + TILE * s.e_pad
    new_top = features + TILE * p_step
    safe_top = new_top + s.m_pad
    scales = safe_top + s.m_pad
    new_z = scales + s.m_pad
    ones = new_z + s.m_pad
    columns = ones + max(s.m_pad, s.e_pad)
    weights = columns + s.d * TILE
    scores = weights + s.m * TILE
    reference = scores + TILE * TILE
    safe = reference + TILE
    total = safe + TILE
    numerator = total + TILE
    fill(one, ones, max(s.m_pad, s.e_pad), one)
    width = panel(one)
    for head in range(low, high):
        kv = p.sums + head * p.sums_size
        z = kv + p.kv_size
        top = z + s.m_pad
        keys, queries = key_side(s, p, head), query_side(s, p, head)
        seen = has_seen(one, s, top)
        first_member, last_member = integer_at(p.member_starts + 8 * head), integer_at(p.member_starts + 8 * head + 8)
        start, size = 0, TILE
        while start < p.num_keys:
            count = min(size, p.num_keys - start)
            some = load_keys(one, s, keys, k, v, mask, head, start, count, points, dense, factors, values)
            log_keys(
                one, s, keys, points, count, factors, features, p_step,
                ahead_of(q, integer_at(p.members + 8 * first_member), start, start + count, s.d),
            )  # fmt: skip
            rise = raise_top(one, s, keys, features, p_step, count, top, new_top, safe_top)
            if rise > SMALL_RISE and count > 1:
                size = max(1, count // 4)
                continue
            if rise > 0:
                rescale(one, s, top, new_top, kv, z, 0, scales, ones)
            fill(one, new_z, s.m_pad, one - one)
            exp_block(one, features, p_step, count, s.m_pad, keys + ZERO, 0, safe_top, ones, 0, new_z)
            after = min(p.num_keys, start + count + TILE)
            first_seen = 0
            if not seen:
                while first_seen < count and is_hidden(mask, head, start + first_seen):
                    first_seen += 1
            finite = is_finite(one, keys, values, s.e_pad, count, numerator)
            exact = True
            for member in range(first_member, last_member):
                f = integer_at(p.members + 8 * member)
                load_queries(one, s, queries, q, f, start, count, False, points, dense, factors, columns)
                target = ahead_of(out, f, start, start + count, s.e)
                log_queries(one, s, queries, columns, count, factors, weights, target)
                weigh(one, s, queries, weights, count, top, z, reference, safe, total)
                score_pairs(one, s, keys, features, p_step, weights, count, scores, total)
                if count > 1:
                    for t in range(first_seen, count):
                        exact = exact and not get(one, total + t) < SMALLEST_TOTAL
                    if not exact:
                        break
                step = (
                    ROWS if finite else 1
                )  # a value that is not finite must not meet the weight 0 of a query before it
                for t in range(0, count, step):
                    product(
                        one, min(step, count - t), s.e_pad, min(t + step, count), scores + t, 1, TILE, values, width,
                        s.e_pad, numerator + t * s.e_pad, s.e_pad,
                    )  # fmt: skip
                if member + 1 < last_member:
                    coming = ahead_of(q, integer_at(p.members + 8 * (member + 1)), start, start + count, s.d)
                else:
                    coming = ahead_of(v, head, start + count, after, s.e)
                product_add_ahead(
                    one, count, s.e_pad, s.m, weights, 1, TILE, kv, width, s.e_pad, numerator, s.e_pad, coming
                )
                invert(one, total, count)
                keep_stats(one, p, f, start, count, total, reference)
                store_points(one, out, f, start, count, s.e, s.e_pad, total, numerator)
            if not exact:
                if rise > 0:
                    undo_rise(one, s, kv, z, top, scales, ones)
                size = max(1, count // 4)
                continue
            add_keys(one, s, features, p_step, values, count, kv, 0, ahead_of(k, head, start + count, after, s.d))
            add_rows(one, z, s.m_pad, new_z, s.m_pad, 1, one)
            seen = seen or some
            start += count
            size = TILE if size == TILE or start % TILE == 0 else size


@inlined
def score_pairs(one, s, side, features, p_step, weights, count, scores, total):
    """scores[j, i] of key j and query i >= j by their features, 0 for the few queries before that are read with those;
    their sums are added to the totals of the queries.
    """
    width, lane = panel(one), lanes(one)
    n = rest_of_tile(count, lane)
    for j in range(0, count, GROUP):
        rows = min(GROUP, count - j)
        left = j // lane * lane
        edge = max(0, left - rest_of_tile(ROWS - 1, lane))
        line = scores + j * TILE
        product(
            one, rows, n - left, s.m, features + j * p_step, p_step, 1, weights + left, width, TILE, line + left, TILE
        )
        fill_before(one, line + edge, TILE, rows, n - edge, j - edge, one - one)
        sum_block(one, line + left, TILE, rows, n - left, side + ONE, 0, total + left)


@inlined
def undo_rise(one, s, kv, z, top, scales, ones):
    """Take back what `rescale` did."""
    for j in range(s.m_pad):
        factor = get(one, scales + j)
        if factor > 0 and factor < 1:
            put(one, top + j, get(one, top + j) + np.log2(factor))
        elif factor == 0:
            put(one, top + j, -np.inf * one)
            factor = one
        put(one, scales + j, one / factor)
    scale_sums(one, s, kv, z, 0, scales, ones)


def causal_scratch(one, s):
    """Items of scratch that `causal` needs."""
    keys = TILE * (2 * s.d_pad + 2 + s.e_pad + s.m_pad + lanes_of(one)) + 4 * s.m_pad + max(s.m_pad, s.e_pad)
    return keys + TILE * (s.d + s.m + TILE + 3 + s.e_pad)
