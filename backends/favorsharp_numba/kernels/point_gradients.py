"""From the gradients of log features to those of points and of a map's constants; all backward kernels call this.

The gradients of the log features of a tile of points are called *slopes*: (m, TILE), a column for each point. Their
sums over the features, a line of a tile, are the slopes of the log factors f (`Sizes`).
"""

from collections import namedtuple

import numpy as np

from favorsharp_numba.kernels.arguments import ALPHA, BETA, TILE
from favorsharp_numba.vectors.blocks import scale_block
from favorsharp_numba.vectors.compiling import inlined
from favorsharp_numba.vectors.dots import total_of
from favorsharp_numba.vectors.items import get, panel, put
from favorsharp_numba.vectors.products import NOTHING, product, product_add, product_ahead, product_take
from favorsharp_numba.vectors.rows import add_rows, fill, take_row

PointSpace = namedtuple("PointSpace", "gradient weighted sums end")


@inlined
def point_space(s, gradient):
    """The parts of the workspace of `add_point_gradients`; `gradient` has room for rows of points or of values."""
    weighted = gradient + TILE * max(s.d_pad, s.e_pad)
    sums = weighted + TILE * s.d_pad
    end = sums + s.d_pad
    return PointSpace(gradient, weighted, sums, end)


MapSums = namedtuple("MapSums", "points column factor_points factor_products factor end")


@inlined
def map_sums_at(s, points):
    """Where the sums that a map's gradients are made of lie, for one side of a head.

    Of slopes: times the point (m, d_pad), alone (m_pad). Of the slopes of log factors: times the point (d_pad), times
    the products of its coordinates (d, d_pad), alone (1). The low parts of all of them follow behind, in the same
    order.
    """
    column = points + s.m * s.d_pad
    factor_points = column + s.m_pad
    factor_products = factor_points + s.d_pad
    factor = factor_products + s.d * s.d_pad
    end = factor + 8
    return MapSums(points, column, factor_points, factor_products, factor, end)


@inlined
def add_point_gradients(
    one, s, constants, z, dense, slopes, factor_slopes, count, with_factors, w, target, maps, ahead
):  # fmt: skip
    """Add the gradients of a tile of points z to rows at `target`, and their share to the sums of a map at `maps`.

    `maps` is 0 if the gradients of the map are not wanted. `with_factors` is 0 if log factors cancel. `dense` has room
    for a tile of points.
    """
    product_ahead(
        one, count, s.d_pad, s.m, slopes, 1, TILE, constants + s.rows, panel(one), s.d_pad, w.gradient, s.d_pad, ahead
    )
    if with_factors:
        add_factor_gradients(one, s, constants, z, dense, factor_slopes, count, w)
    scale = one * np.log(2.0) * get(one, constants + ALPHA)  # logarithms are to base 2
    add_rows(one, target, s.d, w.gradient, s.d_pad, count, one * scale)
    if maps:
        add_map_gradients(one, s, slopes, z, factor_slopes, count, maps, w, with_factors)


@inlined
def add_factor_gradients(one, s, constants, z, dense, slopes, count, w):
    """Add slope * (linear - 2 beta z - 2 dense^T dense z), the gradient through the log factor, to the rows."""
    width = panel(one)
    # a product of one column and one row: strides do not matter, and are those of other products, compiled already
    product_add(one, count, s.d_pad, 1, slopes, 1, TILE, constants + s.linear, width, s.d_pad, w.gradient, s.d_pad)
    fill(one, w.weighted, s.d_pad, one)
    scale_block(one, z, s.d_pad, count, s.d_pad, slopes, w.weighted, dense, s.d_pad)
    add_rows(one, w.gradient, s.d_pad, dense, s.d_pad, count, -2 * get(one, constants + BETA))
    if s.has_dense:
        product(one, count, s.d_pad, s.d, z, s.d_pad, 1, constants + s.dense, s.d * width, width, dense, s.d_pad)
        for t in range(count):
            for j in range(s.d):
                place = dense + t * s.d_pad + j
                put(one, place, -2 * get(one, slopes + t) * get(one, place))
        product_add(
            one, count, s.d_pad, s.d, dense, s.d_pad, 1, constants + s.dense_back, s.d * width, width, w.gradient,
            s.d_pad,
        )  # fmt: skip


@inlined
def add_map_gradients(one, s, slopes, z, factor_slopes, count, maps, w, with_factors):
    """Add the slopes of a tile to the sums of a map at the place `maps`, with their low parts."""
    width, sums = panel(one), map_sums_at(s, maps)
    lows = map_sums_at(s, sums.end)
    product_take(
        one, s.m, s.d_pad, count, slopes, TILE, 1, z, width, s.d_pad, sums.points, s.d_pad, lows.points, NOTHING
    )
    for i in range(s.m):
        put(one, w.weighted, total_of(one, slopes + i * TILE, count))
        take_row(one, 1, w.weighted, sums.column + i, lows.column + i)
    if with_factors:
        fill(one, w.sums, s.d_pad, one - one)
        for t in range(count):
            slope = get(one, factor_slopes + t)
            for j in range(s.d_pad):
                value = slope * get(one, z + t * s.d_pad + j)
                put(one, w.weighted + t * s.d_pad + j, value)
                put(one, w.sums + j, get(one, w.sums + j) + value)
        take_row(one, s.d_pad, w.sums, sums.factor_points, lows.factor_points)
        product_take(
            one, s.d, s.d_pad, count, w.weighted, 1, s.d_pad, z, width, s.d_pad, sums.factor_products, s.d_pad,
            lows.factor_products, NOTHING,
        )  # fmt: skip
        put(one, w.sums, total_of(one, factor_slopes, count))
        take_row(one, 1, w.sums, sums.factor, lows.factor)
