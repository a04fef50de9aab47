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
    """Seconds of each peer for one piece of work. The first is ours; those in `beside` are shown, but not compared."""

    work: str
    seconds: dict[str, float]
    goal: float | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    flops: float | None = None
    beside: tuple[str, ...] = ()

    @property
    def best(self) -> tuple[str, float] | None:
        """The fastest of the other peers that are compared."""
        _, *others = self.seconds.items()
        return min((x for x in others if x[0] not in self.beside), key=lambda x: x[1], default=None)

    @property
    def gflops(self) -> float | None:
        """Our billions of multiplications and additions a second, in the products that the work consists of."""
        return None if self.flops is None else self.flops / next(iter(self.seconds.values())) / 1e9

    @property
    def ratio(self) -> float | None:
        """The time of the best other peer over ours."""
        return None if self.best is None else self.best[1] / next(iter(self.seconds.values()))


def compare(
    work: str,
    peers: dict[str, Callable[[], Any]],
    *,
    want: Any = None,
    tolerance: float = 1e-3,
    goal: float | None = None,
    rounds: int = 9,
    budget: float = 20.0,
    flops: float | None = None,
    unchecked: str = "performer-pytorch",
    beside: tuple[str, ...] = (),
) -> Table:
    """Time the peers in turn, round by round; a peer that fails or whose result is wrong is left out and named."""
    left_out = {}
    runs: dict[str, Callable[[], Any]] = {}
    for name, peer in peers.items():
        try:
            got = peer()
            if want is not None and name != unchecked:
                got = np.asarray(got.detach() if hasattr(got, "detach") else got, dtype=np.float64)
                error = np.max(np.abs(got - want)) / np.max(np.abs(want))
                if not error <= tolerance:
                    raise ArithmeticError(f"relative error {error:.1g}")
            peer()
        except Exception as fault:
            left_out[name] = f"{type(fault).__name__}: {fault}"[:120]
            continue
        runs[name] = peer
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for number in range(rounds):
        for name, peer in runs.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            result = peer()
            times[name].append(time.perf_counter() - start)
            del result
        if number >= 2 and time.perf_counter() - begin > budget:
            break
    return Table(work, {name: statistics.median(found) for name, found in times.items()}, goal, left_out, flops, beside)


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
    for package in ("favorsharp", "numba", "numpy", "torch", "jax", "performer-pytorch"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "not installed"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": f"{name}, {cores} cores", "python": platform.python_version(), **packages}
