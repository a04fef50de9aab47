"""The kernels of `decode_step`, and of `update` with few keys.

A token does not change the sums of a state. Its features and its value are kept, and its query reads the sums of an
earlier state and what is kept since then (`turn`). `keep` keeps several keys without a query. When SPAN tokens are
kept, and whenever someone wants the sums, `fold` adds the kept tokens to those of the earlier state, with low parts.
"""

from collections import namedtuple
from typing import NamedTuple

import numpy as np

from favorsharp_numba.kernels.arguments import ALPHA, NO_MASK, ONE, TILE, ZERO, Points, Sizes
from favorsharp_numba.kernels.sums import scale_sums
from favorsharp_numba.kernels.tiles import load_points, log_factors, log_keys, store_points, zero_or_nan
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import exp_block, max_block, scale_block, sum_block
from favorsharp_numba.vectors.compiling import inlined
from favorsharp_numba.vectors.dots import total_of
from favorsharp_numba.vectors.emitter import LOG2E
from favorsharp_numba.vectors.items import get, integer_at, item_size, panel, put
from favorsharp_numba.vectors.products import NOTHING, product_take
from favorsharp_numba.vectors.rows import copy, fill, take_row
from favorsharp_numba.vectors.tokens import mix_rows, row_dots, token_features, token_weights

HEADS = 12
"""The number of heads with the same map whose log features are computed together: the map is read once for all."""

SPAN = 32
"""The number of tokens that are kept. With more, queries read more rows; with fewer, sums take tokens more often."""
HIGHEST = 40.0
"""How far the feature of a kept token may rise above the top of the sums, in bits."""

# A plan is a list of integers: the fields of `Sizes`; the places of the packed constants of queries and of keys, and
# the address of `map_of`; for q, k, v and out the fields of `Points` other than `base`; and the number of queries that
# read each head.
NUM_SIZES = len(Sizes._fields)
MAPS = NUM_SIZES
POINTS = MAPS + 3
POINTS_SIZE = len(Points._fields) - 1
QUERIES = POINTS + 4 * POINTS_SIZE
PLAN_SIZE = QUERIES + 1


@inlined
def sizes_at(plan):
    """The sizes in a plan."""
    return Sizes(
        integer_at(plan), integer_at(plan + 8), integer_at(plan + 16), integer_at(plan + 24), integer_at(plan + 32),
        integer_at(plan + 40), integer_at(plan + 48), integer_at(plan + 56), integer_at(plan + 64),
        integer_at(plan + 72), integer_at(plan + 80), integer_at(plan + 88), integer_at(plan + 96),
        integer_at(plan + 104), integer_at(plan + 112), integer_at(plan + 120), integer_at(plan + 128),
        integer_at(plan + 136), integer_at(plan + 144), integer_at(plan + 152),
    )  # fmt: skip


@inlined
def points_at(plan, number, base):
    """The array of a number in a plan, at an address."""
    line = plan + 8 * (POINTS + POINTS_SIZE * number)
    return Points(
        integer_at(line), base, integer_at(line + 8), integer_at(line + 16), integer_at(line + 24),
        integer_at(line + 32),
    )  # fmt: skip


class Kept(NamedTuple):
    """The memory of kept tokens, which are not in the sums: SPAN rows of features (m_pad) and values (e_pad) a head.

    `marks` has an item that is 1 if a token's features exceeded HIGHEST in any head, and an item for each head. The row
    of such a token holds its log features, to base 2.
    """

    marks: int
    features: int
    values: int


TurnSpace = namedtuple(
    "TurnSpace", "points dense factors keys queries tops z zeros ignored numerator total scores ones end"
)


@inlined
def turn_space(s, points):
    """The parts of the workspace of `turn`."""
    dense = points + HEADS * s.d_pad
    factors = dense + HEADS * s.d_pad
    keys = factors + 2 * TILE
    queries = keys + HEADS * s.m_pad
    tops = queries + HEADS * s.m_pad
    z = tops + s.m_pad
    zeros = z + s.m_pad
    ignored = zeros + s.m_pad
    numerator = ignored + s.m_pad
    total = numerator + s.e_pad
    scores = total + TILE
    ones = scores + TILE
    end = ones + s.m_pad
    return TurnSpace(
        points, dense, factors, keys, queries, tops, z, zeros, ignored, numerator, total, scores, ones, end
    )


