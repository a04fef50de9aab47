"""What the attention kernels are made of: tiles of points, their log features, and the sums that queries read.

Logarithms are of base 2. Key features stand in rows, (tile, m); query features in columns, (m, tile), so that the
maximum over features of every query, and the sums, are taken down columns, in vectors. Scratch and packed constants are
places (`vectors.py`); `Sizes` says where in the packed constants of a map what lies.
"""

from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable

from favorsharp_numba.vectors.blocks import byte_at, get, integer_at, item_size, lanes, panel, put
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.emitter import BYTES
from favorsharp_numba.vectors.primitives import (
    exp_block,
    max_block,
    product,
    product_add_ahead,
    product_ahead,
    product_take,
    product_terms_ahead,
    scale_block,
    sum_block,
)
from favorsharp_numba.vectors.products import Ahead
from favorsharp_numba.vectors.rows import (
    add_rows,
    combine,
    compare_tops,
    dot_rows,
    fill,
    load_rows,
    quadratic_rows,
    scale_rows,
    store_rows,
    take_row,
    take_tops,
    total_of,
    transpose_block,
)

TILE = 64
"""Points worked on at once."""
PART = 8
"""Tiles of keys that nobody reads between that are added up by themselves: less often than sums take keys, as low parts
cost as much as they.
"""
GROUP = 16
"""Keys that are scored at once where later ones have fewer queries."""
ROWS = 6
"""Queries that read together where each sees one key more: the rows of a register tile."""

HEADER = 9
ALPHA, OFFSET, BETA, ONE, ZERO, NEAR_ALPHA, NEAR_HALF, NEAR_HALF_SCALED, NEAR_SCALE = range(HEADER)
"""Scalars at the head of packed constants: the root of the scale, the log factor's constant and its coefficient of
|z|^2, 1, 0; of exact scores, the root of the scale times log2(e), and the coefficients of |y|^2 for points y and for
points that log2(e) has multiplied; log2(e)."""


class Points(NamedTuple):
    """An array of points: the kind of its items, its address, where the offset of each batch entry stands, strides.

    Offsets and strides are in bytes.
    """

    kind: int
    base: int
    offsets: int
    row: int
    column: int
    item: int


class Mask(NamedTuple):
    """A boolean array, in the same terms; offsets 0 where all is visible."""

    base: int
    offsets: int
    step: int


NO_MASK = Mask(0, 0, 0)


class Sizes(NamedTuple):
    """Sizes of a problem, padded ones (d_pad, ...) to whole vectors, and offsets into the packed constants of a side.

    A side's log features of a point x are z A^T + column + f with z = alpha x - center and
    f = offset + linear.z - beta |z|^2 - |dense z|^2; `rows` holds A as rows, `panels` its transpose in panels. Exact
    scores are near (alpha x - near_center).(alpha y - near_center), with both norms' halves taken off where `gaussian`;
    near_scaled and near_shift are log2(e) times near_center and center - near_center.
    """

    d: int
    d_pad: int
    m: int
    m_pad: int
    e: int
    e_pad: int
    center: int
    linear: int
    near_center: int
    near_scaled: int
    near_shift: int
    column: int
    rows: int
    panels: int
    dense: int
    dense_back: int
    has_dense: int
    gaussian: int
    total: int


