"""The kernel of `draw_seeds`: one seed after the other, each the candidate with the largest score so far."""

from collections import namedtuple
from typing import NamedTuple

import numpy as np

from favorsharp_numba.kernels.arguments import NO_MASK, TILE
from favorsharp_numba.kernels.tiles import load_points, rest_of_tile, transpose
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import square_distances
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.items import get, lanes, put
from favorsharp_numba.vectors.rows import fill


class Candidates(NamedTuple):
    """The numbers of candidates, coordinates and seeds; `slots` and `d_pad` are rounded up to whole vectors."""

    count: int
    slots: int
    d: int
    d_pad: int
    m: int


SeedSpace = namedtuple("SeedSpace", "rows columns logs scores left own squares end")


@inlined
def seed_space(s, rows):
    """The parts of the workspace of `draw`: candidates as columns, and what is known of each."""
    columns = rows + TILE * s.d_pad
    logs = columns + s.d * s.slots
    scores = logs + s.slots
    left = scores + s.slots
    own = left + s.slots
    squares = own + s.slots
    end = squares + s.slots
    return SeedSpace(rows, columns, logs, scores, left, own, squares, end)


@outlined
def first_pick(one, count, logs, scores):
    """Take the logs as scores; the first candidate with the largest one."""
    pick = 0
    for i in range(count):
        put(one, scores + i, get(one, logs + i))
        if get(one, logs + i) > get(one, logs + pick):
            pick = i
    return pick


@outlined
def next_pick(one, count, pick, grain, own, squares, logs, left, scores):
    """Take the squared distances from a new seed into account; the candidate with the largest score after that.

    Its score is its log weight plus the logarithm of what the seeds leave unexplained of it, 1 - exp(-D^2).
    """
    size, best = get(one, own + pick), 0
    for i in range(count):
        value = get(one, squares + i)
        if value < get(one, left + i):
            value = value if value > grain * (size + get(one, own + i)) else one - one
            put(one, left + i, value)
            put(one, scores + i, get(one, logs + i) + np.log(-np.expm1(-value)) if value > 0 else -np.inf * one)
        if get(one, scores + i) > get(one, scores + best):
            best = i
    return best


@kernel(seed_space)
def draw(one, s, points, logs, constants, grain, picks, low, high, scratch):
    """The seeds of heads low .. high: their numbers, or -1 minus the number for a seed that is not used.

    `constants` is the place of a 1 with zeros behind it. Squared distances are 0 if they are not larger than `grain`
    times the squared norms of both points.
    """
    w = seed_space(s, scratch)
    zeros = constants + lanes(one)
    for head in range(low, high):
        for start in range(0, s.count, TILE):
            count = min(TILE, s.count - start)
            load_points(one, points, NO_MASK, head, start, count, s.d, s.d_pad, constants, zeros, w.rows)
            n = rest_of_tile(count, lanes(one))
            transpose(one, w.rows, s.d_pad, count, s.d, w.columns + start, s.slots, n)
        load_points(one, logs, NO_MASK, head, 0, s.count, 1, 1, constants, zeros, w.logs)
        square_distances(one, w.columns, s.slots, s.d, s.slots, zeros, 0, w.own)
        fill(one, w.left, s.count, np.inf * one)
        pick = first_pick(one, s.count, w.logs, w.scores)
        for j in range(s.m):
            used = get(one, w.scores + pick) > -np.inf
            put(one, picks + head * s.m + j, one * (pick if used else -1 - pick))
            square_distances(one, w.columns, s.slots, s.d, s.slots, w.columns + pick, s.slots, w.squares)
            pick = next_pick(one, s.count, pick, grain, w.own, w.squares, w.logs, w.left, w.scores)
