"""The kernels of Lloyd steps and of `condense`: keys add rows to the sums of their nearest landmarks.

The rows are the keys themselves, whose means are the next landmarks, or their values. Logarithms here are natural.
"""

from collections import namedtuple
from typing import NamedTuple

import numpy as np

from favorsharp_numba.kernels.arguments import NO_MASK, ONE, TILE
from favorsharp_numba.kernels.tiles import ahead_of, load_points, rest_of_tile, transpose
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import exp_block
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.dots import dot_rows, quadratic_rows
from favorsharp_numba.vectors.emitter import LOG2E
from favorsharp_numba.vectors.items import get, integer_at, lanes, panel, put
from favorsharp_numba.vectors.products import product, product_ahead, product_nearest
from favorsharp_numba.vectors.rows import combine, fill, take_scaled_row


class Landmarks(NamedTuple):
    """The sizes of a call, and where in the packed constants of a metric the arrays are.

    A head is cut into `per_head` tasks. With `condensing`, values are added up, and otherwise keys. `conserving` is the
    option of `condense`. `width` is the padded size of what is added up. `slots` is the number of candidates for seeds,
    and `slots_pad` the same rounded up to whole vectors; no seeds are drawn if `slots` is 0. ROOT is the square root of
    the scale; keys are ROOT y - center. `lift` holds L and `matrix` holds L L^T, both in panels.
    """

    n: int
    m: int
    m_pad: int
    d: int
    d_pad: int
    e: int
    width: int
    per_head: int
    gaussian: int
    condensing: int
    conserving: int
    slots: int
    slots_pad: int
    center: int
    direction: int
    lift: int
    matrix: int
    zeros: int
    total: int


ROOT = 0
"""The place of the square root of the scale in packed constants. Other scalars are at ONE, ZERO and NEAR_SCALE."""

Space = namedtuple(
    "Space", "toward bias norms other lifted rows columns first squares logs best owner nothing values end"
)


@inlined
def landmark_space(s, toward):
    """The parts of the workspace of `gather_landmarks`; `lifted` has room for keys and for landmarks."""
    bias = toward + s.m * s.d_pad
    norms = bias + s.m_pad
    other = norms + 2 * s.m_pad
    lifted = other + s.m_pad
    rows = lifted + max(TILE, s.m) * s.d_pad
    columns = rows + TILE * s.d_pad
    first = columns + s.d * TILE
    squares = first + TILE
    logs = squares + 2 * TILE
    best = logs + TILE
    owner = best + TILE
    nothing = owner + TILE
    values = nothing + TILE
    end = values + TILE * s.width
    return Space(
        toward, bias, norms, other, lifted, rows, columns, first, squares, logs, best, owner, nothing, values, end
    )  # fmt: skip


Sums = namedtuple("Sums", "top weight weight_low rows lows")


@inlined
def sums_size(s):
    """The number of items of the sums of a task.

    These are the largest log weight of each landmark, its weights and its rows, and the low parts of both.
    """
    return 3 * s.m_pad + 2 * s.m * s.width


@inlined
def sums_at(s, sums, number):
    """The sums of a task: the `Sums` with that number."""
    top = sums + number * sums_size(s)
    rows = top + 3 * s.m_pad
    return Sums(top, top + s.m_pad, top + 2 * s.m_pad, rows, rows + s.m * s.width)


@inlined
def aim(one, s, side, points, used, w):
    """Prepare the landmarks of a head: M c, and -|u_c|^2 / 2, which is -inf for landmarks that are not used."""
    width = panel(one)
    product(
        one, s.m, s.d_pad, s.d, points, s.d_pad, 1, side + s.matrix, s.d * width, width, w.toward, s.d_pad
    )  # fmt: skip
    dot_rows(one, points, w.toward, s.d_pad, s.m, s.d_pad, w.bias)
    for c in range(s.m):
        put(one, w.bias + c, -one / 2 * get(one, w.bias + c) + get(one, used + c))


@inlined
def log_norms_of_landmarks(one, s, side, points, w):
    """The log norms s of the landmarks of a head; if weights conserve means of kernels, the log means."""
    share = one / 2 if s.conserving else one
    width, squares = panel(one), w.norms + s.m_pad
    product(
        one, s.m, s.d_pad, s.d, points, s.d_pad, 1, side + s.lift, s.d * width, width, w.lifted, s.d_pad
    )  # fmt: skip
    quadratic_rows(one, w.lifted, s.d_pad, s.m, s.d_pad, side + s.zeros, w.norms, squares)
    quadratic_rows(one, points, s.d_pad, s.m, s.d_pad, side + s.direction, w.norms, w.other)
    for c in range(s.m):
        put(one, w.norms + c, get(one, w.norms + c) + share * get(one, squares + c))


