"""The ops `update`, `read` and `decode_step`: states on the CPU."""

from dataclasses import replace
from typing import Any

from favorsharp.backend import State, num_leaving, with_recent
from favorsharp_numba.host.arguments import broadcast, empty, expanded, name_of
from favorsharp_numba.host.decode_plan import turn_of
from favorsharp_numba.host.kept_tokens import settled
from favorsharp_numba.host.problem import AttentionProblem, absorbed


def update(state: State, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None) -> State:
    """As `favorsharp.ops.state.update`."""
    state = settled(state, feature_map)
    if state.window == 0:
        return absorbed(state, k, v, key_mask, feature_map)
    k, v, mask = with_recent(state, k, v, key_mask)
    left = num_leaving(k.shape[-2], state.window)
    if left:
        state = absorbed(state, k[..., :left, :], v[..., :left, :], mask[..., :left], feature_map)
    batch = broadcast(k.shape[:-2], v.shape[:-2], mask.shape[:-1])
    kept = {"recent_k": k[..., left:, :], "recent_v": v[..., left:, :], "recent_mask": mask[..., left:, None]}
    return replace(
        state,
        **{
            name: expanded(x, (*batch, *x.shape[-2:]))[..., 0]
            if name == "recent_mask"
            else expanded(x, (*batch, *x.shape[-2:]))
            for name, x in kept.items()
        },
    )


def read(state: State, q: Any, feature_map: Any) -> Any:
    """As `favorsharp.ops.state.read`."""
    return _read(state, q, feature_map, name_of(q))


def decode_step(q: Any, k: Any, v: Any, state: State, feature_map: Any, *, key_mask: Any = None) -> tuple[Any, State]:
    """As `favorsharp.ops.state.decode_step`."""
    turn = turn_of(q, k, v, state, feature_map) if key_mask is None else None
    if turn is not None:
        return turn(q, k, v, state, feature_map)
    state = update(state, k, v, feature_map, key_mask=key_mask)
    return read(state, q, feature_map), state


decode_step_plan = turn_of


def _read(state: State, q: Any, feature_map: Any, dtype: str) -> Any:
    recent = state.recent_k.shape[-2]
    near = (state.recent_k, state.recent_v, state.recent_mask) if recent else (None, None, None)
    problem = AttentionProblem(feature_map, q, near[0], near[1], key_mask=near[2], state=state)
    problem.load_state(state)
    out = empty(q, (*problem.batch, q.shape[-2], state.kv.shape[-1]), dtype)
    problem.read(out, recent=recent)
    return out
