"""The metric of landmarks from moments, as `favorsharp.landmarks.metric` computes it. Call these functions in float64.

Matrices have d rows that are `pad` items apart, with zeros behind the first d.
"""

from collections import namedtuple

import numpy as np

from favorsharp_numba.kernels.arguments import ONE
from favorsharp_numba.kernels.tiles import transpose
from favorsharp_numba.vectors.arrays import FLOAT64, load_rows
from favorsharp_numba.vectors.blocks import sum_block
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.items import get, lanes, panel, put
from favorsharp_numba.vectors.products import product
from favorsharp_numba.vectors.rows import combine, fill

ROWS = 16
"""The rows of a product that are computed together, a multiple of a vector."""

TINY = 1e-150
"""Added to the covariance of queries, so that it has a Cholesky factor if all queries are equal."""

MetricSpace = namedtuple("MetricSpace", "factor turned inner work lift center mean vector inside direction end")


@inlined
def metric_space(d, pad, factor):
    """The parts of the workspace of `solve_metric`, with its results `lift`, `center` and `direction`."""
    turned = factor + d * pad
    inner = turned + d * pad
    work = inner + d * pad
    lift = work + d * pad
    center = lift + d * pad
    mean = center + pad
    vector = mean + pad
    inside = vector + pad
    direction = inside + pad
    end = direction + pad
    return MetricSpace(factor, turned, inner, work, lift, center, mean, vector, inside, direction, end)


@outlined
def solve_metric(one, d, pad, queries, keys, scale, tilt, ridge, w):
    """The metric for moments (see `add_points`) of queries and keys: with U'U = S_x, M = U'(I + t U S_y U')^-1 U."""
    nothing, size, width = one - one, d * pad, panel(one)
    if get(one, queries) == 0:
        queries = keys
    mean_x, cov_x, mean_y, cov_y = queries + pad, queries + 2 * pad, keys + pad, keys + 2 * pad
    combine(one, size, nothing, scale, cov_x, nothing, cov_x, w.inner)
    trace = nothing
    for i in range(d):
        trace += get(one, w.inner + i * (pad + 1))
    add_to_diagonal(one, d, pad, ridge / d * trace + TINY, w.inner)
    cholesky(one, d, pad, w.inner, w.factor)
    transpose(one, w.factor, pad, d, d, w.turned, pad, pad)
    for i in range(0, d, ROWS):  # U has zeros below its diagonal, and only the other part of U S_y U' is needed
        count, own = min(ROWS, d - i), i * pad + i
        product(
            one, count, pad, d - i, w.factor + own, pad, 1, cov_y + i * pad, width, pad, w.work + i * pad, pad
        )  # fmt: skip
        product(
            one, count, pad - i, d - i, w.work + own, pad, 1, w.turned + own, width, pad, w.inner + own, pad
        )  # fmt: skip
    combine(one, size, nothing, tilt * scale, w.inner, nothing, w.inner, w.inner)
    add_to_diagonal(one, d, pad, one, w.inner)
    cholesky(one, d, pad, w.inner, w.work)
    forward(one, d, pad, w.work, w.factor, w.inner)
    transpose(one, w.inner, pad, d, d, w.lift, pad, pad)
    root = np.sqrt(scale)
    combine(one, pad, nothing, root, mean_y, nothing, mean_y, w.center)
    combine(one, pad, nothing, root, mean_x, nothing, mean_x, w.mean)
    fill(one, w.vector, 3 * pad, nothing)  # `inside` and the direction too
    sum_block(one, cov_y, pad, d, pad, w.mean, 1, w.vector)
    sum_block(one, w.lift, pad, d, pad, w.vector, 1, w.inside)
    sum_block(one, w.inner, pad, d, pad, w.inside, 1, w.direction)
    combine(one, pad, nothing, one, w.mean, -tilt * scale, w.direction, w.direction)


@inlined
def add_to_diagonal(one, d, pad, value, matrix):
    """Add a value to each item on the diagonal."""
    for i in range(d):
        place = matrix + i * (pad + 1)
        put(one, place, get(one, place) + value)


@outlined
def cholesky(one, d, pad, matrix, factor):
    """The upper triangular factor U of a matrix U'U, row by row."""
    for i in range(d):
        first = i // lanes(one) * lanes(one)
        line, count = factor + i * pad + first, pad - first
        fill(one, factor + i * pad, first, one - one)
        combine(one, count, one - one, -one, matrix + i * pad + first, one - one, matrix + i * pad + first, line)
        sum_block(one, factor + first, pad, i, count, factor + i, pad, line)
        scale = -one / np.sqrt(-get(one, factor + i * pad + i))
        combine(one, count, one - one, scale, line, one - one, line, line)
        fill(one, line, i - first, one - one)


@outlined
def forward(one, d, pad, factor, right, solution):
    """Solve U' X = B for the factor U of `cholesky`, row by row."""
    for i in range(d):
        line = solution + i * pad
        combine(one, pad, one - one, -one, right + i * pad, one - one, right + i * pad, line)
        sum_block(one, solution, pad, i, pad, factor + i, pad, line)
        combine(one, pad, one - one, -one / get(one, factor + i * (pad + 1)), line, one - one, line, line)


@outlined
def pack_metric(one, s, pad, w, side):
    """Write a metric to packed constants, which have the scalars and the zeros already."""
    bytes_apart, factor, zeros, width = 8 * pad, side + ONE, side + s.zeros, panel(one)
    load_rows(one, FLOAT64, 8 * w.center, bytes_apart, 1, s.d, s.d_pad, factor, zeros, side + s.center)
    load_rows(one, FLOAT64, 8 * w.direction, bytes_apart, 1, s.d, s.d_pad, factor, zeros, side + s.direction)
    for j in range(0, s.d, width):
        n, place = min(width, s.d - j), j * s.d
        load_rows(one, FLOAT64, 8 * (w.lift + j), bytes_apart, s.d, n, width, factor, zeros, side + s.lift + place)
