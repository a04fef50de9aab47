"""The kernel of `landmark_window`: near keys are scored exactly, and landmarks stand for all others.

`window_rule.py` says which keys are near. Positions are cut into *units*: as many whole blocks of the window as fit in
a tile, or one block if it is longer. The *surroundings* of a unit are its own blocks and one more on each side. All
keys outside of them are far from each query of the unit, so their landmarks have one weight for all these queries:
the sum over the keys before the surroundings, merged with the sum over those behind them. Nothing is subtracted. A key
of the surroundings that is far from some of the queries enters these with the score of its own landmark.

Each key is added to a single row of such sums, so sums of prefixes are cheap to compute twice. They are kept before
each GROUP of units only, and computed again from there. The units are visited in descending order, with the running sum
of the keys behind them. Logarithms of weights are natural, and scores are to base 2.
"""

from collections import namedtuple
from typing import Any, NamedTuple

import numpy as np

from favorsharp_numba.kernels.arguments import NEAR_SCALE, NO_MASK, ONE, TILE, ZERO, Sizes
from favorsharp_numba.kernels.landmarks import (
    ROOT,
    add_log_norms,
    add_rows_of_keys,
    aim,
    empty_sums,
    landmark_space,
    log_norms_of_landmarks,
    nearest,
    sums_at,
    sums_size,
    weigh_keys,
)
from favorsharp_numba.kernels.near_scores import raise_references
from favorsharp_numba.kernels.tiles import ahead_of, load_points, rest_of_tile, store_points, turn_queries
from favorsharp_numba.kernels.window_rule import behind_near, first_near, first_reader, last_reader
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import exp_block, max_block, shift_block
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.dots import quadratic_rows
from favorsharp_numba.vectors.items import get, integer_at, lanes, panel, put
from favorsharp_numba.vectors.products import NOTHING, product_add, product_terms
from favorsharp_numba.vectors.rows import combine, copy, fill, invert

GROUP = 8
"""The number of units whose sums of the keys before them are in the workspace at once."""
BLOCK = 128
"""The largest number of keys that are scored at once."""


class Windows(NamedTuple):
    """The window of a call, and which queries read which key head.

    The query heads of key head b are members[member_starts[b]] .. members[member_starts[b + 1]]; both are addresses of
    lists.
    """

    window: int
    members: int
    member_starts: int


class Unit(NamedTuple):
    """The positions first .. last of a unit, and low .. high of its surroundings."""

    first: int
    last: int
    low: int
    high: int


WindowSpace = namedtuple(
    "WindowSpace",
    "choice before_all after_all before means bias nothing points factors columns squares dots rows norms kinds values "
    "scores largest safe total reference numerator end",
)


@inlined
def window_space(s, choice):
    """The parts of the workspace of `landmark_window`.

    `choice` is the workspace of `gather_landmarks`. `before_all` and `after_all` are running `Sums`, and `before` has
    those before each unit of a group, without low parts. Behind the end lie what `kept_items` counts.
    """
    before_all = landmark_space(s, choice).end
    after_all = before_all + sums_size(s)
    before = after_all + sums_size(s)
    means = before + GROUP * high_parts(s)
    bias = means + s.m * s.width
    nothing = bias + s.m_pad
    points = nothing + s.m_pad
    factors = points + TILE * s.d_pad
    columns = factors + 2 * TILE
    squares = columns + s.d * TILE
    dots = squares + TILE
    rows = dots + s.m * TILE
    norms = rows + BLOCK * s.d_pad
    kinds = norms + 2 * BLOCK
    values = kinds + BLOCK
    scores = values + BLOCK * s.width
    largest = scores + BLOCK * TILE
    safe = largest + TILE
    total = safe + 2 * TILE
    reference = total + TILE
    numerator = reference + TILE
    end = numerator + TILE * s.width
    return WindowSpace(
        choice, before_all, after_all, before, means, bias, nothing, points, factors, columns, squares, dots, rows,
        norms, kinds, values, scores, largest, safe, total, reference, numerator, end,
    )  # fmt: skip


