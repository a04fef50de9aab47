"""Values of one column, as of a regression: features are added up as they are made, and never stored.

Sums may be relative to tops that later features exceed by a little, so that none has to be known before they are made;
where one does by more, it is taken again.
"""

import numpy as np
from numba.extending import register_jitable

from favorsharp_numba.kernels.attention import keep_stats, key_side, query_side
from favorsharp_numba.kernels.tiles import (
    ROWS,
    TILE,
    ZERO,
    ahead_of,
    get,
    integer_at,
    lanes,
    load_keys,
    load_queries,
    log_keys,
    log_queries,
    panel,
    put,
    rescale,
    rest_of_tile,
    store_points,
    take_keys,
    usable_values,
    values_at,
    weigh,
)
from favorsharp_numba.vectors.blocks import item_size
from favorsharp_numba.vectors.compiling import inlined, jit, outlined
from favorsharp_numba.vectors.primitives import (
    exp_block,
    max_block,
    product,
    product_sum,
    product_sums,
    product_terms,
    scale_block,
)
from favorsharp_numba.vectors.products import NOTHING, Sums
from favorsharp_numba.vectors.rows import add_rows, compare_tops, copy, fill, invert, take_row, take_tops

KEYS_ABOVE = 16
"""How far a key's log feature may exceed the top of its sums, and thus how far these, and what is read of them, may
exceed 1."""
QUERIES_ABOVE = 40
"""How far a query's weights may exceed the reference that a few of them gave; what is read is then scaled back."""
TRIES = 3
"""How often features are made anew. Two suffice, unless logarithms are so large that their rounding is above a limit:
then features are stored and their own maxima taken off."""


@outlined
def add_up(one, normalised, m, n, k, a, a_row, b, b_panel, b_step, row, column, sums, ahead):
    """Take a product into the sums of values, and of weights too where `normalised`."""
    if normalised:
        product_sums(one, m, n, k, a, a_row, 1, b, b_panel, b_step, row, column, sums, ahead)
    else:
        product_sum(one, m, n, k, a, a_row, 1, b, b_panel, b_step, row, column, sums, ahead)


@inlined
def begin_keys(one, s, side, top, scratch):
    """Get the scratch of `take_column` ready for sums of this top."""
    shifted, bounds = scratch, scratch + s.m_pad
    for j in range(s.m_pad):
        value = get(one, top + j)
        known = value > -np.inf
        put(one, shifted + j, get(one, side + s.column + j) - (value if known else one - one))
        put(one, bounds + j, KEYS_ABOVE * one if known else -np.inf * one)


@inlined
def take_column(
    one, s, side, points, count, factors, values, v_step, normalised, kv, z, top, lows, ones, scratch, ahead
):  # fmt: skip
    """Take keys into the sums (kv, and z where `normalised`) relative to 2**top; the first keys set it.

    `lows` are the low parts of kv, and then of z.
    """
    width = panel(one)
    shifted, bounds, total = scratch, scratch + s.m_pad, scratch + 2 * s.m_pad
    largest, new_top, scales = total + 2 * s.m_pad, total + 3 * s.m_pad, total + 4 * s.m_pad
    sums = Sums(ones, 0, values, v_step, total, total + s.m_pad, largest)
    for _ in range(TRIES):
        fill(one, total, 2 * s.m_pad, one - one)
        fill(one, largest, s.m_pad, -np.inf * one)
        add_up(
            one, normalised, count, s.m_pad, s.d, points, s.d_pad, side + s.panels, s.d * width, width, factors,
            shifted, sums, ahead,
        )  # fmt: skip
        if not compare_tops(one, s.m_pad, bounds, largest, new_top) > 0:
            take_row(one, s.m_pad, total, z, lows + s.m_pad)
            take_row(one, s.m_pad, total + s.m_pad, kv, lows)
            return
        for j in range(s.m_pad):
            value, above = get(one, top + j), get(one, largest + j)
            if above > get(one, bounds + j):
                value = value + above if value > -np.inf else above
            put(one, new_top + j, value)
        rescale(one, s, top, new_top, kv, z, lows, lows + s.m_pad, 1, scales, ones)
        begin_keys(one, s, side, top, scratch)
    p, p_step = scratch + 7 * s.m_pad, s.m_pad + lanes(one)
    log_keys(one, s, side, points, count, factors, p, p_step, NOTHING)
    rest = p + TILE * p_step
    fill(one, rest + 3 * s.m_pad, max(s.m_pad, s.e_pad), one)
    take_keys(
        one, s, side, p, p_step, values, v_step, count, kv, z, top, lows, lows + s.m_pad, 1, rest, NOTHING
    )  # fmt: skip
    begin_keys(one, s, side, top, scratch)