def lanes_of(one: Any) -> int:
    """What `lanes` is to compiled functions."""
    return int(BYTES // one.itemsize)


@inlined
def is_hidden(mask, b, position):
    """Whether a mask hides a position."""
    if mask.offsets == 0:
        return False
    return byte_at(mask.base + integer_at(mask.offsets + 8 * b) + position * mask.step) == 0


@outlined
def load_points(one, points, mask, b, start, count, size, pad, factor, offset, tile):
    """Rows factor x - offset of points start .. start + count, zeros for hidden ones, padded with zeros."""
    base = points.base + integer_at(points.offsets + 8 * b) + start * points.row
    if points.column == points.item:
        load_rows(one, points.kind, base, points.row, count, size, pad, factor, offset, tile)
    else:
        for t in range(count):
            row = tile + t * pad
            for j in range(size):
                address = base + t * points.row + j * points.column
                load_rows(one, points.kind, address, 0, 1, 1, 1, factor, offset + j, row + j)
            fill(one, row + size, pad - size, one - one)
    if mask.offsets != 0:
        for t in range(count):
            if is_hidden(mask, b, start + t):
                fill(one, tile + t * pad, size, one - one)


@inlined
def ahead_of(points, b, start, stop, size):
    """The points start .. stop, for a product to bring nearer; nothing where their rows have gaps."""
    rows = max(0, stop - start) if points.column == points.item else 0
    base = points.base + integer_at(points.offsets + 8 * b) + start * points.row
    return Ahead(base, points.row, rows, size * points.item)


@outlined
def store_points(one, points, b, start, count, size, pad, factors, tile):
    """Store rows times factors[t]."""
    base = points.base + integer_at(points.offsets + 8 * b) + start * points.row
    if points.column == points.item:
        store_rows(one, points.kind, base, points.row, count, size, pad, factors, tile)
    else:
        for t in range(count):
            for j in range(size):
                address = base + t * points.row + j * points.column
                store_rows(one, points.kind, address, 0, 1, 1, 1, factors + t, tile + t * pad + j)


@inlined
def transpose(one, x, x_step, rows, columns, y, y_step, pad):
    """y[j, i] = x[i, j], with zeros in y's columns rows .. pad."""
    transpose_block(one, x, x_step, rows, columns, y, y_step)
    if pad > rows:
        for j in range(columns):
            fill(one, y + j * y_step + rows, pad - rows, one - one)


@inlined
def zero_or_nan(one, s, side, z, count, factors):
    """factors[t] = 0, or NaN where row z[t] is not finite; the tile of scratch behind the factors is used too."""
    quadratic_rows(one, z, s.d_pad, count, s.d_pad, side + s.total - s.d_pad, factors, factors + TILE)


@inlined
def log_factors(one, s, side, z, count, dense, factors):
    """factors[t] of rows z: what a log feature holds of its point alone; NaN where that is not finite.

    The tile of scratch behind the factors is used too.
    """
    if s.has_dense:
        product(one, count, s.d_pad, s.d, z, s.d_pad, 1, side + s.dense, s.d * panel(one), panel(one), dense, s.d_pad)
    squares = factors + TILE
    quadratic_rows(one, z, s.d_pad, count, s.d_pad, side + s.linear, factors, squares)
    combine(one, count, get(one, side + OFFSET), one, factors, -get(one, side + BETA), squares, factors)
    if s.has_dense:
        dot_rows(one, dense, dense, s.d_pad, count, s.d_pad, dense)
        add_rows(one, factors, count, dense, 0, 1, -one)
    combine(one, count, one - one, one, factors, one - one, factors, factors)  # NaN for an infinity


@inlined
def rest_of_tile(count, width):
    """The count, in whole vectors."""
    return (count + width - 1) // width * width


# Keys ----------------------------------------------------------------------------------------------------------------


@inlined
def load_keys(one, s, side, k, mask, b, start, count, z, dense, factors):
    """Load a tile of keys and their log factors, -inf for hidden ones; False where all are hidden."""
    load_points(one, k, mask, b, start, count, s.d, s.d_pad, side + ALPHA, side + s.center, z)
    log_factors(one, s, side, z, count, dense, factors)
    if mask.offsets == 0:
        return count > 0
    some = False
    for t in range(count):
        if is_hidden(mask, b, start + t):
            put(one, factors + t, -np.inf * one)
        else:
            some = True
    return some


@inlined
def load_values(one, s, side, v, mask, b, start, count, values):
    """Load a tile of values, zeros for hidden ones: rows of e_pad."""
    load_points(one, v, mask, b, start, count, s.e, s.e_pad, side + ONE, side + s.total - s.e_pad, values)


@inlined
def usable_values(one, s, v, mask, by_item):
    """Whether values can be taken where they lie, by item or in whole vectors: of the dtype to work in, none hidden."""
    same = mask.offsets == 0 and v.item == item_size(one)
    return same and (s.e == 1 or v.column == v.item) and (by_item or s.e == s.e_pad)


@inlined
def place_of(points, b, position):
    """The place of a point of the dtype to work in."""
    return (points.base + integer_at(points.offsets + 8 * b) + position * points.row) // points.item


@inlined
def values_at(one, s, side, v, mask, b, start, count, usable, loaded):
    """The place of a tile of values: where they lie, or where they are loaded to if they are not usable there."""
    if usable:
        return place_of(v, b, start)
    load_values(one, s, side, v, mask, b, start, count, loaded)
    return loaded


@inlined
def log_keys(one, s, side, z, count, factors, p, p_step, ahead):
    """Log features of keys, a row each."""
    width = panel(one)
    product_terms_ahead(
        one, count, s.m_pad, s.d, z, s.d_pad, 1, side + s.panels, s.d * width, width, p, p_step, factors,
        side + s.column, ahead,
    )  # fmt: skip


@inlined
def raise_top(one, s, side, p, p_step, count, top, new_top, safe):
    """new_top = the largest log feature so far, safe = the same with 0 for -inf; return the largest rise.

    Where features are seen for the first time and none rose, it is a little more than 0.
    """
    max_block(one, p, p_step, count, s.m_pad, side + ZERO, 0, top, new_top)
    return compare_tops(one, s.m_pad, top, new_top, safe)


@inlined
def lows_of(one, s, p, task, scratch):
    """The low parts of kv and then of z: those that a state keeps, or zeros in scratch."""
    if p.lows != 0:
        return p.lows + task * (p.kv_size + s.m_pad)
    fill(one, scratch, p.kv_size + s.m_pad, one - one)
    return scratch


@register_jitable
def lows_size(s):
    """Items of scratch that low parts need."""
    return max(s.m * s.e_pad, s.e * s.m_pad) + s.m_pad


@inlined
def rescale(one, s, top, new_top, kv, z, lows, z_lows, transposed, factors, ones):
    """Divide the sums by the rise of the top, feature by feature, and take the new top; factors keep what it was."""
    take_tops(one, s.m_pad, top, new_top, factors)
    scale_sums(one, s, kv, z, transposed, factors, ones)
    scale_sums(one, s, lows, z_lows, transposed, factors, ones)


@inlined
def scale_sums(one, s, kv, z, transposed, factors, ones):
    """Multiply the sums by a factor for each feature."""
    scale_block(one, z, s.m_pad, 1, s.m_pad, ones, factors, z, s.m_pad)
    if transposed:
        scale_block(one, kv, s.m_pad, s.e, s.m_pad, ones, factors, kv, s.m_pad)
    else:
        scale_rows(one, kv, s.e_pad, s.m, s.e_pad, factors)


@inlined
def add_keys(one, s, p, p_step, values, v_step, count, kv, lows, transposed, ahead):
    """Add features times values, rows `v_step` apart, to kv, (m, e_pad), or transposed (e, m_pad).

    A tile is added up by itself and then taken with the low parts of kv: errors do not grow with the number of keys.
    """
    width = panel(one)
    if transposed:
        product_take(one, s.e, s.m_pad, count, values, 1, v_step, p, width, p_step, kv, s.m_pad, lows, ahead)
    else:
        product_take(one, s.m, s.e_pad, count, p, 1, p_step, values, width, v_step, kv, s.e_pad, lows, ahead)


@inlined
def take_keys(one, s, side, p, p_step, values, v_step, count, kv, z, top, lows, z_lows, transposed, scratch, ahead):
    """Take keys into the sums (kv, z) relative to 2**top: their log features become features."""
    new_top = scratch
    safe = new_top + s.m_pad
    scales = safe + s.m_pad
    ones = scales + s.m_pad
    if raise_top(one, s, side, p, p_step, count, top, new_top, safe) > 0:
        rescale(one, s, top, new_top, kv, z, lows, z_lows, transposed, scales, ones)
    new_z = scales
    fill(one, new_z, s.m_pad, one - one)
    exp_block(one, p, p_step, count, s.m_pad, side + ZERO, 0, safe, ones, 0, new_z)
    take_row(one, s.m_pad, new_z, z, z_lows)
    add_keys(one, s, p, p_step, values, v_step, count, kv, lows, transposed, ahead)


@register_jitable
def take_keys_scratch(s):
    """Items of scratch that `take_keys` needs; those from 3 m_pad on are ones."""
    return 3 * s.m_pad + max(s.m_pad, s.e_pad)


@inlined
def absorb(one, s, side, k, v, mask, b, start, stop, kv, z, top, lows, z_lows, transposed, scratch):
    """Take the keys start .. stop into the sums (kv, z) relative to 2**top."""
    p_step = s.m_pad + lanes(one)
    points = scratch
    dense = points + TILE * s.d_pad
    factors = dense + TILE * s.d_pad
    loaded = factors + 2 * TILE
    p = loaded + TILE * s.e_pad
    rest = p + TILE * p_step
    new_top, safe, scales, ones = rest, rest + s.m_pad, rest + 2 * s.m_pad, rest + 3 * s.m_pad
    part = rest + take_keys_scratch(s)
    size = z - kv
    part_z = part + size
    fill(one, ones, max(s.m_pad, s.e_pad), one)
    fill(one, part_z, s.m_pad, one - one)
    usable = usable_values(one, s, v, mask, transposed)
    v_step = v.row // v.item if usable else s.e_pad
    width, held = panel(one), 0
    for first in range(start, stop, TILE):
        count = min(TILE, stop - first)
        if load_keys(one, s, side, k, mask, b, first, count, points, dense, factors):
            values = values_at(one, s, side, v, mask, b, first, count, usable, loaded)
            after = min(stop, first + count + TILE)
            next_values = ahead_of(v, b, first + count, after, s.e)
            log_keys(one, s, side, points, count, factors, p, p_step, next_values)
            next_keys = ahead_of(k, b, first + count, after, s.d)
            if raise_top(one, s, side, p, p_step, count, top, new_top, safe) > 0:
                rescale(one, s, top, new_top, kv, z, lows, z_lows, transposed, scales, ones)
                if held > 0:
                    scale_sums(one, s, part, part_z, transposed, scales, ones)
            exp_block(one, p, p_step, count, s.m_pad, side + ZERO, 0, safe, ones, 0, part_z)
            if held == 0:
                fill(one, part, size, one - one)
            if transposed:
                product_add_ahead(
                    one, s.e, s.m_pad, count, values, 1, v_step, p, width, p_step, part, s.m_pad, next_keys
                )  # fmt: skip
            else:
                product_add_ahead(
                    one, s.m, s.e_pad, count, p, 1, p_step, values, width, v_step, part, s.e_pad, next_keys
                )  # fmt: skip
            held += 1
            if held == PART:
                take_part(one, s, size, part, kv, z, lows, z_lows)
                held = 0
    if held > 0:
        take_part(one, s, size, part, kv, z, lows, z_lows)


@inlined
def take_part(one, s, size, part, kv, z, lows, z_lows):
    """Take the sums of some tiles, of which those of the weights begin anew."""
    take_row(one, size, part, kv, lows)
    take_row(one, s.m_pad, part + size, z, z_lows)
    fill(one, part + size, s.m_pad, one - one)


def absorb_scratch(one, s):
    """Items of scratch that `absorb` needs."""
    return TILE * (2 * s.d_pad + 2 + s.e_pad + s.m_pad + lanes_of(one)) + take_keys_scratch(s) + lows_size(s)


@inlined
def is_finite(one, side, rows, step, count, n, totals):
    """Whether all of some rows of n items is; `totals` is scratch."""
    fill(one, totals, n, one - one)
    sum_block(one, rows, step, count, n, side + ZERO, 0, totals)
    return total_of(one, totals, n) == 0


# Queries -------------------------------------------------------------------------------------------------------------


@inlined
def load_queries(one, s, side, q, b, start, count, with_factors, z, dense, factors, columns):
    """Load a tile of queries, rows and columns, and their log factors: 0 (or NaN) where those cancel."""
    load_points(one, q, NO_MASK, b, start, count, s.d, s.d_pad, side + ALPHA, side + s.center, z)
    turn_queries(one, s, side, count, with_factors, z, dense, factors, columns)


@inlined
def turn_queries(one, s, side, count, with_factors, z, dense, factors, columns):
    """Columns and log factors of queries that are loaded as rows."""
    if with_factors:
        log_factors(one, s, side, z, count, dense, factors)
    n = rest_of_tile(count, lanes(one))
    transpose(one, z, s.d_pad, count, s.d, columns, TILE, n)
    if with_factors:
        fill(one, factors + count, n - count, one - one)
    else:
        fill(one, factors, n, one - one)
        sum_block(one, columns, TILE, s.d, n, side + ZERO, 0, factors)


@inlined
def log_queries(one, s, side, columns, count, factors, p, ahead):
    """Log features of queries, a column each."""
    n = rest_of_tile(count, lanes(one))
    product_terms_ahead(
        one, s.m, n, s.d, side + s.rows, s.d_pad, 1, columns, panel(one), TILE, p, TILE, side + s.column, factors, ahead
    )


@inlined
def weigh(one, s, side, p, count, top, z, reference, safe, total):
    """Turn log query features into weights relative to 2**reference; total is their sum over the keys of z."""
    n = rest_of_tile(count, lanes(one))
    fill(one, reference, n, -np.inf * one)
    fill(one, total, n, one - one)
    max_block(one, p, TILE, s.m, n, top, 1, reference, reference)
    compare_tops(one, n, reference, reference, safe)
    exp_block(one, p, TILE, s.m, n, top, 1, safe, z, 1, total)


@inlined
def read_sums(one, s, p, count, kv, transposed, numerator, scratch, ahead):
    """numerator (tile, e_pad) = weights times kv; `scratch` has e tiles where kv is transposed."""
    width = panel(one)
    if transposed:
        n = rest_of_tile(count, lanes(one))
        product_ahead(one, s.e, n, s.m, kv, s.m_pad, 1, p, width, TILE, scratch, TILE, ahead)
        transpose(one, scratch, TILE, s.e, count, numerator, s.e_pad, s.e_pad)
    else:
        product_ahead(one, count, s.e_pad, s.m, p, 1, TILE, kv, width, s.e_pad, numerator, s.e_pad, ahead)
