"""Kernels of bidirectional and causal attention.

Each works on some of the key heads, or of the queries, of a problem; `run.py` shares the rest out among threads. What
the keys of a head amount to is a block of *sums*: kv, z (m_pad) and top (m_pad), the same as a `State` but to base 2.
"""

from typing import NamedTuple

import numpy as np

from favorsharp_numba.kernels.near_scores import (
    add_near,
    near_keys,
    near_queries,
    raise_references,
    score_near,
    weigh_near,
)
from favorsharp_numba.kernels.tiles import (
    GROUP,
    ONE,
    ROWS,
    TILE,
    ZERO,
    absorb,
    absorb_scratch,
    add_keys,
    ahead_of,
    get,
    integer_at,
    is_finite,
    is_hidden,
    lanes,
    lanes_of,
    load_keys,
    load_queries,
    load_values,
    log_keys,
    log_queries,
    lows_of,
    lows_size,
    panel,
    put,
    raise_top,
    read_sums,
    rescale,
    rest_of_tile,
    scale_sums,
    store_points,
    usable_values,
    values_at,
    weigh,
)
from favorsharp_numba.vectors.compiling import inlined, jit
from favorsharp_numba.vectors.primitives import (
    exp_block,
    fill_before,
    product,
    product_add_ahead,
    sum_block,
)
from favorsharp_numba.vectors.rows import add_rows, copy, fill, invert, take_row, take_tops

SMALL_RISE = 40
"""How far the top of a feature may rise within a causal tile before the tile is cut: 2**-40 loses nothing."""
SMALLEST_TOTAL = 2.0**-60
"""The smallest sum of weights that a causal row is normalised by; below, its tile is cut."""


