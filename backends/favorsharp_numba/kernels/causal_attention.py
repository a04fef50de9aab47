"""The kernel of causal attention without a window; `windowed_attention.py` has the one with a window."""

from collections import namedtuple
from typing import NamedTuple

from favorsharp_numba.kernels.arguments import GROUP, ONE, ROWS, TILE, ZERO, is_hidden, key_side, query_side
from favorsharp_numba.kernels.sums import (
    add_keys,
    has_seen,
    keep_stats,
    lows_size,
    raise_top,
    rescale,
    sums_with_lows,
    undo_rise,
    weigh,
)
from favorsharp_numba.kernels.tiles import (
    ahead_of,
    is_finite,
    load_keys,
    load_queries,
    log_keys,
    log_queries,
    rest_of_tile,
    store_points,
    usable_values,
    values_at,
)
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import exp_block, fill_before, sum_block
from favorsharp_numba.vectors.compiling import inlined
from favorsharp_numba.vectors.items import get, integer_at, lanes, panel
from favorsharp_numba.vectors.products import product, product_add_ahead
from favorsharp_numba.vectors.rows import fill, invert, take_row

SMALL_RISE = 40
"""How far the top of a feature may rise within a causal tile, in bits, before the tile is cut: 2**-40 loses nothing."""
SMALLEST_TOTAL = 2.0**-60
"""The smallest sum of weights that a row of a causal tile is divided by; if one is smaller, the tile is cut."""

CausalSpace = namedtuple(
    "CausalSpace",
    "points dense factors loaded features new_top safe_top scales new_z ones columns weights scores reference safe "
    "total numerator lows end",
)


@inlined
def causal_space(s, points):
    """The parts of the workspace of `causal`."""
    dense = points + TILE * s.d_pad
    factors = dense + TILE * s.d_pad
    loaded = factors + 2 * TILE
    features = loaded + TILE * s.e_pad
    new_top = features + TILE * s.feature_step
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
    lows = numerator + TILE * s.e_pad
    end = lows + lows_size(s)
    return CausalSpace(
        points, dense, factors, loaded, features, new_top, safe_top, scales, new_z, ones, columns, weights, scores,
        reference, safe, total, numerator, lows, end,
    )  # fmt: skip


class Tile(NamedTuple):
    """A tile of positions: its first one and their number, the first key that may be visible, and its values.

    `values` is the place of the first value, and `v_step` the distance of values; `finite` says whether all are finite.
    """

    start: int
    length: int
    first_seen: int
    values: int
    v_step: int
    finite: bool


