"""The op `weighted_attention`: exact attention to keys with log weights, on the CPU."""

import math
from functools import lru_cache
from typing import Any

import numpy as np

from favorsharp_numba.host.arguments import Held, broadcast, empty, name_of, promoted, widened
from favorsharp_numba.host.reading import reading_constants, reading_places
from favorsharp_numba.host.threads import pieces_of, share
from favorsharp_numba.kernels.arguments import Sizes
from favorsharp_numba.kernels.weighted_attention import attend
from favorsharp_numba.kernels.workspace import items_of
from favorsharp_numba.vectors.compiling import TAGS
from favorsharp_numba.vectors.emitter import BYTES


def weighted_attention(
    q: Any, keys: Any, log_weight: Any, values: Any, *, scale: float, causal_from: int | None = None
) -> Any:  # fmt: skip
    """As `favorsharp.ops.weighted_attention.weighted_attention`."""
    dtype = widened(promoted(*(name_of(x) for x in (q, keys, log_weight, values))))
    batch = broadcast(q.shape[:-2], keys.shape[:-2], log_weight.shape[:-1], values.shape[:-2])
    n, heads = q.shape[-2], math.prod(batch)
    s, constants = _sizes(*keys.shape[-2:], values.shape[-1], float(scale), dtype)
    out = empty(q, (*batch, n, s.e), name_of(log_weight))
    held = Held()
    arrays = [held.points(x, batch) for x in (q, keys, log_weight[..., None], values)]
    target, side = held.points(out, batch), held.place(constants)
    work = float(heads * n * s.m * (s.d + s.e))
    per_head = pieces_of(heads, n, work)
    first = -1 if causal_from is None else causal_from
    share(
        attend, heads * per_head, work, items_of(attend, s), TAGS[dtype], s, side, *arrays, n, first, target, per_head,
        of_torch=held.of_torch,
    )  # fmt: skip
    return out


@lru_cache(maxsize=64)
def _sizes(m: int, d: int, e: int, scale: float, dtype: str) -> tuple[Sizes, Any]:
    """The sizes of a call, and its constants."""
    lanes = BYTES // np.dtype(dtype).itemsize
    d_pad, m_pad, e_pad = (max(1, -(-x // lanes)) * lanes for x in (d, m, e))
    zeros, total = reading_places(lanes, d_pad, e_pad)
    fields = d, d_pad, m, m_pad, e, e_pad, m_pad + lanes, *[zeros] * 10, 0, 0, total
    return Sizes._make(fields), reading_constants(d_pad, e_pad, scale, dtype)