@kernel(turn_space)
def turn(one, plan, q, k, v, out, kv, z, c, marks, features, values, position, low, high, scratch):
    """One token for heads low .. high: a key, a value, and one query or several, which read it and the tokens before.

    `plan` is the address of a plan, which is the same for all tokens. q, k, v, out, kv, z and c are addresses of
    arrays, of which those of the state have no gaps, and c are natural logarithms. The token goes to the row `position`
    of the places in `Kept`. All arguments are plain integers, because these are passed in the least time.
    """
    s = sizes_at(plan)
    w = turn_space(s, scratch)
    kept = Kept(marks, features, values)
    queries_from, keys_from = points_at(plan, 0, q), points_at(plan, 1, k)
    values_from, out_to = points_at(plan, 2, v), points_at(plan, 3, out)
    query_side, key_side = integer_at(plan + 8 * MAPS), integer_at(plan + 8 * (MAPS + 1))
    map_of = integer_at(plan + 8 * (MAPS + 2))
    fill(one, w.zeros, s.m_pad, one - one)
    fill(one, w.ignored, s.m_pad, one - one)
    fill(one, w.z, s.m_pad, one - one)
    fill(one, w.tops, s.m_pad, -np.inf * one)
    fill(one, w.ones, s.m_pad, one)
    num_queries = integer_at(plan + 8 * QUERIES)
    first = low
    while first < high:
        number = integer_at(map_of + 8 * first)
        count = 1
        while count < HEADS and first + count < high and integer_at(map_of + 8 * (first + count)) == number:
            count += 1
        side = key_side + number * s.total
        load_token(one, keys_from, first, count, 0, s.d, s.d_pad, side + ALPHA, side + s.center, w.points, s.d_pad)
        place, step = values + (first * SPAN + position) * s.e_pad, SPAN * s.e_pad
        load_token(one, values_from, first, count, 0, s.e, s.e_pad, side + ONE, side + s.total - s.e_pad, place, step)
        log_factors(one, s, side, w.points, count, w.dense, w.factors)
        log_keys(one, s, side, w.points, count, w.factors, w.keys, s.m_pad, NOTHING)
        for t in range(count):
            keep_features(one, s, first + t, w.keys + t * s.m_pad, 1, place_at(one, c), kept, position, w.tops, w.z)
        side = query_side + number * s.total
        read_tokens(one, s, side, queries_from, out_to, first, count, num_queries, kv, z, c, kept, position, w)
        first += count


@inlined
def read_tokens(one, s, side, q, out, first, count, num_queries, kv, z, c, kept, position, w):
    """The results of the queries of some heads with the same map."""
    for row in range(num_queries):
        load_token(one, q, first, count, row, s.d, s.d_pad, side + ALPHA, side + s.center, w.points, s.d_pad)
        zero_or_nan(one, s, side, w.points, count, w.factors)
        log_keys(one, s, side, w.points, count, w.factors, w.queries, s.m_pad, NOTHING)
        for t in range(count):
            read_head(one, s, side, first + t, w.queries + t * s.m_pad, kv, z, c, kept, position + 1, w)
            store_points(one, out, first + t, row, 1, s.e, s.e_pad, w.ones, w.numerator)


@inlined
def keep_features(one, s, head, logarithms, count, c, kept, position, tops, room):
    """Keep the features of some tokens, given by their log features, or the largest of these if one rises too high.

    `tops` has -inf behind the m tops that it receives; `room` has m_pad items.
    """
    row, highest = kept.features + (head * SPAN + position) * s.m_pad, logarithms
    copy(one, c + head * s.m, s.m, tops)
    if count > 1:
        highest = room
        copy(one, logarithms, s.m_pad, room)
        put(one, row, one - one)
        max_block(one, logarithms, s.m_pad, count, s.m_pad, row, 0, room, room)
    if token_features(one, s.m_pad, s.m, tops, highest, row) > HIGHEST:
        copy(one, highest, s.m_pad, row)
        put(one, kept.marks, one)
        put(one, kept.marks + 1 + head, one)
    elif count > 1:
        for t in range(count):
            token_features(one, s.m_pad, s.m, tops, logarithms + t * s.m_pad, row + t * s.m_pad)


