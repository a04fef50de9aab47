"""The ops `update`, `read` and `decode_step`: states on the CPU."""

from collections.abc import Callable
from typing import Any

from favorsharp.backend import State
from favorsharp_numba.host.arguments import name_of
from favorsharp_numba.host.decode_plan import turn_of
from favorsharp_numba.host.kept_tokens import keeps, with_few
from favorsharp_numba.host.problem import absorbed
from favorsharp_numba.host.windowed_tokens import NearTurn, read_state, takes_store, updated


def update(state: State, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None) -> State:
    """As `favorsharp.ops.state.update`."""
    if keeps(state, k, v, key_mask, feature_map):
        return with_few(state, k, v, feature_map)
    add = updated if state.window else absorbed
    return add(state, k, v, key_mask, feature_map)


def read(state: State, q: Any, feature_map: Any) -> Any:
    """As `favorsharp.ops.state.read`."""
    return read_state(state, q, feature_map, name_of(q))


def decode_step(q: Any, k: Any, v: Any, state: State, feature_map: Any, *, key_mask: Any = None) -> tuple[Any, State]:
    """As `favorsharp.ops.state.decode_step`."""
    turn = decode_step_plan(q, k, v, state, feature_map) if key_mask is None else None
    if turn is not None:
        return turn(q, k, v, state, feature_map)
    state = update(state, k, v, feature_map, key_mask=key_mask)
    return read(state, q, feature_map), state


def decode_step_plan(q: Any, k: Any, v: Any, state: State, feature_map: Any) -> Callable[..., tuple[Any, State]] | None:
    """What runs tokens of these layouts, or None if they have no plan."""
    if takes_store(q, k, v, state, feature_map):
        return NearTurn(q, k, v, state, feature_map)
    return turn_of(q, k, v, state, feature_map)
