"""One token in one pass over the state: what tokens of one layout share is worked out once.

The arithmetic of a token takes microseconds, less than it takes to describe its arrays to a kernel.
"""

import ctypes
import math
import threading
from typing import Any

import numpy as np

from favorsharp.backend import State, has_low_parts
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
from favorsharp_numba.host.threads import SMALL, aligned, share
from favorsharp_numba.kernels.decode_step import PLAN_SIZE, turn, turn_scratch

_NOTHING_KEPT, _NO_ROWS = (None, 0), (0, 0)


class Turn:
    """One token, for arrays laid out as those of a first call: a function of q, k, v, the state and the map.

    Neither layouts nor the map are looked at again.
    """

    def __init__(self, q: Any, k: Any, v: Any, state: State, feature_map: Any) -> None:
        batch, size = tuple(state.kv.shape[:-2]), state.kv.shape[-1]
        packed, sizes, query, key = pack(feature_map, name_of(state.kv), size)
        self.one = packed.one
        self.heads, self.d = math.prod(batch), sizes.d
        self.keeps = has_low_parts(state.kv)
        self.work = float(self.heads * sizes.m * (4 * size + 2 * sizes.d))
        self.scratch = turn_scratch(sizes)
        out = empty(q, (*batch, 1, size), name_of(q))
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
        self.held.arrays = [x for x in self.held.arrays if not hasattr(x, "owner")]  # constants, not this call's arrays
        assert len(plan) == PLAN_SIZE
        self.plan = self.held.keep(np.array(plan, dtype=np.int64))
        self.threads = threading.local()

    def __call__(self, q: Any, k: Any, v: Any, state: State, feature_map: Any) -> tuple[Any, State]:
        """The result and the state after it."""
        kept, position = state.single_tokens or _NOTHING_KEPT
        rows = _NO_ROWS
        if self.keeps:
            rows = kept and kept.rows_at(position)
            if rows is None:
                state = settled(state, feature_map)
                kept, position = Kept(state, self.heads, self.d, self.one.dtype), 0
                rows = kept.rows_at(0)
        old = state.kv, state.z, state.c
        out, kv, z, c = map(self.empty_like, (self.out, *old))
        places = tuple(map(self.start_of, (q, k, v, out, *old, kv, z, c)))
        if not all(places):  # as of arrays without items too
            check_memory((q, k, v, *old))
        if self.work < SMALL:
            turn(self.one, self.plan, *places, *rows, 0, self.heads, self._scratch())
        else:
            share(turn, self.heads, self.work, self.scratch, self.one, self.plan, *places, *rows)
        new = State(kv, z, c, state.window, state.recent_k, state.recent_v, state.recent_mask, state.fingerprint)
        if self.keeps:
            object.__setattr__(new, "single_tokens", After(kept, position + 1))
        return out, new

    def _scratch(self) -> int:
        """Where this thread's scratch is."""
        try:
            place: int = self.threads.place
        except AttributeError:
            self.threads.memory = np.empty(self.scratch + 64, self.one.dtype)
            place = self.threads.place = aligned(self.threads.memory)
        return place


def turn_of(q: Any, k: Any, v: Any, state: State, feature_map: Any) -> Turn | None:
    """The turn for arrays of these layouts; None where the kernel cannot take them."""
    held = state.kv, state.z, state.c
    batch, dtype = tuple(state.kv.shape[:-2]), state.kv.dtype
    if state.window or q.shape[-2] != 1 or k.shape[-2] != 1:
        return None
    if any(tuple(x.shape[:-2]) != batch for x in (q, k, v, *held)) or batch != broadcast(
        feature_map.batch_shape, batch
    ):
        return None
    if any(x.dtype != dtype or not _is_whole(x) for x in held) or not all(usable_where_it_lies(x) for x in (q, k, v)):
        return None
    return Turn(q, k, v, state, feature_map)


def _start_of_whole(x: Any) -> int:
    """As `start_of` of NumPy arrays, in a third of the time for those without gaps that can be written to."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(x))
    except (TypeError, ValueError, BufferError):
        return start_of(x)


def _is_whole(x: Any) -> bool:
    return usable_where_it_lies(x) and bool(x.is_contiguous() if is_torch(x) else x.flags.c_contiguous)
