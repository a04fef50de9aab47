"""Runs shares of work on the OpenMP threads of torch, for arrays of torch.

After an operation of torch its threads wait actively for the next one, for milliseconds. Threads of our own would take
turns with them on the same processors; see docs/design/threads-of-torch.md.
"""

import ctypes
import os
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any, Protocol


class Shared(Protocol):
    """Work that several threads do together."""

    def take_part(self) -> None:
        """Do shares of the work until none is left; called on each thread that takes part. Raises nothing."""


_forked = False
_free = threading.Lock()
"""Held while a call uses the threads, because a second caller would start as many threads again."""


def _leave_to_parent() -> None:
    """OpenMP's threads do not survive a fork, and GNU's library waits for them forever."""
    global _forked, _free
    _forked, _free = True, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _take_part(work: Shared) -> None:
    work.take_part()


_member = ctypes.CFUNCTYPE(None, ctypes.py_object)(_take_part)
"""What each thread of a team calls."""


@cache
def _openmp() -> Any:
    """The OpenMP library that torch's own threads belong to; None if there is none with the entry points of GNU's.

    On Linux, LLVM's and Intel's libraries have these too.
    """
    torch = sys.modules["torch"]
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    path = Path(torch.__file__ or "").parent / "lib" / "libtorch_cpu.so"
    try:
        library = ctypes.CDLL(str(path))  # the search also finds libraries that torch is linked to
        start, end, inside = library.GOMP_parallel_start, library.GOMP_parallel_end, library.omp_in_parallel
    except (OSError, AttributeError):
        return None
    start.argtypes, start.restype = [type(_member), ctypes.py_object, ctypes.c_uint], None
    end.argtypes, end.restype = [], None
    inside.argtypes, inside.restype = [], ctypes.c_int
    return library


def run(work: Shared) -> bool:
    """Have the calling thread and the threads of torch take part in some work, and wait until they have finished.

    Returns
    -------
    bool
        False if nothing was done: if torch's OpenMP lacks the entry points of GNU's library, in a forked child, inside
        a parallel region, and while another call uses the threads.
    """
    openmp = None if _forked else _openmp()
    if openmp is None or openmp.omp_in_parallel():
        return False
    free = _free
    if not free.acquire(blocking=False):
        return False
    try:
        # a team of another size than that of torch's operations would make OpenMP end threads and start others
        openmp.GOMP_parallel_start(_member, work, sys.modules["torch"].get_num_threads())
        try:
            work.take_part()
        finally:
            openmp.GOMP_parallel_end()  # waits for the others
    finally:
        free.release()
    return True