@inlined
def log_masses(one, s, side, weight, head, start, count, masses, w, ahead):
    """The log weights with which keys count, without the distances to their landmarks; -inf for hidden keys."""
    load_points(one, weight, NO_MASK, head, start, count, 1, 1, side + ONE, side + s.zeros, masses)
    add_log_norms(one, s, side, count, masses, w.rows, w.lifted, w.first, w.squares, ahead)


@inlined
def add_log_norms(one, s, side, count, masses, rows, lifted, first, squares, ahead):
    """Turn the log weights of a tile of keys into `log_masses`, and compute their coordinates in `lifted`.

    `first` and `squares` have room for one and for two tiles.
    """
    width, of_u = panel(one), squares + TILE
    product_ahead(
        one, count, s.d_pad, s.d, rows, s.d_pad, 1, side + s.lift, s.d * width, width, lifted, s.d_pad, ahead
    )  # fmt: skip
    quadratic_rows(one, lifted, s.d_pad, count, s.d_pad, side + s.zeros, first, of_u)
    quadratic_rows(one, rows, s.d_pad, count, s.d_pad, side + s.direction, first, squares)
    share = one / 2 if s.condensing else one
    for t in range(count):
        value = get(one, masses + t)
        if value != -np.inf:
            value += get(one, first + t) + share * get(one, of_u + t)
            if s.gaussian:
                value -= one / 2 * get(one, squares + t)
            put(one, masses + t, value)


@outlined
def nearest(one, s, count, toward, bias, rows, columns, nothing, best, owner, ahead):
    """The nearest landmark of each of a tile of keys, and u.u_c - |u_c|^2 / 2 for it."""
    n = rest_of_tile(count, lanes(one))
    transpose(one, rows, s.d_pad, count, s.d, columns, TILE, n)
    fill(one, nothing, n, one - one)
    fill(one, owner, n, one - one)
    fill(one, best, n, -np.inf * one)
    product_nearest(
        one, s.m, n, s.d, toward, s.d_pad, 1, columns, panel(one), TILE, bias, nothing, best, owner, ahead
    )  # fmt: skip


@inlined
def scale_landmark(one, s, sums, c, factor):
    """Multiply the sums of a landmark."""
    for j in range(c * s.width, (c + 1) * s.width):
        put(one, sums.rows + j, factor * get(one, sums.rows + j))
        put(one, sums.lows + j, factor * get(one, sums.lows + j))
    put(one, sums.weight + c, factor * get(one, sums.weight + c))
    put(one, sums.weight_low + c, factor * get(one, sums.weight_low + c))


@inlined
def raise_landmark(one, s, sums, c, value):
    """Raise the largest log weight of a landmark to a value, if it is larger, and its sums with it."""
    top = get(one, sums.top + c)
    if value > top:
        if top != -np.inf:
            scale_landmark(one, s, sums, c, np.exp(top - value))
        put(one, sums.top + c, value)


@outlined
def add_row(one, s, sums, c, factor, row, weight):
    """Add a row times a factor to the rows of a landmark, and a weight to its weight."""
    take_scaled_row(one, s.width, row, factor, sums.rows + c * s.width, sums.lows + c * s.width)
    held, value = get(one, sums.weight + c), weight + get(one, sums.weight_low + c)
    put(one, sums.weight + c, held + value)
    put(one, sums.weight_low + c, value - (get(one, sums.weight + c) - held))


@outlined
def weigh_keys(one, s, count, owner, best, norms, masses):
    """Turn the log masses of keys into their log weights at their landmarks.

    `norms` are the log norms of landmarks or, if weights conserve means, the log means; `best` is what `nearest` found.
    """
    for t in range(count):
        value = get(one, masses + t)
        if value != -np.inf:
            away = one - one if s.conserving else get(one, best + t)
            put(one, masses + t, value - (get(one, norms + int(get(one, owner + t))) - away))


@outlined
def add_rows_of_keys(one, s, sums, count, logs, owner, rows, w):
    """Add the rows of a tile of keys with log weights to the sums of their landmarks. `w` is a `Space`."""
    for t in range(count):
        raise_landmark(one, s, sums, int(get(one, owner + t)), get(one, logs + t))
    shares = w.best
    for t in range(count):
        put(one, shares + t, one * LOG2E * (get(one, logs + t) - get(one, sums.top + int(get(one, owner + t)))))
    n = rest_of_tile(count, lanes(one))
    exp_block(one, shares, TILE, 1, n, w.nothing, 0, w.nothing, w.nothing, 0, w.squares)
    for t in range(count):
        if get(one, logs + t) != -np.inf:
            share = get(one, shares + t)
            add_row(one, s, sums, int(get(one, owner + t)), share, rows + t * s.width, share)


