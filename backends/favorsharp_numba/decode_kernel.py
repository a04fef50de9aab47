"""The kernel of one token: the state is read once and written once."""

from typing import NamedTuple

import numpy as np

from favorsharp_numba.compiling import jit
from favorsharp_numba.tiles import (
    ALPHA,
    ONE,
    Mask,
    Sizes,
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


@jit
def turn(one, s, sides, q, k, v, out, kv, z, c, new_kv, new_z, new_c, low, high, scratch):
    """One token for heads low .. high; state arrays are contiguous, their logarithms natural."""
    points = scratch
    dense = points + s.d_pad
    factors = dense + s.d_pad
    values = factors + 128
    keys = values + s.e_pad
    queries = keys + s.m_pad
    scales = queries + s.m_pad
    numerator = scales + s.m_pad
    total = numerator + s.e_pad
    everything = Mask(0, 0)
    log2e = one / np.log(one + one)
    lowest = np.log(one - one)  # -inf in the dtype to work in: Numba has no exp2 of two dtypes in one kernel
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
        for j in range(s.m):
            old, key = get(one, c + head * s.m + j) * log2e, get(one, keys + j)
            top = key if key > old else old
            put(one, new_c + head * s.m + j, key / log2e if key > old else get(one, c + head * s.m + j))
            safe = top if top > lowest else one - one
            put(one, scales + j, np.exp2(old - safe))
            put(one, keys + j, np.exp2(key - safe))
            weight = get(one, queries + j) + top
            put(one, queries + j, weight)
            if weight > reference:
                reference = weight
        if not reference > lowest:
            reference = one - one
        weights = one - one
        for j in range(s.m):
            weight = np.exp2(get(one, queries + j) - reference)
            place = head * s.m + j
            value = get(one, z + place) * get(one, scales + j) + get(one, keys + j)
            put(one, new_z + place, value)
            put(one, queries + j, weight)
            weights += weight * value
        place = head * s.m * s.e
        turn_rows(one, kv + place, new_kv + place, s.m, s.e, scales, keys, queries, values, numerator)
        put(one, total, one / weights if weights != 0 else weights)
        store_points(one, out, head, 0, 1, s.e, s.e_pad, total, numerator)


def turn_scratch(s: Sizes) -> int:
    """Items of scratch that `turn` needs."""
    return 2 * s.d_pad + 128 + 2 * s.e_pad + 3 * s.m_pad + 64
