"""How a stream compresses its keys in a workspace, in the steps of `landmark_seeds` and `landmarks`.

A row of a key or of a landmark holds the point, scaled and centred, and behind it its coordinates u in the metric, in
which distances are taken. All squared distances between keys are computed once, as one product. A landmark is a mean of
keys with shares that add up to 1, and its squared distance to any u is the mean of those of its keys, minus half of the
mean between its keys. So Lloyd steps only add up rows of distances: they cost n^2 multiply-adds and not n m d.

All keys are scored as seeds, and those that are no candidates have the score -inf. So the seed that is nearest to each
key is known once all seeds are drawn.
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
from favorsharp_numba.kernels.landmarks import ROOT
from favorsharp_numba.kernels.tiles import load_points, rest_of_tile, transpose
from favorsharp_numba.vectors.blocks import exp_block, max_block
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.dots import quadratic_rows
from favorsharp_numba.vectors.emitter import LOG2E
from favorsharp_numba.vectors.items import get, lanes, panel, put
from favorsharp_numba.vectors.picks import take_nearer
from favorsharp_numba.vectors.products import product, product_terms
from favorsharp_numba.vectors.rows import add_rows, combine, copy, fill
from favorsharp_numba.vectors.transposing import transpose_block

CompressionSpace = namedtuple(
    "CompressionSpace",
    "rows columns apart away along squares first masses logs scores left known owner shares room landmarks used norms "
    "tops totals spreads nothing means weights lists end",
)


@inlined
def padded_keys(n):
    """The number of keys, rounded up to whole tiles."""
    return (n + TILE - 1) // TILE * TILE


@inlined
def compression_space(s, rows):
    """The parts of the workspace of `compress_keys`; `lists` is in float64.

    `apart` has the squared distances between keys, and `away` those of landmarks to keys.
    """
    n = padded_keys(s.held)
    columns = rows + 2 * n * s.d_pad
    apart = columns + n * s.d_pad
    away = apart + n * n
    along = away + s.m * n
    squares = along + n
    first = squares + n
    masses = first + n
    logs = masses + n
    scores = logs + n
    left = scores + n
    known = left + n
    owner = known + n
    shares = owner + n
    room = shares + n
    landmarks = room + n
    used = landmarks + 2 * s.m * s.d_pad
    norms = used + s.m_pad
    tops = norms + 3 * s.m_pad
    totals = tops + s.m_pad
    spreads = totals + s.m_pad
    nothing = spreads + s.m_pad
    means = nothing + TILE
    weights = means + s.m * s.e_pad
    lists = weights + s.m_pad
    end = lists + s.wide * LISTS * n
    return CompressionSpace(
        rows, columns, apart, away, along, squares, first, masses, logs, scores, left, known, owner, shares, room,
        landmarks, used, norms, tops, totals, spreads, nothing, means, weights, lists, end,
    )  # fmt: skip


@outlined
def compress_keys(one, s, n, grain, noise, lists, side, points, keys, weight, values, w):
    """Landmarks for n keys, in the workspace: rows, log weights, and mean values.

    `points` are the keys, `keys` the place of their rows, not scaled; `weight` and `values` are places too. Rounding
    errors of squared distances are at most `grain` times the squared norms of both points.
    """
    fill(one, w.nothing, TILE, one - one)
    load_rows_of_keys(one, s, n, side, points, weight, w)
    measure(one, s, n, w)
    score_candidates(one, s, n, noise, lists, keys, weight, w)
    draw_seeds(one, s, n, grain, side, w)
    for _ in range(s.steps):
        share_out(one, s, n, w)
        move(one, s, n, w)
        assign(one, s, n, w)
    weigh(one, s, n, side, w)
    share_out(one, s, n, w)
    take_means(one, s, n, values, w)


# Keys ----------------------------------------------------------------------------------------------------------------


@inlined
def load_rows_of_keys(one, s, n, side, points, weight, w):
    """Load the rows of keys, and the log masses with which keys count."""
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


@outlined
def measure(one, s, n, w):
    """The squared distances between all keys, -2 u.u' + |u|^2 + |u'|^2: those below the diagonal, and their mirror."""
    step, line, nothing = 2 * s.d_pad, padded_keys(n), one - one
    for start in range(0, n, TILE):
        size, own, columns = min(TILE, n - start), w.rows + start * step + s.d_pad, w.columns + start * s.d
        count = rest_of_tile(size, lanes(one))
        transpose(one, own, step, size, s.d, columns, TILE, count)
        combine(one, s.d * TILE, nothing, -2 * one, columns, nothing, columns, columns)
        corner, squares = w.apart + start * (line + 1), w.squares + start
        product_terms(
            one, n - start, count, s.d, own, step, 1, columns, panel(one), TILE, corner, line, squares, squares
        )  # fmt: skip
        if n > start + TILE:
            transpose_block(one, corner + TILE * line, line, n - start - TILE, TILE, corner + TILE, line)


@outlined
def score_candidates(one, s, n, noise, lists, keys, weight, w):
    """The scores of keys before any seed is drawn: -inf, except for the candidates (see `landmark_seeds`)."""
    seen, slots = 0, min(s.slots, n)
    offsets, gumbel = noise + s.d, noise + s.d + slots
    for t in range(n):
        value = projection(one, s.d, keys + t * s.d_pad, noise)
        if get(one, weight + t) != -np.inf and value < np.inf:
            put(1.0, lists + seen, value)
            put(1.0, lists + n + seen, 1.0 * t)
            seen += 1
    along = sorted_by(seen, n, lists)
    order, different = along + n, first_of_each(seen, n, along)
    fill(one, w.logs, padded_keys(n), -np.inf * one)
    for slot in range(slots):
        rank = int(np.floor((slot + get(1.0, offsets + slot)) * max(different / slots, 1.0)))
        if rank < different:
            key = int(get(1.0, order + rank))
            put(one, w.logs + key, 2 * get(one, w.masses + key) + one * get(1.0, gumbel + slot))
    begin_draw(one, padded_keys(n), w)


# Landmarks -----------------------------------------------------------------------------------------------------------


@outlined
def draw_seeds(one, s, n, grain, side, w):
    """The seeds as landmarks, and the seed that is nearest to each key.

    The candidates are different keys. So a distance that may be a rounding error is set to that error, and not to 0.
    """
    step, line, count, nothing = 2 * s.d_pad, padded_keys(n), rest_of_tile(n, lanes(one)), one - one
    for j in range(s.m):
        pick, row, away = best_candidate(one, count, w), w.landmarks + j * step, w.away + j * line
        needed = get(one, w.scores + pick) > -np.inf
        put(one, w.used + j, nothing if needed else -np.inf * one)
        if needed:
            copy(one, w.rows + pick * step, step, row)
            least = grain * get(one, w.squares + pick)
            combine(one, count, least, grain, w.squares, nothing, w.squares, w.room)
            max_block(one, w.apart + pick * line, line, 1, count, w.nothing, 0, w.room, away)
            put(one, away + pick, nothing)
            take_nearer(one, count, away, w.squares, nothing, nothing, j, w.left, w.owner)
        else:
            fill(one, row, step, nothing)
            combine(one, s.d_pad, nothing, -one, side + s.center, nothing, side + s.center, row)
            fill(one, away, count, np.inf * one)


@outlined
def share_out(one, s, n, w):
    """The share of each key in its landmark, from log masses.

    The mass of a landmark is `totals` times the exponential of `tops`, the largest log mass of its keys.
    """
    fill(one, w.tops, s.m_pad, -np.inf * one)
    fill(one, w.totals, s.m_pad, one - one)
    for t in range(n):
        value, top = get(one, w.masses + t), w.tops + int(get(one, w.owner + t))
        if value > get(one, top):
            put(one, top, value)
    for t in range(n):
        away = get(one, w.masses + t) - get(one, w.tops + int(get(one, w.owner + t)))
        put(one, w.shares + t, one * LOG2E * away)
    for start in range(0, n, TILE):
        count, line = rest_of_tile(min(TILE, n - start), lanes(one)), w.shares + start
        exp_block(one, line, TILE, 1, count, w.nothing, 0, w.nothing, w.nothing, 0, w.room)
    for t in range(n):
        if get(one, w.masses + t) != -np.inf:
            total = w.totals + int(get(one, w.owner + t))
            put(one, total, get(one, total) + get(one, w.shares + t))
    for t in range(n):
        put(one, w.shares + t, get(one, w.shares + t) / get(one, w.totals + int(get(one, w.owner + t))))


@outlined
def move(one, s, n, w):
    """Move landmarks to the means of their keys, and make `away` the means of their keys' distances.

    `spreads` are half of the mean distances between the keys of a landmark. A landmark without keys stays.
    """
    step, line, count = 2 * s.d_pad, padded_keys(n), rest_of_tile(n, lanes(one))
    fill(one, w.spreads, s.m_pad, one - one)
    for c in range(s.m):
        if get(one, w.totals + c) > 0:
            fill(one, w.landmarks + c * step, step, one - one)
            fill(one, w.away + c * line, count, one - one)
    for t in range(n):
        c, share = int(get(one, w.owner + t)), get(one, w.shares + t)
        if get(one, w.masses + t) != -np.inf and get(one, w.totals + c) > 0:
            add_rows(one, w.landmarks + c * step, step, w.rows + t * step, 0, 1, share)
            add_rows(one, w.away + c * line, count, w.apart + t * line, 0, 1, share)
    for t in range(n):
        c, share = int(get(one, w.owner + t)), get(one, w.shares + t)
        if get(one, w.masses + t) != -np.inf and get(one, w.totals + c) > 0:
            spread = get(one, w.spreads + c) + share / 2 * get(one, w.away + c * line + t)
            put(one, w.spreads + c, spread)


@outlined
def assign(one, s, n, w):
    """The nearest landmark of each key, from `away` and `spreads`; `away` becomes the distances of landmarks."""
    line, count, nothing = padded_keys(n), rest_of_tile(n, lanes(one)), one - one
    fill(one, w.owner, count, nothing)
    fill(one, w.left, count, np.inf * one)
    for c in range(s.m):
        away = w.away + c * line
        combine(one, count, -get(one, w.spreads + c), one, away, nothing, away, away)
        take_nearer(one, count, away, w.squares, nothing, nothing, c, w.left, w.owner)


@outlined
def weigh(one, s, n, side, w):
    """Turn log masses into the log weights of keys at their landmarks, which conserve the means of kernels."""
    step, own, squares = 2 * s.d_pad, w.landmarks, w.norms + s.m_pad
    quadratic_rows(one, own + s.d_pad, step, s.m, s.d_pad, side + s.zeros, w.norms, squares)
    quadratic_rows(one, own, step, s.m, s.d_pad, side + s.direction, w.norms, squares + s.m_pad)
    for c in range(s.m):
        put(one, w.norms + c, get(one, w.norms + c) + one / 2 * get(one, squares + c))
    for t in range(n):
        if get(one, w.masses + t) != -np.inf:
            norm = one / 2 * get(one, w.squares + t) + get(one, w.norms + int(get(one, w.owner + t)))
            put(one, w.masses + t, get(one, w.masses + t) - norm)


@outlined
def take_means(one, s, n, values, w):
    """The mean value and the log weight of each landmark."""
    fill(one, w.means, s.m * s.e_pad, one - one)
    for t in range(n):
        if get(one, w.masses + t) != -np.inf:
            target = w.means + int(get(one, w.owner + t)) * s.e_pad
            add_rows(one, target, s.e_pad, values + t * s.e_pad, 0, 1, get(one, w.shares + t))
    for c in range(s.m):
        total = get(one, w.totals + c)
        put(one, w.weights + c, get(one, w.tops + c) + (np.log(total) if total != 0 else one - one))
