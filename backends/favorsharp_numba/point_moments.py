"""The op `point_moments`: count, mean and covariance of points, on the CPU."""

import math
from typing import Any

import numpy as np

from favorsharp_numba.host.arguments import Held, broadcast, numpy_or_torch
from favorsharp_numba.host.threads import num_threads, share
from favorsharp_numba.kernels.arguments import TILE
from favorsharp_numba.kernels.point_moments import MomentSizes, add_points, sums_length
from favorsharp_numba.kernels.workspace import items_of, on_host
from favorsharp_numba.vectors.compiling import TAGS
from favorsharp_numba.vectors.emitter import BYTES, VECTORS


def point_moments(x: Any, mask: Any) -> tuple[Any, Any, Any]:
    """As `favorsharp.ops.point_moments.point_moments`."""
    n, d = x.shape[-2:]
    batch = broadcast(x.shape[:-2], () if mask is None else mask.shape[:-1])
    heads, lanes = math.prod(batch), BYTES // 8
    d_pad = max(1, -(-d // lanes)) * lanes
    s = MomentSizes(n, d, d_pad, _pieces(heads, n, d))
    sums = np.zeros((heads * s.per_head, int(on_host(sums_length)(s))))
    constants = np.zeros(2 * d_pad)
    constants[0] = 1
    held = Held()
    arrays = held.points(x, batch), held.mask(mask, batch), held.place(constants), held.place(sums)
    work = float(heads * n * d * d)
    share(add_points, heads * s.per_head, work, items_of(add_points, s), TAGS["float64"], s, *arrays)
    found = _moments(sums.reshape(heads, s.per_head, 3 + d, d_pad), d, VECTORS * lanes)
    return tuple(numpy_or_torch(x, part.reshape(*batch, *part.shape[-2:])) for part in found)


def _moments(sums: Any, d: int, width: int) -> tuple[Any, Any, Any]:
    """Count, mean and covariance of each head, from the sums of its tasks (heads, tasks, 3 + d, padded d)."""
    shift, number, total = sums[:, :, :1, :d], sums[:, :, 1:2, :1], sums[:, :, 2:3, :d]
    count = number.sum(axis=1)
    safe = np.maximum(count, 1)
    mean = ((shift * number + total).sum(axis=1)) / safe
    away = np.where(number > 0, shift - mean[:, None], 0.0)  # of the shift from the mean
    products = sums[:, :, 3:, :d]
    blocks = np.arange(d) // width
    products = np.where(blocks[:, None] >= blocks[None, :], products, np.swapaxes(products, -1, -2))
    cross = np.swapaxes(away, -1, -2) @ total
    products = products + cross + np.swapaxes(cross, -1, -2) + number * (np.swapaxes(away, -1, -2) @ away)
    return count, mean, products.sum(axis=1) / safe


def _pieces(heads: int, n: int, d: int) -> int:
    """The number of pieces that each head is cut into, so that there are enough tasks for the threads."""
    threads = num_threads()
    if heads * n * d * d < 4e6 or heads == 0 or heads >= 2 * threads:
        return 1
    return max(1, min(-(-4 * threads // heads), n // (4 * TILE)))
