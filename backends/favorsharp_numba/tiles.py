"""What the attention kernels are made of: tiles of points, their log features, and the sums that queries read.

Logarithms are of base 2. Key features stand in rows, (tile, m); query features in columns, (m, tile), so that the
maximum over features of every query, and the sums, are taken down columns, in vectors. Scratch and packed constants are
places (`vectors.py`); `Sizes` says where in the packed constants of a map what lies.
"""

from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable

from favorsharp_numba.compiling import inlined, jit, jit_sums
from favorsharp_numba.emitter import BYTES
from favorsharp_numba.primitives import (
    exp_block,
    fill_before,
    max_block,
    product,
    product_add,
    product_add_ahead,
    product_ahead,
    product_terms,
    product_terms_ahead,
    scale_block,
    shift_block,
    sum_block,
)
from favorsharp_numba.rows import (
    add_rows,
    combine,
    compare_tops,
    copy,
    fill,
    load_rows,
    quadratic_rows,
    scale_rows,
    store_rows,
    take_tops,
    transpose_block,
)
from favorsharp_numba.vectors import Ahead, byte_at, get, integer_at, lanes, panel, put

TILE = 64
"""Points worked on at once."""

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


@jit
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


@jit
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


@jit_sums
def total_of(one, x, n):
    total = one - one
    for j in range(n):
        total += get(one, x + j)
    return total


@jit_sums
def zero_or_nan(one, z, d):
    """0; NaN where an entry is not finite."""
    total = one - one
    for j in range(d):
        total += get(one, z + j)
    return total * (one - one)


@jit_sums
def squared_norm(one, z, d):
    total = one - one
    for j in range(d):
        value = get(one, z + j)
        total += value * value
    return total


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
    for t in range(count if s.has_dense else 0):
        put(one, factors + t, get(one, factors + t) - squared_norm(one, dense + t * s.d_pad, s.d))
    combine(one, count, one - one, one, factors, one - one, factors, factors)  # NaN for an infinity


@inlined
def rest_of_tile(count, width):
    """The count, in whole vectors."""
    return (count + width - 1) // width * width


# Keys ----------------------------------------------------------------------------------------------------------------


@inlined
def load_keys(one, s, side, k, v, mask, b, start, count, z, dense, factors, values):
    """Load a tile of keys and values, and the keys' log factors, -inf for hidden ones; False where all are hidden."""
    load_points(one, k, mask, b, start, count, s.d, s.d_pad, side + ALPHA, side + s.center, z)
    zeros = side + s.total - s.e_pad
    load_points(one, v, mask, b, start, count, s.e, s.e_pad, side + ONE, zeros, values)
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
def rescale(one, s, top, new_top, kv, z, transposed, factors, ones):
    """Divide the sums by the rise of the top, feature by feature, and take the new top; factors keep what it was."""
    take_tops(one, s.m_pad, top, new_top, factors)
    scale_sums(one, s, kv, z, transposed, factors, ones)


@inlined
def scale_sums(one, s, kv, z, transposed, factors, ones):
    """Multiply the sums by a factor for each feature."""
    scale_block(one, z, s.m_pad, 1, s.m_pad, ones, factors, z, s.m_pad)
    if transposed:
        scale_block(one, kv, s.m_pad, s.e, s.m_pad, ones, factors, kv, s.m_pad)
    else:
        scale_rows(one, kv, s.e_pad, s.m, s.e_pad, factors)


@inlined
def add_keys(one, s, p, p_step, values, count, kv, transposed, ahead):
    """Add features times values to kv, (m, e_pad), or transposed (e, m_pad)."""
    width = panel(one)
    if transposed:
        product_add_ahead(one, s.e, s.m_pad, count, values, 1, s.e_pad, p, width, p_step, kv, s.m_pad, ahead)
    else:
        product_add_ahead(one, s.m, s.e_pad, count, p, 1, p_step, values, width, s.e_pad, kv, s.e_pad, ahead)


