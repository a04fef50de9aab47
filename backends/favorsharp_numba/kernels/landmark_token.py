"""The kernel of a token of a stream between two compressions: the key enters a store, and the query reads the store."""

from collections import namedtuple

import numpy as np

from favorsharp_numba.kernels.arguments import ALPHA, NEAR_ALPHA, NEAR_SCALE, NO_MASK, ONE, TILE, ZERO, Points
from favorsharp_numba.kernels.tiles import load_points, rest_of_tile, store_points
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import exp_block, sum_block
from favorsharp_numba.vectors.compiling import inlined
from favorsharp_numba.vectors.dots import quadratic_rows, total_of
from favorsharp_numba.vectors.items import get, integer_at, lanes, put
from favorsharp_numba.vectors.picks import first_largest
from favorsharp_numba.vectors.rows import combine, fill

TOKEN_SIZES = 10
"""The integers of a plan before those of arrays: d, d_pad, e, e_pad, the number of query heads for each key head, the
number of keys for which there is room (at ROOM), the place of the constants for reading, where their zeros are, and
two zeros."""
ROOM = 5

TokenSpace = namedtuple("TokenSpace", "point scores squares zeros ignored numerator total end")


@inlined
def token_space(s, point):
    """The parts of the workspace of `take_token`; s is (d_pad, e_pad, room), the last in whole vectors."""
    scores = point + s[0]
    squares = scores + s[2]
    zeros = squares + s[2]
    ignored = zeros + s[2]
    numerator = ignored + s[2]
    total = numerator + s[1]
    end = total + TILE
    return TokenSpace(point, scores, squares, zeros, ignored, numerator, total, end)


@inlined
def token_points(plan, number, base):
    """An array of a plan, at an address."""
    line = plan + 8 * (TOKEN_SIZES + 5 * number)
    return Points(
        integer_at(line), base, integer_at(line + 8), integer_at(line + 16), integer_at(line + 24),
        integer_at(line + 32),
    )  # fmt: skip


@kernel(token_space)
def take_token(one, plan, q, k, v, out, rows, weight, values, queries, held, low, high, scratch):
    """One token for heads low .. high.

    `plan` is the address of a plan; q, k, v and out are addresses. `rows`, `weight`, `values` and `queries` are the
    places of the store, in which `held` keys of each head are in use; hidden ones have rows of zeros.
    """
    d, d_pad, e, e_pad = integer_at(plan), integer_at(plan + 8), integer_at(plan + 16), integer_at(plan + 24)
    group, room, side = integer_at(plan + 32), integer_at(plan + 40), integer_at(plan + 48)
    zeros, count = side + integer_at(plan + 56), held + 1
    pad, nothing = rest_of_tile(count, lanes(one)), one - one
    w = token_space((d_pad, e_pad, rest_of_tile(room, lanes(one))), scratch)
    q_from, k_from = token_points(plan, 0, q), token_points(plan, 1, k)
    v_from, out_to = token_points(plan, 2, v), token_points(plan, 3, out)
    fill(one, w.zeros, pad, nothing)
    for head in range(low, high):
        line, first = rows + head * room * d_pad, values + head * room * e_pad
        load_points(one, k_from, NO_MASK, head, 0, 1, d, d_pad, side + ONE, zeros, line + held * d_pad)
        load_points(one, v_from, NO_MASK, head, 0, 1, e, e_pad, side + ONE, zeros, first + held * e_pad)
        put(one, weight + head * room + held, nothing)
        for number in range(head * group, (head + 1) * group):
            kept = queries + (number * room + held) * d_pad
            load_points(one, q_from, NO_MASK, number, 0, 1, d, d_pad, side + ONE, zeros, kept)
            load_points(one, q_from, NO_MASK, number, 0, 1, d, d_pad, side + NEAR_ALPHA, zeros, w.point)
            quadratic_rows(one, line, d_pad, count, d_pad, w.point, w.scores, w.squares)
            # a point or a score that is not finite makes the score NaN
            combine(one, count, nothing, get(one, side + ALPHA), w.scores, nothing, w.scores, w.scores)
            combine(one, count, nothing, one, w.scores, nothing, w.squares, w.scores)
            scale = get(one, side + NEAR_SCALE)
            combine(one, count, nothing, one, w.scores, scale, weight + head * room, w.scores)
            fill(one, w.scores + count, pad - count, -np.inf * one)
            fill(one, w.ignored, pad, nothing)
            put(one, w.total, get(one, w.scores + first_largest(one, pad, w.scores)))
            add_up(one, side, count, pad, e_pad, first, w)
            store_points(one, out_to, number, 0, 1, e, e_pad, w.total, w.numerator)


@inlined
def add_up(one, side, count, pad, e_pad, values, w):
    """Turn scores into weights, and add up the values; `total` becomes the inverse of the sum of weights."""
    put(one, w.total, one - one - get(one, w.total))
    exp_block(one, w.scores, 0, 1, pad, w.total, 0, w.zeros, side + ZERO, 0, w.ignored)
    fill(one, w.numerator, e_pad, one - one)
    sum_block(one, values, e_pad, count, e_pad, w.scores, 1, w.numerator)
    put(one, w.total, one / total_of(one, w.scores, pad))
