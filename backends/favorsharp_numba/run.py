"""Shares the work of a kernel among threads.

Kernels run without the interpreter's lock, on threads of our own: Numba's threading layers end the process where they
are called from two threads at once (workqueue) or after a fork (OpenMP). Small work stays on the calling thread.
"""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numba
import numpy as np

SMALL = 4e6
"""Multiplications below which handing work to another thread costs more than it saves: some 40 microseconds."""

_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()


def _forget_pool() -> None:
    """Threads do not survive a fork, and a lock may have been held by one of them."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


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


def _workers(count: int) -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None or _pool._max_workers < count:
            _pool = ThreadPoolExecutor(count, thread_name_prefix="favorsharp")
        return _pool


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
    step = max(1, tasks // (4 * threads))  # short shares: a thread that is held up leaves its rest to the others
    shares = iter(range(0, tasks, step))
    take = threading.Lock()

    def work_off(thread: int) -> None:
        place = aligned(memory[thread])
        while True:
            with take:
                low = next(shares, None)
            if low is None:
                return
            kernel(one, *arguments, low, min(low + step, tasks), place)

    others = [_workers(num_threads() - 1).submit(work_off, thread) for thread in range(1, threads)]
    try:
        work_off(0)
    finally:
        wait(others)
    for other in others:
        other.result()


def aligned(memory: Any) -> int:
    """The first place of an array that lies on a cache line."""
    address: int = memory.__array_interface__["data"][0]
    return -(-address // 64) * 64 // int(memory.itemsize)