@inlined
def take_keys(one, s, side, p, p_step, values, count, kv, z, top, transposed, scratch, ahead):
    """Take keys into the sums (kv, z) relative to 2**top: their log features become features."""
    new_top = scratch
    safe = new_top + s.m_pad
    scales = safe + s.m_pad
    ones = scales + s.m_pad
    if raise_top(one, s, side, p, p_step, count, top, new_top, safe) > 0:
        rescale(one, s, top, new_top, kv, z, transposed, scales, ones)
    exp_block(one, p, p_step, count, s.m_pad, side + ZERO, 0, safe, ones, 0, z)
    add_keys(one, s, p, p_step, values, count, kv, transposed, ahead)


@register_jitable
def take_keys_scratch(s):
    """Items of scratch that `take_keys` needs; those from 3 m_pad on are ones."""
    return 3 * s.m_pad + max(s.m_pad, s.e_pad)


@inlined
def absorb(one, s, side, k, v, mask, b, start, stop, kv, z, top, transposed, scratch):
    """Take the keys start .. stop into the sums (kv, z) relative to 2**top."""
    p_step = s.m_pad + lanes(one)
    points = scratch
    dense = points + TILE * s.d_pad
    factors = dense + TILE * s.d_pad
    values = factors + 2 * TILE
    p = values + TILE * s.e_pad
    rest = p + TILE * p_step
    fill(one, rest + 3 * s.m_pad, max(s.m_pad, s.e_pad), one)
    for first in range(start, stop, TILE):
        count = min(TILE, stop - first)
        if load_keys(one, s, side, k, v, mask, b, first, count, points, dense, factors, values):
            after = min(stop, first + count + TILE)
            next_values = ahead_of(v, b, first + count, after, s.e)
            log_keys(one, s, side, points, count, factors, p, p_step, next_values)
            next_keys = ahead_of(k, b, first + count, after, s.d)
            take_keys(one, s, side, p, p_step, values, count, kv, z, top, transposed, rest, next_keys)


def absorb_scratch(one, s):
    """Items of scratch that `absorb` needs."""
    return TILE * (2 * s.d_pad + 2 + s.e_pad + s.m_pad + lanes_of(one)) + take_keys_scratch(s)


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


# Exact scores --------------------------------------------------------------------------------------------------------


@inlined
def load_near(one, s, side, points, mask, b, start, count, scaled, rows, norms):
    """Rows alpha x - near_center, times log2(e) where `scaled`, and what norms contribute to scores: 0, or NaN where a
    row is not finite, and minus half of |row|^2 where `gaussian`. The tile of scratch behind the norms is used too.
    """
    factor, center = (NEAR_ALPHA, s.near_scaled) if scaled else (ALPHA, s.near_center)
    load_points(one, points, mask, b, start, count, s.d, s.d_pad, side + factor, side + center, rows)
    zeros, squares = side + s.total - s.d_pad, norms + TILE
    quadratic_rows(one, rows, s.d_pad, count, s.d_pad, zeros, norms, squares)
    if s.gaussian:
        half = get(one, side + (NEAR_HALF_SCALED if scaled else NEAR_HALF))
        add_rows(one, norms, count, squares, count, 1, half)


@inlined
def near_norms(one, s, half, squares, factors, count, norms):
    """`half` times the squares where `gaussian`, else 0; NaN where a factor is not finite."""
    nothing = one - one
    combine(one, count, nothing, half if s.gaussian else nothing, squares, nothing, factors, norms)


@inlined
def near_keys(one, s, side, count, factors, norms):
    """Norms, as of `load_near`, of rows and log factors that `load_keys` made; NaN too for those hidden.

    The center of the keys is the near one too where `gaussian`; where not, `near_queries` puts it back.
    """
    near_norms(one, s, get(one, side + NEAR_HALF), factors + TILE, factors, count, norms)


@inlined
def near_queries(one, s, side, keys, columns, count, factors, norms):
    """Turn the columns of `load_queries` into log2(e) (alpha x - near_center); norms are what they add to the scores of
    `near_keys`, NaN where a query is not finite.
    """
    n = rest_of_tile(count, lanes(one))
    squares = norms + TILE
    shift_block(one, columns, TILE, s.d, n, side + NEAR_SCALE, side + s.near_shift, squares)
    near_norms(one, s, get(one, side + NEAR_HALF_SCALED), squares, factors, n, norms)
    if not s.gaussian:
        sum_block(one, columns, TILE, s.d, n, keys + s.center, 1, norms)


