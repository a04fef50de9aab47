"""The plan of `decode_step`: everything that tokens with the same shapes, dtypes and memory layouts share.

The arithmetic of a token takes microseconds, less time than it takes to describe its arrays to a kernel. `dispatch`
asks `turn_of` for a plan (the attribute `plan` of `favorsharp_numba.state.decode_step`).
"""

import ctypes
import math
import threading
from typing import Any

import numpy as np

from favorsharp.backend import State, unsettled
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
from favorsharp_numba.host.kept_tokens import After, Kept, Layout, is_whole, kept_at
from favorsharp_numba.host.threads import SMALL, share
from favorsharp_numba.kernels.decode_step import PLAN_SIZE, turn
from favorsharp_numba.kernels.workspace import items_of


class Turn:
    """A plan: a function of q, k, v, the state and the map, for arrays laid out like those of the first call.

    It does not check layouts or the map again.
    """

    def __init__(self, q: Any, k: Any, v: Any, state: State, feature_map: Any) -> None:
        batch, size = tuple(state.like.shape[:-2]), state.like.shape[-1]
        packed, sizes, query, key = pack(feature_map, name_of(state.like), size)
        self.one = packed.one
        self.heads = math.prod(batch)
        self.work = float(self.heads * sizes.m * (4 * size + 2 * sizes.d) * q.shape[-2])
        self.scratch = items_of(turn, sizes)
        out = empty(q, (*batch, q.shape[-2], size), name_of(q))
        self.empty_like, self.start_of = np.empty_like, _start_of_numpy
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
        # the constants are kept; the arrays of the first call are released
        self.held.arrays = [x for x in self.held.arrays if not hasattr(x, "owner")]
        assert len(plan) == PLAN_SIZE
        self.plan = self.held.keep(np.array(plan, dtype=np.int64))
        self.layout = Layout(sizes, self.one, self.heads)
        self.threads = threading.local()

    def __call__(self, q: Any, k: Any, v: Any, state: State, feature_map: Any) -> tuple[Any, State]:
        """The result of a token, and the state after it."""
        kept, position = kept_at(state, self.layout)
        out = self.empty_like(self.out)
        places = tuple(map(self.start_of, (q, k, v, out)))
        if not all(places):  # arrays without items have no address
            check_memory((q, k, v))
        self._run(places, kept, position)
        if kept.marks[0]:
            kept, position = kept.begun_again(position, raised=True), 0
            kept.claim(0)
            self._run(places, kept, position)
        return out, unsettled(state, After(kept, position + 1))

    def _run(self, places: tuple[int, ...], kept: Kept, position: int) -> None:
        """Run the kernel for a token that is kept at a position."""
        given = self.one, self.plan, *places, *kept.sums, *kept.places, position
        if self.work < SMALL:
            turn(*given, 0, self.heads, self._scratch())
        else:
            share(turn, self.heads, self.work, self.scratch, *given, of_torch=self.held.of_torch)

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
    batch = tuple(state.like.shape[:-2])
    if state.window or q.shape[-2] == 0 or k.shape[-2] != 1:
        return None
    if batch != broadcast(feature_map.batch_shape, batch) or not (state.single_tokens is not None or is_whole(state)):
        return None
    if not all(tuple(x.shape[:-2]) == batch and usable_where_it_lies(x) for x in (q, k, v)):
        return None
    return Turn(q, k, v, state, feature_map)


def _start_of_numpy(x: Any) -> int:
    """As `start_of` for NumPy arrays, but three times as fast if an array has items, has no gaps and is writable."""
    flags = x.flags
    if flags.c_contiguous and flags.writeable and x.size:
        return ctypes.addressof(ctypes.c_char.from_buffer(x))
    return start_of(x)