@kernel(causal_space)
def causal(one, s, p, q, k, v, mask, out, low, high, scratch):
    """Attention of every query to the keys up to its own, for key heads low .. high.

    The keys of a tile and the sums before it share one top, which may be larger than what an early query of the tile
    can see. If that would cost accuracy (a large rise, a small total), the tile is computed again in shorter pieces; in
    a piece of one point, the top is attained by a key that its query sees.
    """
    w = causal_space(s, scratch)
    step = s.feature_step
    fill(one, w.ones, max(s.m_pad, s.e_pad), one)
    usable = usable_values(one, s, v, mask, False)
    v_step = v.row // v.item if usable else s.e_pad
    for head in range(low, high):
        sums = sums_with_lows(one, s, p, head, w.lows)
        keys, queries = key_side(s, p, head), query_side(s, p, head)
        seen = has_seen(one, s, sums.top)
        members, members_end = integer_at(p.member_starts + 8 * head), integer_at(p.member_starts + 8 * head + 8)
        start, size = 0, TILE
        while start < p.num_keys:
            count = min(size, p.num_keys - start)
            some = load_keys(one, s, keys, k, mask, head, start, count, w.points, w.dense, w.factors)
            values = values_at(one, s, keys, v, mask, head, start, count, usable, w.loaded)
            next_queries = ahead_of(q, integer_at(p.members + 8 * members), start, start + count, s.d)
            log_keys(one, s, keys, w.points, count, w.factors, w.features, step, next_queries)
            rise = raise_top(one, s, keys, w.features, step, count, sums.top, w.new_top, w.safe_top)
            if rise > SMALL_RISE and count > 1:
                size = max(1, count // 4)
                continue
            if rise > 0:
                rescale(one, s, sums, w.new_top, 0, w.scales, w.ones)
            fill(one, w.new_z, s.m_pad, one - one)
            exp_block(one, w.features, step, count, s.m_pad, keys + ZERO, 0, w.safe_top, w.ones, 0, w.new_z)
            first_seen = 0 if seen else leading_hidden(mask, head, start, count)
            finite = is_finite(one, keys, values, v_step, count, s.e_pad, w.numerator)
            tile = Tile(start, count, first_seen, values, v_step, finite)
            if not read_tile(one, s, p, keys, queries, sums, tile, q, v, out, head, members, members_end, w):
                if rise > 0:
                    undo_rise(one, s, sums, w.scales, w.ones)
                size = max(1, count // 4)
                continue
            next_keys = ahead_of(k, head, start + count, min(p.num_keys, start + count + TILE), s.d)
            add_keys(one, s, w.features, step, values, v_step, count, sums, 0, next_keys)
            take_row(one, s.m_pad, w.new_z, sums.z, sums.z_lows)
            seen = seen or some
            start += count
            size = TILE if size == TILE or start % TILE == 0 else size


@inlined
def leading_hidden(mask, head, start, count):
    """The number of hidden keys at the beginning of a tile."""
    number = 0
    while number < count and is_hidden(mask, head, start + number):
        number += 1
    return number


@inlined
def read_tile(one, s, p, keys, queries, sums, tile, q, v, out, head, members, members_end, w):
    """The queries of a tile, of all query heads, read the sums and the keys of the tile up to their own.

    Return False, with some results not written, if a total is too small for this tile.
    """
    start, count = tile.start, tile.length
    exact = True
    for member in range(members, members_end):
        f = integer_at(p.members + 8 * member)
        load_queries(one, s, queries, q, f, start, count, False, w.points, w.dense, w.factors, w.columns)
        target = ahead_of(out, f, start, start + count, s.e)
        log_queries(one, s, queries, w.columns, count, w.factors, w.weights, target)
        weigh(one, s, queries, w.weights, count, sums.top, sums.z, w.reference, w.safe, w.total)
        score_pairs(one, s, keys, w.features, w.weights, count, w.scores, w.total)
        if count > 1:
            for t in range(tile.first_seen, count):
                exact = exact and not get(one, w.total + t) < SMALLEST_TOTAL
            if not exact:
                break
        read_values(one, s, tile, w.scores, w.numerator)
        if member + 1 < members_end:
            coming = ahead_of(q, integer_at(p.members + 8 * (member + 1)), start, start + count, s.d)
        else:
            coming = ahead_of(v, head, start + count, min(p.num_keys, start + count + TILE), s.e)
        product_add_ahead(
            one, count, s.e_pad, s.m, w.weights, 1, TILE, sums.kv, panel(one), s.e_pad, w.numerator, s.e_pad, coming
        )
        invert(one, w.total, count)
        keep_stats(one, p, f, start, count, w.total, w.reference)
        store_points(one, out, f, start, count, s.e, s.e_pad, w.total, w.numerator)
    return exact


@inlined
def score_pairs(one, s, side, features, weights, count, scores, total):
    """scores[j, i] = the score of key j and query i >= j by their features; the totals take the sums over j.

    The scores of the few queries before j that read their values together with query j are 0.
    """
    width, lane = panel(one), lanes(one)
    n = rest_of_tile(count, lane)
    for j in range(0, count, GROUP):
        rows = min(GROUP, count - j)
        left = j // lane * lane
        edge = max(0, left - rest_of_tile(ROWS - 1, lane))
        line = scores + j * TILE
        product(
            one, rows, n - left, s.m, features + j * s.feature_step, s.feature_step, 1, weights + left, width, TILE,
            line + left, TILE,
        )  # fmt: skip
        fill_before(one, line + edge, TILE, rows, n - edge, j - edge, one - one)
        sum_block(one, line + left, TILE, rows, n - left, side + ONE, 0, total + left)


@inlined
def read_values(one, s, tile, scores, numerator):
    """numerator = scores times the values of the keys up to the query's own."""
    step = ROWS if tile.finite else 1  # an infinite value times the weight 0 of a query before it would be NaN
    for t in range(0, tile.length, step):
        product(
            one, min(step, tile.length - t), s.e_pad, min(t + step, tile.length), scores + t, 1, TILE, tile.values,
            panel(one), tile.v_step, numerator + t * s.e_pad, s.e_pad,
        )  # fmt: skip
