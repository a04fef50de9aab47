"""Records a call while its kernels are launched, for `repeats`; `arrays`, `maps` and `launch` report to it."""

import threading
from array import array
from typing import Any, NamedTuple

from favorsharp_cuda.host.declarations import ADDRESSES, PROBLEM


class Launch(NamedTuple):
    """One launch: its structure as numbers of eight bytes, and the places in it of addresses of the call's arrays."""

    expression: str
    grid: int
    threads: int
    shared: int
    numbers: "array[int]"
    places: tuple[tuple[int, int], ...]


class Recording:
    """The launches of a call with tensors, in the form in which a call with other tensors can repeat them.

    Attributes
    ----------
    made : list of (tensor, shape, dtype)
        The tensors that the call has allocated.
    constants : list of tensors
        The tensors of the packed map, whose addresses do not change.
    launches : list of Launch
    is_whole : bool
        False if a kernel got an address that does not belong to exactly one argument, allocation or constant.
    """

    def __init__(self, arguments: list[Any]) -> None:
        self.made: list[tuple[Any, tuple[int, ...], str]] = []
        self.constants: list[Any] = []
        self.launches: list[Launch] = []
        places = [(x.data_ptr(), i) for i, x in enumerate(arguments) if x.numel()]  # kernels do not read empty ones
        self.sources = dict(places)
        self.is_whole = len(self.sources) == len(places) and 0 not in self.sources
        self.count = len(arguments)

    def allocated(self, x: Any, shape: tuple[int, ...], dtype: str) -> None:
        """Report a new tensor."""
        self.sources[x.data_ptr()] = self.count + len(self.made)
        self.made.append((x, shape, dtype))

    def launched(self, expression: str, grid: int, threads: int, problem: Any, shared: int) -> None:
        """Report a launch."""
        if problem.dtype != PROBLEM:
            self.is_whole = False
            return
        fixed, numbers = {x.data_ptr() for x in self.constants}, array("q", problem.tobytes())
        held = [(place, numbers[place]) for place in ADDRESSES if numbers[place]]
        self.is_whole &= all((address in fixed) != (address in self.sources) for _, address in held)
        places = tuple((place, self.sources[address]) for place, address in held if address in self.sources)
        self.launches.append(Launch(expression, grid, threads, shared, numbers, places))


class _Active(threading.local):
    recording: Recording | None = None


active = _Active()
"""The recording of the call that this thread is in, or None."""