@inlined
def high_parts(s):
    """The number of items of `Sums` without the low parts of its rows, which come last."""
    return 3 * s.m_pad + s.m * s.width


def unit_length(window: int) -> int:
    """The number of positions of a unit."""
    return max(1, TILE // window) * window


def kept_items(s: Any, window: int) -> int:
    """The number of items behind the workspace: two for each key, and the sums before each group of units."""
    groups = -(-s.n // (unit_length(window) * GROUP))
    return int(2 * s.n + groups * (3 * s.m_pad + 2 * s.m * s.width))


@inlined
def unit_at(s, p, number):
    """A unit by its number."""
    length = max(1, TILE // p.window) * p.window
    first = number * length
    last = min(s.n, first + length)
    low = max(0, first_near(first // p.window) * p.window)
    return Unit(first, last, low, min(s.n, behind_near((last - 1) // p.window) * p.window))


@inlined
def reading_sizes(s):
    """The sizes with which queries read keys."""
    z = s.zeros
    return Sizes(s.d, s.d_pad, s.m, s.m_pad, s.e, s.width, s.m_pad, z, z, z, z, z, z, z, z, z, z, 0, 0, s.total)


@kernel(window_space)
def landmark_window(one, s, p, q, k, weight, v, sides, points, used, out, low, high, scratch):
    """Bidirectional attention with a window around landmarks, for key heads low .. high.

    `sides` and `points` are as in `gather_landmarks`; `weight` are the log weights of keys, 0 or, if hidden, -inf.
    """
    w = window_space(s, scratch)
    fill(one, w.nothing, s.m_pad, one - one)
    length = max(1, TILE // p.window) * p.window
    units = (s.n + length - 1) // length
    for head in range(low, high):
        side, own = integer_at(sides + 8 * head), points + head * s.m * s.d_pad
        owners = w.end
        logs = owners + s.n
        visible = find_owners(one, s, side, own, used + head * s.m_pad, k, weight, head, owners, logs, w)
        sum_prefixes(one, s, p, side, v, head, units, owners, logs, w)
        after = sums_at(s, w.after_all, 0)
        empty_sums(one, s, after)
        behind = s.n
        for step in range(units):
            number = units - 1 - step
            if step == 0 or number % GROUP == GROUP - 1:
                sum_group(one, s, p, side, v, head, number // GROUP, number, owners, logs, w)
            unit = unit_at(s, p, number)
            add_range(one, s, side, v, head, unit.high, behind, after, owners, logs, w)
            behind = unit.high
            merge_far(one, s, side, w.before + number % GROUP * high_parts(s), w)
            for i in range(integer_at(p.member_starts + 8 * head), integer_at(p.member_starts + 8 * head + 8)):
                f = integer_at(p.members + 8 * i)
                for first in range(unit.first, unit.last, TILE):
                    count = min(TILE, unit.last - first)
                    read_tile(one, s, p, side, own, q, k, v, head, f, first, count, unit, visible, owners, logs, w)
                    store_points(one, out, f, first, count, s.e, s.width, w.total, w.numerator)


# Sums of keys --------------------------------------------------------------------------------------------------------


@outlined
def find_owners(one, s, side, points, used, k, weight, head, owners, logs, w):
    """The landmark of each key, and its log weight there. Return whether any key is visible."""
    x = landmark_space(s, w.choice)
    fill(one, x.nothing, TILE, one - one)
    aim(one, s, side, points, used, x)
    log_norms_of_landmarks(one, s, side, points, x)
    visible = False
    for first in range(0, s.n, TILE):
        count = min(TILE, s.n - first)
        masses = logs + first
        load_points(one, k, NO_MASK, head, first, count, s.d, s.d_pad, side + ROOT, side + s.center, x.rows)
        load_points(one, weight, NO_MASK, head, first, count, 1, 1, side + ONE, side + s.zeros, masses)
        next_keys = ahead_of(k, head, first + TILE, min(s.n, first + 2 * TILE), s.d)
        add_log_norms(one, s, side, count, masses, x.rows, x.lifted, x.first, x.squares, next_keys)
        nearest(one, s, count, x.toward, x.bias, x.rows, x.columns, x.nothing, x.best, x.owner, NOTHING)
        copy(one, x.owner, count, owners + first)
        for t in range(count):
            visible = visible or get(one, masses + t) != -np.inf
        weigh_keys(one, s, count, x.owner, x.best, x.norms, masses)
    return visible


@outlined
def add_range(one, s, side, v, head, start, stop, sums, owners, logs, w):
    """Add the keys start .. stop to sums."""
    for first in range(start, stop, TILE):
        count = min(TILE, stop - first)
        load_points(one, v, NO_MASK, head, first, count, s.e, s.width, side + ONE, side + s.zeros, w.values)
        add_rows_of_keys(one, s, sums, count, logs + first, owners + first, w.values, landmark_space(s, w.choice))


@outlined
def sum_prefixes(one, s, p, side, v, head, units, owners, logs, w):
    """Keep the sums of the keys before the surroundings of the first unit of each group."""
    sums, size = sums_at(s, w.before_all, 0), sums_size(s)
    kept = logs + s.n
    empty_sums(one, s, sums)
    held = 0
    for group in range((units + GROUP - 1) // GROUP):
        unit = unit_at(s, p, group * GROUP)
        add_range(one, s, side, v, head, held, unit.low, sums, owners, logs, w)
        held = unit.low
        copy(one, sums.top, size, kept + group * size)


@outlined
def sum_group(one, s, p, side, v, head, group, last, owners, logs, w):
    """Compute the sums of the keys before the surroundings of each unit of a group, up to the unit `last`."""
    sums, size, first = sums_at(s, w.before_all, 0), sums_size(s), group * GROUP
    copy(one, logs + s.n + group * size, size, sums.top)
    held = unit_at(s, p, first).low
    for number in range(first, last + 1):
        unit = unit_at(s, p, number)
        add_range(one, s, side, v, head, held, unit.low, sums, owners, logs, w)
        held = unit.low
        copy(one, sums.top, high_parts(s), w.before + (number - first) * high_parts(s))


@outlined
def merge_far(one, s, side, before, w):
    """Merge the sums before a unit with those behind it: mean values of landmarks, and log weights to base 2."""
    a, b = sums_at(s, before, 0), sums_at(s, w.after_all, 0)
    base = get(one, side + NEAR_SCALE)
    for c in range(s.m):
        top_a, top_b = get(one, a.top + c), get(one, b.top + c)
        top = max(top_a, top_b)
        first, second = get(one, a.weight + c), get(one, b.weight + c)
        target = w.means + c * s.width
        if top == -np.inf:  # no key; or the weight is NaN
            fill(one, target, s.width, first + second)
            put(one, w.bias + c, top + first + second)
            continue
        p_a, p_b = np.exp(top_a - top), np.exp(top_b - top)
        total = p_a * first + p_b * second
        row = c * s.width
        combine(one, s.width, one - one, p_a / total, a.rows + row, p_b / total, b.rows + row, target)
        put(one, w.bias + c, base * (top + np.log(total)))


# Queries -------------------------------------------------------------------------------------------------------------


@outlined
def read_tile(one, s, p, side, points, q, k, v, head, f, first, count, unit, visible, owners, logs, w):
    """A tile of queries of one head reads the keys around it and the landmarks of all others.

    `numerator` receives what they have read, and `total` the factors that complete it.
    """
    t, n, width = reading_sizes(s), rest_of_tile(count, lanes(one)), panel(one)
    load_tile(one, s, side, q, f, first, count, w)
    product_terms(
        one, s.m, n, s.d, points, s.d_pad, 1, w.columns, width, TILE, w.dots, TILE, w.nothing, w.factors
    )  # fmt: skip
    fill(one, w.numerator, TILE * s.width, one - one)
    fill(one, w.total, n, one - one)
    fill(one, w.reference, n, -np.inf * one)
    low = max(unit.low, first_near(first // p.window) * p.window)
    high = min(unit.high, behind_near((first + count - 1) // p.window) * p.window)
    for start in range(low, high, BLOCK):
        size = min(BLOCK, high - start)
        load_around(one, s, side, k, v, head, start, size, logs, w)
        product_terms(
            one, size, n, s.d, w.rows, s.d_pad, 1, w.columns, width, TILE, w.scores, TILE, w.norms, w.factors
        )  # fmt: skip
        score_far(one, s, p, side, first, count, start, size, owners, logs, w)
        add_scored(one, t, side, count, n, w.scores, size, side + ZERO, 0, w.values, w)
    add_scored(one, t, side, count, n, w.dots, s.m, w.bias, 1, w.means, w)
    if not visible:
        fill(one, w.total, n, one - one)
        fill(one, w.numerator, count * s.width, one - one)
    invert(one, w.total, count)


@inlined
def load_tile(one, s, side, q, f, first, count, w):
    """Load a tile of queries as columns, to base 2."""
    center = side + (s.center if s.gaussian else s.zeros)
    load_points(one, q, NO_MASK, f, first, count, s.d, s.d_pad, side + ROOT, center, w.points)
    turn_queries(one, reading_sizes(s), side, count, False, w.points, w.points, w.factors, w.columns)
    n = rest_of_tile(count, lanes(one))
    shift_block(one, w.columns, TILE, s.d, n, side + NEAR_SCALE, side + s.zeros, w.squares)


@inlined
def load_around(one, s, side, k, v, head, start, size, logs, w):
    """Load keys and their values, and what is added to exact scores of keys. Hidden ones become 0, with -inf."""
    load_points(one, k, NO_MASK, head, start, size, s.d, s.d_pad, side + ROOT, side + s.center, w.rows)
    load_points(one, v, NO_MASK, head, start, size, s.e, s.width, side + ONE, side + s.zeros, w.values)
    squares = w.norms + BLOCK
    quadratic_rows(one, w.rows, s.d_pad, size, s.d_pad, side + s.zeros, w.norms, squares)  # 0, or NaN
    half = -one / 2 * get(one, side + NEAR_SCALE) if s.gaussian else one - one
    for t in range(size):
        if get(one, logs + start + t) == -np.inf:
            fill(one, w.rows + t * s.d_pad, s.d_pad, one - one)
            fill(one, w.values + t * s.width, s.width, one - one)
            put(one, w.norms + t, -np.inf * one)
        elif s.gaussian:
            put(one, w.norms + t, get(one, w.norms + t) + half * get(one, squares + t))


@inlined
def score_far(one, s, p, side, first, count, start, size, owners, logs, w):
    """Replace the scores of keys for the queries that they are far from by those of their landmarks."""
    base = get(one, side + NEAR_SCALE)
    for t in range(size):
        block = (start + t) // p.window
        low = min(count, max(0, first_reader(block, False) * p.window - first))
        high = max(low, min(count, (last_reader(block) + 1) * p.window - first))
        if low > 0 or high < count:
            shift = base * get(one, logs + start + t)
            line, dots = w.scores + t * TILE, w.dots + int(get(one, owners + start + t)) * TILE
            combine(one, low, shift, one, dots, one - one, dots, line)
            combine(one, count - high, shift, one, dots + high, one - one, dots + high, line + high)


@inlined
def add_scored(one, t, side, count, n, scores, size, bias, bias_step, values, w):
    """Add the values of keys or landmarks with scores, plus `bias`, to what queries have read."""
    copy(one, w.reference, n, w.largest)
    max_block(one, scores, TILE, size, n, bias, bias_step, w.largest, w.largest)
    raise_references(one, t, side, n, w.largest, w.numerator, w.total, w.reference, w.safe)
    exp_block(one, scores, TILE, size, n, bias, bias_step, w.safe, side + ONE, 0, w.total)
    product_add(
        one, count, t.e_pad, size, scores, 1, TILE, values, panel(one), t.e_pad, w.numerator, t.e_pad
    )  # fmt: skip