@inlined
def empty_sums(one, s, sums):
    """Make sums those of no keys."""
    fill(one, sums.top, s.m_pad, -np.inf * one)
    fill(one, sums.weight, 2 * s.m_pad + 2 * s.m * s.width, one - one)


@outlined
def settle(one, s, sums, results, masses):
    """The mean row and the log weight of each landmark; results stay as they are where a landmark has no key."""
    for c in range(s.m):
        weight = get(one, sums.weight + c)
        if weight > 0 or (s.condensing and weight != 0):
            row, low, share = sums.rows + c * s.width, sums.lows + c * s.width, one / weight
            combine(one, s.width, one - one, share, row, share, low, results + c * s.width)
        if s.condensing:
            put(one, masses + c, get(one, sums.top + c) + (np.log(weight) if weight != 0 else one - one))


@kernel(landmark_space)
def gather_landmarks(
    one, s, k, weight, v, sides, points, used, sums, logs, known, steps, results, masses, low, high, scratch
):  # fmt: skip
    """Tasks low .. high add their keys to sums. A head that is one task goes through all steps.

    `sides` is the address of a list of places: the constants of each head. `points` and `results` are places of all
    heads' landmarks and of what replaces them; in Lloyd steps they are the same. Without `condensing`, `logs` is the
    place of the log masses of all keys, which are computed in the first step unless they are `known`.
    """
    w = landmark_space(s, scratch)
    for task in range(low, high):
        head, piece = task // s.per_head, task % s.per_head
        side, own, total = integer_at(sides + 8 * head), points + head * s.m * s.d_pad, sums_at(s, sums, task)
        start, stop = s.n * piece // s.per_head, s.n * (piece + 1) // s.per_head
        free, masses_of = used + head * s.m_pad, logs if s.condensing else logs + head * s.n
        for step in range(steps):
            seen = known or step > 0
            gather_range(one, s, side, own, free, k, weight, v, head, start, stop, total, masses_of, seen, w)
            if s.per_head == 1:
                settle(one, s, total, results + head * s.m * s.width, masses + head * s.m_pad)


@outlined
def gather_range(one, s, side, points, used, k, weight, v, head, start, stop, sums, logs, known, w):
    """The sums of the keys start .. stop of a head, whose landmarks are at the place `points`.

    Without `condensing`, `logs` is the place of the log masses of the head's keys.
    """
    fill(one, w.nothing, TILE, one - one)
    aim(one, s, side, points, used, w)
    empty_sums(one, s, sums)
    if s.condensing:
        log_norms_of_landmarks(one, s, side, points, w)
    for first in range(start, stop, TILE):
        count, after = min(TILE, stop - first), min(TILE, max(0, stop - first - TILE))
        next_keys = ahead_of(k, head, first + TILE, first + TILE + after, s.d)
        load_points(one, k, NO_MASK, head, first, count, s.d, s.d_pad, side + ROOT, side + s.center, w.rows)
        masses, rows = w.logs if s.condensing else logs + first, w.rows
        if not known:
            next_values = ahead_of(v, head, first + TILE, first + TILE + after, s.e)
            log_masses(one, s, side, weight, head, first, count, masses, w, next_values)
        if s.condensing:
            load_points(one, v, NO_MASK, head, first, count, s.e, s.width, side + ONE, side + s.zeros, w.values)
            rows = w.values
        nearest(one, s, count, w.toward, w.bias, w.rows, w.columns, w.nothing, w.best, w.owner, next_keys)
        if s.condensing:
            weigh_keys(one, s, count, w.owner, w.best, w.norms, masses)
        add_rows_of_keys(one, s, sums, count, masses, w.owner, rows, w)


@kernel(landmark_space)
def merge_landmarks(one, s, sums, results, masses, low, high, scratch):
    """Merge the sums of the tasks of heads low .. high, and settle them."""
    for head in range(low, high):
        total = sums_at(s, sums, head * s.per_head)
        for piece in range(1, s.per_head):
            other = sums_at(s, sums, head * s.per_head + piece)
            for c in range(s.m):
                top = get(one, other.top + c)
                if top != -np.inf:
                    raise_landmark(one, s, total, c, top)
                    factor = np.exp(top - get(one, total.top + c))
                    put(one, other.weight + c, get(one, other.weight + c) + get(one, other.weight_low + c))
                    add_row(one, s, total, c, factor, other.rows + c * s.width, factor * get(one, other.weight + c))
        settle(one, s, total, results + head * s.m * s.width, masses + head * s.m_pad)