@inlined
def read_head(one, s, side, head, query, kv, z, c, kept, count, w):
    """The numerator in the workspace = what a query, given by its log features, reads from the sums and kept tokens.

    The weights are divided by their total first, so that no product is larger than a value or a sum.
    """
    line = head * s.m
    copy(one, place_at(one, c) + line, s.m, w.tops)
    copy(one, place_at(one, z) + line, s.m, w.z)
    reference = token_weights(one, s.m_pad, w.tops, query)
    put(one, w.total, one - one - reference if reference > -np.inf * one else one - one)
    exp_block(one, query, 0, 1, s.m_pad, w.total, 0, w.zeros, side + ZERO, 0, w.ignored)
    rows = kept.features + head * SPAN * s.m_pad
    row_dots(one, rows, s.m_pad, count, s.m_pad, query, w.scores)
    row_dots(one, w.z, s.m_pad, 1, s.m_pad, query, w.total)
    total = get(one, w.total) + total_of(one, w.scores, count)
    inverse = one / total if total != 0 else total
    for t in range(count):
        put(one, w.scores + t, get(one, w.scores + t) * inverse)
    put(one, w.total, inverse)
    scale_block(one, query, s.m_pad, 1, s.m_pad, w.total, w.ones, query, s.m_pad)
    mix_rows(one, place_at(one, kv) + line * s.e, s.m, s.e, query, w.numerator)
    sum_block(one, kept.values + head * SPAN * s.e_pad, s.e_pad, count, s.e_pad, w.scores, 1, w.numerator)


@inlined
def load_token(one, points, first, count, row, size, pad, factor, offset, rows, step):
    """As `load_points`, for one point of each of some heads; their rows are `step` items apart."""
    for t in range(count):
        load_points(one, points, NO_MASK, first + t, row, 1, size, pad, factor, offset, rows + t * step)


@inlined
def place_at(one, address):
    """The place at an address."""
    return address // item_size(one)


# Keys without a query ------------------------------------------------------------------------------------------------

KeepSpace = namedtuple("KeepSpace", "points dense factors logarithms tops room end")


@inlined
def keep_space(s, points):
    """The parts of the workspace of `keep`."""
    dense = points + SPAN * s.d_pad
    factors = dense + SPAN * s.d_pad
    logarithms = factors + 2 * TILE
    tops = logarithms + SPAN * s.m_pad
    room = tops + s.m_pad
    end = room + s.m_pad
    return KeepSpace(points, dense, factors, logarithms, tops, room, end)


@kernel(keep_space)
def keep(one, s, key_sides, map_of, k, v, first, count, c, marks, features, values, position, low, high, scratch):
    """Keep `count` keys and values of heads low .. high, from the number `first` on, in the rows from `position` on.

    k and v are `Points`, `key_sides` the place of the packed constants of keys, `map_of` an address as in `Problem`, c
    the address of the tops of the sums, as in `turn`, and the others are the places in `Kept`.
    """
    w = keep_space(s, scratch)
    kept = Kept(marks, features, values)
    fill(one, w.tops, s.m_pad, -np.inf * one)
    for head in range(low, high):
        side = key_sides + integer_at(map_of + 8 * head) * s.total
        rows = values + (head * SPAN + position) * s.e_pad
        load_points(one, k, NO_MASK, head, first, count, s.d, s.d_pad, side + ALPHA, side + s.center, w.points)
        load_points(one, v, NO_MASK, head, first, count, s.e, s.e_pad, side + ONE, side + s.total - s.e_pad, rows)
        log_factors(one, s, side, w.points, count, w.dense, w.factors)
        log_keys(one, s, side, w.points, count, w.factors, w.logarithms, s.m_pad, NOTHING)
        keep_features(one, s, head, w.logarithms, count, place_at(one, c), kept, position, w.tops, w.room)


# Sums take kept tokens -----------------------------------------------------------------------------------------------

FoldSpace = namedtuple("FoldSpace", "kv z lows z_lows features part largest factors ones zero end")


@inlined
def fold_space(s, kv):
    """The parts of the workspace of `fold`."""
    z = kv + s.m * s.e_pad
    lows = z + s.m_pad
    z_lows = lows + s.m * s.e_pad
    features = z_lows + s.m_pad
    part = features + SPAN * s.feature_step
    largest = part + s.m_pad
    factors = largest + s.m_pad
    ones = factors + s.m_pad
    zero = ones + max(s.m_pad, s.e_pad, TILE)
    end = zero + TILE
    return FoldSpace(kv, z, lows, z_lows, features, part, largest, factors, ones, zero, end)


