"""The op `point_moments`: count, mean and covariance of points, on the CPU."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from favorsharp_numba.host.arguments import Held, broadcast, name_of, numpy_or_torch
from favorsharp_numba.host.threads import num_threads, pieces_of, share
from favorsharp_numba.kernels.point_moments import MomentSizes, add_points, sums_length
from favorsharp_numba.kernels.workspace import items_of, on_host
from favorsharp_numba.vectors.compiling import TAGS
from favorsharp_numba.vectors.emitter import BYTES

BLOCK = 2048
"""The number of points whose products are added up in float32, if `narrow` allows it."""
FEW = 64
"""With fewer coordinates float32 saves no time."""
RANGE = 1e-25, 1e25
"""If the largest variance of each head is in this range, no square that matters is too large or small for float32."""


def point_moments(x: Any, mask: Any, *, narrow: bool = False) -> tuple[Any, Any, Any]:
    """As `favorsharp.moments.point_moments`."""
    n, d = x.shape[-2:]
    batch = broadcast(x.shape[:-2], () if mask is None else mask.shape[:-1])
    found = None
    if narrow and name_of(x) == "float32" and n > BLOCK and d >= FEW:
        found = _in_range(*_merged(_blocks(x, mask, batch)))
    if found is None:
        heads = math.prod(batch)
        found = _merged([_sums(x, mask, batch, "float64", pieces_of(heads, n, float(heads * n * d * d)))])
    return tuple(numpy_or_torch(x, part.reshape(*batch, *part.shape[-2:])) for part in found)


def _blocks(x: Any, mask: Any, batch: tuple[int, ...]) -> Iterator[Any]:
    """The float32 moments of blocks, for as many blocks at a time as there are threads."""
    step = BLOCK * max(1, num_threads() // max(1, math.prod(batch)))
    for start in range(0, x.shape[-2], step):
        part = x[..., start : start + step, :]
        hidden = None if mask is None else mask[..., start : start + step]
        yield _sums(part, hidden, batch, "float32", -(-part.shape[-2] // BLOCK))


def _in_range(count: Any, mean: Any, covariance: Any) -> tuple[Any, Any, Any] | None:
    """The moments; or None, if some of their squares did not fit float32."""
    largest = np.max(np.diagonal(covariance, axis1=-2, axis2=-1), axis=-1)
    fits = np.all((largest > RANGE[0]) & (largest < RANGE[1]))
    return (count, mean, covariance) if fits else None


def _sums(x: Any, mask: Any, batch: tuple[int, ...], dtype: str, per_head: int) -> Any:
    """Count, mean and covariance of the points of each task (heads, tasks, 2 + d, d), computed in a dtype."""
    n, d = x.shape[-2:]
    heads, lanes = math.prod(batch), BYTES // np.dtype(dtype).itemsize
    d_pad = max(1, -(-d // lanes)) * lanes
    s = MomentSizes(n, d, d_pad, per_head)
    sums = np.zeros((heads * per_head, int(on_host(sums_length)(s))), dtype)
    constants = np.zeros(2 * d_pad, dtype)
    constants[0] = 1
    held = Held()
    arrays = held.points(x, batch), held.mask(mask, batch), held.place(constants), held.place(sums)
    work, items = float(heads * n * d * d), items_of(add_points, s)
    share(add_points, heads * per_head, work, items, TAGS[dtype], s, *arrays, of_torch=held.of_torch)
    return sums.reshape(heads, per_head, 2 + d, d_pad)[..., :d]


def _merged(found: Iterable[Any]) -> tuple[Any, Any, Any]:
    """Count, mean and covariance of each head, from those of its tasks, some tasks at a time."""
    counts, means, scatter = [], [], 0.0
    for parts in found:
        counts.append(parts[:, :, :1, 0].astype(np.float64))
        means.append(parts[:, :, 1].astype(np.float64))
        for task in range(parts.shape[1]):
            scatter = scatter + np.multiply(parts[:, task, 2:], parts[:, task, :1, :1], dtype=np.float64)
    count, mean = np.concatenate(counts, axis=1), np.concatenate(means, axis=1)
    whole = np.sum(count, axis=1, keepdims=True)
    share = count / np.maximum(whole, 1)
    common = np.sum(share * mean, axis=1, keepdims=True)
    away = mean - common
    return whole, common, scatter / np.maximum(whole, 1) + np.swapaxes(share * away, -1, -2) @ away
