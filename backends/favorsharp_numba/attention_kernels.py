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
    product,
    product_add,
    sum_block,
)
from favorsharp_numba.rows import add_rows
from favorsharp_numba.tiles import (
    ALPHA,
    NEAR_KEYS,
    NO_MASK,
    ONE,
    TILE,
    ZERO,
    absorb,
    add_keys,
    copy,
    fill,
    fill_near_scratch,
    get,
    integer_at,
    invert,
    is_finite,
    is_hidden,
    lanes,
    lanes_of,
    load_keys,
    load_near_keys,
    load_points,
    load_queries,
    log_keys,
    log_queries,
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
    near_rows = norms + TILE
    near_norms = near_rows + NEAR_KEYS * s.d_pad
    near_values = near_norms + NEAR_KEYS + TILE
    extra = near_values + NEAR_KEYS * s.e_pad
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
            log_queries(one, s, side, columns, count, factors, weights)
            weigh(one, s, side, weights, count, z + s.m_pad, z, reference, safe, total)
            read_sums(one, s, weights, count, kv, p.transposed, numerator, extra)
            if recent > 0:
                keys = key_side(s, p, key_head)
                near_queries(one, s, side, columns, count, factors, norms)
                fill_near_scratch(one, s, extra)
                for near in range(0, recent, TILE):
                    size = min(TILE, recent - near)
                    load_near_keys(
                        one, s, keys, k, v, mask, key_head, near, size, near_rows, near_norms, near_values
                    )  # fmt: skip
                    read_near(
                        one, s, keys, columns, norms, 0, count, near_rows, near_norms, near_values, near, size, mask,
                        key_head, 0, numerator, total, reference, extra,
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
    near = NEAR_KEYS * (s.d_pad + 1 + s.e_pad) + TILE
    return TILE * (2 * s.d_pad + s.d + s.m + 6 + s.e_pad) + near + max(s.e * TILE, near_scratch(s))


@inlined
def has_seen(one, s, top):
    """Whether any key is in sums of this top."""
    largest = -np.inf
    for j in range(s.m):
        largest = max(largest, get(one, top + j))
    return largest > -np.inf


SLOTS = 4
"""Heads of queries that `windowed` works on together."""


@inlined
def slot_of(s, slots, i):
    """Where what is kept of a tile of queries lies: columns, factors, norms, weights, numerator, total, reference."""
    columns = slots + i * slot_size(s)
    factors = columns + TILE * s.d
    norms = factors + 2 * TILE
    weights = norms + TILE
    numerator = weights + TILE * s.m
    total = numerator + TILE * s.e_pad
    return columns, factors, norms, weights, numerator, total, total + TILE


@register_jitable
def slot_size(s):
    return TILE * (s.d + s.m + s.e_pad + 5)


@jit
def windowed(one, s, p, q, k, v, mask, out, work, low, high, scratch):
    """Attention with near blocks scored exactly, for key heads low .. high.

    Positions count from the first key; the queries are those of positions first_query and on. A tile holds as many
    whole blocks as there is room for, or a part of one; each of its blocks reads the sums as they are at that block.
    What a query has read of the blocks before is kept in `work` (e_pad + 2 items a query) until the pass over the
    blocks after it.
    """
    p_step = s.m_pad + lanes(one)
    points = scratch
    dense = points + TILE * s.d_pad
    key_factors = dense + TILE * s.d_pad
    values = key_factors + 2 * TILE
    features = values + TILE * s.e_pad
    near_rows = features + TILE * p_step
    near_norms = near_rows + NEAR_KEYS * s.d_pad
    near_values = near_norms + NEAR_KEYS + TILE
    safe = near_values + NEAR_KEYS * s.e_pad
    slots = safe + TILE
    of_keys = slots + SLOTS * slot_size(s)
    of_near = of_keys + take_keys_scratch(s)
    fill(one, of_keys + 3 * s.m_pad, max(s.m_pad, s.e_pad), one)
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
        size = min(TILE, held * w)
        tiles = (blocks + held - 1) // held
        seen = has_seen(one, s, top)
        loaded, some = -1, False
        for step in range(tiles if p.causal else 2 * tiles):
            after = step >= tiles
            block = (2 * tiles - 1 - step if after else step) * held
            parts = min(held, blocks - block)
            if step == tiles:
                fill(one, kv, p.kv_size + s.m_pad, one - one)
                fill(one, top, s.m_pad, -np.inf * one)
                loaded = -1
            far = block + 2 < blocks if after else seen or block + parts > 2
            stop = min(length, (block + parts) * w)
            for first in range(block * w, stop, size):
                last = min(first + size, stop)
                for chunk in range(members, members_end, SLOTS):
                    heads = min(SLOTS, members_end - chunk)
                    for i in range(heads):
                        f = integer_at(p.members + 8 * (chunk + i))
                        load_slot(
                            one, s, p, queries, q, f, first, last, parts, pad, far, points, dense, slot_of(s, slots, i)
                        )  # fmt: skip
                    for i in range(parts):
                        part = parts - 1 - i if after else i
                        entering = block + part + 2 if after else block + part - 2
                        if chunk == members and first == block * w and 0 <= entering < blocks:
                            end = min(length, (entering + 1) * w)
                            for key in range(entering * w, end, TILE):
                                start = entering // held * held * w if held > 1 else key
                                if start != loaded:
                                    loaded = start
                                    count = min(size, length - start) if held > 1 else min(TILE, end - start)
                                    some = load_keys(
                                        one, s, keys, k, v, mask, head, start, count, points, dense, key_factors, values
                                    )  # fmt: skip
                                    log_keys(one, s, keys, points, count, key_factors, features, p_step)
                                if some:
                                    take_keys(
                                        one, s, keys, features + (key - start) * p_step, p_step,
                                        values + (key - start) * s.e_pad, min(TILE, end - key), kv, z, top, 0, of_keys,
                                    )  # fmt: skip
                        begin, end = bounds(p, first, last, part)
                        for j in range(heads if begin < end else 0):
                            f = integer_at(p.members + 8 * (chunk + j))
                            _, _, _, weights, numerator, total, reference = slot_of(s, slots, j)
                            column, count = part * pad, end - begin
                            row = numerator + column * s.e_pad
                            if far:
                                weigh(
                                    one, s, queries, weights + column, count, top, z, reference + column, safe,
                                    total + column,
                                )  # fmt: skip
                                read_sums(one, s, weights + column, count, kv, 0, row, of_near)
                            line = work + (f * p.num_queries + begin - p.first_query) * (s.e_pad + 2)
                            if after:
                                merge_kept(one, s, count, row, total + column, reference + column, line)
                            elif not p.causal:
                                keep(one, s, count, row, total + column, reference + column, line)
                    if not p.causal and not after:
                        continue
                    nearest = last if p.causal else min(length, (block + parts + 1) * w)
                    for start in range(max(0, (block - 1) * w), nearest, NEAR_KEYS):
                        loaded_near = min(NEAR_KEYS, nearest - start)
                        load_near_keys(
                            one, s, keys, k, v, mask, head, start, loaded_near, near_rows, near_norms, near_values
                        )  # fmt: skip
                        for i in range(heads):
                            columns, _, norms, _, numerator, total, reference = slot_of(s, slots, i)
                            for part in range(parts):
                                begin, end = bounds(p, first, last, part)
                                column = part * pad
                                until = min(start + loaded_near, end if p.causal else (block + part + 2) * w)
                                for key in range(
                                    max(start, (block + part - 1) * w), until if begin < end else 0, TILE
                                ):  # fmt: skip
                                    place = key - start
                                    read_near(
                                        one, s, keys, columns + column, norms + column, begin, end - begin,
                                        near_rows + place * s.d_pad, near_norms + place,
                                        near_values + place * s.e_pad, key, min(TILE, until - key), mask, head,
                                        p.causal, numerator + column * s.e_pad, total + column, reference + column,
                                        of_near,
                                    )  # fmt: skip
                    for i in range(heads):
                        f = integer_at(p.members + 8 * (chunk + i))
                        _, _, _, _, numerator, total, reference = slot_of(s, slots, i)
                        for part in range(parts):
                            begin, end = bounds(p, first, last, part)
                            column, count = part * pad, end - begin
                            if count > 0:
                                place = begin - p.first_query
                                invert(one, total + column, count)
                                keep_stats(one, p, f, place, count, total + column, reference + column)
                                store_points(
                                    one, out, f, place, count, s.e, s.e_pad, total + column,
                                    numerator + column * s.e_pad,
                                )  # fmt: skip


@inlined
def bounds(p, first, last, part):
    """Where the queries of a block of a tile begin and end."""
    start = first + part * p.window
    return max(start, p.first_query), min(last, start + p.window)


@inlined
def load_slot(one, s, p, side, q, head, first, last, parts, pad, far, points, dense, slot):
    """Load a tile of queries, a block every `pad` columns: log features where `far`, else nothing read, and near."""
    columns, factors, norms, weights, numerator, total, reference = slot
    for part in range(parts):
        begin, end = bounds(p, first, last, part)
        if begin < end:
            load_points(
                one, q, NO_MASK, head, begin - p.first_query, end - begin, s.d, s.d_pad, side + ALPHA, side + s.center,
                points + part * pad * s.d_pad,
            )  # fmt: skip
    count = (parts - 1) * (pad - p.window) + last - first
    turn_queries(one, s, side, count, far, points, dense, factors, columns)
    if far:
        log_queries(one, s, side, columns, count, factors, weights)
    else:  # factors are 0, or NaN for a query that is not finite
        n = rest_of_tile(count, lanes(one))
        fill(one, reference, n, -np.inf * one)
        copy(one, factors, n, total)
        fill(one, numerator, count * s.e_pad, one - one)
    near_queries(one, s, side, columns, count, factors, norms)


@inlined
def keep(one, s, count, numerator, total, reference, line):
    """Put aside what a tile of queries has read."""
    for t in range(count):
        row = line + t * (s.e_pad + 2)
        for j in range(s.e_pad):
            put(one, row + j, get(one, numerator + t * s.e_pad + j))
        put(one, row + s.e_pad, get(one, total + t))
        put(one, row + s.e_pad + 1, get(one, reference + t))


@inlined
def merge_kept(one, s, count, numerator, total, reference, line):
    """Merge what was put aside into what the queries have read since."""
    for t in range(count):
        row = line + t * (s.e_pad + 2)
        old, new = get(one, row + s.e_pad + 1), get(one, reference + t)
        top = max(old, new)
        safe = top if top > -np.inf else one - one
        first, second = np.exp2(old - safe), np.exp2(new - safe)
        for j in range(s.e_pad):
            place = numerator + t * s.e_pad + j
            put(one, place, get(one, place) * second + get(one, row + j) * first)
        put(one, total + t, get(one, total + t) * second + get(one, row + s.e_pad) * first)
        put(one, reference + t, top)


def windowed_scratch(one, s):
    """Items of scratch that `windowed` needs."""
    keys = TILE * (2 * s.d_pad + 3 + s.e_pad + s.m_pad + lanes_of(one)) + take_keys_scratch(s)
    return keys + NEAR_KEYS * (s.d_pad + 1 + s.e_pad) + TILE + SLOTS * slot_size(s) + near_scratch(s)


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
    fill(one, scores, TILE * TILE, one - one)
    width = panel(one)
    for head in range(low, high):
        kv = p.sums + head * p.sums_size
        z = kv + p.kv_size
        top = z + s.m_pad
        keys, queries = key_side(s, p, head), query_side(s, p, head)
        seen = has_seen(one, s, top)
        start, size = 0, TILE
        while start < p.num_keys:
            count = min(size, p.num_keys - start)
            some = load_keys(one, s, keys, k, v, mask, head, start, count, points, dense, factors, values)
            log_keys(one, s, keys, points, count, factors, features, p_step)
            rise = raise_top(one, s, keys, features, p_step, count, top, new_top, safe_top)
            if rise > SMALL_RISE and count > 1:
                size = max(1, count // 4)
                continue
            if rise > 0:
                rescale(one, s, top, new_top, kv, z, 0, scales, ones)
            fill(one, new_z, s.m_pad, one - one)
            exp_block(one, features, p_step, count, s.m_pad, keys + ZERO, 0, safe_top, ones, 0, new_z)
            first_seen = 0
            if not seen:
                while first_seen < count and is_hidden(mask, head, start + first_seen):
                    first_seen += 1
            finite = is_finite(one, keys, values, s.e_pad, count, numerator)
            n = (count + lanes(one) - 1) // lanes(one) * lanes(one)
            exact = True
            for member in range(integer_at(p.member_starts + 8 * head), integer_at(p.member_starts + 8 * head + 8)):
                f = integer_at(p.members + 8 * member)
                load_queries(one, s, queries, q, f, start, count, False, points, dense, factors, columns)
                log_queries(one, s, queries, columns, count, factors, weights)
                weigh(one, s, queries, weights, count, top, z, reference, safe, total)
                score_pairs(one, s, features, p_step, weights, count, scores)
                sum_block(one, scores, TILE, count, n, keys + ONE, 0, total)
                if count > 1:
                    for t in range(first_seen, count):
                        exact = exact and not get(one, total + t) < SMALLEST_TOTAL
                    if not exact:
                        break
                step = 6 if finite else 1  # a value that is not finite must not meet the weight 0 of a query before it
                for t in range(0, count, step):
                    product(
                        one, min(step, count - t), s.e_pad, min(t + step, count), scores + t, 1, TILE, values, width,
                        s.e_pad, numerator + t * s.e_pad, s.e_pad,
                    )  # fmt: skip
                product_add(one, count, s.e_pad, s.m, weights, 1, TILE, kv, width, s.e_pad, numerator, s.e_pad)
                invert(one, total, count)
                keep_stats(one, p, f, start, count, total, reference)
                store_points(one, out, f, start, count, s.e, s.e_pad, total, numerator)
            if not exact:
                if rise > 0:
                    undo_rise(one, s, kv, z, top, scales, ones)
                size = max(1, count // 4)
                continue
            add_keys(one, s, features, p_step, values, count, kv, 0)
            add_rows(one, z, s.m_pad, new_z, s.m_pad, 1, one)
            seen = seen or some
            start += count
            size = TILE if size == TILE or start % TILE == 0 else size


@inlined
def score_pairs(one, s, features, p_step, weights, count, scores):
    """scores[j, i] of key j and query i >= j by their features; 0 before."""
    width, lane = panel(one), lanes(one)
    n = (count + lane - 1) // lane * lane
    for j in range(0, count, 12):
        rows = min(12, count - j)
        left = j // lane * lane
        product(
            one, rows, n - left, s.m, features + j * p_step, p_step, 1, weights + left, width, TILE,
            scores + j * TILE + left, TILE,
        )  # fmt: skip
        for row in range(j, j + rows):
            fill(one, scores + row * TILE, row, one - one)


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
