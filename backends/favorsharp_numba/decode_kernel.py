"""The kernel of one token: the state is read once and written once."""

import numpy as np

from favorsharp_numba.compiling import inlined, jit, jit_sums
from favorsharp_numba.primitives import exp_block, turn_rows
from favorsharp_numba.tiles import (
    ALPHA,
    NO_MASK,
    ONE,
    TILE,
    ZERO,
    Points,
    Sizes,
    fill,
    get,
    integer_at,
    load_points,
    log_factors,
    log_keys,
    put,
    store_points,
    zero_or_nan,
)
from favorsharp_numba.vectors import NOTHING, item_size

NUM_SIZES = len(Sizes._fields)
MAPS = NUM_SIZES
"""Where in a plan the places of the packed constants of queries and keys and the address of `map_of` stand."""
POINTS = MAPS + 3
"""And where the kind, offsets, row, column and item of q, k, v and out: what `Points` holds besides its base."""
PLAN_SIZE = POINTS + 4 * 5


@jit_sums
def dot(one, x, y, n):
    total = one - one
    for j in range(n):
        total += get(one, x + j) * get(one, y + j)
    return total


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
def turn(one, plan, q, k, v, out, kv, z, c, new_kv, new_z, new_c, low, high, scratch):
    """One token for heads low .. high.

    `plan` is the address of PLAN_SIZE integers, the same for every token; the others are addresses. State arrays are
    contiguous, their logarithms natural. Integers one by one are what a call takes the least time to pass.
    """
    s = sizes_at(plan)
    queries_from, keys_from = points_at(plan, 0, q), points_at(plan, 1, k)
    values_from, out_to = points_at(plan, 2, v), points_at(plan, 3, out)
    query_side, key_side = integer_at(plan + 8 * MAPS), integer_at(plan + 8 * (MAPS + 1))
    map_of = integer_at(plan + 8 * (MAPS + 2))
    kv, z, c = place_of(one, kv), place_of(one, z), place_of(one, c)
    new_kv, new_z, new_c = place_of(one, new_kv), place_of(one, new_z), place_of(one, new_c)
    points = scratch
    dense = points + s.d_pad
    factors = dense + s.d_pad
    values = factors + 2 * TILE
    keys = values + s.e_pad
    queries = keys + s.m_pad
    scales = queries + s.m_pad
    tops = scales + s.m_pad
    nothing = tops + s.m_pad
    ignored = nothing + s.m_pad
    numerator = ignored + s.m_pad
    total = numerator + s.e_pad
    log2e = one / np.log(one + one)
    lowest = np.log(one - one)  # -inf in the dtype to work in: Numba has no exp2 of two dtypes in one kernel
    fill(one, nothing, 2 * s.m_pad, one - one)
    for j in range(s.m, s.m_pad):
        put(one, scales + j, lowest)
        put(one, tops + j, one - one)
    for head in range(low, high):
        number = integer_at(map_of + 8 * head)
        side = key_side + number * s.total
        load_points(one, keys_from, NO_MASK, head, 0, 1, s.d, s.d_pad, side + ALPHA, side + s.center, points)
        log_factors(one, s, side, points, 1, dense, factors)
        log_keys(one, s, side, points, 1, factors, keys, s.m_pad, NOTHING)
        zeros = side + s.total - s.e_pad
        load_points(one, values_from, NO_MASK, head, 0, 1, s.e, s.e_pad, side + ONE, zeros, values)
        side = query_side + number * s.total
        load_points(one, queries_from, NO_MASK, head, 0, 1, s.d, s.d_pad, side + ALPHA, side + s.center, points)
        put(one, factors, zero_or_nan(one, points, s.d))
        log_keys(one, s, side, points, 1, factors, queries, s.m_pad, NOTHING)
        reference = lowest
        place = head * s.m
        for j in range(s.m):
            held = get(one, c + place + j)
            old, key = held * log2e, get(one, keys + j)
            top = key if key > old else old
            put(one, new_c + place + j, key / log2e if key > old else held)
            put(one, tops + j, top if top > lowest else one - one)
            put(one, scales + j, old)
            weight = get(one, queries + j) + top
            put(one, queries + j, weight)
            reference = weight if weight > reference else reference
        put(one, total, one - one - reference if reference > lowest else one - one)
        exp_block(one, scales, 0, 1, s.m_pad, side + ZERO, 0, tops, side + ZERO, 0, ignored)
        exp_block(one, keys, 0, 1, s.m_pad, side + ZERO, 0, tops, side + ZERO, 0, ignored)
        exp_block(one, queries, 0, 1, s.m_pad, total, 0, nothing, side + ZERO, 0, ignored)
        for j in range(s.m):
            put(one, new_z + place + j, get(one, z + place + j) * get(one, scales + j) + get(one, keys + j))
        weights = dot(one, queries, new_z + place, s.m)
        place *= s.e
        turn_rows(one, kv + place, new_kv + place, s.m, s.e, scales, keys, queries, values, numerator)
        put(one, total, one / weights if weights != 0 else weights)
        store_points(one, out_to, head, 0, 1, s.e, s.e_pad, total, numerator)


@inlined
def place_of(one, address):
    """The place at an address."""
    return address // item_size(one)


def turn_scratch(s: Sizes) -> int:
    """Items of scratch that `turn` needs."""
    return 2 * s.d_pad + 2 * TILE + 2 * s.e_pad + 6 * s.m_pad + 64
