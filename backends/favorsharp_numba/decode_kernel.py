"""The kernel of one token: the state is read once and written once."""

from typing import NamedTuple

import numpy as np

from favorsharp_numba.compiling import jit, jit_sums
from favorsharp_numba.primitives import exp_block
from favorsharp_numba.tiles import (
    ALPHA,
    ONE,
    TILE,
    ZERO,
    Mask,
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
from favorsharp_numba.vectors import turn_rows


class Sides(NamedTuple):
    """Places of the packed constants of queries and keys, and where the map of each head stands."""

    query: int
    key: int
    map_of: int


@jit_sums
def dot(one, x, y, n):
    total = one - one
    for j in range(n):
        total += get(one, x + j) * get(one, y + j)
    return total


@jit
def turn(one, s, sides, q, k, v, out, kv, z, c, new_kv, new_z, new_c, low, high, scratch):
    """One token for heads low .. high; state arrays are contiguous, their logarithms natural."""
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
    everything = Mask(0, 0)
    log2e = one / np.log(one + one)
    lowest = np.log(one - one)  # -inf in the dtype to work in: Numba has no exp2 of two dtypes in one kernel
    fill(one, nothing, 2 * s.m_pad, one - one)
    for j in range(s.m, s.m_pad):
        put(one, scales + j, lowest)
        put(one, tops + j, one - one)
    for head in range(low, high):
        number = integer_at(sides.map_of + 8 * head)
        side = sides.key + number * s.total
        load_points(one, k, everything, head, 0, 1, s.d, s.d_pad, side + ALPHA, side + s.center, points)
        log_factors(one, s, side, points, 1, dense, factors)
        log_keys(one, s, side, points, 1, factors, keys, s.m_pad)
        zeros = side + s.total - s.e_pad
        load_points(one, v, everything, head, 0, 1, s.e, s.e_pad, side + ONE, zeros, values)
        side = sides.query + number * s.total
        load_points(one, q, everything, head, 0, 1, s.d, s.d_pad, side + ALPHA, side + s.center, points)
        put(one, factors, zero_or_nan(one, points, s.d))
        log_keys(one, s, side, points, 1, factors, queries, s.m_pad)
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
        store_points(one, out, head, 0, 1, s.e, s.e_pad, total, numerator)


def turn_scratch(s: Sizes) -> int:
    """Items of scratch that `turn` needs."""
    return 2 * s.d_pad + 2 * TILE + 2 * s.e_pad + 6 * s.m_pad + 64
