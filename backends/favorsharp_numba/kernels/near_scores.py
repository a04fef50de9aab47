"""Exact scores of near keys, and how they are added to what queries have read by features.

Scores are to base 2. They are blocks with a row for each key and a column for each query.
"""

import numpy as np

from favorsharp_numba.kernels.arguments import (
    ALPHA,
    GROUP,
    NEAR_ALPHA,
    NEAR_HALF,
    NEAR_HALF_SCALED,
    NEAR_SCALE,
    ONE,
    ROWS,
    TILE,
    ZERO,
    is_hidden,
)
from favorsharp_numba.kernels.tiles import load_points, rest_of_tile
from favorsharp_numba.vectors.blocks import exp_block, fill_before, max_block, scale_block, shift_block, sum_block
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.dots import quadratic_rows
from favorsharp_numba.vectors.items import get, lanes, panel
from favorsharp_numba.vectors.products import product_add, product_terms
from favorsharp_numba.vectors.rows import add_rows, combine, fill, scale_rows
from favorsharp_numba.vectors.tops import compare_tops, take_tops


@inlined
def load_near(one, s, side, points, mask, b, start, count, scaled, rows, norms):
    """Load rows alpha x - near_center, times log2(e) if `scaled`, and what their norms contribute to scores.

    That is minus half of |row|^2 if the kernel is Gaussian, or else 0; NaN if the row is not finite. `norms` has two
    tiles, of which the second is overwritten.
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
    """norms = `half` times the squares if the kernel is Gaussian, or else 0; NaN if a factor is not finite."""
    nothing = one - one
    combine(one, count, nothing, half if s.gaussian else nothing, squares, nothing, factors, norms)


@inlined
def near_keys(one, s, side, count, factors, norms):
    """What the norms of keys contribute to scores, from the log factors that `load_keys` made; NaN for hidden keys.

    `load_keys` has centred the rows by the center of the keys. For the Gaussian kernel that is also the near center;
    for the softmax kernel `near_queries` makes up for it.
    """
    near_norms(one, s, get(one, side + NEAR_HALF), factors + TILE, factors, count, norms)


@inlined
def near_queries(one, s, side, keys, columns, count, factors, norms):
    """Turn the columns of `load_queries` into log2(e) (alpha x - near_center).

    `norms` receives what queries contribute to their scores with rows of `load_keys`; NaN if a query is not finite.
    """
    n = rest_of_tile(count, lanes(one))
    squares = norms + TILE
    shift_block(one, columns, TILE, s.d, n, side + NEAR_SCALE, side + s.near_shift, squares)
    near_norms(one, s, get(one, side + NEAR_HALF_SCALED), squares, factors, n, norms)
    if not s.gaussian:
        sum_block(one, columns, TILE, s.d, n, keys + s.center, 1, norms)


@inlined
def first_seeing(one, before, n):
    """The first of n columns for which a key is scored, if `before` queries come before it, in whole vectors."""
    return min(max(0, before), n) // lanes(one) * lanes(one)


@outlined
def score_near(
    one, s, side, columns, query_norms, n, rows, norms, size, before, mask, b, start, scores, largest
):  # fmt: skip
    """The scores of `size` keys, from the position `start` on, and n columns of queries. `largest` rises to the
    largest.

    The first before + i columns come before key i and do not see it (if that is larger than 0).
    """
    width, partly = panel(one), before + size > 1
    group = GROUP if partly else size
    for j in range(0, size, group):
        count, left = min(group, size - j), first_seeing(one, before + j, n)
        line = scores + j * TILE + left
        product_terms(
            one, count, n - left, s.d, rows + j * s.d_pad, s.d_pad, 1, columns + left, width, TILE, line, TILE,
            norms + j, query_norms + left,
        )  # fmt: skip
        if partly:
            fill_before(one, line, TILE, count, n - left, before + j - left, -np.inf * one)
        for i in range(count if mask.offsets != 0 else 0):
            if is_hidden(mask, b, start + j + i):
                fill(one, line + i * TILE, n - left, -np.inf * one)
        max_block(one, line, TILE, count, n - left, side + ZERO, 0, largest + left, largest + left)


@inlined
def raise_references(one, s, side, n, largest, numerator, total, reference, room):
    """Raise the references of n queries to their largest scores, and divide what they have read by the rise.

    `room` has two tiles; the first one receives the references, with 0 for -inf.
    """
    safe, factors = room, room + TILE
    if compare_tops(one, n, reference, largest, safe) > 0:
        take_tops(one, n, reference, largest, factors)
        scale_block(one, total, n, 1, n, side + ONE, factors, total, n)
        scale_rows(one, numerator, s.e_pad, n, s.e_pad, factors)


@outlined
def weigh_near(one, side, n, size, before, safe, scores, total):
    """Turn scores into weights relative to 2**safe, and add these to the totals."""
    partly = before + size > 1
    group = GROUP if partly else size
    for j in range(0, size, group):
        count, left = min(group, size - j), first_seeing(one, before + j, n)
        line = scores + j * TILE + left
        exp_block(one, line, TILE, count, n - left, side + ZERO, 0, safe + left, side + ONE, 0, total + left)
        # queries before `left` may be in one register tile with later ones, which reads all keys of the later ones
        for i in range(min(count, ROWS - 1) if left > 0 else 0):
            fill(one, line + i * TILE - min(left, ROWS), min(left, ROWS), one - one)


@outlined
def add_near(one, s, count, size, before, weights, values, v_step, finite, numerator):
    """Add the weighted values of keys, rows `v_step` apart, to the numerators of queries. `finite`: all values are
    finite.
    """
    width = panel(one)
    if before + size <= 1:
        product_add(one, count, s.e_pad, size, weights, 1, TILE, values, width, v_step, numerator, s.e_pad)
        return
    step = ROWS if finite else 1  # an infinite value times the weight 0 of a query before it would be NaN
    for t in range(0, count, step):
        stop = min(t + step, count)
        seen = min(size, max(0, stop - before))
        product_add(
            one, stop - t, s.e_pad, seen, weights + t, 1, TILE, values, width, v_step, numerator + t * s.e_pad,
            s.e_pad,
        )  # fmt: skip
