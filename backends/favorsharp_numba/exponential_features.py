"""exp(u W^T + row + column), streamed to memory; and its gradients, from features that are computed again."""

import math
from typing import Any

import numpy as np

from favorsharp_numba.host.arguments import (
    KINDS,
    Held,
    broadcast,
    expanded,
    host,
    like_array,
    name_of,
    promoted,
    summed_to,
    target,
    widened,
)
from favorsharp_numba.host.threads import share
from favorsharp_numba.kernels.tiles import (
    NO_MASK,
    ONE,
    TILE,
    get,
    integer_at,
    load_points,
    panel,
    put,
    store_points,
)
from favorsharp_numba.vectors.compiling import TAGS, inlined, jit
from favorsharp_numba.vectors.emitter import BYTES, VECTORS
from favorsharp_numba.vectors.primitives import (
    multiply_block,
    product,
    product_add,
    product_exp,
    product_exp_stream,
)
from favorsharp_numba.vectors.rows import fill, total_of

STREAM_BYTES = 1 << 22
"""Results larger than this are stored past the caches, which they would only sweep empty."""


class _Problem:
    """Packed rows and columns, and addresses, of one call."""

    def __init__(self, u: Any, rows: Any, row: Any, column: Any) -> None:
        self.result = promoted(*(name_of(x) for x in (u, rows, row, column)))
        self.dtype = np.dtype(widened(self.result))
        self.one = TAGS[self.dtype.name]
        self.lanes = BYTES // self.dtype.itemsize
        self.width = VECTORS * self.lanes
        self.batch = broadcast(*(x.shape[:-2] for x in (u, rows, row, column)))
        self.map_batch = broadcast(rows.shape[:-2], column.shape[:-2])
        self.n, self.m, self.d = u.shape[-2], rows.shape[-2], rows.shape[-1]
        self.m_pad, self.d_pad = (max(1, -(-x // self.lanes)) * self.lanes for x in (self.m, self.d))
        self.heads = math.prod(self.batch)
        self.per_head = max(1, -(-self.n // (8 * TILE)))
        self.held = Held()
        panels = -(-self.m_pad // self.width)
        self.wide_rows = np.zeros((*self.map_batch, panels * self.width, self.d_pad), self.dtype)
        self.wide_rows[..., : self.m, : self.d] = _wide(rows, self.dtype)
        spread = self.wide_rows[..., : self.d].reshape(*self.map_batch, panels, self.width, self.d)
        packed = np.ascontiguousarray(spread.swapaxes(-1, -2))
        terms = np.zeros((*self.map_batch, 1, panels * self.width), self.dtype)
        terms[..., : self.m] = _wide(column, self.dtype)
        constants = np.zeros(max(self.d_pad, self.m_pad) + 8, self.dtype)
        constants[ONE] = 1
        self.u = self.held.points(u, self.batch)
        self.row = self.held.points(expanded(row, (*row.shape[:-2], self.n, 1)), self.batch)
        self.packed, self.terms = self.places(packed), self.places(terms)
        self.constants = self.held.place(constants)

    def places(self, x: Any) -> int:
        """Where the place of each batch entry's part of a packed array stands."""
        self.held.keep(x)
        size = math.prod(x.shape[len(self.map_batch) :])
        numbers = np.arange(math.prod(self.map_batch), dtype=np.int64).reshape(self.map_batch) * size
        places = np.broadcast_to(numbers + x.ctypes.data // x.itemsize, self.batch)
        return self.held.keep(np.ascontiguousarray(places).reshape(-1))


def exponential_features(u: Any, rows: Any, row: Any, column: Any, *, out: Any = None) -> Any:
    """As `favorsharp.ops.exponential_features.exponential_features`; `out` takes the result."""
    p = _Problem(u, rows, row, column)
    shape = (*p.batch, p.n, p.m)
    result = target(out, (u, rows, row, column), shape, p.result)
    points = p.held.points(result, p.batch)
    starts = points.base + p.held.arrays[-1].values
    direct = points.kind == KINDS[p.dtype.name] and points.column == p.dtype.itemsize and p.m % p.lanes == 0
    stream = (
        direct
        and math.prod(shape) * p.dtype.itemsize > STREAM_BYTES
        and points.row % BYTES == 0
        and bool(np.all(starts % BYTES == 0))
    )
    scratch = TILE * (p.d_pad + 2) + (0 if direct else TILE * p.m_pad)
    share(
        _forward, p.heads * p.per_head, float(math.prod(shape) * (p.d + 12)), scratch, p.one,
        p.u, p.row, points, p.packed, p.terms, p.n, p.m, p.d, p.d_pad, p.m_pad, int(direct), int(stream),
        p.per_head, p.constants,
    )  # fmt: skip
    if out is None or result is out:
        return result
    out[...] = result
    return out


def exponential_features_backward(gradient: Any, u: Any, rows: Any, row: Any, column: Any) -> tuple[Any, Any, Any, Any]:
    """The gradients of u, rows, row and column, in their shapes and dtypes."""
    p = _Problem(u, rows, row, column)
    tasks = p.heads * p.per_head
    du = np.zeros((p.heads, p.n, p.d), p.dtype)
    drow = np.zeros((p.heads, p.n, 1), p.dtype)
    drows = np.zeros((tasks, p.m, p.d_pad), p.dtype)
    dcolumn = np.zeros((tasks, 1, p.m_pad), p.dtype)
    scratch = TILE * (2 * p.d_pad + 3 + 2 * p.m_pad)
    share(
        _backward, tasks, float(p.heads * p.n * p.m * 3 * p.d), scratch, p.one,
        p.u, p.row, p.held.points(gradient, p.batch), p.packed, p.terms, p.places(p.wide_rows), p.n, p.m, p.d,
        p.d_pad, p.m_pad, p.per_head, p.constants,
        *(p.held.place(x) for x in (du, drow, drows, dcolumn)),
    )  # fmt: skip
    drows = drows.reshape(p.heads, p.per_head, p.m, p.d_pad).sum(axis=1)[:, :, : p.d]
    dcolumn = dcolumn.reshape(p.heads, p.per_head, 1, p.m_pad).sum(axis=1)[:, :, : p.m]
    gradients = zip((du, drows, drow, dcolumn), (u, rows, row, column), strict=True)
    du, drows, drow, dcolumn = (
        like_array(summed_to(g.reshape(*p.batch, *g.shape[-2:]), tuple(x.shape)), x) for g, x in gradients
    )
    return du, drows, drow, dcolumn


def _wide(x: Any, dtype: Any) -> Any:
    return host(x.float() if name_of(x) == "bfloat16" else x).astype(dtype)


@inlined
def _load(one, u, row, head, start, count, d, d_pad, constants, z, factors):
    everything = NO_MASK
    zeros = constants + 8
    load_points(one, u, everything, head, start, count, d, d_pad, constants + ONE, zeros, z)
    load_points(one, row, everything, head, start, count, 1, 1, constants + ONE, zeros, factors)


@jit
def _forward(
    one, u, row, out, rows, columns, n, m, d, d_pad, m_pad, direct, stream, per_head, constants, low, high,
    scratch,
):  # fmt: skip
    z = scratch
    factors = z + TILE * d_pad
    ones = factors + TILE
    tile = ones + TILE
    fill(one, ones, TILE, one)
    width = panel(one)
    for task in range(low, high):
        head, piece = task // per_head, task % per_head
        stop = n * (piece + 1) // per_head
        matrix, terms = integer_at(rows + 8 * head), integer_at(columns + 8 * head)
        for start in range(n * piece // per_head, stop, TILE):
            count = min(TILE, stop - start)
            _load(one, u, row, head, start, count, d, d_pad, constants, z, factors)
            if direct:
                place = (out.base + integer_at(out.offsets + 8 * head) + start * out.row) // out.item
                step = out.row // out.item
                if stream:
                    product_exp_stream(
                        one, count, m, d, z, d_pad, 1, matrix, d * width, width, place, step, factors, terms
                    )
                else:
                    product_exp(one, count, m, d, z, d_pad, 1, matrix, d * width, width, place, step, factors, terms)
            else:
                product_exp(one, count, m_pad, d, z, d_pad, 1, matrix, d * width, width, tile, m_pad, factors, terms)
                store_points(one, out, head, start, count, m, m_pad, ones, tile)


@jit
def _backward(
    one, u, row, gradient, rows, columns, wide_rows, n, m, d, d_pad, m_pad, per_head, constants, du, drow,
    drows, dcolumn, low, high, scratch,
):  # fmt: skip
    z = scratch
    factors = z + TILE * d_pad
    features = factors + TILE
    slopes = features + TILE * m_pad
    result = slopes + TILE * m_pad
    width = panel(one)
    everything = NO_MASK
    for task in range(low, high):
        head, piece = task // per_head, task % per_head
        stop = n * (piece + 1) // per_head
        matrix, terms = integer_at(rows + 8 * head), integer_at(columns + 8 * head)
        for start in range(n * piece // per_head, stop, TILE):
            count = min(TILE, stop - start)
            _load(one, u, row, head, start, count, d, d_pad, constants, z, factors)
            product_exp(one, count, m_pad, d, z, d_pad, 1, matrix, d * width, width, features, m_pad, factors, terms)
            load_points(one, gradient, everything, head, start, count, m, m_pad, constants + ONE, constants + 8, slopes)
            multiply_block(one, slopes, m_pad, count, m_pad, features, dcolumn + task * m_pad)
            product(
                one, count, d_pad, m, slopes, m_pad, 1, integer_at(wide_rows + 8 * head), width, d_pad, result, d_pad
            )
            for t in range(count):
                put(one, drow + head * n + start + t, total_of(one, slopes + t * m_pad, m))
                for j in range(d):
                    put(one, du + (head * n + start + t) * d + j, get(one, result + t * d_pad + j))
            product_add(one, m, d_pad, count, slopes, 1, m_pad, z, width, d_pad, drows + task * m * d_pad, d_pad)
