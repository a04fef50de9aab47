"""The kernels for values of one column, as in a regression: features are added up as they are made, and never stored.

They replace `gather_keys` and `read_queries` for such values (docs/design/one-column.md). The exponential of a feature
needs a reference before the largest feature is known. So the sums are relative to tops which later features may exceed
by a little; if a feature exceeds its top by more, its tile is computed again.
"""

from collections import namedtuple

import numpy as np

from favorsharp_numba.kernels.arguments import ROWS, TILE, ZERO, key_side, query_side
from favorsharp_numba.kernels.sums import keep_stats, rescale, sums_at, take_keys, take_space, weigh
from favorsharp_numba.kernels.tiles import (
    ahead_of,
    load_keys,
    load_queries,
    log_keys,
    log_queries,
    rest_of_tile,
    store_points,
    usable_values,
    values_at,
)
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import exp_block, max_block, scale_block
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.items import get, integer_at, item_size, lanes, panel, put
from favorsharp_numba.vectors.products import NOTHING, ColumnSums, product, product_sum, product_sums, product_terms
from favorsharp_numba.vectors.rows import add_rows, copy, fill, invert, take_row
from favorsharp_numba.vectors.tops import compare_tops, take_tops

KEYS_ABOVE = 16
"""How far, in bits, the log feature of a key may exceed the top of its sums; the sums, and what is read of them, may
exceed 1 by the same factor."""
QUERIES_ABOVE = 40
"""How far, in bits, the weights of a query may exceed the largest of its first features, to which they are relative at
first; what the query reads is then scaled back."""
TRIES = 3
"""How often the features of a tile are computed. Two attempts suffice, unless logarithms are so large that their
rounding exceeds the limits; then features are stored, and their own maxima are subtracted."""


@outlined
def add_up(one, normalised, m, n, k, a, a_row, b, b_panel, b_step, row, column, sums, ahead):
    """Add powers of two of a product to the sums of values, and to the sums of weights if `normalised`."""
    if normalised:
        product_sums(one, m, n, k, a, a_row, 1, b, b_panel, b_step, row, column, sums, ahead)
    else:
        product_sum(one, m, n, k, a, a_row, 1, b, b_panel, b_step, row, column, sums, ahead)


# Keys ----------------------------------------------------------------------------------------------------------------

KeysSpace = namedtuple("KeysSpace", "shifted bounds weights values largest new_top scales features taking end")


@inlined
def keys_space(s, shifted):
    """The parts of the workspace of `take_column`; `taking` is a `TakeSpace`.

    `weights` and `values` are the sums of a tile, and `bounds` what its log features may be at most.
    """
    bounds = shifted + s.m_pad
    weights = bounds + s.m_pad
    values = weights + s.m_pad
    largest = values + s.m_pad
    new_top = largest + s.m_pad
    scales = new_top + s.m_pad
    features = scales + s.m_pad
    taking = take_space(s, features + TILE * s.feature_step)
    return KeysSpace(shifted, bounds, weights, values, largest, new_top, scales, features, taking, taking.end)


@inlined
def begin_keys(one, s, side, top, w):
    """Prepare the workspace of `take_column` for sums of this top."""
    for j in range(s.m_pad):
        value = get(one, top + j)
        known = value > -np.inf
        put(one, w.shifted + j, get(one, side + s.column + j) - (value if known else one - one))
        put(one, w.bounds + j, KEYS_ABOVE * one if known else -np.inf * one)


@inlined
def take_column(one, s, side, points, count, factors, values, v_step, normalised, sums, ones, w, ahead):
    """Add a tile of keys to the sums, to z only if `normalised`. The first keys set the top."""
    width = panel(one)
    totals = ColumnSums(ones, 0, values, v_step, w.weights, w.values, w.largest)
    for _ in range(TRIES):
        fill(one, w.weights, s.m_pad, one - one)
        fill(one, w.values, s.m_pad, one - one)
        fill(one, w.largest, s.m_pad, -np.inf * one)
        add_up(
            one, normalised, count, s.m_pad, s.d, points, s.d_pad, side + s.panels, s.d * width, width, factors,
            w.shifted, totals, ahead,
        )  # fmt: skip
        if not compare_tops(one, s.m_pad, w.bounds, w.largest, w.new_top) > 0:
            take_row(one, s.m_pad, w.weights, sums.z, sums.z_lows)
            take_row(one, s.m_pad, w.values, sums.kv, sums.lows)
            return
        for j in range(s.m_pad):
            value, above = get(one, sums.top + j), get(one, w.largest + j)
            if above > get(one, w.bounds + j):
                value = value + above if value > -np.inf else above
            put(one, w.new_top + j, value)
        rescale(one, s, sums, w.new_top, 1, w.scales, ones)
        begin_keys(one, s, side, sums.top, w)
    log_keys(one, s, side, points, count, factors, w.features, s.feature_step, NOTHING)
    taking = w.taking
    fill(one, taking.ones, max(s.m_pad, s.e_pad), one)
    take_keys(one, s, side, w.features, s.feature_step, values, v_step, count, sums, 1, taking, NOTHING)
    begin_keys(one, s, side, sums.top, w)


