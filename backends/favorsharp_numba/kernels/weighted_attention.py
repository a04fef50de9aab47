"""The kernel of `weighted_attention`: softmax attention to keys with log weights, block by block of keys.

Logarithms are to base 2. Scores, maxima and weights are those of the exact scores of near keys (`near_scores`).
"""

from collections import namedtuple

import numpy as np

from favorsharp_numba.kernels.arguments import ALPHA, NEAR_ALPHA, NEAR_SCALE, NO_MASK, ONE, TILE
from favorsharp_numba.kernels.near_scores import add_near, raise_references, score_near, weigh_near
from favorsharp_numba.kernels.tiles import (
    is_finite,
    load_points,
    rest_of_tile,
    store_points,
    turn_queries,
    zero_or_nan,
)
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.items import get, lanes, put
from favorsharp_numba.vectors.rows import copy, fill, invert

BLOCK = 128
"""The number of keys that are scored at once."""

WeightedSpace = namedtuple(
    "WeightedSpace",
    "rows norms values points factors columns reference largest safe total numerator scores end",
)


@inlined
def weighted_space(s, rows):
    """The parts of the workspace of `attend`. It holds all keys and values of a head."""
    norms = rows + s.m * s.d_pad
    values = norms + s.m_pad
    points = values + s.m * s.e_pad
    factors = points + TILE * s.d_pad
    columns = factors + 2 * TILE
    reference = columns + s.d * TILE
    largest = reference + TILE
    safe = largest + TILE
    total = safe + 2 * TILE
    numerator = total + TILE
    scores = numerator + TILE * s.e_pad
    end = scores + BLOCK * TILE
    return WeightedSpace(
        rows, norms, values, points, factors, columns, reference, largest, safe, total, numerator, scores, end
    )  # fmt: skip


@outlined
def load_weighted(one, s, side, keys, weight, values, head, w):
    """Load the keys of a head, scaled, with their log weights and values. Hidden keys become 0, with the weight 0."""
    zeros = side + s.center
    load_points(one, keys, NO_MASK, head, 0, s.m, s.d, s.d_pad, side + ALPHA, zeros, w.rows)
    load_points(one, values, NO_MASK, head, 0, s.m, s.e, s.e_pad, side + ONE, zeros, w.values)
    load_points(one, weight, NO_MASK, head, 0, s.m, 1, 1, side + NEAR_SCALE, zeros, w.norms)
    for t in range(s.m):
        if get(one, w.norms + t) == -np.inf:
            fill(one, w.rows + t * s.d_pad, s.d_pad, one - one)
            fill(one, w.values + t * s.e_pad, s.e_pad, one - one)
    for start in range(0, s.m, TILE):
        count = min(TILE, s.m - start)
        zero_or_nan(one, s, side, w.rows + start * s.d_pad, count, w.factors)
        for t in range(count):
            put(one, w.norms + start + t, get(one, w.norms + start + t) + get(one, w.factors + t))


@kernel(weighted_space)
def attend(one, s, side, q, keys, weight, values, num_queries, causal_from, out, per_head, low, high, scratch):
    """Queries of the tasks low .. high attend to the keys of their head. Task = head * per_head + a share of queries.

    If `causal_from` is not negative, query i sees only keys up to the position causal_from + i.
    """
    w = weighted_space(s, scratch)
    for task in range(low, high):
        head, share = task // per_head, task % per_head
        load_weighted(one, s, side, keys, weight, values, head, w)
        visible, finite = first_visible(one, s, w), is_finite(one, side, w.values, s.e_pad, s.m, s.e_pad, w.numerator)
        start, stop = num_queries * share // per_head, num_queries * (share + 1) // per_head
        read_range(one, s, side, q, head, start, stop, causal_from, visible, finite, out, w)


@outlined
def read_range(one, s, side, q, head, low, high, causal_from, visible, finite, out, w):
    """The queries low .. high of a head read its keys, which have been loaded. Keys before `visible` are hidden."""
    for start in range(low, high, TILE):
        count = min(TILE, high - start)
        load_points(one, q, NO_MASK, head, start, count, s.d, s.d_pad, side + NEAR_ALPHA, side + s.center, w.points)
        turn_queries(one, s, side, count, False, w.points, w.points, w.factors, w.columns)
        attend_tile(one, s, side, start, count, causal_from, finite, w)
        for t in range(count):  # a query that sees no key gets 0, even if it is not finite
            if visible >= (s.m if causal_from < 0 else causal_from + start + t + 1):
                put(one, w.total + t, one - one)
                fill(one, w.numerator + t * s.e_pad, s.e_pad, one - one)
        invert(one, w.total, count)
        store_points(one, out, head, start, count, s.e, s.e_pad, w.total, w.numerator)


@inlined
def first_visible(one, s, w):
    """The position of the first key that is not hidden, or the number of keys."""
    for t in range(s.m):
        if get(one, w.norms + t) != -np.inf:
            return t
    return s.m


@inlined
def attend_tile(one, s, side, start, count, causal_from, finite, w):
    """A tile of queries reads all keys that it sees."""
    n = rest_of_tile(count, lanes(one))
    fill(one, w.numerator, TILE * s.e_pad, one - one)
    fill(one, w.total, n, one - one)
    fill(one, w.reference, n, -np.inf * one)
    seen = s.m if causal_from < 0 else min(s.m, causal_from + start + count)
    for first in range(0, seen, BLOCK):
        size = min(BLOCK, seen - first)
        before = -size if causal_from < 0 else first - causal_from - start
        copy(one, w.reference, n, w.largest)
        score_near(
            one, s, side, w.columns, w.factors, n, w.rows + first * s.d_pad, w.norms + first, size, before, NO_MASK, 0,
            0, w.scores, w.largest,
        )  # fmt: skip
        raise_references(one, s, side, n, w.largest, w.numerator, w.total, w.reference, w.safe)
        weigh_near(one, side, n, size, before, w.safe, w.scores, w.total)
        add_near(one, s, count, size, before, w.scores, w.values + first * s.e_pad, s.e_pad, finite, w.numerator)
