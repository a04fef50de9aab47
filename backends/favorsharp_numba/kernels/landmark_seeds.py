"""The kernel that draws the seeds of landmarks: candidates among the keys, and then one seed after the other.

It computes the same as `favorsharp.ops.landmark_seeds`. Projections of keys are in float64, whatever the dtype of the
kernel: different keys must not have the same one.
"""

from collections import namedtuple

import numpy as np

from favorsharp_numba.kernels.arguments import NO_MASK, ONE, TILE
from favorsharp_numba.kernels.landmarks import ROOT, add_log_norms
from favorsharp_numba.kernels.tiles import load_points, rest_of_tile, transpose
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import square_distances
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.items import get, integer_at, lanes, put
from favorsharp_numba.vectors.picks import first_largest, take_nearer
from favorsharp_numba.vectors.products import NOTHING
from favorsharp_numba.vectors.rows import combine, copy, fill

LISTS = 4
"""Lists of float64 for each key: projections and the numbers of their keys, and room for sorting both."""

FAR = 37.0
"""A squared distance from which on log(1 - exp(-D^2)) rounds to 0."""

SeedSpace = namedtuple(
    "SeedSpace", "rows lifted first norms columns logs scores left known owner squares distances end"
)


@inlined
def seed_space(s, rows):
    """The parts of the workspace of `draw`: candidates as columns, and their scores and distances."""
    lifted = rows + TILE * s.d_pad
    first = lifted + TILE * s.d_pad
    norms = first + TILE
    columns = norms + 2 * TILE
    logs = columns + s.d * s.slots_pad
    scores = logs + s.slots_pad
    left = scores + s.slots_pad
    known = left + s.slots_pad
    owner = known + s.slots_pad
    squares = owner + s.slots_pad
    distances = squares + s.slots_pad
    end = distances + s.slots_pad
    return SeedSpace(
        rows, lifted, first, norms, columns, logs, scores, left, known, owner, squares, distances, end
    )  # fmt: skip


@kernel(seed_space)
def draw(one, s, k, weight, sides, noise, lists, grain, points, used, low, high, scratch):
    """The seeds of heads low .. high: their points, scaled and centred, and 0 for a seed that is used, -inf for others.

    `noise` is the place of the float64 numbers of the choice: a direction, the offsets and the noise of the slots.
    `lists` is the place of the lists of each head. Squared distances are 0 if they are not larger than `grain` times
    the squared norms of both points.
    """
    w = seed_space(s, scratch)
    for head in range(low, high):
        side, along = integer_at(sides + 8 * head), lists + head * LISTS * s.n
        own, free = points + head * s.m * s.d_pad, used + head * s.m_pad
        draw_head(one, s, k, weight, side, head, noise, along, grain, own, free, w)


@outlined
def draw_head(one, s, k, weight, side, head, noise, along, grain, points, used, w):
    """The seeds of a head; `along` is the place of its lists."""
    seen = project(one, s, k, weight, side, head, noise, along, w)
    along = sorted_by(seen, s.n, along)
    order, different = along + s.n, first_of_each(seen, s.n, along)
    load_candidates(one, s, k, weight, side, head, noise + s.d, order, different, w)
    square_distances(one, w.columns, s.slots_pad, s.d, s.slots_pad, side + s.zeros, 0, w.squares)
    fill(one, w.logs + s.slots, s.slots_pad - s.slots, -np.inf * one)
    begin_draw(one, s.slots_pad, w)
    for j in range(s.m):
        pick = best_candidate(one, s.slots_pad, w)
        place = points + j * s.d_pad
        needed = get(one, w.scores + pick) > -np.inf
        put(one, used + j, one - one if needed else -np.inf * one)
        if needed:
            load_key(one, s, k, side, head, order, slot_rank(s, noise + s.d, different, pick), place)
        else:
            combine(one, s.d_pad, one - one, -one, side + s.center, one - one, side + s.center, place)
        square_distances(
            one, w.columns, s.slots_pad, s.d, s.slots_pad, w.columns + pick, s.slots_pad, w.distances
        )  # fmt: skip
        size = get(one, w.squares + pick)
        take_nearer(one, s.slots_pad, w.distances, w.squares, size, grain, j, w.left, w.owner)


# Candidates ----------------------------------------------------------------------------------------------------------


@inlined
def project(one, s, k, weight, side, head, direction, along, w):
    """The projections of all keys that are visible and not NaN, and behind them which keys; return their number."""
    seen = 0
    for start in range(0, s.n, TILE):
        count = min(TILE, s.n - start)
        load_points(one, k, NO_MASK, head, start, count, s.d, s.d_pad, side + ONE, side + s.zeros, w.rows)
        load_points(one, weight, NO_MASK, head, start, count, 1, 1, side + ONE, side + s.zeros, w.first)
        for t in range(count):
            value = projection(one, s.d, w.rows + t * s.d_pad, direction)
            if get(one, w.first + t) != -np.inf and value < np.inf:
                put(1.0, along + seen, value)
                put(1.0, along + s.n + seen, 1.0 * (start + t))
                seen += 1
    return seen


