"""Shares the work of a kernel among threads.

Kernels run without the interpreter's lock, on threads of our own: Numba's threading layers end the process where they
are called from two threads at once (workqueue) or after a fork (OpenMP). Small work stays on the calling thread.
"""

import contextlib
import ctypes
import os
import platform
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from favorsharp_numba.vectors.compiling import jit

SMALL = 4e6
"""Multiplications below which handing work to another thread costs more than it saves: some 40 microseconds."""

PATIENCE, MOMENT = 4000, 100
"""How often to look whether others have finished before going to sleep, some 100 microseconds in all: to be woken takes
30, as long as a share of small work. And how often once they have, for them to hand the interpreter's lock back."""

PAUSE = "llvm.x86.sse2.pause" if platform.machine().lower() in ("x86_64", "amd64") else None
"""What tells a processor that a thread only waits; elsewhere its looks are over sooner."""

_calls: "queue.SimpleQueue[Work]" = queue.SimpleQueue()
_helpers: list[int] = []
"""The system's numbers of the helpers."""
_places: set[int] = set()
"""The processors that they have been told to run on; none before that."""
_lock = threading.Lock()


def _forget_helpers() -> None:
    """Threads do not survive a fork, and a lock may have been held by one of them."""
    global _calls, _helpers, _places, _lock
    _calls, _helpers, _places, _lock = queue.SimpleQueue(), [], set(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)


def num_threads() -> int:
    """How many threads may work: what Numba, torch and threadpoolctl are told, whichever is least."""
    limits = [numba.config.NUMBA_NUM_THREADS]
    parallel = sys.modules.get("numba.np.ufunc.parallel")
    if parallel is not None and parallel._is_initialized:
        limits.append(numba.get_num_threads())
    if "torch" in sys.modules:
        limits.append(sys.modules["torch"].get_num_threads())
    if "threadpoolctl" in sys.modules:
        limits += _controlled()
    return max(1, min(limits))


_controller: Any = None


def _controlled() -> list[int]:
    """The limits that threadpoolctl holds for the libraries it knows."""
    global _controller
    if _controller is None:
        _controller = sys.modules["threadpoolctl"].ThreadpoolController()
    return [library.num_threads for library in _controller.lib_controllers]


@intrinsic
def _look(context, address):
    """The integer at an address, which another thread may just have written."""

    def emit(context, builder, signature, args):
        if PAUSE:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, PAUSE), [])
        pointer = builder.inttoptr(args[0], ir.PointerType())
        return builder.load_atomic(pointer, "acquire", 8, typ=ir.IntType(64))

    return types.int64(types.int64), emit


@jit
def watch(address, patience):
    """Wait, without the interpreter's lock, until the integer at an address is 0; return what it is then."""
    left = patience
    while left > 0:
        left -= 1
        if _look(address) == 0:
            left = min(left, MOMENT)
    return _look(address)


class Work:
    """The tasks of a kernel, and who is at them."""

    def __init__(self, kernel: Callable[..., None], given: tuple[Any, ...], tasks: int, memory: Any) -> None:
        self.kernel, self.given, self.tasks, self.memory = kernel, given, tasks, memory
        self.threads = len(memory)
        self.least = max(1, tasks // (16 * self.threads))
        self.next = self.started = 0
        self.lock, self.ended = threading.Lock(), threading.Lock()
        self.ended.acquire()
        self.busy = ctypes.c_int64(0)  # helpers, not the caller
        self.waiting = False
        self.fault: BaseException | None = None

    def run(self) -> None:
        """Take part, wait for the helpers, and raise what went wrong.

        An interrupt is raised once nobody writes to the caller's memory any more.
        """
        self._take_part()
        while True:
            try:
                self._wait()
                break
            except BaseException as fault:
                self._stop(fault)
        if self.fault is not None:
            raise self.fault

    def help(self) -> None:
        """Take part as a helper."""
        with self.lock:
            if self.next == self.tasks:
                return
            self.busy.value += 1
        self._take_part()
        with self.lock:
            self.busy.value -= 1
            if self.waiting and self.busy.value == 0:
                self.ended.release()

    def _take_part(self) -> None:
        """Work off shares, large ones first, until none is left."""
        try:
            with self.lock:
                place = aligned(self.memory[self.started])
                self.started += 1
            while True:
                with self.lock:
                    low = self.next
                    high = self.next = min(self.tasks, low + max(self.least, (self.tasks - low) // (2 * self.threads)))
                if low == high:
                    return
                self.kernel(*self.given, low, high, place)
        except BaseException as fault:
            self._stop(fault)

    def _stop(self, fault: BaseException) -> None:
        self.fault = fault
        with self.lock:
            self.next = self.tasks

    def _wait(self) -> None:
        if watch(ctypes.addressof(self.busy), PATIENCE) == 0:
            return
        with self.lock:
            self.waiting = self.busy.value > 0
        if self.waiting:
            self.ended.acquire()


def _help() -> None:
    calls = _calls
    while True:
        calls.get().help()


def _call_helpers(work: Work) -> None:
    global _places
    with _lock:
        while len(_helpers) < work.threads - 1:
            helper = threading.Thread(target=_help, name=f"favorsharp_{len(_helpers) + 1}", daemon=True)
            helper.start()
            _helpers.append(helper.native_id or 0)
            _places = set()
        _keep_apart(work.threads - 1)
    for _ in range(work.threads - 1):
        _calls.put(work)


def _own_processor() -> Callable[[], int] | None:
    """The function that tells on which processor the calling thread runs, where threads can be told where to run."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    return getattr(ctypes.PyDLL(None), "sched_getcpu", None)


_processor = _own_processor()


def _keep_apart(count: int) -> None:
    """Keep helpers off the caller's processor, on the others that it may use, where these are enough for so many.

    To the scheduler of a virtual machine a processor that has been idle for some ten milliseconds may look taken. It
    then wakes helpers on the caller's, where they take turns with it until, milliseconds later, one of them is moved.
    """
    global _places
    if _processor is None:
        return
    with contextlib.suppress(OSError):  # not allowed here: helpers run where the system likes
        places = os.sched_getaffinity(0)
        others = places - {_processor()}
        if len(others) >= count:
            places = others
        if places == _places:
            return
        _places = places
        for helper in _helpers:
            if helper != threading.get_native_id():  # as it is where threads are greenlets
                os.sched_setaffinity(helper, places)


def share(kernel: Callable[..., None], tasks: int, work: float, scratch: int, one: Any, *arguments: Any) -> None:
    """Call kernel(one, *arguments, low, high, scratch place) for shares of range(tasks).

    Parameters
    ----------
    kernel : compiled function
    tasks : int
        How many; they do not depend on each other.
    work : float
        Multiplications in all, to judge whether threads pay.
    scratch : int
        Items of scratch that a thread needs.
    one : float32 or float64 scalar
        The dtype to work in.
    *arguments
        Of the kernel.
    """
    if tasks == 0:
        return
    threads = 1 if work < SMALL else min(num_threads(), tasks)
    memory = np.empty((threads, scratch + 64), one.dtype)  # a row a thread, of which each uses what is aligned
    if threads == 1:
        kernel(one, *arguments, 0, tasks, aligned(memory[0]))
        return
    shared = Work(kernel, (one, *arguments), tasks, memory)
    _call_helpers(shared)
    shared.run()


def aligned(memory: Any) -> int:
    """The first place of an array that lies on a cache line."""
    address: int = memory.__array_interface__["data"][0]
    return -(-address // 64) * 64 // int(memory.itemsize)
