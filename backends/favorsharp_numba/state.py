"""Streaming: a state takes keys, and queries read it."""

from dataclasses import replace
from typing import Any

from favorsharp.ops.state import State, num_leaving, with_recent
from favorsharp_numba.arguments import broadcast, empty, expanded, host, is_torch, name_of, numpy_or_torch
from favorsharp_numba.decode_kernel import turn, turn_scratch
from favorsharp_numba.problem import AttentionProblem
from favorsharp_numba.run import share


def update(state: State, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None) -> State:
    """As `favorsharp.ops.state.update`."""
    if state.window == 0:
        return _absorbed(state, k, v, key_mask, feature_map)
    k, v, mask = with_recent(state, k, v, key_mask)
    left = num_leaving(k.shape[-2], state.window)
    if left:
        state = _absorbed(state, k[..., :left, :], v[..., :left, :], mask[..., :left], feature_map)
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
    batch = tuple(state.kv.shape[:-2])
    alike = all(tuple(x.shape[:-2]) == batch for x in (q, k, v, state.z, state.c))
    whole = all(_is_contiguous(x) and name_of(x) == name_of(state.kv) for x in (state.kv, state.z, state.c))
    if state.window == 0 and key_mask is None and alike and whole and q.shape[-2] == k.shape[-2] == 1:
        return _turned(q, k, v, state, feature_map)
    state = update(state, k, v, feature_map, key_mask=key_mask)
    return read(state, q, feature_map), state


def _turned(q: Any, k: Any, v: Any, state: State, feature_map: Any) -> tuple[Any, State]:
    """One token in one pass over the state."""
    problem = AttentionProblem(feature_map, q, k, v, state=state)
    if problem.key_batch != tuple(state.kv.shape[:-2]):  # the map has axes of its own
        state = update(state, k, v, feature_map)
        return read(state, q, feature_map), state
    s, held, dtype = problem.s, problem.held, name_of(state.kv)
    out = empty(q, (*problem.batch, 1, s.e), name_of(q))
    kv, z, c = (empty(q, tuple(x.shape), dtype) for x in (state.kv, state.z, state.c))
    old = [held.place(host(x)) for x in (state.kv, state.z, state.c)]
    new = [held.place(host(x)) for x in (kv, z, c)]
    work = float(problem.heads * s.m * (4 * s.e + 2 * s.d))
    share(
        turn, problem.heads, work, turn_scratch(s), problem.one, s, problem.sides(), problem.q, problem.k, problem.v,
        held.points(out, problem.batch), *old, *new,
    )  # fmt: skip
    return out, replace(state, kv=kv, z=z, c=c)


def _is_contiguous(x: Any) -> bool:
    return bool(x.is_contiguous() if is_torch(x) else x.flags.c_contiguous and x.flags.aligned)


def _absorbed(state: State, k: Any, v: Any, key_mask: Any, feature_map: Any) -> State:
    problem = AttentionProblem(feature_map, None, k, v, key_mask=key_mask, state=state)
    problem.load_state(state)
    problem.absorb()
    return replace(state, **{name: numpy_or_torch(k, x) for name, x in problem.state_arrays().items()})


def _read(state: State, q: Any, feature_map: Any, dtype: str) -> Any:
    recent = state.recent_k.shape[-2]
    near = (state.recent_k, state.recent_v, state.recent_mask) if recent else (None, None, None)
    problem = AttentionProblem(feature_map, q, near[0], near[1], key_mask=near[2], state=state)
    problem.load_state(state)
    out = empty(q, (*problem.batch, q.shape[-2], state.kv.shape[-1]), dtype)
    problem.read(out, recent=recent)
    return out