@outlined
def projection(one, d, row, direction):
    """The inner product of a row with a direction in float64, as four sums that do not wait for each other."""
    a = b = c = e = 0.0
    for j in range(0, d // 4 * 4, 4):
        a += get(one, row + j) * get(1.0, direction + j)
        b += get(one, row + j + 1) * get(1.0, direction + j + 1)
        c += get(one, row + j + 2) * get(1.0, direction + j + 2)
        e += get(one, row + j + 3) * get(1.0, direction + j + 3)
    for j in range(d // 4 * 4, d):
        a += get(one, row + j) * get(1.0, direction + j)
    return (a + b) + (c + e)


@outlined
def sorted_by(count, n, along):
    """Sort `count` projections, and the keys n items behind them; equal ones keep their order. Return their place.

    That is `along`, or behind both lists. Projections are moved with their keys, so that memory is read in order.
    """
    room, width = along + 2 * n, 1
    while width < count:
        for start in range(0, count, 2 * width):
            middle, stop = min(start + width, count), min(start + 2 * width, count)
            left, right, place = start, middle, start
            while left < middle and right < stop:  # without branches, which a processor could not predict
                first, second = get(1.0, along + left), get(1.0, along + right)
                take_left = first <= second
                put(1.0, room + place, first if take_left else second)
                put(1.0, room + n + place, get(1.0, along + n + (left if take_left else right)))
                left, right, place = left + take_left, right + (not take_left), place + 1
            for shift in (0, n):
                for i in range(left, middle):
                    put(1.0, room + shift + place + i - left, get(1.0, along + shift + i))
                for i in range(right, stop):
                    put(1.0, room + shift + place + middle - left + i - right, get(1.0, along + shift + i))
        along, room, width = room, along, 2 * width
    return along


@outlined
def first_of_each(count, n, along):
    """Keep the first of all keys with the same projection in sorted lists; return how many are left."""
    left, last = 0, 0.0
    for i in range(count):
        value = get(1.0, along + i)
        if left == 0 or value != last:
            put(1.0, along + n + left, get(1.0, along + n + i))
            left, last = left + 1, value
    return left


@inlined
def slot_rank(s, offsets, different, slot):
    """The rank of the candidate of a slot among the different keys, one from each of as many strata as slots."""
    return int(np.floor((slot + get(1.0, offsets + slot)) * max(different / s.slots, 1.0)))


@outlined
def load_key(one, s, k, side, head, order, rank, row):
    """Load the key of a rank, scaled and centred."""
    key = int(get(1.0, order + rank))
    load_points(one, k, NO_MASK, head, key, 1, s.d, s.d_pad, side + ROOT, side + s.center, row)


@inlined
def load_candidates(one, s, k, weight, side, head, offsets, order, different, w):
    """The coordinates of all candidates as columns, and their log weights with noise; -inf for slots without one."""
    for start in range(0, s.slots, TILE):
        count = min(TILE, s.slots - start)
        fill(one, w.rows, count * s.d_pad, one - one)
        fill(one, w.logs + start, count, -np.inf * one)
        for t in range(count):
            rank = slot_rank(s, offsets, different, start + t)
            if rank < different:
                load_key(one, s, k, side, head, order, rank, w.rows + t * s.d_pad)
                key, place = int(get(1.0, order + rank)), w.logs + start + t
                load_points(one, weight, NO_MASK, head, key, 1, 1, 1, side + ONE, side + s.zeros, place)
        add_log_norms(one, s, side, count, w.logs + start, w.rows, w.lifted, w.first, w.norms, NOTHING)
        n = rest_of_tile(count, lanes(one))
        transpose(one, w.lifted, s.d_pad, count, s.d, w.columns + start, s.slots_pad, n)
        for t in range(start, start + count):
            value = 2 * get(one, w.logs + t) + get(1.0, offsets + s.slots + t)
            put(one, w.logs + t, one * value)


# Draws ---------------------------------------------------------------------------------------------------------------


@outlined
def best_candidate(one, n, w):
    """The candidate with the largest score: its log weight plus the logarithm of what the seeds leave unexplained.

    That is 1 - exp(-D^2), D being the distance to the nearest seed. `w` has lists of n candidates, in whole vectors:
    `left`, their squared distances D^2, and `logs`. `scores` are those for the distances `known`. Distances only become
    smaller, and scores with them, so only the largest score has to be brought up to date.
    """
    pick = first_largest(one, n, w.scores)
    while get(one, w.left + pick) != get(one, w.known + pick):
        value, score = get(one, w.left + pick), get(one, w.logs + pick)
        put(one, w.known + pick, value)
        if value <= 0:
            score = -np.inf * one
        elif value < FAR:
            score += np.log(-np.expm1(-value))
        put(one, w.scores + pick, score)
        pick = first_largest(one, n, w.scores)
    return pick


@inlined
def begin_draw(one, n, w):
    """No seed is near any candidate."""
    copy(one, w.logs, n, w.scores)
    fill(one, w.left, n, np.inf * one)
    fill(one, w.known, n, np.inf * one)
    fill(one, w.owner, n, one - one)
