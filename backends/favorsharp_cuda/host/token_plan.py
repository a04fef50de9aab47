"""The plan of `decode_step`: tokens laid out like an earlier one repeat its launch, and nothing is described again.

`favorsharp.plans` finds the plan by the layout of a token and of its state (`favorsharp_cuda.state.decode_step_plan`).
See docs/design/repeated-launches.md.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from favorsharp.backend import State
from favorsharp_cuda.host import arrays, plain, repeats
from favorsharp_cuda.host.launch import stream_of
from favorsharp_cuda.host.problem import lows_of, sums_of


class TokenPlan:
    """A function of q, k, v, the state and the map, for tensors laid out like those of the first call.

    `otherwise` computes tokens that cannot be repeated: the first one of a stream, those of a state without low parts,
    and those of a captured graph.
    """

    def __init__(self, otherwise: Callable[..., tuple[Any, State]]) -> None:
        self.otherwise = otherwise
        self.known: dict[Any, Any] = {}

    def __call__(self, q: Any, k: Any, v: Any, state: State, feature_map: Any) -> tuple[Any, State]:
        """The result of a token, and the state after it."""
        sums, low = sums_of(state), lows_of(state)
        stream, is_capturing = stream_of(q)
        if low[0] is None or is_capturing:
            return self.otherwise(q, k, v, state, feature_map)
        known = self.known.get(kind := (stream, repeats.epoch()))
        if known is None:
            result = self.otherwise(q, k, v, state, feature_map)
            self.known[kind] = repeats.recorded(plain.decode, q, k, v, feature_map, None, sums, low, 1, None)
            return result
        every = repeats.launched(known, [q, k, v, *sums, *low])
        out, ((kv, z, c), (kv_low, z_low)), _ = known.results
        kv, z, c, kv_low, z_low = every[kv], every[z], every[c], every[kv_low], every[z_low]
        return every[out], replace(state, kv=kv, z=z, c=c, kv_low=kv_low, z_low=z_low)


def plan_of(q: Any, k: Any, v: Any, state: State, otherwise: Callable[..., tuple[Any, State]]) -> TokenPlan | None:
    """The plan for tensors of these layouts, or None if tokens are not single launches with results laid out alike."""
    if state.window or q.shape[-2] != 1 or not all(map(arrays.is_torch, (q, k, v))):
        return None
    batch, wide = tuple(state.kv.shape[:-2]), arrays.name_of(state.kv)
    for x in (q, k, v):
        if tuple(x.shape[:-2]) != batch or x.dtype != q.dtype or arrays.WIDER[arrays.name_of(x)] != wide:
            return None
    return TokenPlan(otherwise) if all(x.is_contiguous() for x in sums_of(state)) else None
