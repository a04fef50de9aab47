"""The op `causal_attention`: causal attention on the CPU, with and without a state."""

from dataclasses import replace
from functools import partial
from typing import Any

from favorsharp.backend import State, empty_state, num_leaving, with_recent
from favorsharp_numba.host.arguments import target
from favorsharp_numba.host.problem import AttentionProblem, packed_attention


def causal_attention(
    q: Any,
    k: Any,
    v: Any,
    feature_map: Any,
    *,
    key_mask: Any = None,
    window: int = 0,
    state: State | None = None,
    out: Any = None,
) -> tuple[Any, State]:
    """As `favorsharp.ops.causal_attention.causal_attention`.

    The result is written to `out` if that shares no memory with the inputs.
    """
    n, before, keys, values, mask = q.shape[-2], 0, k, v, key_mask
    if state is not None and state.recent_k.shape[-2] > 0:
        before = state.recent_k.shape[-2]
        keys, values, mask = with_recent(state, k, v, key_mask)
    problem = AttentionProblem(feature_map, q, keys, values, key_mask=mask, state=state, window=window)
    if state is None:
        problem.new_sums()
        state = empty_state(feature_map, problem.key_batch, k.shape[-1], v.shape[-1], window, k[..., :0, :])
    else:
        problem.load_state(state)
        problem.load_lows(state)
    out = target(out, (q, k, v, key_mask), (*problem.batch, n, v.shape[-1]), problem.result)
    if window:
        problem.windowed(out, causal=True, first_query=before)
    else:
        problem.causal(out)
    state = replace(state, **problem.state_arrays_like(q))
    return out, replace(state, **recent(state, k, v, key_mask)) if window else state


causal_attention_packed = partial(packed_attention, causal=True)


def recent(state: State, k: Any, v: Any, key_mask: Any) -> dict[str, Any]:
    """The recent keys, values and mask of a state with a window, after further keys and values."""
    before = state.recent_k.shape[-2]
    left = num_leaving(before + k.shape[-2], state.window)
    passed = max(0, left - before)  # new keys that enter the sums at once are not copied
    mask = None if key_mask is None else key_mask[..., passed:]
    keys, values, mask = with_recent(state, k[..., passed:, :], v[..., passed:, :], mask)
    left -= passed
    return {"recent_k": keys[..., left:, :], "recent_v": values[..., left:, :], "recent_mask": mask[..., left:]}
