"""The op `attention`: bidirectional attention on the CPU."""

from functools import partial
from typing import Any

from favorsharp_numba.host.arguments import target
from favorsharp_numba.host.problem import AttentionProblem, packed_attention


def attention(
    q: Any, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None, window: int = 0, out: Any = None
) -> Any:
    """As `favorsharp.ops.attention.attention`; written to `out` if that shares no memory with the inputs."""
    problem = AttentionProblem(feature_map, q, k, v, key_mask=key_mask, window=window)
    out = target(out, (q, k, v, key_mask), (*problem.batch, q.shape[-2], v.shape[-1]), problem.result)
    if window > 0 and k.shape[-2] > 0:
        problem.new_sums()
        problem.windowed(out, causal=False)
    else:
        problem.gather()
        problem.read(out)
    return out


attention_packed = partial(packed_attention, causal=False)
