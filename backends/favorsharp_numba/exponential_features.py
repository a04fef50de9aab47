"""The op `exponential_features`: exp(u W^T + row + column) and its gradients, and features of points, on the CPU."""

import math
from typing import Any

import numpy as np

from favorsharp_numba.host.arguments import (
    KINDS,
    Held,
    broadcast,
    expanded,
    host,
    indices,
    like_array,
    name_of,
    packed_map,
    promoted,
    summed_to,
    target,
    widened,
)
from favorsharp_numba.host.threads import share
from favorsharp_numba.kernels.arguments import ONE, TILE, Points
from favorsharp_numba.kernels.exponential_features import (
    ZEROS,
    Features,
    PointFeatures,
    features,
    features_backward,
    features_of_points,
)
from favorsharp_numba.kernels.workspace import items_of
from favorsharp_numba.vectors.compiling import TAGS
from favorsharp_numba.vectors.emitter import BYTES, VECTORS

STREAM_BYTES = 1 << 22
"""Results larger than this are stored past the caches: they would only displace what the caches hold."""


class _Problem:
    """A call in the terms of the kernels: packed rows and columns, and the addresses of the points."""

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
        constants = np.zeros(ZEROS + max(self.d_pad, self.m_pad), self.dtype)
        constants[ONE] = 1
        self.u = self.held.points(u, self.batch)
        self.row = self.held.points(expanded(row, (*row.shape[:-2], self.n, 1)), self.batch)
        self.packed, self.terms = self.places(packed), self.places(terms)
        self.constants = self.held.place(constants)

    def places(self, x: Any) -> int:
        """The address of the list of places of each batch entry's part of a packed array."""
        self.held.keep(x)
        size = math.prod(x.shape[len(self.map_batch) :])
        numbers = np.arange(math.prod(self.map_batch), dtype=np.int64).reshape(self.map_batch) * size
        places = np.broadcast_to(numbers + x.ctypes.data // x.itemsize, self.batch)
        return self.held.keep(np.ascontiguousarray(places).reshape(-1))

    def run(self, kernel: Any, work: float, *arguments: Any, direct: bool = False, stream: bool = False) -> None:
        """Run a kernel for all tasks, shared among threads."""
        sizes = Features(self.n, self.m, self.d, self.m_pad, self.d_pad, self.per_head, int(direct), int(stream))
        tasks, items = self.heads * self.per_head, items_of(kernel, sizes)
        fixed = (self.u, self.row, self.packed, self.terms, self.constants)
        share(kernel, tasks, work, items, self.one, sizes, *fixed, *arguments, of_torch=self.held.of_torch)


def exponential_features(u: Any, rows: Any, row: Any, column: Any, *, out: Any = None) -> Any:
    """As `favorsharp.ops.exponential_features.exponential_features`; `out` receives the result."""
    p = _Problem(u, rows, row, column)
    shape = (*p.batch, p.n, p.m)
    result = target(out, (u, rows, row, column), shape, p.result)
    points, direct, stream = _destination(p.held, result, p.batch, p.dtype)
    p.run(features, float(math.prod(shape) * (p.d + 12)), points, direct=direct, stream=stream)
    if out is None or result is out:
        return result
    out[...] = result
    return out


def exponential_features_of_points(
    x: Any, feature_map: Any, side: str, *, logarithms: bool = False, out: Any = None
) -> Any:
    """The features of a map's queries or keys, or their logarithms, (*b, n, d) -> (*b, n, m), in the dtype of x.

    Parameters
    ----------
    x : array, shape (*b, n, d)
        Unscaled points; the constants contain the transform of the map.
    feature_map : DenseExponentialMap
    side : {"query", "key"}
    logarithms : bool
        Whether to return the logarithms of features.
    out : array, shape (*b, n, m), optional
        It receives the result.
    """
    dtype = widened(name_of(x))
    packed = packed_map(feature_map, dtype)
    s, *constants = packed.of_points
    batch, held, n = broadcast(x.shape[:-2], packed.batch), Held(), x.shape[-2]
    shape = (*batch, n, s.m)
    result = target(out, (x,), shape, name_of(x))
    points, direct, stream = _destination(held, result, batch, packed.dtype)
    p = PointFeatures(
        n=n,
        per_head=max(1, -(-n // (8 * TILE))),
        side=held.place(constants[side == "key"]),
        map_of=held.constant(indices(packed.batch, batch)),
        direct=int(direct and (stream or not logarithms)),
        stream=int(stream),
        logarithms=int(logarithms),
    )
    tasks, work = math.prod(batch) * p.per_head, float(math.prod(shape) * (s.d + 12))
    given = held.points(x, batch), points
    items = items_of(features_of_points, s)
    share(features_of_points, tasks, work, items, packed.one, s, p, *given, of_torch=held.of_torch)
    if out is None or result is out:
        return result
    out[...] = result
    return out


def _destination(held: Held, result: Any, batch: tuple[int, ...], dtype: Any) -> tuple[Points, bool, bool]:
    """An array of results as kernels take it, and whether they can store whole vectors there, and past the caches."""
    points = held.points(result, batch)
    starts = points.base + held.arrays[-1].values
    whole = result.shape[-1] * dtype.itemsize % BYTES == 0
    direct = points.kind == KINDS[dtype.name] and points.column == dtype.itemsize and whole
    large = math.prod(result.shape) * dtype.itemsize > STREAM_BYTES
    stream = direct and large and points.row % BYTES == 0 and bool(np.all(starts % BYTES == 0))
    return points, direct, stream


def exponential_features_backward(gradient: Any, u: Any, rows: Any, row: Any, column: Any) -> tuple[Any, Any, Any, Any]:
    """The gradients of u, rows, row and column, in their shapes and dtypes."""
    p = _Problem(u, rows, row, column)
    tasks = p.heads * p.per_head
    du = np.zeros((p.heads, p.n, p.d), p.dtype)
    drow = np.zeros((p.heads, p.n, 1), p.dtype)
    drows = np.zeros((tasks, p.m, p.d_pad), p.dtype)
    dcolumn = np.zeros((tasks, 1, p.m_pad), p.dtype)
    p.run(
        features_backward, float(p.heads * p.n * p.m * 3 * p.d), p.held.points(gradient, p.batch),
        p.places(p.wide_rows), *(p.held.place(x) for x in (du, drow, drows, dcolumn)),
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
