"""The kernel of `point_moments`: sums of points and of their products, in float64 for points of any dtype."""

from collections import namedtuple
from typing import NamedTuple

from favorsharp_numba.kernels.arguments import TILE, is_hidden
from favorsharp_numba.kernels.tiles import load_points
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import sum_block
from favorsharp_numba.vectors.compiling import inlined
from favorsharp_numba.vectors.items import get, panel, put
from favorsharp_numba.vectors.products import product_add
from favorsharp_numba.vectors.rows import fill, quadratic_rows


class MomentSizes(NamedTuple):
    """The numbers of points and coordinates, and into how many tasks a head is cut."""

    n: int
    d: int
    d_pad: int
    per_head: int


MomentSpace = namedtuple("MomentSpace", "rows factors end")


@inlined
def moment_space(s, rows):
    """The parts of the workspace of `add_points`."""
    factors = rows + TILE * s.d_pad
    end = factors + 2 * TILE
    return MomentSpace(rows, factors, end)


@inlined
def sums_length(s):
    """The number of items of the sums of a task: a shift, the number of points, their sum, and their products."""
    return (3 + s.d) * s.d_pad


@kernel(moment_space)
def add_points(one, s, x, mask, constants, sums, low, high, scratch):
    """Add the points of the tasks low .. high, minus a shift, to the sums of each task. The sums are 0 before.

    The shift is the mean of the first tile: covariances are differences of sums, which would cancel without it. Of the
    products, only those in and below the diagonal panels are added up. `constants` is the place of a 1 with zeros
    behind it.
    """
    w, width = moment_space(s, scratch), panel(one)
    zeros = constants + s.d_pad
    for task in range(low, high):
        head, piece = task // s.per_head, task % s.per_head
        shift = sums + task * sums_length(s)
        number, total, products = shift + s.d_pad, shift + 2 * s.d_pad, shift + 3 * s.d_pad
        start, stop = s.n * piece // s.per_head, s.n * (piece + 1) // s.per_head
        seen = load_visible(one, s, x, mask, head, start, min(TILE, stop - start), constants, zeros, zeros, w)
        if seen > 0:
            sum_block(one, w.rows, s.d_pad, min(TILE, stop - start), s.d_pad, constants, 0, shift)
            for j in range(s.d):
                put(one, shift + j, get(one, shift + j) / seen)
        for first in range(start, stop, TILE):
            count = min(TILE, stop - first)
            seen = load_visible(one, s, x, mask, head, first, count, constants, shift, zeros, w)
            put(one, number, get(one, number) + seen)
            sum_block(one, w.rows, s.d_pad, count, s.d_pad, constants, 0, total)
            for j in range(0, s.d, width):
                product_add(
                    one, s.d - j, min(width, s.d_pad - j), count, w.rows + j, 1, s.d_pad, w.rows + j, width, s.d_pad,
                    products + j * s.d_pad + j, s.d_pad,
                )  # fmt: skip


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
