"""The op `point_moments`: count, mean and covariance of points, on the CPU."""

import math
from typing import Any

import numpy as np

from favorsharp_numba.host.arguments import Held, broadcast, numpy_or_torch
from favorsharp_numba.host.threads import pieces_of, share
from favorsharp_numba.kernels.point_moments import MomentSizes, add_points, sums_length
from favorsharp_numba.kernels.workspace import items_of, on_host
from favorsharp_numba.vectors.compiling import TAGS
from favorsharp_numba.vectors.emitter import BYTES


def point_moments(x: Any, mask: Any) -> tuple[Any, Any, Any]:
    """As `favorsharp.moments.point_moments`."""
    n, d = x.shape[-2:]
    batch = broadcast(x.shape[:-2], () if mask is None else mask.shape[:-1])
    heads, lanes = math.prod(batch), BYTES // 8
    d_pad = max(1, -(-d // lanes)) * lanes
    s = MomentSizes(n, d, d_pad, pieces_of(heads, n, float(heads * n * d * d)))
    sums = np.zeros((heads * s.per_head, int(on_host(sums_length)(s))))
    constants = np.zeros(2 * d_pad)
    constants[0] = 1
    held = Held()
    arrays = held.points(x, batch), held.mask(mask, batch), held.place(constants), held.place(sums)
    work = float(heads * n * d * d)
    items, of_torch = items_of(add_points, s), held.of_torch
    share(add_points, heads * s.per_head, work, items, TAGS["float64"], s, *arrays, of_torch=of_torch)
    found = _merged(sums.reshape(heads, s.per_head, 2 + d, d_pad)[..., :d])
    return tuple(numpy_or_torch(x, part.reshape(*batch, *part.shape[-2:])) for part in found)


def _merged(parts: Any) -> tuple[Any, Any, Any]:
    """Count, mean and covariance of each head, from those of its tasks (heads, tasks, 2 + d, d)."""
    count, mean, covariance = parts[:, :, :1, :1], parts[:, :, 1:2], parts[:, :, 2:]
    if parts.shape[1] == 1:
        return count[:, 0], mean[:, 0], covariance[:, 0]
    whole = count.sum(axis=1, keepdims=True)
    share = count / np.maximum(whole, 1)
    common = np.sum(share * mean, axis=1, keepdims=True)
    away = (mean - common)[:, :, 0]
    covariance = np.einsum("ht,htij->hij", share[..., 0, 0], covariance, optimize=True)
    return whole[:, 0], common[:, 0], covariance + np.swapaxes(share[:, :, 0] * away, -1, -2) @ away
