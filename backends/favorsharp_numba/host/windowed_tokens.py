"""The plan of `decode_step` for a state with a window, and the store in which its recent keys and values are kept.

Most tokens only join the recent keys, and their query reads these exactly and the sums through features. A store has
room for two blocks of keys, and holds the sums in the layout of the kernels, so that a token writes one row of each
head. Only every `window`-th token moves a block into the sums. States are values: a state refers to the first rows of a
store. A token is written to the next row if no other token is there; otherwise a new store is made, beginning with a
copy.
"""

import math
import threading
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from favorsharp.backend import RECENT_BLOCKS, State, in_store, num_leaving, with_recent
from favorsharp_numba.host.arguments import (
    Held,
    broadcast,
    empty,
    expanded,
    host,
    indices,
    name_of,
    numpy_or_torch,
    pack,
    start_of,
)
from favorsharp_numba.host.problem import AttentionProblem, absorbed
from favorsharp_numba.host.token_plans import TokenPlan, is_plain_token
from favorsharp_numba.kernels.windowed_token import PLAN_SIZE, near_turn


class NearStore:
    """Recent keys and values with room for two blocks, and the sums of a state in the layout of the kernels.

    `others` are the fields of a state in the store, without those of its recent keys.
    """

    def __init__(self, k: Any, v: Any, state: State, feature_map: Any) -> None:
        batch, self.room = tuple(state.kv.shape[:-2]), RECENT_BLOCKS * state.window
        self.used = held = int(state.recent_k.shape[-2])
        self.keys = empty(k, (*batch, self.room, k.shape[-1]), name_of(k))
        self.values = empty(k, (*batch, self.room, v.shape[-1]), name_of(v))
        self.visible = empty(k, (*batch, self.room), "bool")
        self.keys[..., :held, :], self.values[..., :held, :] = state.recent_k, state.recent_v
        self.visible[...] = True
        self.visible[..., :held] = state.recent_mask
        problem = AttentionProblem(feature_map, None, self.keys, self.values, state=state)
        problem.load_state(state)
        kv, z = (numpy_or_torch(k, x) for x in problem.state_sums())
        self.others = {"kv": kv, "z": z, "c": state.c, "kv_low": state.kv_low, "z_low": state.z_low}
        self.others |= {"window": state.window, "fingerprint": state.fingerprint}
        self.sums = problem.sums
        places = start_of(self.sums) // self.sums.itemsize, start_of(self.keys), start_of(self.values)
        self.places = *places, 0 if host(state.recent_mask).all() else start_of(self.visible)
        self.lock = threading.Lock()

    def claim(self, position: int) -> bool:
        """Take the row behind `position` rows, if there is room and no other token has taken it."""
        with self.lock:
            if self.used != position or position == self.room:
                return False
            self.used += 1
            return True


class InStore(NamedTuple):
    """The part of a store that holds the recent keys of a state: its first rows."""

    whole: NearStore
    held: int

    def __reduce__(self) -> Any:
        return type(None), ()  # copies and pickles of a state do not have it

    def recent(self) -> dict[str, Any]:
        """The recent keys, values and mask of the state."""
        whole, held = self
        keys, values = whole.keys[..., :held, :], whole.values[..., :held, :]
        return {"recent_k": keys, "recent_v": values, "recent_mask": whole.visible[..., :held]}


class NearTurn(TokenPlan):
    """A plan: a function of q, k, v, a state and the map, for arrays laid out like those of the first call."""

    def __init__(self, q: Any, k: Any, v: Any, state: State, feature_map: Any) -> None:
        batch, self.window, held = tuple(state.kv.shape[:-2]), state.window, Held()
        packed, sizes, query, key = pack(feature_map, name_of(state.kv), v.shape[-1])
        heads, room = math.prod(batch), RECENT_BLOCKS * self.window
        work = float(heads * q.shape[-2] * (sizes.m + room) * (sizes.d + sizes.e))
        out = empty(q, (*batch, q.shape[-2], v.shape[-1]), name_of(q))
        plan = [*sizes, held.place(query), held.place(key), held.constant(indices(packed.batch, batch))]
        for x in (q, k, v, out, *(empty(k, (*batch, room, x.shape[-1]), name_of(x)) for x in (k, v))):
            plan += held.layout(x, batch)
        plan += [q.shape[-2], room, held.keep(room * np.arange(heads, dtype=np.int64))]
        assert len(plan) == PLAN_SIZE
        all_sizes = sizes, packed.padded(room)
        super().__init__(near_turn, all_sizes, plan, held, one=packed.one, heads=heads, work=work, out=out)

    def __call__(self, q: Any, k: Any, v: Any, state: State, feature_map: Any) -> tuple[Any, State]:
        """The result of a token, and the state after it."""
        part = state.store
        if part is None or not part.whole.claim(part.held):
            if state.recent_k.shape[-2] == RECENT_BLOCKS * self.window:
                state = without_first_block(state, feature_map)
            store = NearStore(k, v, state, feature_map)
            part = InStore(store, store.used)
            store.claim(part.held)
        out, places = self.begun(q, k, v)
        self.run(*places, *part.whole.places, part.held)
        return out, in_store(part.whole.others, InStore(part.whole, part.held + 1))


def without_first_block(state: State, feature_map: Any) -> State:
    """The state after its first block of recent keys has entered the sums."""
    names, w = ("recent_k", "recent_v", "recent_mask"), state.window
    k, v, mask = (getattr(state, name) for name in names)
    left = absorbed(state, k[..., :w, :], v[..., :w, :], mask[..., :w], feature_map)
    return replace(left, recent_k=k[..., w:, :], recent_v=v[..., w:, :], recent_mask=mask[..., w:])


def takes_store(q: Any, k: Any, v: Any, state: State, feature_map: Any) -> bool:
    """Whether there is a `NearTurn` for arrays of these layouts: one key, of the dtype of the recent ones."""
    return (
        state.window > 0
        and (k.dtype, v.dtype) == (state.recent_k.dtype, state.recent_v.dtype)
        and is_plain_token(q, k, v, state, feature_map)
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
