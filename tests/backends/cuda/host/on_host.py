"""The backend `cuda` without a GPU: its own dispatch and launches, with `HostModule` in place of CuPy's modules."""

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from host_module import HostModule, sanitizer

from favorsharp import dispatch

NAME = "cuda_on_host"
GUARD = 256
"""Bytes before and after every array, which no kernel may write and whose bits, if read, are NaN."""

_guarded: "weakref.WeakSet[_Memory]" = weakref.WeakSet()


def family_of(name: str) -> list[str]:
    """The instances that are built together: those of one kernel and dtype, or only one under a sanitizer."""
    from favorsharp_cuda.host.source import INSTANTIATIONS

    if sanitizer():
        return [name]

    def family(other: str) -> str:
        return other.partition(",")[0].rstrip(">")

    return [other for other in INSTANTIATIONS if family(other) == family(name)]


HostModule.family = staticmethod(family_of)


class _Memory(np.ndarray):
    """Bytes of an array and of the guards around it."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def fresh(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A new array full of NaN, between guards."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if sanitizer() == "address":  # this call sets guards of its own
        whole = np.empty(size, np.uint8)
        whole[:] = 0xFF
        return whole.view(dtype).reshape(shape)
    memory = np.full(size + 2 * GUARD + 64, 0xFF, np.uint8).view(_Memory)
    _guarded.add(memory)
    start = GUARD + -(memory.ctypes.data + GUARD) % 64
    memory.start, memory.stop = start, start + size  # type: ignore[attr-defined]
    return np.ndarray(shape, dtype, buffer=memory, offset=start)


def guarded(x: np.ndarray) -> np.ndarray:
    """A copy of an array between guards, read-only."""
    copy = fresh(x.shape, x.dtype)
    copy[...] = x
    copy.flags.writeable = False
    return copy


def check_guards() -> None:
    """Fail if a kernel has written beside an array."""
    for memory in list(_guarded):
        before, after = memory[: memory.start], memory[memory.stop :]  # type: ignore[attr-defined]
        if (np.asarray(before) != 0xFF).any() or (np.asarray(after) != 0xFF).any():
            raise AssertionError("a kernel wrote beside an array")


def _empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    from favorsharp_cuda.host import arrays

    if arrays.is_numpy(like):
        return fresh(shape, dtype)
    out = _kept_empty(like, shape, dtype)
    if out.dtype.is_floating_point:
        out.fill_(float("nan"))
    return out


def _kept_empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    torch = sys.modules["torch"]
    return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)


@contextmanager
def installed(code: str | None = None) -> Iterator[str]:
    """Inside the block, a backend of the given name runs the kernels on the CPU, and new arrays are full of NaN.

    With `code`, the kernels are those of another source.
    """
    from favorsharp_cuda.host import arrays, launch

    folder = str(Path(__file__).with_name("backend"))
    kept = launch.module_class, launch.source, arrays.empty
    launch.module_class, arrays.empty = HostModule, _empty
    if code is not None:
        launch.source = lambda: code
    launch.forget()
    sys.path.insert(0, folder)
    dispatch.rediscover()
    try:
        yield NAME
    finally:
        launch.module_class, launch.source, arrays.empty = kept
        launch.forget()
        sys.path.remove(folder)
        dispatch.rediscover()
