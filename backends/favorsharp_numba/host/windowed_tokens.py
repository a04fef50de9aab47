"""The plan of `decode_step` for a state with a window, and the store in which its recent keys and values are kept.

Most tokens only join the recent keys, and their query reads these exactly and the sums through features. A store has
room for two blocks of keys, and holds the sums in the layout of the kernels, so that a token writes one row of each
head. Only every `window`-th token moves a block into the sums. States are values: a state refers to the first rows of a
store. A token is written to the next row if no other token is there; otherwise a new store is made, beginning with a
copy.
"""

import threading
from dataclasses import replace
from typing import Any

from favorsharp.backend import State, num_leaving, with_recent
from favorsharp_numba.host.arguments import (
    broadcast,
    check_memory,
    empty,
    expanded,
    host,
    is_torch,
    name_of,
    numpy_or_torch,
    packed_map,
    start_of,
    usable_where_it_lies,
)
from favorsharp_numba.host.problem import AttentionProblem, absorbed


class NearStore:
    """Recent keys and values with room for two blocks, and the sums of a state, for the tokens of one layout."""

    def __init__(self, q: Any, k: Any, v: Any, state: State, feature_map: Any) -> None:
        batch, self.room = tuple(state.kv.shape[:-2]), 2 * state.window
        self.used = held = int(state.recent_k.shape[-2])
        self.keys = empty(k, (*batch, self.room, k.shape[-1]), name_of(k))
        self.values = empty(k, (*batch, self.room, v.shape[-1]), name_of(v))
        self.visible = empty(k, (*batch, self.room), "bool")
        self.keys[..., :held, :], self.values[..., :held, :] = state.recent_k, state.recent_v
        self.visible[...] = True
        self.visible[..., :held] = state.recent_mask
        mask = None if host(state.recent_mask).all() else self.visible
        problem = AttentionProblem(feature_map, q, self.keys, self.values, key_mask=mask, state=state)
        problem.load_state(state)
        out = empty(q, (*batch, q.shape[-2], v.shape[-1]), name_of(q))
        self.out, self.arguments = problem.held.points(out, problem.batch), problem.arguments()
        # the constants are kept; q is released, and the store itself holds the other arrays
        problem.held.arrays = [x for x in problem.held.arrays if not hasattr(x, "owner")]
        kv, z = problem.state_sums()
        self.kv, self.z = numpy_or_torch(k, kv), numpy_or_torch(k, z)
        self.problem: Any = problem
        self.queries = _layout(q)
        self.lock = threading.Lock()

    def __reduce__(self) -> Any:
        return type(None), ()  # copies and pickles of a state do not have it

    def claim(self, position: int, q: Any, feature_map: Any) -> bool:
        """Take the row behind `position` rows, if there is room and no other token has taken it.

        The store must have been made for queries of this layout, and for the present numbers of the map.
        """
        if self.queries != _layout(q) or self.problem.packed is not packed_map(feature_map, self.problem.dtype):
            return False
        with self.lock:
            if self.used != position or position == self.room:
                return False
            self.used += 1
            return True

    def read(self, q: Any, out: Any, recent: int) -> None:
        """Queries read the sums, and the first `recent` keys exactly."""
        start = start_of(q)
        if not start:
            check_memory((q,))
        q, out = self.problem.q._replace(base=start), self.out._replace(base=start_of(out))
        self.problem.read_points(self.arguments, q, out, recent=recent)


def windowed_turn(q: Any, k: Any, v: Any, state: State, feature_map: Any) -> tuple[Any, State]:
    """The result of a token, and the state after it; a plan for all states for which `takes_store` is true."""
    held = int(state.recent_k.shape[-2])
    if held == 2 * state.window:
        state = updated(state, k, v, None, feature_map)
        return read_state(state, q, feature_map, name_of(q)), state
    store = state.store
    if store is None or not store.claim(held, q, feature_map):
        store = NearStore(q, k, v, state, feature_map)
        store.claim(held, q, feature_map)
    keys, values = store.keys[..., : held + 1, :], store.values[..., : held + 1, :]
    keys[..., held:, :], values[..., held:, :] = k, v
    out = empty(q, (*q.shape[:-1], v.shape[-1]), name_of(q))
    store.read(q, out, held + 1)
    after = State(
        store.kv, store.z, state.c, state.window, keys, values, store.visible[..., : held + 1], state.fingerprint,
        state.kv_low, state.z_low,
    )  # fmt: skip
    after.remember("store", store)
    return out, after


def _layout(x: Any) -> Any:
    """The dtype, shape and strides of an array."""
    return x.dtype, x.shape, x.stride() if is_torch(x) else x.strides


def takes_store(q: Any, k: Any, v: Any, state: State) -> bool:
    """Whether `windowed_turn` takes arrays of these layouts: one key, of the dtype of the recent ones."""
    batch = tuple(state.kv.shape[:-2])
    return (
        state.window > 0
        and q.shape[-2] > 0
        and k.shape[-2] == 1
        and (k.dtype, v.dtype) == (state.recent_k.dtype, state.recent_v.dtype)
        and all(tuple(x.shape[:-2]) == batch for x in (q, k, v))
        and all(usable_where_it_lies(x) for x in (q, k, v))
    )


def updated(state: State, k: Any, v: Any, key_mask: Any, feature_map: Any) -> State:
    """The state with a window after further keys and values."""
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


def read_state(state: State, q: Any, feature_map: Any, dtype: str) -> Any:
    """Attention of queries to all keys of a state."""
    recent = state.recent_k.shape[-2]
    near = (state.recent_k, state.recent_v, state.recent_mask) if recent else (None, None, None)
    problem = AttentionProblem(feature_map, q, near[0], near[1], key_mask=near[2], state=state)
    problem.load_state(state)
    out = empty(q, (*problem.batch, q.shape[-2], state.kv.shape[-1]), dtype)
    problem.read(out, recent=recent)
    return out