GatherSpace = namedtuple("GatherSpace", "points dense factors loaded ones lows of_keys end")


@inlined
def gather_space(s, points):
    """The parts of the workspace of `gather_column`; `of_keys` is a `KeysSpace`."""
    dense = points + TILE * s.d_pad
    factors = dense + TILE * s.d_pad
    loaded = factors + 2 * TILE
    ones = loaded + TILE * s.e_pad
    lows = ones + s.m_pad
    of_keys = keys_space(s, lows + 2 * s.m_pad)
    return GatherSpace(points, dense, factors, loaded, ones, lows, of_keys, of_keys.end)


@kernel(gather_space)
def gather_column(one, s, p, k, v, mask, normalised, low, high, scratch):
    """As `attention.gather_keys`; kv is one line of m_pad items. z is not computed unless results are `normalised`."""
    w = gather_space(s, scratch)
    fill(one, w.ones, s.m_pad, one)
    usable = usable_values(one, s, v, mask, True)
    v_step = v.row // v.item if usable else s.e_pad
    for task in range(low, high):
        head, segment = task // p.segments, task % p.segments
        start, stop = p.num_keys * segment // p.segments, p.num_keys * (segment + 1) // p.segments
        side, sums, of_keys = key_side(s, p, head), sums_at(s, p, task, w.lows), w.of_keys
        fill(one, w.lows, 2 * s.m_pad, one - one)
        begin_keys(one, s, side, sums.top, of_keys)
        for first in range(start, stop, TILE):
            count = min(TILE, stop - first)
            if load_keys(one, s, side, k, mask, head, first, count, w.points, w.dense, w.factors):
                values = values_at(one, s, side, v, mask, head, first, count, usable, w.loaded)
                coming = ahead_of(k, head, first + count, min(stop, first + count + TILE), s.d)
                take_column(
                    one, s, side, w.points, count, w.factors, values, v_step, normalised, sums, w.ones, of_keys, coming
                )  # fmt: skip


# Queries -------------------------------------------------------------------------------------------------------------

QueriesSpace = namedtuple("QueriesSpace", "rows limits relative largest scales weights end")


@inlined
def queries_space(s, rows):
    """The parts of the workspace of `weigh_column`; `weights` holds the first log features, or all of them."""
    limits = rows + s.m_pad
    relative = limits + TILE
    largest = relative + TILE
    scales = largest + TILE
    weights = scales + TILE
    end = weights + s.m * TILE
    return QueriesSpace(rows, limits, relative, largest, scales, weights, end)


@inlined
def begin_queries(one, s, side, top, w):
    """Prepare the workspace of `weigh_column` for sums of this top."""
    copy(one, side + s.column, s.m, w.rows)
    add_rows(one, w.rows, s.m, top, 0, 1, one)
    fill(one, w.limits, TILE, QUERIES_ABOVE * one)


