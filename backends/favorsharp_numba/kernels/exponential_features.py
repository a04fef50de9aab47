"""The kernels of `exponential_features`, forward and backward: features exp(u W^T + row + column) and their
gradients; and features of points, which a map transforms.
"""

from collections import namedtuple
from typing import NamedTuple

import numpy as np

from favorsharp_numba.kernels.arguments import ALPHA, NO_MASK, ONE, TILE
from favorsharp_numba.kernels.tiles import factors_of_turned, load_points, store_points
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import multiply_block
from favorsharp_numba.vectors.compiling import inlined
from favorsharp_numba.vectors.dots import total_of
from favorsharp_numba.vectors.items import get, integer_at, lanes, panel, put
from favorsharp_numba.vectors.products import (
    product,
    product_add,
    product_exp,
    product_exp_stream,
    product_natural_stream,
    product_power,
    product_power_stream,
    product_terms,
)
from favorsharp_numba.vectors.rows import fill


class Features(NamedTuple):
    """The sizes of a call.

    A head is cut into `per_head` tasks. `direct`: the kernel stores features where they belong; `stream`: past the
    caches.
    """

    n: int
    m: int
    d: int
    m_pad: int
    d_pad: int
    per_head: int
    direct: int
    stream: int


ZEROS = 8
"""Where the zeros begin in the array `constants` that the kernels take; its item ONE is 1."""

ForwardSpace = namedtuple("ForwardSpace", "points terms ones tile end")


@inlined
def forward_space(s, points):
    """The parts of the workspace of `features`; `tile` holds features that are not stored directly."""
    terms = points + TILE * s.d_pad
    ones = terms + TILE
    tile = ones + TILE
    end = tile + (0 if s.direct else TILE * s.m_pad)
    return ForwardSpace(points, terms, ones, tile, end)


@inlined
def load_tile(one, s, u, row, constants, head, start, count, w):
    """Load a tile of points and the terms of their rows."""
    factor, zeros = constants + ONE, constants + ZEROS
    load_points(one, u, NO_MASK, head, start, count, s.d, s.d_pad, factor, zeros, w.points)
    load_points(one, row, NO_MASK, head, start, count, 1, 1, factor, zeros, w.terms)


