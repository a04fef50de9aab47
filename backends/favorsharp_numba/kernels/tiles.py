"""Tiles of points: loading, storing, and their log features. All attention kernels call these functions.

Logarithms are to base 2. The features of keys are rows (tile, feature_step); the features of queries are columns
(m, TILE), so that maxima and sums over the features of a query run down a column, in vectors. Workspaces and packed
constants are given as places (`vectors/blocks.py`); `Sizes` says where in the packed constants an array is.
"""

import numpy as np

from favorsharp_numba.kernels.arguments import ALPHA, BETA, NO_MASK, OFFSET, ONE, TILE, ZERO, is_hidden, place_of
from favorsharp_numba.vectors.arrays import load_rows, store_rows
from favorsharp_numba.vectors.blocks import sum_block
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.dots import dot_rows, quadratic_rows, total_of
from favorsharp_numba.vectors.items import get, integer_at, item_size, lanes, panel, put
from favorsharp_numba.vectors.products import Ahead, product, product_terms_ahead
from favorsharp_numba.vectors.rows import add_rows, combine, fill
from favorsharp_numba.vectors.transposing import transpose_block


@inlined
def rest_of_tile(count, width):
    """The count, rounded up to whole vectors."""
    return (count + width - 1) // width * width


@outlined
def load_points(one, points, mask, b, start, count, size, pad, factor, offset, tile):
    """Load rows factor x - offset of the points from `start` on: zeros for hidden points, and zeros as padding."""
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
    """The points start .. stop, for a product to prefetch; none if there are gaps in their rows."""
    rows = max(0, stop - start) if points.column == points.item else 0
    base = points.base + integer_at(points.offsets + 8 * b) + start * points.row
    return Ahead(base, points.row, rows, size * points.item)


@outlined
def store_points(one, points, b, start, count, size, pad, factors, tile):
    """Store the rows of a tile, each multiplied by its factor."""
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
    """y[j, i] = x[i, j], and zeros in the columns rows .. pad of y."""
    transpose_block(one, x, x_step, rows, columns, y, y_step)
    if pad > rows:
        for j in range(columns):
            fill(one, y + j * y_step + rows, pad - rows, one - one)


# Log factors ---------------------------------------------------------------------------------------------------------


@inlined
def zero_or_nan(one, s, side, z, count, factors):
    """factors[t] = 0, or NaN if row z[t] is not finite. `factors` has two tiles, of which the second is overwritten."""
    quadratic_rows(one, z, s.d_pad, count, s.d_pad, side + s.total - s.d_pad, factors, factors + TILE)


@inlined
def log_factors(one, s, side, z, count, dense, factors):
    """factors[t] = the part f of the log features of row z[t] that is the same for all features; NaN if not finite.

    `factors` has two tiles; the second one receives the squared norms of the rows.
    """
    if s.has_dense:
        product(one, count, s.d_pad, s.d, z, s.d_pad, 1, side + s.dense, s.d * panel(one), panel(one), dense, s.d_pad)
    factors_of_turned(one, s, side, z, count, dense, factors)


@inlined
def factors_of_turned(one, s, side, z, count, turned, factors):
    """As `log_factors`, from rows `turned` = z times the matrix `dense`, which are overwritten."""
    squares = factors + TILE
    quadratic_rows(one, z, s.d_pad, count, s.d_pad, side + s.linear, factors, squares)
    combine(one, count, get(one, side + OFFSET), one, factors, -get(one, side + BETA), squares, factors)
    if s.has_dense:
        dot_rows(one, turned, turned, s.d_pad, count, s.d_pad, turned)
        add_rows(one, factors, count, turned, 0, 1, -one)
    combine(one, count, one - one, one, factors, one - one, factors, factors)  # an infinity becomes NaN


# Keys and values -----------------------------------------------------------------------------------------------------


@inlined
def load_keys(one, s, side, k, mask, b, start, count, z, dense, factors):
    """Load a tile of keys and their log factors, -inf for hidden keys. Return whether any key is visible."""
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
def log_keys(one, s, side, z, count, factors, features, step, ahead):
    """The log features of a tile of keys, as rows `step` items apart."""
    width = panel(one)
    product_terms_ahead(
        one, count, s.m_pad, s.d, z, s.d_pad, 1, side + s.panels, s.d * width, width, features, step, factors,
        side + s.column, ahead,
    )  # fmt: skip


@inlined
def load_values(one, s, side, v, mask, b, start, count, values):
    """Load a tile of values as rows of e_pad items, zeros for hidden ones."""
    load_points(one, v, mask, b, start, count, s.e, s.e_pad, side + ONE, side + s.total - s.e_pad, values)


@inlined
def usable_values(one, s, v, mask, by_item):
    """Whether a kernel can read values in place: they have its dtype, none is hidden, and their rows are whole vectors.

    With `by_item` the kernel reads single items, and rows may have any length.
    """
    same = mask.offsets == 0 and v.item == item_size(one)
    return same and (s.e == 1 or v.column == v.item) and (by_item or s.e == s.e_pad)


@inlined
def values_at(one, s, side, v, mask, b, start, count, usable, loaded):
    """The place of a tile of values: in their array if they are `usable` there, or else where they are loaded to."""
    if usable:
        return place_of(v, b, start)
    load_values(one, s, side, v, mask, b, start, count, loaded)
    return loaded


@inlined
def is_finite(one, side, rows, step, count, n, totals):
    """Whether rows of n items are finite. `totals` has room for n items."""
    fill(one, totals, n, one - one)
    sum_block(one, rows, step, count, n, side + ZERO, 0, totals)
    return total_of(one, totals, n) == 0


# Queries -------------------------------------------------------------------------------------------------------------


@inlined
def load_queries(one, s, side, q, b, start, count, with_factors, z, dense, factors, columns):
    """Load a tile of queries, as rows z and as columns, and their log factors.

    Log factors are the same for all keys, so that they cancel in a normalised result. Without `with_factors` they are
    0, or NaN for a query that is not finite.
    """
    load_points(one, q, NO_MASK, b, start, count, s.d, s.d_pad, side + ALPHA, side + s.center, z)
    turn_queries(one, s, side, count, with_factors, z, dense, factors, columns)


@inlined
def turn_queries(one, s, side, count, with_factors, z, dense, factors, columns):
    """The columns and the log factors of a tile of queries that has been loaded as rows z."""
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
def log_queries(one, s, side, columns, count, factors, features, ahead):
    """The log features of a tile of queries, as columns."""
    n = rest_of_tile(count, lanes(one))
    product_terms_ahead(
        one, s.m, n, s.d, side + s.rows, s.d_pad, 1, columns, panel(one), TILE, features, TILE, side + s.column,
        factors, ahead,
    )  # fmt: skip