@inlined
def weigh_column(
    one, s, side, columns, count, factors, normalised, sums, reference, total, numerator, ones, w, ahead
):  # fmt: skip
    """What a tile of queries reads, relative to 2**reference: `numerator`, and `total` if `normalised`."""
    n, lead = rest_of_tile(count, lanes(one)), min(ROWS, s.m)
    fill(one, w.relative, n, -np.inf * one)
    product_terms(
        one, lead, n, s.d, side + s.rows, s.d_pad, 1, columns, panel(one), TILE, w.weights, TILE, w.rows, factors
    )
    max_block(one, w.weights, TILE, lead, n, side + ZERO, 0, w.relative, w.relative)
    compare_tops(one, n, w.relative, w.relative, reference)
    totals = ColumnSums(sums.z, 1, sums.kv, 1, total, numerator, w.largest)
    again = True
    for _ in range(TRIES):
        copy(one, factors, n, w.relative)
        add_rows(one, w.relative, n, reference, 0, 1, -one)
        fill(one, total, n, one - one)
        fill(one, numerator, n, one - one)
        fill(one, w.largest, n, -np.inf * one)
        add_up(  # the last stride has the type that it has for keys, so that `add_up` is compiled once
            one, normalised, s.m, n, s.d, side + s.rows, s.d_pad, columns, panel(one), np.int64(TILE), w.rows,
            w.relative, totals, ahead,
        )  # fmt: skip
        again = compare_tops(one, n, w.limits, w.largest, w.relative) > 0
        copy(one, reference, n, w.relative)
        add_rows(one, w.relative, n, w.largest, 0, 1, one)
        take_tops(one, n, reference, w.relative, w.scales)
        if not again:
            break
    if again:
        log_queries(one, s, side, columns, count, factors, w.weights, NOTHING)
        weigh(one, s, side, w.weights, count, sums.top, sums.z, reference, w.relative, total)
        product(one, 1, n, s.m, sums.kv, s.m_pad, 1, w.weights, panel(one), TILE, numerator, TILE)
        fill(one, w.scales, n, one)
    scale_block(one, total, n, 1, n, ones, w.scales, total, n)
    scale_block(one, numerator, n, 1, n, ones, w.scales, numerator, n)


ReadSpace = namedtuple(
    "ReadSpace", "points dense factors columns reference total numerator ones lowest half ignored of_queries end"
)


@inlined
def read_space(s, points):
    """The parts of the workspace of `read_column`; `of_queries` is a `QueriesSpace`.

    `ones`, `lowest` and `half` are constants of `to_scale`: ones, the smallest exponent, and -1/2.
    """
    dense = points + TILE * s.d_pad
    factors = dense + TILE * s.d_pad
    columns = factors + 2 * TILE
    reference = columns + s.d * TILE
    total = reference + TILE
    numerator = total + TILE
    ones = numerator + TILE
    lowest = ones + TILE
    half = lowest + TILE
    ignored = half + TILE
    of_queries = queries_space(s, ignored + TILE)
    end = of_queries.end
    return ReadSpace(
        points, dense, factors, columns, reference, total, numerator, ones, lowest, half, ignored, of_queries, end
    )


@kernel(read_space)
def read_column(one, s, p, q, out, normalised, per_head, low, high, scratch):
    """As `attention.read_queries`, for the sums of `gather_column`."""
    w = read_space(s, scratch)
    of_queries = w.of_queries
    fill(one, w.ones, TILE, one)
    fill(one, w.lowest, TILE, (-126 if item_size(one) == 4 else -1022) * one)
    put(one, w.half, -one / (one + one))
    fill(one, w.ignored, TILE, one - one)
    for task in range(low, high):
        head, share = task // per_head, task % per_head
        key_head = integer_at(p.key_head_of + 8 * head)
        side, sums = query_side(s, p, key_head), sums_at(s, p, key_head * p.segments, 0)
        begin_queries(one, s, side, sums.top, of_queries)
        stop = p.num_queries * (share + 1) // per_head
        for start in range(p.num_queries * share // per_head, stop, TILE):
            count = min(TILE, stop - start)
            load_queries(one, s, side, q, head, start, count, not normalised, w.points, w.dense, w.factors, w.columns)
            coming = ahead_of(q, head, start + count, min(stop, start + count + TILE), s.d)
            weigh_column(
                one, s, side, w.columns, count, w.factors, normalised, sums, w.reference, w.total, w.numerator,
                w.ones, of_queries, coming,
            )  # fmt: skip
            if normalised:
                invert(one, w.total, count)
                keep_stats(one, p, head, start, count, w.total, w.reference)
            else:
                to_scale(one, side, count, w)
            store_points(one, out, head, start, count, 1, 1, w.total, w.numerator)


@inlined
def to_scale(one, side, count, w):
    """Multiply numerators by half a power of 2**reference, and set the totals to the other half.

    The result is numerator times total: a power may leave the range of the dtype where the result does not.
    """
    n = rest_of_tile(count, lanes(one))
    scale_block(one, w.reference, n, 1, n, w.half, w.ones, w.reference, n)
    max_block(one, w.reference, n, 1, n, side + ZERO, 0, w.lowest, w.reference)
    fill(one, w.total, n, one - one)
    exp_block(one, w.total, n, 1, n, side + ZERO, 0, w.reference, side + ZERO, 0, w.ignored)
    scale_block(one, w.numerator, n, 1, n, w.ones, w.total, w.numerator, n)