@inlined
def begin_queries(one, s, side, top, scratch):
    """Get the scratch of `weigh_column` ready for sums of this top."""
    copy(one, side + s.column, s.m, scratch)
    add_rows(one, scratch, s.m, top, 0, 1, one)
    fill(one, scratch + s.m_pad, TILE, QUERIES_ABOVE * one)


@inlined
def weigh_column(
    one, s, side, columns, count, factors, normalised, kv, z, reference, total, numerator, ones, scratch, ahead
):  # fmt: skip
    """What a tile of queries reads: sums of values, and of weights where `normalised`, relative to 2**reference."""
    n, lead = rest_of_tile(count, lanes(one)), min(ROWS, s.m)
    rows, limits = scratch, scratch + s.m_pad
    relative, largest, scales, first = limits + TILE, limits + 2 * TILE, limits + 3 * TILE, limits + 4 * TILE
    fill(one, relative, n, -np.inf * one)
    product_terms(one, lead, n, s.d, side + s.rows, s.d_pad, 1, columns, panel(one), TILE, first, TILE, rows, factors)
    max_block(one, first, TILE, lead, n, side + ZERO, 0, relative, relative)
    compare_tops(one, n, relative, relative, reference)
    sums = Sums(z, 1, kv, 1, total, numerator, largest)
    again = True
    for _ in range(TRIES):
        copy(one, factors, n, relative)
        add_rows(one, relative, n, reference, 0, 1, -one)
        fill(one, total, n, one - one)
        fill(one, numerator, n, one - one)
        fill(one, largest, n, -np.inf * one)
        add_up(  # with a step of the type that keys have: it is compiled once
            one, normalised, s.m, n, s.d, side + s.rows, s.d_pad, columns, panel(one), np.int64(TILE), rows, relative,
            sums, ahead,
        )  # fmt: skip
        again = compare_tops(one, n, limits, largest, relative) > 0
        copy(one, reference, n, relative)
        add_rows(one, relative, n, largest, 0, 1, one)
        take_tops(one, n, reference, relative, scales)
        if not again:
            break
    if again:
        weights = first
        log_queries(one, s, side, columns, count, factors, weights, NOTHING)
        weigh(one, s, side, weights, count, z + s.m_pad, z, reference, relative, total)
        product(one, 1, n, s.m, kv, s.m_pad, 1, weights, panel(one), TILE, numerator, TILE)
        fill(one, scales, n, one)
    scale_block(one, total, n, 1, n, ones, scales, total, n)
    scale_block(one, numerator, n, 1, n, ones, scales, numerator, n)


