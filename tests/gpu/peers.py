"""A few cases of the benchmark beside other software for GPUs; each peer has a time limit, and is recorded at once.

flash-linear-attention is left out: it tries 48 configurations of a kernel when it is first called, which takes minutes.
`python -m benchmarks.gpu` has it, and more cases.
"""

import contextlib
import functools
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import turns
from clocks import DEVICE, clock
from records import DRY, record
from turns import Step

from benchmarks import gpu
from benchmarks.gpu import Case, Token

CASES = (
    *(Case(4, 16, 16_384, 64, m, causal) for causal in (True, False) for m in (64, 256)),
    Token(64, 8, 64, 64),
    Case(4, 16, 4_096, 64, 64, True),
    Case(4, 16, 16_384, 64, 64, True, backward=True),
    Case(4, 16, 65_536, 64, 256, True),
)
LIMIT = 25
"""Seconds of one peer."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise after so many seconds; compiled code that is running then finishes first."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@functools.lru_cache(maxsize=1)
def runs(case: Case | Token) -> tuple[Any, dict[str, Callable[..., Any]], Any]:
    """The arrays of a case, the function of each peer, and our result."""
    q, k, v, feature_map = gpu.problem(case, DEVICE)
    is_token = isinstance(case, Token)
    found = gpu.token_peers(case, DEVICE, feature_map)[1] if is_token else gpu.forward_peers(case, DEVICE, feature_map)
    if case.backward:
        found = {name: gpu.with_backward(function) for name, function in found.items()}
    with torch.set_grad_enabled(case.backward):
        return (q, k, v), found, found[gpu.OURS](q, k, v)


def names(case: Case | Token) -> list[str]:
    """The names of the peers of a case, without running them."""
    if isinstance(case, Token):
        return [gpu.OURS, gpu.LANDMARKS, "torch", "torch.compile"]
    found = gpu.forward_peers(case, "cpu", SimpleNamespace(rows=torch.zeros(1, 1)))
    return [name for name in found if not name.startswith("flash-linear-attention")]


def measure(case: Case | Token, name: str, ends: float) -> None:
    """Record the time of a peer, and its difference from our result."""
    left = ends - time.time()
    if left < 3:
        raise TimeoutError("no time was left")
    with at_most(min(LIMIT, left)), torch.set_grad_enabled(case.backward):
        given, functions, ours = runs(case)
        got = functions[name](*given)
        largest = ours.float().abs().max()
        apart = (
            None
            if name.startswith(("exact", gpu.LANDMARKS))
            else float((got.float() - ours.float()).abs().max() / largest)
        )
        seconds = clock(lambda: functions[name](*given))
    record("peer", case=str(case), name=name, seconds=seconds, tokens=case.tokens, apart=apart)


def steps(ends: float) -> list[Step]:
    """Every peer of every case."""
    cases = gpu.QUICK[:1] if DRY else CASES
    pairs = [(case, name) for case in cases for name in names(case)]
    return [Step("peer", {"case": str(case), "name": name}, partial(measure, case, name, ends)) for case, name in pairs]


def main() -> int:
    """Measure as many peers as the time allows."""
    options = turns.parser()
    options.add_argument("--seconds", type=float, default=120)
    options.add_argument("--ends", type=float, help="the end as a time, for processes that go on")
    given = options.parse_args()
    if given.ends is None:
        ends = time.time() + given.seconds
        return turns.shepherd([sys.executable, str(Path(__file__)), "--ends", str(ends)])
    if DRY:
        gpu.peers.compiled = lambda function: function
    return turns.main(lambda: steps(given.ends))


if __name__ == "__main__":
    sys.exit(main())
