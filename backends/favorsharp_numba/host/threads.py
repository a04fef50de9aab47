"""The thread pool: `share` runs a kernel for many tasks, on the calling thread and on worker threads.

Kernels run without the interpreter's lock. The pool is our own, because Numba's threading layers crash the process if
two threads call them at once (workqueue) or after a fork (OpenMP); see docs/design/threads-of-our-own.md. Small work
stays on the calling thread.
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
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from favorsharp_numba.host import torch_team, workspace
from favorsharp_numba.kernels.arguments import TILE
from favorsharp_numba.vectors.compiling import jit

SMALL = 4e6
"""The number of multiplications below which a further thread costs more than it saves: some 40 microseconds of work."""

PATIENCE, MOMENT = 4000, 100
"""How often a caller checks whether the workers have finished before it goes to sleep, some 100 microseconds in all;
waking up takes 30, as long as a share of small work. The second number says how often it checks after they have
finished, so that they can release the interpreter's lock."""

PAUSE = "llvm.x86.sse2.pause" if platform.machine().lower() in ("x86_64", "amd64") else None
"""The instruction that tells a processor that a thread is waiting actively; other processors check faster without
it."""

_calls: "queue.SimpleQueue[Work]" = queue.SimpleQueue()
_workers: list[int] = []
"""The thread numbers of the workers, as the system counts them."""
_places: set[int] = set()
"""The processors that the workers have been told to run on; empty before that."""
_lock = threading.Lock()


