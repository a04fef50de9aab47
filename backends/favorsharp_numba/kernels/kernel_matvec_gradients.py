"""The backward kernel of `kernel_matvec`: gradients of points and values that read sums without normalisation."""

from collections import namedtuple

import numpy as np

from favorsharp_numba.kernels.arguments import NO_MASK, ONE, TILE, ZERO, query_side
from favorsharp_numba.kernels.point_gradients import add_point_gradients, point_space
from favorsharp_numba.kernels.sums import read_sums, sums_at
from favorsharp_numba.kernels.tiles import (
    ahead_of,
    load_points,
    load_queries,
    log_queries,
    rest_of_tile,
    transpose,
)
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import exp_block, max_block, multiply_block
from favorsharp_numba.vectors.compiling import inlined
from favorsharp_numba.vectors.items import get, integer_at, item_size, lanes, panel, put
from favorsharp_numba.vectors.products import NOTHING, product
from favorsharp_numba.vectors.rows import add_rows, fill, scale_rows

ReadGradientsSpace = namedtuple(
    "ReadGradientsSpace",
    "points dense factors columns weights slopes rows row_columns shifts scales totals of_points end",
)


@inlined
def read_gradients_space(s, points):
    """The parts of the workspace of `read_gradients`; `of_points` is a `PointSpace`."""
    dense = points + TILE * s.d_pad
    factors = dense + TILE * s.d_pad
    columns = factors + 2 * TILE
    weights = columns + s.d * TILE
    slopes = weights + s.m * TILE
    rows = slopes + s.m * TILE
    row_columns = rows + TILE * s.e_pad
    shifts = row_columns + s.e * TILE
    scales = shifts + TILE
    totals = scales + TILE
    of_points = point_space(s, totals + TILE)
    end = of_points.end
    return ReadGradientsSpace(
        points, dense, factors, columns, weights, slopes, rows, row_columns, shifts, scales, totals, of_points, end
    )


@kernel(read_gradients_space)
def read_gradients(one, s, p, readers, values, of_points, of_values, maps, maps_size, per_head, low, high, scratch):
    """Gradients of readers of sums that are not normalised. Task = head * per_head + a share of its readers.

    A reader i with values g_i and weights w_i = exp2(lq_i + top) reads the sums kv. Its log features get the gradient
    w_i (kv.g_i), and its values get w_i kv if `of_values` is not 0. A power of 2 is split between weights and values,
    half of the reference each: either may leave the range of the dtype where their product does not. `maps`, if it is
    not 0, has `maps_size` items for each task.
    """
    w = read_gradients_space(s, scratch)
    gradient = w.of_points.gradient
    row, step = (1, s.m_pad) if p.transposed else (s.e_pad, 1)
    for task in range(low, high):
        head, share = task // per_head, task % per_head
        key_head = integer_at(p.key_head_of + 8 * head)
        side, sums = query_side(s, p, key_head), sums_at(s, p, key_head * p.segments, 0)
        stop = p.num_queries * (share + 1) // per_head
        for start in range(p.num_queries * share // per_head, stop, TILE):
            count = min(TILE, stop - start)
            n, line = rest_of_tile(count, lanes(one)), head * p.num_queries + start
            after = min(stop, start + count + TILE)
            load_queries(one, s, side, readers, head, start, count, True, w.points, w.dense, w.factors, w.columns)
            next_readers = ahead_of(readers, head, start + count, after, s.d)
            log_queries(one, s, side, w.columns, count, w.factors, w.weights, next_readers)
            split_weights(one, s, side, n, sums.top, w)
            zeros = side + s.total - s.e_pad
            load_points(one, values, NO_MASK, head, start, count, s.e, s.e_pad, side + ONE, zeros, w.rows)
            scale_rows(one, w.rows, s.e_pad, count, s.e_pad, w.scales)
            transpose(one, w.rows, s.e_pad, count, s.e, w.row_columns, TILE, n)
            product(one, s.m, n, s.e, sums.kv, row, step, w.row_columns, panel(one), TILE, w.slopes, TILE)
            if of_values:
                read_sums(one, s, w.weights, count, sums.kv, p.transposed, gradient, w.row_columns, NOTHING)
                scale_rows(one, gradient, s.e_pad, count, s.e_pad, w.scales)
                add_rows(one, of_values + line * s.e, s.e, gradient, s.e_pad, count, one)
            fill(one, w.totals, n, one - one)
            multiply_block(one, w.slopes, TILE, s.m, n, w.weights, w.totals)
            add_point_gradients(
                one, s, side, w.points, w.dense, w.slopes, w.totals, count, True, w.of_points,
                of_points + line * s.d, maps + task * maps_size if maps else 0,
                ahead_of(values, head, start + count, after, s.e),
            )  # fmt: skip


@inlined
def split_weights(one, s, side, n, top, w):
    """Turn log features into weights relative to 2**shift, half of the reference; `scales` receives 2**shift."""
    largest = 126 if item_size(one) == 4 else 1022
    fill(one, w.shifts, n, -np.inf * one)
    max_block(one, w.weights, TILE, s.m, n, top, 1, w.shifts, w.shifts)
    for t in range(n):
        reference = get(one, w.shifts + t)
        shift = max(reference / 2, reference - largest) if reference > -np.inf else 0
        put(one, w.shifts + t, one * shift)
        put(one, w.scales + t, one * np.exp2(shift))
    fill(one, w.totals, n, one - one)
    exp_block(one, w.weights, TILE, s.m, n, top, 1, w.shifts, side + ZERO, 0, w.totals)
