"""exp(u W^T + row + column), streamed to memory."""

import math
from typing import Any

import numpy as np

from favorsharp_numba.arguments import KINDS, LOG2E, Held, broadcast, empty, host, name_of, promoted, widened
from favorsharp_numba.compiling import TAGS, jit, vector_bytes
from favorsharp_numba.run import share
from favorsharp_numba.tiles import ONE, TILE, Mask, fill, get, integer_at, load_points, panel, put, store_points
from favorsharp_numba.vectors import BYTES, VECTORS

if vector_bytes():
    from favorsharp_numba.vectors import product_exp2, product_exp2_stream
else:
    from favorsharp_numba.plain import product_exp2, product_exp2_stream

STREAM_BYTES = 1 << 22
"""Results larger than this are stored past the caches, which they would only sweep empty."""


def exponential_features(u: Any, rows: Any, row: Any, column: Any, *, out: Any = None) -> Any:
    """As `favorsharp.ops.exponential_features.exponential_features`; `out` takes the result."""
    result = promoted(*(name_of(x) for x in (u, rows, row, column)))
    dtype = np.dtype(widened(result))
    one = TAGS[dtype.name]
    lane = BYTES // dtype.itemsize
    width = VECTORS * lane
    batch = broadcast(*(x.shape[:-2] for x in (u, rows, row, column)))
    map_batch = broadcast(rows.shape[:-2], column.shape[:-2])
    n, (m, d) = u.shape[-2], rows.shape[-2:]
    shape = (*batch, n, m)
    if out is None:
        out = empty(u, shape, result)
    panels = -(-m // width)
    spread = np.zeros((*map_batch, panels * width, d), dtype)
    np.multiply(_wide(rows, dtype), LOG2E, out=spread[..., :m, :])
    packed = np.ascontiguousarray(spread.reshape(*map_batch, panels, width, d).swapaxes(-1, -2))
    terms = np.zeros((*map_batch, 1, panels * width), dtype)
    np.multiply(_wide(column, dtype), LOG2E, out=terms[..., :m])
    held = Held()
    target = held.points(out, batch)
    direct = target.kind == KINDS[dtype.name] and target.column == dtype.itemsize and m % lane == 0
    large = math.prod(shape) * dtype.itemsize > STREAM_BYTES
    aligned = (out.data_ptr() if hasattr(out, "data_ptr") else out.ctypes.data) % BYTES == 0
    stream = direct and large and aligned and target.row % BYTES == 0 and _all_aligned(held, target)
    m_pad = -(-m // lane) * lane
    d_pad = -(-max(d, 1) // lane) * lane
    constants = np.zeros(d_pad + 8, dtype)
    constants[ONE] = 1
    scratch = TILE * (d_pad + 2) + (0 if direct else TILE * m_pad) + TILE
    per_head = max(1, -(-n // (8 * TILE)))
    share(
        _features, math.prod(batch) * per_head, float(math.prod(shape) * (d + 12)), scratch, one,
        held.points(u, batch), held.points(row, batch), target,
        held.keep(_places(packed, map_batch, batch)), held.keep(_places(terms, map_batch, batch)),
        n, m, d, d_pad, m_pad, int(direct), int(stream), per_head, held.place(constants), LOG2E,
    )  # fmt: skip
    del packed, terms
    return out


def _wide(x: Any, dtype: Any) -> Any:
    return host(x.float() if name_of(x) == "bfloat16" else x).astype(dtype)


def _places(x: Any, own: tuple[int, ...], batch: tuple[int, ...]) -> Any:
    """The place of each batch entry's part of a packed array."""
    size = math.prod(x.shape[len(own) :])
    numbers = np.arange(math.prod(own), dtype=np.int64).reshape(own) * size + x.ctypes.data // x.itemsize
    return np.ascontiguousarray(np.broadcast_to(numbers, batch)).reshape(-1)


def _all_aligned(held: Held, target: Any) -> bool:
    """Whether every batch entry of the target begins on a vector."""
    return bool(np.all(held.arrays[-1] % BYTES == 0))


@jit
def _features(
    one, u, row, out, rows, columns, n, m, d, d_pad, m_pad, direct, stream, per_head, constants, log2e, low, high,
    scratch,
):  # fmt: skip
    z = scratch
    factors = z + TILE * d_pad
    ones = factors + TILE
    tile = ones + TILE
    fill(one, ones, TILE, one)
    width = panel(one)
    everything = Mask(0, 0)
    zeros = constants + 8
    for task in range(low, high):
        head, share_of = task // per_head, task % per_head
        stop = n * (share_of + 1) // per_head
        matrix, terms = integer_at(rows + 8 * head), integer_at(columns + 8 * head)
        for start in range(n * share_of // per_head, stop, TILE):
            count = min(TILE, stop - start)
            load_points(one, u, everything, head, start, count, d, d_pad, constants + ONE, zeros, z)
            load_points(one, row, everything, head, start, count, 1, 1, constants + ONE, zeros, factors)
            for t in range(count):
                put(one, factors + t, get(one, factors + t) * log2e)
            if direct:
                place = (integer_at(out.addresses + 8 * head) + start * out.row) // out.item
                step = out.row // out.item
                if stream:
                    product_exp2_stream(
                        one, count, m, d, z, d_pad, 1, matrix, d * width, width, place, step, factors, terms
                    )
                else:
                    product_exp2(one, count, m, d, z, d_pad, 1, matrix, d * width, width, place, step, factors, terms)
            else:
                product_exp2(one, count, m_pad, d, z, d_pad, 1, matrix, d * width, width, tile, m_pad, factors, terms)
                store_points(one, out, head, start, count, m, m_pad, ones, tile)
