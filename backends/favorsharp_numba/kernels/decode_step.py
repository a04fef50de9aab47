"""The kernel of one token: the state is read once and written once."""

import numpy as np

from favorsharp_numba.kernels.tiles import (
    ALPHA,
    NO_MASK,
    ONE,
    TILE,
    ZERO,
    Points,
    Sizes,
    integer_at,
    load_points,
    log_factors,
    log_keys,
    put,
    store_points,
    zero_or_nan,
)
from favorsharp_numba.vectors.blocks import item_size
from favorsharp_numba.vectors.compiling import inlined, jit
from favorsharp_numba.vectors.primitives import exp_block, turn_rows
from favorsharp_numba.vectors.products import NOTHING
from favorsharp_numba.vectors.rows import copy, fill
from favorsharp_numba.vectors.tokens import turn_sums, turn_tops

HEADS = 12
"""Heads of one map whose log features are worked out together: the map is read once for all of them."""

NUM_SIZES = len(Sizes._fields)
MAPS = NUM_SIZES
"""Where in a plan the places of the packed constants of queries and keys and the address of `map_of` stand."""
POINTS = MAPS + 3
"""And where the kind, offsets, row, column and item of q, k, v and out: what `Points` holds besides its base."""
PLAN_SIZE = POINTS + 4 * 5


@inlined
def sizes_at(plan):
    return Sizes(
        integer_at(plan), integer_at(plan + 8), integer_at(plan + 16), integer_at(plan + 24), integer_at(plan + 32),
        integer_at(plan + 40), integer_at(plan + 48), integer_at(plan + 56), integer_at(plan + 64),
        integer_at(plan + 72), integer_at(plan + 80), integer_at(plan + 88), integer_at(plan + 96),
        integer_at(plan + 104), integer_at(plan + 112), integer_at(plan + 120), integer_at(plan + 128),
        integer_at(plan + 136), integer_at(plan + 144),
    )  # fmt: skip


@inlined
def points_at(plan, number, base):
    line = plan + 8 * (POINTS + 5 * number)
    return Points(
        integer_at(line), base, integer_at(line + 8), integer_at(line + 16), integer_at(line + 24),
        integer_at(line + 32),
    )  # fmt: skip


@jit
def turn(one, plan, q, k, v, out, kv, z, c, new_kv, new_z, new_c, kept_k, kept_v, low, high, scratch):
    """One token for heads low .. high.

    `plan` is the address of PLAN_SIZE integers, the same for every token; the others are addresses. State arrays are
    contiguous, their logarithms natural; the token is kept in rows of kept_k and kept_v, a head after the other, where
    these are not 0. Integers one by one are what a call takes the least time to pass.
    """
    s = sizes_at(plan)
    queries_from, keys_from = points_at(plan, 0, q), points_at(plan, 1, k)
    values_from, out_to = points_at(plan, 2, v), points_at(plan, 3, out)
    query_side, key_side = integer_at(plan + 8 * MAPS), integer_at(plan + 8 * (MAPS + 1))
    map_of = integer_at(plan + 8 * (MAPS + 2))
    kv, z, c = place_of(one, kv), place_of(one, z), place_of(one, c)
    new_kv, new_z, new_c = place_of(one, new_kv), place_of(one, new_z), place_of(one, new_c)
    kept_k, kept_v = place_of(one, kept_k), place_of(one, kept_v)
    points = scratch
    dense = points + HEADS * s.d_pad
    factors = dense + HEADS * s.d_pad
    values = factors + 2 * TILE
    keys = values + HEADS * s.e_pad
    queries = keys + HEADS * s.m_pad
    scales = queries + HEADS * s.m_pad
    tops = scales + s.m_pad
    new_tops = tops + s.m_pad
    nothing = new_tops + s.m_pad
    ignored = nothing + s.m_pad
    numerator = ignored + s.m_pad
    total = numerator + s.e_pad
    lowest = -np.inf * one
    fill(one, nothing, 2 * s.m_pad, one - one)
    fill(one, tops, s.m_pad, lowest)
    first = low
    while first < high:
        number = integer_at(map_of + 8 * first)
        count = 1
        while count < HEADS and first + count < high and integer_at(map_of + 8 * (first + count)) == number:
            count += 1
        side = key_side + number * s.total
        zeros = side + s.total - s.e_pad
        load_token(one, keys_from, first, count, s.d, s.d_pad, side + ALPHA, side + s.center, points)
        load_token(one, values_from, first, count, s.e, s.e_pad, side + ONE, zeros, values)
        if kept_k != 0:
            zeros = side + s.total - max(s.d_pad, s.e_pad)
            load_token(one, keys_from, first, count, s.d, s.d, side + ONE, zeros, kept_k + first * s.d)
            load_token(one, values_from, first, count, s.e, s.e, side + ONE, zeros, kept_v + first * s.e)
        log_factors(one, s, side, points, count, dense, factors)
        log_keys(one, s, side, points, count, factors, keys, s.m_pad, NOTHING)
        side = query_side + number * s.total
        load_token(one, queries_from, first, count, s.d, s.d_pad, side + ALPHA, side + s.center, points)
        zero_or_nan(one, s, side, points, count, factors)
        log_keys(one, s, side, points, count, factors, queries, s.m_pad, NOTHING)
        for t in range(count):
            key, query = keys + t * s.m_pad, queries + t * s.m_pad
            place = (first + t) * s.m
            copy(one, c + place, s.m, tops)
            reference = turn_tops(one, s.m_pad, tops, key, query, new_tops, scales)
            copy(one, new_tops, s.m, new_c + place)
            put(one, total, one - one - reference if reference > lowest else one - one)
            exp_block(one, query, 0, 1, s.m_pad, total, 0, nothing, side + ZERO, 0, ignored)
            weights = turn_sums(one, s.m, z + place, scales, key, query, new_z + place)
            place *= s.e
            turn_rows(one, kv + place, new_kv + place, s.m, s.e, scales, key, query, values + t * s.e_pad, numerator)
            put(one, total, one / weights if weights != 0 else weights)
            store_points(one, out_to, first + t, 0, 1, s.e, s.e_pad, total, numerator)
        first += count


@inlined
def load_token(one, points, first, count, size, pad, factor, offset, rows):
    """The one point of some heads, as `load_points`."""
    for t in range(count):
        load_points(one, points, NO_MASK, first + t, 0, 1, size, pad, factor, offset, rows + t * pad)


@inlined
def place_of(one, address):
    """The place at an address."""
    return address // item_size(one)


def turn_scratch(s: Sizes) -> int:
    """Items of scratch that `turn` needs."""
    return HEADS * (2 * s.d_pad + s.e_pad + 2 * s.m_pad) + 2 * TILE + s.e_pad + 5 * s.m_pad + 64
