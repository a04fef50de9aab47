"""The base of the plans of single tokens: constants for a kernel, its workspace, and arrays for its results."""

import ctypes
import threading
from typing import Any

import numpy as np

from favorsharp.backend import State
from favorsharp_numba.host import workspace
from favorsharp_numba.host.arguments import Held, broadcast, check_memory, is_torch, start_of, usable_where_it_lies
from favorsharp_numba.host.threads import SMALL, share
from favorsharp_numba.kernels.workspace import items_of


class TokenPlan:
    """A kernel with a list of constants, its `plan`, for tokens whose arrays are laid out like those of a first one.

    `work` is the number of multiplications of a token, and `out` is an array like its result.
    """

    def __init__(
        self, kernel: Any, sizes: Any, plan: list[int], held: Held, *, one: Any, heads: int, work: float, out: Any
    ) -> None:
        self.kernel, self.scratch = kernel, items_of(kernel, sizes)
        self.held, self.one, self.heads, self.work, self.out = held, one, heads, work, out
        # the constants are kept; the arrays of the first call are released
        held.arrays = [x for x in held.arrays if not hasattr(x, "owner")]
        self.plan = held.keep(np.array(plan, dtype=np.int64))
        self.empty_like, self.start_of = np.empty_like, _start_of_numpy
        if is_torch(out):
            import torch

            self.empty_like, self.start_of = torch.empty_like, torch.Tensor.data_ptr
        self.threads = threading.local()

    def begun(self, q: Any, k: Any, v: Any) -> tuple[Any, tuple[int, ...]]:
        """A new array for the result of a token, and the addresses of q, k, v and of this array."""
        out = self.empty_like(self.out)
        places = tuple(map(self.start_of, (q, k, v, out)))
        if not all(places):  # arrays without items have no address
            check_memory((q, k, v))
        return out, places

    def run(self, *given: Any) -> None:
        """Run the kernel with the plan and further arguments for all heads."""
        if self.work < SMALL:
            self.kernel(self.one, self.plan, *given, 0, self.heads, self._scratch())
        else:
            given = self.plan, *given
            share(self.kernel, self.heads, self.work, self.scratch, self.one, *given, of_torch=self.held.of_torch)

    def _scratch(self) -> int:
        """The workspace of this thread."""
        try:
            place: int = self.threads.place
        except AttributeError:
            self.threads.memory = workspace.workspaces(1, self.scratch, self.one.dtype)
            place = self.threads.place = workspace.place_in(self.threads.memory[0])
        return place


def is_plain_token(q: Any, k: Any, v: Any, state: State, feature_map: Any) -> bool:
    """Whether these are a key and its value, and some queries, of the state's batch, that a kernel reads in place."""
    batch = tuple(state.like.shape[:-2])
    return (
        q.shape[-2] > 0
        and k.shape[-2] == 1
        and batch == broadcast(feature_map.batch_shape, batch)
        and all(tuple(x.shape[:-2]) == batch and usable_where_it_lies(x) for x in (q, k, v))
    )


def _start_of_numpy(x: Any) -> int:
    """As `start_of` for NumPy arrays, but three times as fast if an array has items, has no gaps and is writable."""
    flags = x.flags
    if flags.c_contiguous and flags.writeable and x.size:
        return ctypes.addressof(ctypes.c_char.from_buffer(x))
    return start_of(x)
