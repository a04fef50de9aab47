"""The plan of `decode_step`: what all tokens with the same shapes, dtypes and memory layouts share is computed once.

The arithmetic of a token takes microseconds, less time than it takes to describe its arrays to a kernel. `dispatch`
asks `turn_of` for a plan (the attribute `plan` of `favorsharp_numba.state.decode_step`).
"""

import ctypes
import math
import threading
from typing import Any

import numpy as np

from favorsharp.backend import State, has_low_parts
from favorsharp_numba.host import workspace
from favorsharp_numba.host.arguments import (
    Held,
    broadcast,
    check_memory,
    empty,
    indices,
    is_torch,
    name_of,
    pack,
    start_of,
    usable_where_it_lies,
)
from favorsharp_numba.host.kept_tokens import After, Kept, settled
from favorsharp_numba.host.threads import SMALL, share
from favorsharp_numba.kernels.decode_step import PLAN_SIZE, turn
from favorsharp_numba.kernels.workspace import items_of

_NOTHING_KEPT, _NO_ROWS = (None, 0), (0, 0)


class Turn:
    """A plan: a function of q, k, v, the state and the map, for arrays laid out like those of the first call.

    It does not check layouts or the map again.
    """

    def __init__(self, q: Any, k: Any, v: Any, state: State, feature_map: Any) -> None:
        batch, size = tuple(state.kv.shape[:-2]), state.kv.shape[-1]
        packed, sizes, query, key = pack(feature_map, name_of(state.kv), size)
        self.one = packed.one
        self.heads, self.d = math.prod(batch), sizes.d
        self.keeps = has_low_parts(state.kv)
        self.work = float(self.heads * sizes.m * (4 * size + 2 * sizes.d) * q.shape[-2])
        self.scratch = items_of(turn, sizes)
        out = empty(q, (*batch, q.shape[-2], size), name_of(q))
        self.empty_like, self.start_of = np.empty_like, _start_of_whole
        if is_torch(q):
            import torch

            self.empty_like, self.start_of = torch.empty_like, torch.Tensor.data_ptr
        self.out = out
        self.held = Held()
        plan = [*sizes, self.held.place(query), self.held.place(key)]
        plan.append(self.held.constant(indices(packed.batch, batch)))
        for x in (q, k, v, out):
            plan += [part for name, part in self.held.points(x, batch)._asdict().items() if name != "base"]
        plan.append(q.shape[-2])
        # constants stay; the arrays of the first call are released
        self.held.arrays = [x for x in self.held.arrays if not hasattr(x, "owner")]
        assert len(plan) == PLAN_SIZE
        self.plan = self.held.keep(np.array(plan, dtype=np.int64))
        self.threads = threading.local()

    def __call__(self, q: Any, k: Any, v: Any, state: State, feature_map: Any) -> tuple[Any, State]:
        """The result of a token, and the state after it."""
        kept: Any
        kept, position = state.single_tokens or _NOTHING_KEPT
        rows: Any = _NO_ROWS
        if self.keeps:
            rows = kept and kept.rows_at(position)
            if rows is None:
                state = settled(state, feature_map)
                kept, position = Kept(state, self.heads, self.d, self.one.dtype), 0
                rows = kept.rows_at(0)
        old = state.kv, state.z, state.c
        out, kv, z, c = map(self.empty_like, (self.out, *old))
        places = tuple(map(self.start_of, (q, k, v, out, *old, kv, z, c)))
        if not all(places):  # arrays without items have no address either
            check_memory((q, k, v, *old))
        if self.work < SMALL:
            turn(self.one, self.plan, *places, *rows, 0, self.heads, self._scratch())
        else:
            given = (turn, self.heads, self.work, self.scratch, self.one, self.plan, *places, *rows)
            share(*given, of_torch=self.held.of_torch)
        new = State(kv, z, c, state.window, state.recent_k, state.recent_v, state.recent_mask, state.fingerprint)
        if self.keeps:
            new.remember("single_tokens", After(kept, position + 1))
        return out, new

    def _scratch(self) -> int:
        """The workspace of this thread."""
        try:
            place: int = self.threads.place
        except AttributeError:
            self.threads.memory = workspace.workspaces(1, self.scratch, self.one.dtype)
            place = self.threads.place = workspace.place_in(self.threads.memory[0])
        return place


def turn_of(q: Any, k: Any, v: Any, state: State, feature_map: Any) -> Turn | None:
    """The plan for arrays of these layouts, or None if the kernel cannot take them."""
    held = state.kv, state.z, state.c
    batch, dtype = tuple(state.kv.shape[:-2]), state.kv.dtype
    if state.window or q.shape[-2] == 0 or k.shape[-2] != 1:
        return None
    if any(tuple(x.shape[:-2]) != batch for x in (q, k, v, *held)) or batch != broadcast(
        feature_map.batch_shape, batch
    ):
        return None
    if any(x.dtype != dtype or not _is_whole(x) for x in held) or not all(usable_where_it_lies(x) for x in (q, k, v)):
        return None
    return Turn(q, k, v, state, feature_map)


def _start_of_whole(x: Any) -> int:
    """As `start_of` for NumPy arrays, in a third of the time if an array has no gaps and is writable."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(x))
    except (TypeError, ValueError, BufferError):
        return start_of(x)


def _is_whole(x: Any) -> bool:
    return usable_where_it_lies(x) and bool(x.is_contiguous() if is_torch(x) else x.flags.c_contiguous)