@kernel(forward_space)
def features(one, s, u, row, rows, columns, constants, out, low, high, scratch):
    """The features of tasks low .. high; `s` is a `Features`.

    `rows` and `columns` are the addresses of two lists of places, with an item for each head: those of W in panels, and
    of the terms of the columns.
    """
    w = forward_space(s, scratch)
    fill(one, w.ones, TILE, one)
    width = panel(one)
    for task in range(low, high):
        head, piece = task // s.per_head, task % s.per_head
        stop = s.n * (piece + 1) // s.per_head
        matrix, terms = integer_at(rows + 8 * head), integer_at(columns + 8 * head)
        for start in range(s.n * piece // s.per_head, stop, TILE):
            count = min(TILE, stop - start)
            load_tile(one, s, u, row, constants, head, start, count, w)
            if s.direct:
                place = (out.base + integer_at(out.offsets + 8 * head) + start * out.row) // out.item
                step = out.row // out.item
                if s.stream:
                    product_exp_stream(
                        one, count, s.m, s.d, w.points, s.d_pad, 1, matrix, s.d * width, width, place, step, w.terms,
                        terms,
                    )  # fmt: skip
                else:
                    product_exp(
                        one, count, s.m, s.d, w.points, s.d_pad, 1, matrix, s.d * width, width, place, step, w.terms,
                        terms,
                    )  # fmt: skip
            else:
                product_exp(
                    one, count, s.m_pad, s.d, w.points, s.d_pad, 1, matrix, s.d * width, width, w.tile, s.m_pad,
                    w.terms, terms,
                )  # fmt: skip
                store_points(one, out, head, start, count, s.m, s.m_pad, w.ones, w.tile)


class PointFeatures(NamedTuple):
    """What the kernel for features of points takes besides the sizes of the packed map.

    A head of n points is cut into `per_head` tasks. `side` is the place of the packed constants of all maps, and
    `map_of` the address of the list of the map of each head. `direct` and `stream` are those of `Features`;
    `logarithms`: the result has the logarithms of features.
    """

    n: int
    per_head: int
    side: int
    map_of: int
    direct: int
    stream: int
    logarithms: int


PointSpace = namedtuple("PointSpace", "points dense factors scales tile end")


@inlined
def point_space(s, points):
    """The parts of the workspace of `features_of_points`; `tile` holds features that are not stored directly."""
    dense = points + TILE * s.d_pad
    factors = dense + TILE * s.d_pad
    scales = factors + 2 * TILE
    tile = scales + TILE
    end = tile + TILE * s.m_pad
    return PointSpace(points, dense, factors, scales, tile, end)


@kernel(point_space)
def features_of_points(one, s, p, x, out, low, high, scratch):
    """The features of tasks low .. high, from points as the caller has them; `p` is a `PointFeatures`.

    The packed constants give logarithms to base 2; their matrix `dense` is lower triangular.
    """
    w = point_space(s, scratch)
    fill(one, w.scales, TILE, np.log(2.0) * one if p.logarithms else one)
    for task in range(low, high):
        head, piece = task // p.per_head, task % p.per_head
        stop = p.n * (piece + 1) // p.per_head
        side = p.side + integer_at(p.map_of + 8 * head) * s.total
        for start in range(p.n * piece // p.per_head, stop, TILE):
            count = min(TILE, stop - start)
            load_points(one, x, NO_MASK, head, start, count, s.d, s.d_pad, side + ALPHA, side + s.center, w.points)
            if s.has_dense:
                turn_rows(one, s, side, w.points, count, w.dense)
            factors_of_turned(one, s, side, w.points, count, w.dense, w.factors)
            place, step = w.tile, s.m_pad
            if p.direct:
                place = (out.base + integer_at(out.offsets + 8 * head) + start * out.row) // out.item
                step = out.row // out.item
            put_features(one, s, p, side, count, place, step, w)
            if not p.direct:
                store_points(one, out, head, start, count, s.m, s.m_pad, w.scales, w.tile)


@inlined
def turn_rows(one, s, side, z, count, turned):
    """Rows z times the lower triangular matrix `dense`, without its zeros above the diagonal vectors."""
    width, step = panel(one), lanes(one)
    for j in range(0, s.d, step):
        corner = side + s.dense + j // width * s.d * width + j * width + j % width
        product(one, count, step, s.d - j, z + j, s.d_pad, 1, corner, s.d * width, width, turned + j, s.d_pad)


@inlined
def put_features(one, s, p, side, count, place, step, w):
    """Put the features of a tile of points, or their logarithms, in rows `step` items apart.

    Logarithms that are not stored past the caches are to base 2.
    """
    panel_size, width = s.d * panel(one), panel(one)
    panels, column = side + s.panels, side + s.column
    if p.logarithms and p.stream:
        product_natural_stream(
            one, count, s.m_pad, s.d, w.points, s.d_pad, 1, panels, panel_size, width, place, step, w.factors, column
        )  # fmt: skip
    elif p.logarithms:
        product_terms(
            one, count, s.m_pad, s.d, w.points, s.d_pad, 1, panels, panel_size, width, place, step, w.factors, column
        )  # fmt: skip
    elif p.stream:
        product_power_stream(
            one, count, s.m_pad, s.d, w.points, s.d_pad, 1, panels, panel_size, width, place, step, w.factors, column
        )  # fmt: skip
    else:
        product_power(
            one, count, s.m_pad, s.d, w.points, s.d_pad, 1, panels, panel_size, width, place, step, w.factors, column
        )  # fmt: skip


BackwardSpace = namedtuple("BackwardSpace", "points terms features slopes result end")


@inlined
def backward_space(s, points):
    """The parts of the workspace of `features_backward`."""
    terms = points + TILE * s.d_pad
    features = terms + TILE
    slopes = features + TILE * s.m_pad
    result = slopes + TILE * s.m_pad
    end = result + TILE * s.d_pad
    return BackwardSpace(points, terms, features, slopes, result, end)


@kernel(backward_space)
def features_backward(
    one, s, u, row, rows, columns, constants, gradient, wide_rows, du, drow, drows, dcolumn, low, high, scratch
):  # fmt: skip
    """The gradients of tasks low .. high, from features that are computed again.

    `wide_rows` is the address of the list of places of W row by row. Every task has its own drows and dcolumn, and adds
    to them.
    """
    w = backward_space(s, scratch)
    width = panel(one)
    factor, zeros = constants + ONE, constants + ZEROS
    for task in range(low, high):
        head, piece = task // s.per_head, task % s.per_head
        stop = s.n * (piece + 1) // s.per_head
        matrix, terms = integer_at(rows + 8 * head), integer_at(columns + 8 * head)
        for start in range(s.n * piece // s.per_head, stop, TILE):
            count = min(TILE, stop - start)
            load_tile(one, s, u, row, constants, head, start, count, w)
            product_exp(
                one, count, s.m_pad, s.d, w.points, s.d_pad, 1, matrix, s.d * width, width, w.features, s.m_pad,
                w.terms, terms,
            )  # fmt: skip
            load_points(one, gradient, NO_MASK, head, start, count, s.m, s.m_pad, factor, zeros, w.slopes)
            multiply_block(one, w.slopes, s.m_pad, count, s.m_pad, w.features, dcolumn + task * s.m_pad)
            product(
                one, count, s.d_pad, s.m, w.slopes, s.m_pad, 1, integer_at(wide_rows + 8 * head), width, s.d_pad,
                w.result, s.d_pad,
            )  # fmt: skip
            for t in range(count):
                line = head * s.n + start + t
                put(one, drow + line, total_of(one, w.slopes + t * s.m_pad, s.m))
                for j in range(s.d):
                    put(one, du + line * s.d + j, get(one, w.result + t * s.d_pad + j))
            product_add(
                one, s.m, s.d_pad, count, w.slopes, 1, s.m_pad, w.points, width, s.d_pad,
                drows + task * s.m * s.d_pad, s.d_pad,
            )  # fmt: skip