class Problem(NamedTuple):
    """The numbers and addresses that every kernel takes.

    Maps: packed constants of queries and keys (places) with the map of each key head at an address. Queries of key head
    b: `members[member_starts[b]] ...`; q and out are indexed by query head, k, v and mask by key head.
    `stats`, where it is not 0, takes 1 / total and the reference of every query, for a backward pass. `lows`, where it
    is not 0, are the low parts of kv and z of each head, kv_size + m_pad items, which go on in a state.
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
    lows: int


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
        lows = lows_of(one, s, p, task, scratch)
        absorb(
            one, s, key_side(s, p, head), k, v, mask, head, start, stop, kv, z, z + s.m_pad, lows, lows + p.kv_size,
            p.transposed, scratch + lows_size(s),
        )  # fmt: skip


@jit
def merge_segments(one, s, p, low, high, scratch):
    """Merge the segments of key heads low .. high into the first of each: too few of them to need low parts."""
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
            take_tops(one, s.m_pad, top, new_top, scales)
            scale_sums(one, s, kv, z, p.transposed, scales, ones)
            take_tops(one, s.m_pad, other_z + s.m_pad, new_top, scales)
            scale_sums(one, s, other, other_z, p.transposed, scales, ones)
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
    total = safe + 2 * TILE
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
                scores, largest = extra, extra + TILE * TILE
                n = rest_of_tile(count, lanes(one))
                for near in range(0, recent, TILE):
                    size = min(TILE, recent - near)
                    load_keys(one, s, keys, k, mask, key_head, near, size, near_rows, dense, near_factors)
                    load_values(one, s, keys, v, mask, key_head, near, size, near_values)
                    near_keys(one, s, keys, size, near_factors, near_norms)
                    copy(one, reference, n, largest)
                    score_near(
                        one, s, keys, columns, norms, n, near_rows, near_norms, size, -size, mask, key_head, near,
                        scores, largest,
                    )  # fmt: skip
                    raise_references(one, s, keys, n, largest, numerator, total, reference, safe)
                    weigh_near(one, keys, n, size, -size, safe, scores, total)
                    add_near(one, s, count, size, -size, scores, near_values, s.e_pad, False, numerator)
            if normalised:
                invert(one, total, count)
                keep_stats(one, p, head, start, count, total, reference)
            else:
                for t in range(count):
                    put(one, total + t, np.exp2(get(one, reference + t)))
            store_points(one, out, head, start, count, s.e, s.e_pad, total, numerator)


def read_scratch(one, s):
    """Items of scratch that `read_queries` needs."""
    return TILE * (3 * s.d_pad + s.d + s.m + 11 + 2 * s.e_pad) + max(s.e, TILE + 1) * TILE


@inlined
def has_seen(one, s, top):
    """Whether any key is in sums of this top."""
    largest = -np.inf
    for j in range(s.m):
        largest = max(largest, get(one, top + j))
    return largest > -np.inf


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
    loaded = factors + 2 * TILE
    features = loaded + TILE * s.e_pad
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
    own_lows = numerator + TILE * s.e_pad
    fill(one, ones, max(s.m_pad, s.e_pad), one)
    width = panel(one)
    usable = usable_values(one, s, v, mask, False)
    v_step = v.row // v.item if usable else s.e_pad
    for head in range(low, high):
        kv = p.sums + head * p.sums_size
        z = kv + p.kv_size
        top = z + s.m_pad
        lows = lows_of(one, s, p, head, own_lows)
        z_lows = lows + p.kv_size
        keys, queries = key_side(s, p, head), query_side(s, p, head)
        seen = has_seen(one, s, top)
        first_member, last_member = integer_at(p.member_starts + 8 * head), integer_at(p.member_starts + 8 * head + 8)
        start, size = 0, TILE
        while start < p.num_keys:
            count = min(size, p.num_keys - start)
            some = load_keys(one, s, keys, k, mask, head, start, count, points, dense, factors)
            values = values_at(one, s, keys, v, mask, head, start, count, usable, loaded)
            log_keys(
                one, s, keys, points, count, factors, features, p_step,
                ahead_of(q, integer_at(p.members + 8 * first_member), start, start + count, s.d),
            )  # fmt: skip
            rise = raise_top(one, s, keys, features, p_step, count, top, new_top, safe_top)
            if rise > SMALL_RISE and count > 1:
                size = max(1, count // 4)
                continue
            if rise > 0:
                rescale(one, s, top, new_top, kv, z, lows, z_lows, 0, scales, ones)
            fill(one, new_z, s.m_pad, one - one)
            exp_block(one, features, p_step, count, s.m_pad, keys + ZERO, 0, safe_top, ones, 0, new_z)
            after = min(p.num_keys, start + count + TILE)
            first_seen = 0
            if not seen:
                while first_seen < count and is_hidden(mask, head, start + first_seen):
                    first_seen += 1
            finite = is_finite(one, keys, values, v_step, count, s.e_pad, numerator)
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
                        v_step, numerator + t * s.e_pad, s.e_pad,
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
                    undo_rise(one, s, kv, z, top, lows, z_lows, scales, ones)
                size = max(1, count // 4)
                continue
            next_keys = ahead_of(k, head, start + count, after, s.d)
            add_keys(one, s, features, p_step, values, v_step, count, kv, lows, 0, next_keys)
            take_row(one, s.m_pad, new_z, z, z_lows)
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
def undo_rise(one, s, kv, z, top, lows, z_lows, scales, ones):
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
    scale_sums(one, s, lows, z_lows, 0, scales, ones)


def causal_scratch(one, s):
    """Items of scratch that `causal` needs."""
    keys = TILE * (2 * s.d_pad + 2 + s.e_pad + s.m_pad + lanes_of(one)) + 4 * s.m_pad + max(s.m_pad, s.e_pad)
    return keys + TILE * (s.d + s.m + TILE + 3 + s.e_pad) + lows_size(s)


def gather_scratch(one, s):
    """Items of scratch that `gather_keys` needs."""
    return lows_size(s) + absorb_scratch(one, s)