def _forget_workers() -> None:
    """Begin again after a fork: threads do not survive it, and one of them may have held a lock."""
    global _calls, _workers, _places, _lock
    _calls, _workers, _places, _lock = queue.SimpleQueue(), [], set(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


def num_threads() -> int:
    """The number of threads that may work: the smallest of the limits of Numba, torch and threadpoolctl."""
    limits: list[int] = [numba.config.NUMBA_NUM_THREADS]
    parallel = sys.modules.get("numba.np.ufunc.parallel")
    if parallel is not None and parallel._is_initialized:
        limits.append(numba.get_num_threads())
    if "torch" in sys.modules:
        limits.append(sys.modules["torch"].get_num_threads())
    if "threadpoolctl" in sys.modules:
        limits += _controlled()
    return max(1, min(limits))


def pieces_of(heads: int, length: int, work: float) -> int:
    """The number of pieces that each head is cut into, so that there are enough tasks for the threads."""
    threads = num_threads()
    if work < 4e6 or heads == 0 or heads >= 2 * threads:
        return 1
    return max(1, min(-(-4 * threads // heads), length // (4 * TILE)))


_controller: Any = None


def _controlled() -> list[int]:
    """The limits of the libraries that threadpoolctl knows."""
    global _controller
    if _controller is None:
        _controller = sys.modules["threadpoolctl"].ThreadpoolController()
    return [library.num_threads for library in _controller.lib_controllers]


@intrinsic
def _look(context, address):
    """The integer at an address that another thread may write to (an atomic load)."""

    def emit(context, builder, signature, args):
        if PAUSE:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, PAUSE), [])
        pointer = builder.inttoptr(args[0], ir.PointerType())
        return builder.load_atomic(pointer, "acquire", 8, typ=ir.IntType(64))

    return types.int64(types.int64), emit


@jit
def watch(address, patience):
    """Wait actively, without the interpreter's lock, until the integer at an address is 0 or patience has run out."""
    left = patience
    while left > 0:
        left -= 1
        if _look(address) == 0:
            left = min(left, MOMENT)
    return _look(address)


class Work:
    """The tasks of a kernel, and the state of their work sharing."""

    def __init__(self, kernel: Callable[..., None], given: tuple[Any, ...], tasks: int, memory: Any) -> None:
        self.kernel, self.given, self.tasks, self.memory = kernel, given, tasks, memory
        self.threads = len(memory)
        self.least = max(1, tasks // (16 * self.threads))
        self.next = self.started = 0
        self.lock, self.ended = threading.Lock(), threading.Lock()
        self.ended.acquire()
        self.busy = ctypes.c_int64(0)  # the number of workers that are running the kernel
        self.waiting = False
        self.fault: BaseException | None = None

    def run(self) -> None:
        """Take part as the caller, and wait for the workers; afterwards `fault` holds an exception, if any.

        An interrupt is kept until all workers have finished, because they write to the caller's memory.
        """
        self.take_part()
        while True:
            try:
                self._wait()
                break
            except BaseException as fault:
                self._stop(fault)

    def take_part_as_worker(self) -> None:
        """Take part as a worker thread."""
        with self.lock:
            if self.next == self.tasks:
                return
            self.busy.value += 1
        self.take_part()
        with self.lock:
            self.busy.value -= 1
            if self.waiting and self.busy.value == 0:
                self.ended.release()

    def take_part(self) -> None:
        """Run the kernel for shares of the tasks, large shares first, until none is left."""
        try:
            with self.lock:
                if self.started == self.threads:  # there is no workspace for a further thread
                    return
                place = workspace.place_in(self.memory[self.started])
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


def _work() -> None:
    calls = _calls
    while True:
        calls.get().take_part_as_worker()


def _call_workers(work: Work) -> None:
    global _places
    with _lock:
        while len(_workers) < work.threads - 1:
            worker = threading.Thread(target=_work, name=f"favorsharp_{len(_workers) + 1}", daemon=True)
            worker.start()
            _workers.append(worker.native_id or 0)
            _places = set()
        _keep_apart(work.threads - 1)
    for _ in range(work.threads - 1):
        _calls.put(work)


def _own_processor() -> Callable[[], int] | None:
    """The function that returns the processor of the calling thread; None if the system cannot place threads."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    return getattr(ctypes.PyDLL(None), "sched_getcpu", None)


_processor = _own_processor()


def _keep_apart(count: int) -> None:
    """Keep `count` workers off the caller's processor, if the other processors that it may use are enough.

    A processor that has been idle for some ten milliseconds may look busy to the scheduler of a virtual machine. It
    then wakes workers on the caller's processor, where both take turns until one of them is moved, milliseconds later.
    """
    global _places
    if _processor is None:
        return
    with contextlib.suppress(OSError):  # the system does not allow it, so workers run where it puts them
        places = os.sched_getaffinity(0)
        others = places - {_processor()}
        if len(others) >= count:
            places = others
        if places == _places:
            return
        _places = places
        for worker in _workers:
            if worker != threading.get_native_id():  # if threads are greenlets, this is the caller
                os.sched_setaffinity(worker, places)


def share(
    kernel: Callable[..., None],
    tasks: int,
    work: float,
    items: int,
    one: Any,
    *arguments: Any,
    of_torch: bool = False,
) -> None:
    """Call kernel(one, *arguments, low, high, place) for shares low .. high of the tasks.

    Parameters
    ----------
    kernel : compiled function
    tasks : int
        The number of tasks, which do not depend on each other.
    work : float
        The number of multiplications in all, from which the number of threads follows.
    items : int
        The number of items of a thread's workspace; `place` is its place.
    one : float32 or float64 scalar
        The dtype that the kernel computes in.
    *arguments
        Further arguments of the kernel.
    of_torch : bool
        Whether the arrays are torch's, so that its threads should do the work if they can.
    """
    if tasks == 0:
        return
    threads = 1 if work < SMALL else min(num_threads(), tasks)
    memory = workspace.workspaces(threads, items, one.dtype)
    if threads == 1:
        kernel(one, *arguments, 0, tasks, workspace.place_in(memory[0]))
        return
    shared = Work(kernel, (one, *arguments), tasks, memory)
    if not (of_torch and torch_team.run(shared)):
        _call_workers(shared)
        shared.run()
    if shared.fault is not None:
        raise shared.fault
