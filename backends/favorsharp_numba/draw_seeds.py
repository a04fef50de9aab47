"""The op `draw_seeds`: seeds of landmarks from candidates, on the CPU."""

import math
from typing import Any

import numpy as np

from favorsharp_numba.host.arguments import Held, broadcast, name_of, numpy_or_torch, promoted, widened
from favorsharp_numba.host.threads import share
from favorsharp_numba.kernels.draw_seeds import Candidates, draw
from favorsharp_numba.kernels.workspace import items_of
from favorsharp_numba.vectors.compiling import TAGS
from favorsharp_numba.vectors.emitter import BYTES


def draw_seeds(points: Any, logs: Any, *, num_seeds: int) -> tuple[Any, Any]:
    """As `favorsharp.ops.draw_seeds.draw_seeds`."""
    dtype = widened(promoted(name_of(points), name_of(logs)))
    lanes = BYTES // np.dtype(dtype).itemsize
    batch = broadcast(points.shape[:-2], logs.shape[:-1])
    count, d = points.shape[-2:]
    if count == 0 and num_seeds > 0:
        raise ValueError(f"draw_seeds needs one candidate or more, got points of shape {tuple(points.shape)}")
    slots, d_pad = (max(1, -(-x // lanes)) * lanes for x in (count, d))
    s, heads, held = Candidates(count, slots, d, d_pad, num_seeds), math.prod(batch), Held()
    constants, picks = np.zeros(lanes + d_pad, dtype), np.empty((heads, num_seeds), dtype)
    constants[0] = 1
    given = (held.points(points, batch), held.points(logs[..., None], batch), held.place(constants))
    grain = TAGS[dtype] * 16 * np.finfo(np.float64).eps
    share(
        draw, heads, float(heads * num_seeds * count * d), items_of(draw, s), TAGS[dtype], s, *given,
        grain.astype(dtype), held.place(picks),
    )  # fmt: skip
    picks = picks.astype(np.int64).reshape(*batch, num_seeds)
    return tuple(numpy_or_torch(points, x) for x in (np.where(picks < 0, -1 - picks, picks), picks >= 0))