@kernel(fold_space)
def fold(
    one, s, kv, z, c, kv_low, z_low, new_kv, new_z, new_c, new_kv_low, new_z_low, marks, features, values, count,
    low, high, scratch,
):  # fmt: skip
    """The sums of heads low .. high take the first `count` kept tokens. The first arguments are addresses of arrays.

    kv_low and z_low are 0 if the state has no low parts; new_kv_low and new_z_low are 0 if they are not wanted. If
    `marks` is not 0, the tops of the heads that it marks also rise to the log features of the next kept token.
    """
    w = fold_space(s, scratch)
    whole = s.e == s.e_pad
    fill(one, w.kv, w.features - w.kv, one - one)
    fill(one, w.ones, max(s.m_pad, s.e_pad, TILE), one)
    put(one, w.zero, one - one)
    for head in range(low, high):
        line, block = head * s.m, head * s.m * s.e
        sums = w.kv, w.lows  # or where the result goes to, if its rows are whole vectors
        if whole:
            sums = place_at(one, new_kv) + block, place_at(one, new_kv_low) + block if new_kv_low != 0 else w.lows
        load_head(one, s, head, kv, z, sums[0], w.z)
        if kv_low != 0:
            load_head(one, s, head, kv_low, z_low, sums[1], w.z_lows)
        else:
            fill(one, sums[1], s.m * s.e_pad, one - one)
            fill(one, w.z_lows, s.m_pad, one - one)
        rows = features + head * SPAN * s.m_pad
        fill(one, w.largest, s.m_pad, one)
        max_block(one, rows, s.m_pad, count, s.m_pad, w.zero, 0, w.largest, w.largest)
        marked = marks != 0 and get(one, marks + 1 + head) > 0
        raise_tops(one, s, place_at(one, c) + line, rows + count * s.m_pad, marked, place_at(one, new_c) + line, w)
        scale_sums(one, s, sums[0], w.z, 0, w.factors, w.ones)
        scale_sums(one, s, sums[1], w.z_lows, 0, w.factors, w.ones)
        add_kept(one, s, rows, values + head * SPAN * s.e_pad, count, sums, w)
        copy(one, w.z, s.m, place_at(one, new_z) + line)
        if not whole:
            copy_rows(one, w.kv, s.e_pad, s.e, s.m, place_at(one, new_kv) + block, s.e)
        if new_kv_low != 0:
            copy(one, w.z_lows, s.m, place_at(one, new_z_low) + line)
            if not whole:
                copy_rows(one, w.lows, s.e_pad, s.e, s.m, place_at(one, new_kv_low) + block, s.e)


@inlined
def load_head(one, s, head, kv, z, to_kv, to_z):
    """Load kv and z of a head, or their low parts, from arrays at addresses."""
    copy_rows(one, place_at(one, kv) + head * s.m * s.e, s.e, s.e, s.m, to_kv, s.e_pad)
    copy(one, place_at(one, z) + head * s.m, s.m, to_z)


@inlined
def add_kept(one, s, rows, values, count, sums, w):
    """Add kept tokens of a head, multiplied by the factors, to kv and its low parts, `sums`, and to z."""
    if count > 0:
        step = s.feature_step
        scale_block(one, rows, s.m_pad, count, s.m_pad, w.ones, w.factors, w.features, step)
        fill(one, w.part, s.m_pad, one - one)
        sum_block(one, w.features, step, count, s.m_pad, w.ones, 0, w.part)
        take_row(one, s.m_pad, w.part, w.z, w.z_lows)
        product_take(
            one, s.m, s.e_pad, count, w.features, 1, step, values, panel(one), s.e_pad, sums[0], s.e_pad, sums[1],
            NOTHING,
        )  # fmt: skip


@inlined
def raise_tops(one, s, c, log_features, marked, new_c, w):
    """new_c = the tops c, raised to the largest kept features, and if `marked` to further log features (to base 2).

    `factors` receives what sums and features are multiplied by.
    """
    fill(one, w.factors, s.m_pad, one)
    for j in range(s.m):
        top, factor, largest = get(one, c + j), one, get(one, w.largest + j)
        if largest > 1:
            top, factor = top + np.log(largest), one / largest
        if marked:
            level = get(one, log_features + j) / LOG2E
            if level > top:
                top, factor = level, factor * np.exp(top - level)
        put(one, new_c + j, top)
        put(one, w.factors + j, factor)


@inlined
def copy_rows(one, x, x_step, n, m, y, y_step):
    """y = x, for m rows of n items."""
    if x_step == n and y_step == n:
        copy(one, x, m * n, y)
    else:
        for i in range(m):
            copy(one, x + i * x_step, n, y + i * y_step)