@jit
def gather_column(one, s, p, k, v, mask, normalised, low, high, scratch):
    """As `gather_keys`; kv is one line, of m_pad, and z is of use only where results are to be `normalised`."""
    points = scratch
    dense = points + TILE * s.d_pad
    factors = dense + TILE * s.d_pad
    loaded = factors + 2 * TILE
    ones = loaded + TILE * s.e_pad
    lows = ones + s.m_pad
    rest = lows + 2 * s.m_pad
    fill(one, ones, s.m_pad, one)
    usable = usable_values(one, s, v, mask, True)
    v_step = v.row // v.item if usable else s.e_pad
    for task in range(low, high):
        head, segment = task // p.segments, task % p.segments
        start, stop = p.num_keys * segment // p.segments, p.num_keys * (segment + 1) // p.segments
        side, kv = key_side(s, p, head), p.sums + task * p.sums_size
        z = kv + p.kv_size
        top = z + s.m_pad
        fill(one, lows, 2 * s.m_pad, one - one)
        begin_keys(one, s, side, top, rest)
        for first in range(start, stop, TILE):
            count = min(TILE, stop - first)
            if load_keys(one, s, side, k, mask, head, first, count, points, dense, factors):
                values = values_at(one, s, side, v, mask, head, first, count, usable, loaded)
                coming = ahead_of(k, head, first + count, min(stop, first + count + TILE), s.d)
                take_column(
                    one, s, side, points, count, factors, values, v_step, normalised, kv, z, top, lows, ones, rest,
                    coming,
                )  # fmt: skip


@jit
def read_column(one, s, p, q, out, normalised, per_head, low, high, scratch):
    """As `read_queries`, of such sums."""
    points = scratch
    dense = points + TILE * s.d_pad
    factors = dense + TILE * s.d_pad
    columns = factors + 2 * TILE
    reference = columns + s.d * TILE
    total = reference + TILE
    numerator = total + TILE
    ones = numerator + TILE
    constants = ones + TILE  # of `to_scale`: a line that nobody reads, exponents that stay in range, -1/2
    rest = constants + 2 * TILE + lanes(one)
    fill(one, ones, TILE, one)
    fill(one, constants, TILE, one - one)
    fill(one, constants + TILE, TILE, (-126 if item_size(one) == 4 else -1022) * one)
    put(one, constants + 2 * TILE, -one / (one + one))
    for task in range(low, high):
        head, share = task // per_head, task % per_head
        key_head = integer_at(p.key_head_of + 8 * head)
        side, kv = query_side(s, p, key_head), p.sums + key_head * p.segments * p.sums_size
        z = kv + p.kv_size
        begin_queries(one, s, side, z + s.m_pad, rest)
        stop = p.num_queries * (share + 1) // per_head
        for start in range(p.num_queries * share // per_head, stop, TILE):
            count = min(TILE, stop - start)
            load_queries(one, s, side, q, head, start, count, not normalised, points, dense, factors, columns)
            coming = ahead_of(q, head, start + count, min(stop, start + count + TILE), s.d)
            weigh_column(
                one, s, side, columns, count, factors, normalised, kv, z, reference, total, numerator, ones, rest,
                coming,
            )  # fmt: skip
            if normalised:
                invert(one, total, count)
                keep_stats(one, p, head, start, count, total, reference)
            else:
                to_scale(one, side, count, reference, numerator, ones, constants, total)
            store_points(one, out, head, start, count, 1, 1, total, numerator)


@inlined
def to_scale(one, side, count, reference, numerator, ones, constants, factors):
    """Take numerators and what they are to be multiplied by to 2**reference, half of it each: it may leave the range
    where the product does not.
    """
    n = rest_of_tile(count, lanes(one))
    lowest = constants + TILE
    scale_block(one, reference, n, 1, n, lowest + TILE, ones, reference, n)
    max_block(one, reference, n, 1, n, side + ZERO, 0, lowest, reference)
    fill(one, factors, n, one - one)
    exp_block(one, factors, n, 1, n, side + ZERO, 0, reference, side + ZERO, 0, constants)
    scale_block(one, numerator, n, 1, n, ones, factors, numerator, n)


@register_jitable
def column_scratch(s):
    """Items of scratch that either kernel needs."""
    return TILE * (2 * s.d_pad + s.d + s.e_pad + s.m_pad + ROWS + 33) + 14 * s.m_pad + max(s.m_pad, s.e_pad)
