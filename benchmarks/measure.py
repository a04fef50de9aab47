"""Interleaved medians of peers in one process, after a check of every peer's result; the benchmark scripts use it."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

PAUSE = 0.006
"""Seconds between two calls, in which the workers of the last call go to sleep."""


@dataclass
class Table:
    """Seconds of each way to do one piece of work. The first is ours; those in `beside` are shown, but not compared.

    Attributes
    ----------
    work : str
        What is timed.
    seconds : dict
        Medians by name.
    goal : float, optional
        The least time of the best other over ours that is accepted.
    part : float, optional
        The smallest share of the bound that is accepted.
    flops, moved : float, optional
        The multiplications and additions in the matrix products, and the bytes that must be read and written.
    own : bool
        Whether the others are calls of this library too.
    label : str
        The label in the picture; empty means that the row is not in it.
    rounds : dict
        The seconds of every round by name, if they are known.
    """

    work: str
    seconds: dict[str, float]
    goal: float | None = None
    part: float | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    flops: float | None = None
    moved: float | None = None
    beside: tuple[str, ...] = ()
    own: bool = False
    label: str = ""
    rounds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ours(self) -> float:
        """Our seconds."""
        return next(iter(self.seconds.values()))

    @property
    def best(self) -> tuple[str, float] | None:
        """The fastest of the others that are compared."""
        others = [name for name in list(self.seconds)[1:] if name not in self.beside]
        return min(((name, self.seconds[name]) for name in others), key=lambda x: self.times(x[0]), default=None)

    @property
    def ratio(self) -> float | None:
        """The time of the best other software divided by ours."""
        return None if self.best is None else self.times(self.best[0])

    def times(self, name: str) -> float:
        """The time of a call divided by ours: the median over rounds.

        A disturbance lengthens both times of a round, so this differs less between runs than a ratio of medians.
        """
        if name not in self.rounds:
            return self.seconds[name] / self.ours
        ours = next(iter(self.rounds.values()))
        return statistics.median(x / y for x, y in zip(self.rounds[name], ours, strict=True))

    def share(self, bounds: "Bounds") -> float | None:
        """The least time that the machine needs for the products and bytes, divided by our time."""
        least = max((self.flops or 0) / bounds.flops, (self.moved or 0) / bounds.moved)
        return least / self.ours if least else None

    def missed(self, bounds: "Bounds") -> bool:
        """Whether a goal is not reached."""
        ratio, share = self.ratio, self.share(bounds)
        return bool((self.goal and ratio and ratio < self.goal) or (self.part and share and share < self.part))


@dataclass(frozen=True)
class Bounds:
    """The peak rates of the machine, per second: multiplications and additions in float32, and bytes of a copy."""

    flops: float
    moved: float

    def __or__(self, other: "Bounds") -> "Bounds":
        return Bounds(max(self.flops, other.flops), max(self.moved, other.moved))


def bounds(seconds: float = 1.0) -> Bounds:
    """Measure both; each takes about so many seconds."""
    return Bounds(1e9 * peak_fma(seconds), copied(seconds))


def copied(seconds: float = 1.0) -> float:
    """Bytes per second, read and written, of a copy by torch with all threads; the array exceeds every cache."""
    import torch

    source = torch.ones(2**24 if seconds < 0.5 else 2**26)
    target, best, begin = torch.empty_like(source), 0.0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


class OtherWork:
    """The share of processor time that other processes and a hypervisor have taken since the object was made."""

    def __init__(self) -> None:
        self.begin = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds since the machine started: processor time of all processes, that of this one, and wall time."""
        try:
            cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
            with open("/proc/stat") as lines:
                parts = [line.split() for line in lines if line.split()[0] in cores]
        except (AttributeError, OSError):
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, irq, soft, steal = ([int(x[i]) for x in parts] for i in range(1, 9))
        busy = sum(map(sum, (user, nice, system, irq, soft, steal))) / ticks
        return busy, sum(os.times()[:4]), len(cores) * time.monotonic()

    @property
    def part(self) -> float | None:
        """The share, between 0 and 1; None if it is not known."""
        now = self._now()
        if self.begin is None or now is None:
            return None
        busy, own, all_time = (b - a for a, b in zip(self.begin, now, strict=True))
        return None if busy <= 0 else max(0.0, busy - own) / all_time


def compare(
    work: str,
    peers: dict[str, Callable[[], Any]],
    *,
    want: Any = None,
    tolerance: float = 1e-3,
    rounds: int = 27,
    budget: float = 3.0,
    unchecked: tuple[str, ...] = ("favorsharp",),
    times: int = 1,
    **about: Any,
) -> Table:
    """Time the peers in turn, round by round, and in reverse order in every second round.

    A peer that fails or whose result is wrong is left out and named.
    `times` is how often each call does the work; `about` holds further arguments of `Table`.
    """
    left_out = {}
    runs: dict[str, Callable[[], Any]] = {}
    for name, peer in peers.items():
        try:
            got = peer()
            if want is not None and name not in unchecked:
                got = np.asarray(got.detach() if hasattr(got, "detach") else got, dtype=np.float64)
                error = np.max(np.abs(got - want)) / np.max(np.abs(want))
                if not error <= tolerance:
                    raise ArithmeticError(f"relative error {error:.1g}")
        except Exception as fault:
            left_out[name] = f"{type(fault).__name__}: {fault}"[:120]
            continue
        runs[name] = peer
    found: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for number in range(rounds):
        order = list(runs) if number % 2 == 0 else list(runs)[::-1]
        for name in order:
            time.sleep(PAUSE)
            start = time.perf_counter()
            result = runs[name]()
            found[name].append((time.perf_counter() - start) / times)
            del result
        if number >= 2 and time.perf_counter() - begin > budget:
            break
    return table_of(work, found, left_out=left_out, **about)


def table_of(work: str, rounds: dict[str, list[float]], **about: Any) -> Table:
    """A table from the seconds of every round."""
    return Table(work, {name: statistics.median(x) for name, x in rounds.items()}, rounds=rounds, **about)


def peak_fma(seconds: float = 1.0) -> float:
    """GFLOP/s of float32 multiply-adds from the L1 cache on all threads: an upper bound for any matrix product."""
    from favorsharp_numba.host.threads import num_threads, share
    from favorsharp_numba.vectors.compiling import TAGS, jit
    from favorsharp_numba.vectors.products import product

    size, repeats = 48, 200

    @jit
    def multiply(one, step, low, high, scratch):
        for _ in range(low, high):
            for _ in range(repeats):
                product(one, size, 64, size, scratch, 64, 1, scratch + 4096, 64, 64, scratch + 8192, 64)

    tasks, best, begin = 8 * num_threads(), 0.0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        share(multiply, tasks, 1e12, 3 * 4096, TAGS["float32"], 0)
        best = max(best, 2 * size * 64 * size * repeats * tasks / (time.perf_counter() - start) / 1e9)
    return best


def machine() -> dict[str, str]:
    """The processor and the versions that the numbers belong to."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    packages = {}
    for package in ("favorsharp", "numba", "numpy", "torch", "jax", "transformers", "scikit-learn"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "not installed"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": f"{name}, {cores} cores", "python": platform.python_version(), **packages}
