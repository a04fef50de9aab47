"""How a stream compresses its keys in a workspace, in the steps of `landmark_seeds` and `landmarks`.

A row of a key or of a landmark holds the point, scaled and centred, and behind it its coordinates u in the metric, in
which distances are taken. So each key is multiplied by the metric once, and landmarks never are: the mean of some u is
the u of the mean. All keys are scored as seeds, and those that are no candidates have the score -inf. So the seed that
is nearest to each key is known once all seeds are drawn, which is the assignment for the first Lloyd step.
"""

from collections import namedtuple

import numpy as np

from favorsharp_numba.kernels.arguments import NO_MASK, TILE
from favorsharp_numba.kernels.landmark_seeds import (
    LISTS,
    begin_draw,
    best_candidate,
    first_of_each,
    projection,
    sorted_by,
)
from favorsharp_numba.kernels.landmarks import (
    ROOT,
    Landmarks,
    add_rows_of_keys,
    empty_sums,
    settle,
    sums_at,
    sums_size,
    weigh_keys,
)
from favorsharp_numba.kernels.tiles import load_points, rest_of_tile, transpose
from favorsharp_numba.vectors.blocks import square_distances
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.items import get, lanes, panel, put
from favorsharp_numba.vectors.picks import take_nearer
from favorsharp_numba.vectors.products import product, product_nearest
from favorsharp_numba.vectors.rows import combine, copy, dot_rows, fill, quadratic_rows

CompressionSpace = namedtuple(
    "CompressionSpace",
    "rows columns along squares first masses logs scores left known distances owner best landmarks used bias norms "
    "nothing means weights sums lists end",
)


@inlined
def padded_keys(n):
    """The number of keys, rounded up to whole tiles."""
    return (n + TILE - 1) // TILE * TILE