@inlined
def is_finite(one, side, rows, pad, count, totals):
    """Whether all of some rows is; `totals` is scratch."""
    fill(one, totals, pad, one - one)
    sum_block(one, rows, pad, count, pad, side + ZERO, 0, totals)
    return total_of(one, totals, pad) == 0


GROUP = 16
"""Keys that are scored at once where later ones have fewer queries."""
ROWS = 6
"""Queries that read together where each sees one key more: the rows of a register tile."""


@inlined
def num_before(first, position, count):
    """How many of `count` queries from position `first` on come before a key."""
    return min(max(0, position - first), count)


@jit
def read_near(
    one, s, side, columns, query_norms, first, count, rows, norms, values, finite, start, keys, mask, b, causal,
    numerator, total, reference, scratch,
):  # fmt: skip
    """Add a tile of exactly scored keys, start .. start + keys, to what queries first .. first + count have read.

    A query sees a key of them that the mask shows and, where causal, that is not after it. `finite`: all values are.
    """
    n, width, lane = rest_of_tile(count, lanes(one)), panel(one), lanes(one)
    scores = scratch
    new = scores + TILE * TILE
    safe = new + TILE
    scale = safe + TILE
    ones = scale + TILE
    partly = causal and start + keys > first + 1
    group = GROUP if partly else keys
    copy(one, reference, n, new)
    for j in range(0, keys, group):
        size = min(group, keys - j)
        left = num_before(first, start + j, n) // lane * lane if partly else 0
        line = scores + j * TILE
        product_terms(
            one, size, n - left, s.d, rows + j * s.d_pad, s.d_pad, 1, columns + left, width, TILE, line + left,
            TILE, norms + j, query_norms + left,
        )  # fmt: skip
        if partly:
            fill_before(one, line + left, TILE, size, n - left, start + j - first - left, -np.inf * one)
        for i in range(size if mask.offsets != 0 else 0):
            if is_hidden(mask, b, start + j + i):
                fill(one, line + i * TILE + left, n - left, -np.inf * one)
        max_block(one, line + left, TILE, size, n - left, side + ZERO, 0, new + left, new + left)
    if compare_tops(one, n, reference, new, safe) > 0:
        take_tops(one, n, reference, new, scale)
        scale_block(one, total, n, 1, n, ones, scale, total, n)
        scale_block(one, numerator, s.e_pad, count, s.e_pad, scale, ones, numerator, s.e_pad)
    for j in range(0, keys, group):
        size = min(group, keys - j)
        left = num_before(first, start + j, n) // lane * lane if partly else 0
        line = scores + j * TILE
        exp_block(one, line + left, TILE, size, n - left, side + ZERO, 0, safe + left, ones, 0, total + left)
        for i in range(min(size, ROWS - 1) if left > 0 else 0):
            fill(one, line + i * TILE + left - min(left, ROWS), min(left, ROWS), one - one)
    if partly:
        # a value that is not finite must not meet the weight 0 of a query before it
        step = ROWS if finite else 1
        for t in range(0, count, step):
            seen = min(keys, max(0, first + min(t + step, count) - start))
            line = numerator + t * s.e_pad
            product_add(
                one, min(step, count - t), s.e_pad, seen, scores + t, 1, TILE, values, width, s.e_pad, line, s.e_pad,
            )  # fmt: skip
    else:
        product_add(one, count, s.e_pad, keys, scores, 1, TILE, values, width, s.e_pad, numerator, s.e_pad)


@inlined
def fill_near_scratch(one, s, scratch):
    """The ones that `read_near` expects in its scratch."""
    fill(one, scratch + TILE * (TILE + 3), max(TILE, s.e_pad), one)


def near_scratch(s):
    """Items of scratch that `read_near` needs, made ready by `fill_near_scratch`."""
    return TILE * (TILE + 3) + max(TILE, s.e_pad)
