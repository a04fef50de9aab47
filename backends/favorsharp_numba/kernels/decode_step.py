"""The kernel of `decode_step`: one token of every head, for which a state is read once and written once."""

from collections import namedtuple

import numpy as np

from favorsharp_numba.kernels.arguments import ALPHA, NO_MASK, ONE, TILE, ZERO, Points, Sizes
from favorsharp_numba.kernels.tiles import load_points, log_factors, log_keys, store_points, zero_or_nan
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import exp_block
from favorsharp_numba.vectors.compiling import inlined
from favorsharp_numba.vectors.items import integer_at, item_size, put
from favorsharp_numba.vectors.products import NOTHING
from favorsharp_numba.vectors.rows import copy, fill
from favorsharp_numba.vectors.tokens import turn_rows, turn_sums, turn_tops

HEADS = 12
"""The number of heads with the same map whose log features are computed together: the map is read once for all."""

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


TurnSpace = namedtuple(
    "TurnSpace",
    "points dense factors values keys queries scales tops new_tops zeros ignored numerator total no_key no_value end",
)


@inlined
def turn_space(s, points):
    """The parts of the workspace of `turn`."""
    dense = points + HEADS * s.d_pad
    factors = dense + HEADS * s.d_pad
    values = factors + 2 * TILE
    keys = values + HEADS * s.e_pad
    queries = keys + HEADS * s.m_pad
    scales = queries + HEADS * s.m_pad
    tops = scales + s.m_pad
    new_tops = tops + s.m_pad
    zeros = new_tops + s.m_pad
    ignored = zeros + s.m_pad
    numerator = ignored + s.m_pad
    total = numerator + s.e_pad
    no_key = total + TILE
    no_value = no_key + s.m_pad
    end = no_value + s.e_pad
    return TurnSpace(
        points, dense, factors, values, keys, queries, scales, tops, new_tops, zeros, ignored, numerator, total, no_key,
        no_value, end,
    )  # fmt: skip


@kernel(turn_space)
def turn(one, plan, q, k, v, out, kv, z, c, new_kv, new_z, new_c, kept_k, kept_v, low, high, scratch):
    """One token for heads low .. high: a key, a value, and one query or several.

    `plan` is the address of a plan, which is the same for all tokens; the others are addresses of arrays. The arrays of
    a state have no gaps, and its logarithms are natural. If kept_k and kept_v are not 0, the key and the value of the
    token are also stored there, head by head. Plain integers are what a call passes in the least time.
    """
    s = sizes_at(plan)
    w = turn_space(s, scratch)
    queries_from, keys_from = points_at(plan, 0, q), points_at(plan, 1, k)
    values_from, out_to = points_at(plan, 2, v), points_at(plan, 3, out)
    query_side, key_side = integer_at(plan + 8 * MAPS), integer_at(plan + 8 * (MAPS + 1))
    map_of = integer_at(plan + 8 * (MAPS + 2))
    kept_k, kept_v = place_at(one, kept_k), place_at(one, kept_v)
    fill(one, w.zeros, s.m_pad, one - one)
    fill(one, w.ignored, s.m_pad, one - one)
    fill(one, w.no_value, s.e_pad, one - one)
    fill(one, w.tops, s.m_pad, -np.inf * one)
    num_queries = integer_at(plan + 8 * QUERIES)
    first = low
    while first < high:
        number = integer_at(map_of + 8 * first)
        count = 1
        while count < HEADS and first + count < high and integer_at(map_of + 8 * (first + count)) == number:
            count += 1
        side = key_side + number * s.total
        load_token(one, keys_from, first, count, 0, s.d, s.d_pad, side + ALPHA, side + s.center, w.points)
        load_token(one, values_from, first, count, 0, s.e, s.e_pad, side + ONE, side + s.total - s.e_pad, w.values)
        if kept_k != 0:
            zeros = side + s.total - max(s.d_pad, s.e_pad)
            load_token(one, keys_from, first, count, 0, s.d, s.d, side + ONE, zeros, kept_k + first * s.d)
            load_token(one, values_from, first, count, 0, s.e, s.e, side + ONE, zeros, kept_v + first * s.e)
        log_factors(one, s, side, w.points, count, w.dense, w.factors)
        log_keys(one, s, side, w.points, count, w.factors, w.keys, s.m_pad, NOTHING)
        side = query_side + number * s.total
        for row in range(num_queries):
            load_token(one, queries_from, first, count, row, s.d, s.d_pad, side + ALPHA, side + s.center, w.points)
            zero_or_nan(one, s, side, w.points, count, w.factors)
            log_keys(one, s, side, w.points, count, w.factors, w.queries, s.m_pad, NOTHING)
            for t in range(count):
                key, value = w.keys + t * s.m_pad, w.values + t * s.e_pad
                if row == 0:
                    turn_head(one, s, side, first + t, t, row, key, value, kv, z, c, new_kv, new_z, new_c, out_to, w)
                else:  # the new state takes no key, and stays as it is
                    fill(one, w.no_key, s.m_pad, -np.inf * one)
                    turn_head(
                        one, s, side, first + t, t, row, w.no_key, w.no_value, new_kv, new_z, new_c, new_kv, new_z,
                        new_c, out_to, w,
                    )  # fmt: skip
        first += count


@inlined
def turn_head(one, s, side, head, t, row, key, value, kv, z, c, new_kv, new_z, new_c, out, w):
    """The state of a head takes a key, and its query, the t-th of those in the workspace, reads the new state."""
    query = w.queries + t * s.m_pad
    line = head * s.m
    copy(one, place_at(one, c) + line, s.m, w.tops)
    reference = turn_tops(one, s.m_pad, w.tops, key, query, w.new_tops, w.scales)
    copy(one, w.new_tops, s.m, place_at(one, new_c) + line)
    put(one, w.total, one - one - reference if reference > -np.inf * one else one - one)
    exp_block(one, query, 0, 1, s.m_pad, w.total, 0, w.zeros, side + ZERO, 0, w.ignored)
    weights = turn_sums(one, s.m, place_at(one, z) + line, w.scales, key, query, place_at(one, new_z) + line)
    line *= s.e
    turn_rows(
        one, place_at(one, kv) + line, place_at(one, new_kv) + line, s.m, s.e, w.scales, key, query,
        value, w.numerator,
    )  # fmt: skip
    put(one, w.total, one / weights if weights != 0 else weights)
    store_points(one, out, head, row, 1, s.e, s.e_pad, w.total, w.numerator)


@inlined
def load_token(one, points, first, count, row, size, pad, factor, offset, rows):
    """As `load_points`, for one point of each of some heads."""
    for t in range(count):
        load_points(one, points, NO_MASK, first + t, row, 1, size, pad, factor, offset, rows + t * pad)


@inlined
def place_at(one, address):
    """The place at an address."""
    return address // item_size(one)
