"""The kernel of `point_moments`: sums of points and of their products, in float64 for points of any dtype."""

from collections import namedtuple
from typing import NamedTuple

from favorsharp_numba.kernels.arguments import TILE, is_hidden
from favorsharp_numba.kernels.tiles import load_points
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import sum_block
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.dots import quadratic_rows
from favorsharp_numba.vectors.items import get, panel, put
from favorsharp_numba.vectors.products import product_add
from favorsharp_numba.vectors.rows import add_rows, combine, copy, fill


class MomentSizes(NamedTuple):
    """The numbers of points and coordinates, and into how many tasks a head is cut."""

    n: int
    d: int
    d_pad: int
    per_head: int


MomentSpace = namedtuple("MomentSpace", "rows factors shift total end")


@inlined
def moment_space(s, rows):
    """The parts of the workspace of `add_points`."""
    factors = rows + TILE * s.d_pad
    shift = factors + 2 * TILE
    total = shift + s.d_pad
    end = total + s.d_pad
    return MomentSpace(rows, factors, shift, total, end)


@inlined
def sums_length(s):
    """The number of items of the result of a task: the number of points, their mean, and their covariance."""
    return (2 + s.d) * s.d_pad


@kernel(moment_space)
def add_points(one, s, x, mask, constants, sums, low, high, scratch):
    """The moments of the points of tasks low .. high, in `sums`, which is 0 before.

    Points are added up minus a shift, the mean of the first tile: covariances are differences of sums, which would
    cancel without it. Of the products, only those in and below the diagonal panels are added up. `constants` is the
    place of a 1 with zeros behind it.
    """
    w = moment_space(s, scratch)
    for task in range(low, high):
        head, piece = task // s.per_head, task % s.per_head
        start, stop = s.n * piece // s.per_head, s.n * (piece + 1) // s.per_head
        add_range(one, s, x, mask, head, start, stop, constants, sums + task * sums_length(s), w)


@inlined
def add_range(one, s, x, mask, head, start, stop, constants, number, w):
    """The moments of the points start .. stop of a head, at the place `number`."""
    shift_by_tile(one, s, x, mask, head, start, stop, constants, w)
    add_shifted(one, s, x, mask, head, start, stop, constants, number, w)


@outlined
def shift_by_tile(one, s, x, mask, head, start, stop, constants, w):
    """Make the shift the mean of the first tile."""
    zeros, count = constants + s.d_pad, min(TILE, stop - start)
    fill(one, w.shift, s.d_pad, one - one)
    seen = load_visible(one, s, x, mask, head, start, count, constants, zeros, zeros, w)
    if seen > 0:
        sum_block(one, w.rows, s.d_pad, count, s.d_pad, constants, 0, w.shift)
        combine(one, s.d_pad, one - one, one / seen, w.shift, one - one, w.shift, w.shift)


@outlined
def add_shifted(one, s, x, mask, head, start, stop, constants, number, w):
    """As `add_range`, for a shift that is known; it must not be much farther from the points than these are apart."""
    width, zeros = panel(one), constants + s.d_pad
    mean, products = number + s.d_pad, number + 2 * s.d_pad
    fill(one, w.total, s.d_pad, one - one)
    for first in range(start, stop, TILE):
        count = min(TILE, stop - first)
        seen = load_visible(one, s, x, mask, head, first, count, constants, w.shift, zeros, w)
        put(one, number, get(one, number) + seen)
        sum_block(one, w.rows, s.d_pad, count, s.d_pad, constants, 0, w.total)
        for j in range(0, s.d, width):
            # the first rows below the diagonal need only the first half of the panel
            half = min(width // 2, s.d - j)
            add_products(one, s, count, j, half, min(width // 2, s.d_pad - j), j, products, w)
            add_products(one, s, count, j + half, s.d - j - half, min(width, s.d_pad - j), j, products, w)
    if get(one, number) > 0:
        finish_moments(one, s, get(one, number), w.shift, w.total, mean, products)


@inlined
def add_products(one, s, count, i, rows, columns, j, products, w):
    """Add up products of the coordinates i .. i + rows with j .. j + columns."""
    product_add(
        one, rows, columns, count, w.rows + i, 1, s.d_pad, w.rows + j, panel(one), s.d_pad,
        products + i * s.d_pad + j, s.d_pad,
    )  # fmt: skip


@outlined
def finish_moments(one, s, number, shift, total, mean, products):
    """Turn the sums of shifted points, and of their products, into mean and covariance."""
    share = one / number
    combine(one, s.d_pad, one - one, one, shift, share, total, mean)
    for i in range(s.d):
        for j in range(i + 1):
            value = get(one, products + i * s.d_pad + j) - get(one, total + i) * get(one, total + j) * share
            put(one, products + i * s.d_pad + j, value * share)
            put(one, products + j * s.d_pad + i, value * share)


@inlined
def load_visible(one, s, x, mask, head, start, count, factor, shift, zeros, w):
    """Load a tile of points minus a shift, with zeros for hidden points; return the number of the others."""
    load_points(one, x, mask, head, start, count, s.d, s.d_pad, factor, shift, w.rows)
    quadratic_rows(one, w.rows, s.d_pad, count, s.d_pad, zeros, w.factors, w.factors + TILE)
    seen = 0
    for t in range(count):
        if is_hidden(mask, head, start + t) or get(one, w.factors + t) != 0:
            fill(one, w.rows + t * s.d_pad, s.d_pad, one - one)
        else:
            seen += 1
    return seen


@outlined
def merge_moments(one, s, held, added, w):
    """Add moments to others (Chan, Golub and LeVeque 1983: no differences of large numbers)."""
    before, more = get(one, held), get(one, added)
    if more == 0:
        return
    if before == 0:
        copy(one, added, sums_length(s), held)
        return
    share, nothing = more / (before + more), one - one
    put(one, held, before + more)
    mean = held + s.d_pad
    combine(one, s.d_pad, nothing, one, added + s.d_pad, -one, mean, w.shift)
    combine(one, s.d_pad, nothing, one, mean, share, w.shift, mean)
    for i in range(s.d):
        line, other = held + (2 + i) * s.d_pad, added + (2 + i) * s.d_pad
        combine(one, s.d_pad, nothing, one - share, line, share, other, line)
        add_rows(one, line, s.d_pad, w.shift, s.d_pad, 1, share * (one - share) * get(one, w.shift + i))
