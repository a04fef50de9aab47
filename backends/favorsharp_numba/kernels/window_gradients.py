"""The backward kernel of attention with a window: gradients through the keys that are scored exactly.

`attention_gradients.py` has the gradients through features, and `gradient_rows.py` says what rows G and V are.
"""

from collections import namedtuple

import numpy as np

from favorsharp_numba.kernels.arguments import ALPHA, NO_MASK, TILE, ZERO, is_hidden
from favorsharp_numba.kernels.gradient_rows import load_gradients, load_values
from favorsharp_numba.kernels.near_scores import load_near
from favorsharp_numba.kernels.tiles import rest_of_tile, transpose
from favorsharp_numba.kernels.window_rule import behind_near, first_near
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import exp_block, multiply_block
from favorsharp_numba.vectors.compiling import inlined
from favorsharp_numba.vectors.dots import total_of
from favorsharp_numba.vectors.items import get, integer_at, lanes, panel, put
from favorsharp_numba.vectors.products import product, product_add, product_terms
from favorsharp_numba.vectors.rows import add_rows, fill, scale_rows

NearGradientsSpace = namedtuple(
    "NearGradientsSpace",
    "queries norms columns slopes slope_columns room keys key_norms values scores products query_rows key_rows "
    "value_rows totals references sums end",
)


@inlined
def near_gradients_space(s, queries):
    """The parts of the workspace of `near_gradients`. Norms have a second tile, for the squares of rows."""
    norms = queries + TILE * s.d_pad
    columns = norms + 2 * TILE
    slopes = columns + s.d * TILE
    slope_columns = slopes + TILE * s.e_pad
    room = slope_columns + s.e * TILE
    keys = room + TILE * s.e_pad
    key_norms = keys + TILE * s.d_pad
    values = key_norms + 2 * TILE
    scores = values + TILE * s.e_pad
    products = scores + TILE * TILE
    query_rows = products + TILE * TILE
    key_rows = query_rows + TILE * s.d_pad
    value_rows = key_rows + TILE * s.d_pad
    totals = value_rows + TILE * s.e_pad
    references = totals + TILE
    sums = references + TILE
    end = sums + TILE
    return NearGradientsSpace(
        queries, norms, columns, slopes, slope_columns, room, keys, key_norms, values, scores, products, query_rows,
        key_rows, value_rows, totals, references, sums, end,
    )  # fmt: skip


@kernel(near_gradients_space)
def near_gradients(one, s, p, q, k, v, gradient, out, mask, low, high, scratch):
    """Add the gradients through near keys to dq, dk and dv, for query heads low .. high."""
    w = near_gradients_space(s, scratch)
    window, length = p.window, p.num_keys
    pieces = (window + TILE - 1) // TILE  # of a block
    natural = one * np.log(2.0)
    for f in range(low, high):
        query_constants = p.query_side + integer_at(p.map_of + 8 * f) * s.total
        key_constants = p.key_side + integer_at(p.map_of + 8 * f) * s.total
        stats = p.stats + 2 * f * p.num_queries
        root = get(one, query_constants + ALPHA)
        for number in range((length + window - 1) // window * pieces):
            block = number // pieces
            first = block * window + number % pieces * TILE
            count = min(TILE, min(length, (block + 1) * window) - first)
            if count <= 0:
                continue
            load_near_queries(one, s, query_constants, q, gradient, out, stats, f, first, count, w)
            last = first + count if p.causal else min(length, behind_near(block) * window)
            for start in range(max(0, first_near(block) * window), last, TILE):
                size = min(TILE, last - start)
                score_keys(one, s, p, key_constants, k, v, mask, f, first, count, start, size, w)
                add_key_gradients(one, s, p, f, count, start, size, root, w)
            if s.gaussian:
                scale_rows(one, w.queries, s.d_pad, count, s.d_pad, w.sums)
                add_rows(one, w.query_rows, s.d_pad, w.queries, s.d_pad, count, -natural)
            add_rows(one, p.dq + (f * length + first) * s.d, s.d, w.query_rows, s.d_pad, count, root)


@inlined
def load_near_queries(one, s, constants, q, gradient, out, stats, f, first, count, w):
    """Load a tile of queries with their rows G and references, and set their gradients to zero."""
    n = rest_of_tile(count, lanes(one))
    load_near(one, s, constants, q, NO_MASK, f, first, count, True, w.queries, w.norms)
    transpose(one, w.queries, s.d_pad, count, s.d, w.columns, TILE, n)
    fill(one, w.norms + count, n - count, one - one)
    load_gradients(one, s, constants, gradient, out, stats, f, first, count, w.slopes, w.room)
    transpose(one, w.slopes, s.e_pad, count, s.e, w.slope_columns, TILE, n)
    for t in range(n):
        put(one, w.references + t, get(one, stats + 2 * (first + t) + 1) if t < count else one - one)
    fill(one, w.query_rows, TILE * s.d_pad, one - one)
    fill(one, w.sums, n, one - one)


@inlined
def score_keys(one, s, p, constants, k, v, mask, f, first, count, start, size, w):
    """Load a tile of keys with their rows V, and compute the weights with which the tile of queries reads them."""
    n = rest_of_tile(count, lanes(one))
    load_near(one, s, constants, k, mask, f, start, size, False, w.keys, w.key_norms)
    load_values(one, s, constants, v, mask, f, start, size, w.values)
    product_terms(
        one, size, n, s.d, w.keys, s.d_pad, 1, w.columns, panel(one), TILE, w.scores, TILE, w.key_norms, w.norms
    )
    for j in range(size):
        if is_hidden(mask, f, start + j):
            fill(one, w.scores + j * TILE, n, -np.inf * one)
        elif p.causal and start + j > first:
            fill(one, w.scores + j * TILE, min(start + j - first, n), -np.inf * one)
    exp_block(one, w.scores, TILE, size, n, constants + ZERO, 0, w.references, constants + ZERO, 0, w.totals)


@inlined
def add_key_gradients(one, s, p, f, count, start, size, root, w):
    """Add the gradients of a tile of keys to dk and dv, and those of the queries to the rows of the workspace."""
    width, n = panel(one), rest_of_tile(count, lanes(one))
    product(one, size, s.e_pad, count, w.scores, TILE, 1, w.slopes, width, s.e_pad, w.value_rows, s.e_pad)
    line = f * p.num_keys + start
    add_rows(one, p.dv + line * (s.e - 1), s.e - 1, w.value_rows, s.e_pad, size, one)
    product(one, size, n, s.e, w.values, s.e_pad, 1, w.slope_columns, width, TILE, w.products, TILE)
    multiply_block(one, w.products, TILE, size, n, w.scores, w.sums)
    product_add(one, count, s.d_pad, size, w.products, 1, TILE, w.keys, width, s.d_pad, w.query_rows, s.d_pad)
    product(one, size, s.d_pad, count, w.products, TILE, 1, w.queries, width, s.d_pad, w.key_rows, s.d_pad)
    target = p.dk + line * s.d
    add_rows(one, target, s.d, w.key_rows, s.d_pad, size, root * (one * np.log(2.0)))  # queries were scaled to base 2
    if s.gaussian:
        for j in range(size):
            put(one, w.key_norms + j, -total_of(one, w.products + j * TILE, count))
        scale_rows(one, w.keys, s.d_pad, size, s.d_pad, w.key_norms)
        add_rows(one, target, s.d, w.keys, s.d_pad, size, root)