@inlined
def sums_of_rows(s, n):
    """The sizes with which rows of keys are added up."""
    return Landmarks(n, s.m, s.m_pad, s.d, s.d_pad, 0, 2 * s.d_pad, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@inlined
def sums_of_values(s, n):
    """The sizes with which values are added up."""
    return Landmarks(n, s.m, s.m_pad, s.d, s.d_pad, s.e, s.e_pad, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0)


@inlined
def compression_space(s, rows):
    """The parts of the workspace of `compress_keys`; `lists` is in float64."""
    n = padded_keys(s.held)
    columns = rows + 2 * n * s.d_pad
    along = columns + n * s.d_pad
    squares = along + n
    first = squares + n
    masses = first + n
    logs = masses + n
    scores = logs + n
    left = scores + n
    known = left + n
    distances = known + n
    owner = distances + n
    best = owner + n
    landmarks = best + n
    used = landmarks + 2 * s.m * s.d_pad
    bias = used + s.m_pad
    norms = bias + s.m_pad
    nothing = norms + 2 * s.m_pad
    means = nothing + TILE
    weights = means + s.m * s.e_pad
    sums = weights + s.m_pad
    lists = sums + max(sums_size(sums_of_rows(s, n)), sums_size(sums_of_values(s, n)))
    end = lists + s.wide * LISTS * n
    return CompressionSpace(
        rows, columns, along, squares, first, masses, logs, scores, left, known, distances, owner, best, landmarks,
        used, bias, norms, nothing, means, weights, sums, lists, end,
    )  # fmt: skip


@outlined
def compress_keys(one, s, n, grain, noise, lists, side, points, keys, weight, values, w):
    """Landmarks for n keys, in the workspace: rows, log weights, and mean values.

    `points` are the keys, `keys` the place of their rows, not scaled; `weight` and `values` are places too.
    """
    fill(one, w.nothing, TILE, one - one)
    load_rows_of_keys(one, s, n, side, points, weight, w)
    score_candidates(one, s, n, noise, lists, keys, weight, w)
    draw_seeds(one, s, n, grain, side, w)
    t = sums_of_rows(s, n)
    sums = sums_at(t, w.sums, 0)
    for step in range(s.steps):
        if step > 0:
            assign(one, s, n, w)
        empty_sums(one, t, sums)
        add_rows_of_keys(one, t, sums, n, w.masses, w.owner, w.rows)
        settle(one, t, sums, w.landmarks, w.weights)
    assign(one, s, n, w)
    weigh(one, s, n, side, w)
    t = sums_of_values(s, n)
    sums = sums_at(t, w.sums, 0)
    empty_sums(one, t, sums)
    fill(one, w.means, s.m * s.e_pad, one - one)
    add_rows_of_keys(one, t, sums, n, w.masses, w.owner, values)
    settle(one, t, sums, w.means, w.weights)


@inlined
def load_rows_of_keys(one, s, n, side, points, weight, w):
    """The rows of keys; their coordinates u as columns, tile by tile; and the log masses with which keys count."""
    step, width = 2 * s.d_pad, panel(one)
    load_points(one, points, NO_MASK, 0, 0, n, s.d, step, side + ROOT, side + s.center, w.rows)
    product(
        one, n, s.d_pad, s.d, w.rows, step, 1, side + s.lift, s.d * width, width, w.rows + s.d_pad, step
    )  # fmt: skip
    quadratic_rows(one, w.rows + s.d_pad, step, n, s.d_pad, side + s.zeros, w.along, w.squares)
    quadratic_rows(one, w.rows, step, n, s.d_pad, side + s.direction, w.along, w.first)
    for t in range(n):
        value = get(one, weight + t)
        put(one, w.masses + t, value + get(one, w.along + t) + get(one, w.squares + t) if value != -np.inf else value)
    for start in range(0, n, TILE):
        count, line = min(TILE, n - start), w.rows + start * step + s.d_pad
        transpose(one, line, step, count, s.d, w.columns + start * s.d, TILE, rest_of_tile(count, lanes(one)))


@outlined
def score_candidates(one, s, n, noise, lists, keys, weight, w):
    """The scores of keys before any seed is drawn: -inf, except for the candidates (see `landmark_seeds`)."""
    seen, order, slots = 0, lists + n, min(s.slots, n)
    offsets, gumbel = noise + s.d, noise + s.d + slots
    for t in range(n):
        value = projection(one, s.d, keys + t * s.d_pad, noise)
        put(1.0, lists + t, value)
        if get(one, weight + t) != -np.inf and value < np.inf:
            put(1.0, order + seen, 1.0 * t)
            seen += 1
    order = sorted_by(seen, lists, order, order + n)
    different = first_of_each(seen, lists, order)
    fill(one, w.logs, padded_keys(n), -np.inf * one)
    for slot in range(slots):
        rank = int(np.floor((slot + get(1.0, offsets + slot)) * max(different / slots, 1.0)))
        if rank < different:
            key = int(get(1.0, order + rank))
            put(one, w.logs + key, 2 * get(one, w.masses + key) + one * get(1.0, gumbel + slot))
    begin_draw(one, padded_keys(n), w)


@outlined
def draw_seeds(one, s, n, grain, side, w):
    """The seeds as landmarks, and the seed that is nearest to each key."""
    step = 2 * s.d_pad
    for j in range(s.m):
        pick, row = best_candidate(one, rest_of_tile(n, lanes(one)), w), w.landmarks + j * step
        needed = get(one, w.scores + pick) > -np.inf
        put(one, w.used + j, one - one if needed else -np.inf * one)
        if needed:
            copy(one, w.rows + pick * step, step, row)
            for start in range(0, n, TILE):
                count = rest_of_tile(min(TILE, n - start), lanes(one))
                line = w.columns + start * s.d
                square_distances(one, line, TILE, s.d, count, row + s.d_pad, 1, w.distances + start)
            size, count = get(one, w.squares + pick), rest_of_tile(n, lanes(one))
            take_nearer(one, count, w.distances, w.squares, size, grain, j, w.left, w.owner)
        else:
            fill(one, row, step, one - one)
            combine(one, s.d_pad, one - one, -one, side + s.center, one - one, side + s.center, row)


@outlined
def assign(one, s, n, w):
    """The nearest landmark of each key."""
    step, own = 2 * s.d_pad, w.landmarks + s.d_pad
    dot_rows(one, own, own, step, s.m, s.d_pad, w.bias)
    for c in range(s.m):
        put(one, w.bias + c, -one / 2 * get(one, w.bias + c) + get(one, w.used + c))
    fill(one, w.owner, n, one - one)
    fill(one, w.best, n, -np.inf * one)
    for start in range(0, n, TILE):
        count = rest_of_tile(min(TILE, n - start), lanes(one))
        product_nearest(
            one, s.m, count, s.d, own, step, 1, w.columns + start * s.d, panel(one), TILE, w.bias, w.nothing,
            w.best + start, w.owner + start,
        )  # fmt: skip


@outlined
def weigh(one, s, n, side, w):
    """Turn log masses into the log weights of keys at their landmarks, which conserve the means of kernels."""
    step, own, squares = 2 * s.d_pad, w.landmarks, w.norms + s.m_pad
    quadratic_rows(one, own + s.d_pad, step, s.m, s.d_pad, side + s.zeros, w.norms, squares)
    quadratic_rows(one, own, step, s.m, s.d_pad, side + s.direction, w.norms, w.bias)
    for c in range(s.m):
        put(one, w.norms + c, get(one, w.norms + c) + one / 2 * get(one, squares + c))
    for t in range(n):
        if get(one, w.masses + t) != -np.inf:
            put(one, w.masses + t, get(one, w.masses + t) - one / 2 * get(one, w.squares + t))
    weigh_keys(one, sums_of_values(s, n), n, w.owner, w.best, w.norms, w.masses)
