"""Checks with streams, threads and graphs: a call has the same result in each of them, and does not disturb torch."""

import gc
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import turns
from records import DRY, record, short
from turns import Step

import favorsharp as fs
from favorsharp._values import astype, map_arrays

DEVICE = "cpu" if DRY else "cuda"
Given = tuple[Any, Any, Any, Any]


def problem(d: int, n: int, dtype: torch.dtype) -> Given:
    """Points and a map."""
    sample = np.random.default_rng(0).standard_normal((2, 256, d))
    host = astype(fs.feature_map(fs.fit(*sample, method="posrf"), 64, rng=0), np.float32)
    generator = torch.Generator(DEVICE).manual_seed(d)
    q, k, v = (torch.randn(2, 4, n, d, generator=generator, device=DEVICE).to(dtype) for _ in range(3))
    return q, k, v, map_arrays(host, lambda x: torch.from_numpy(np.array(x)).to(DEVICE))


def call(given: Given) -> Any:
    """Causal attention."""
    return fs.linear_attention(*given, is_causal=True)


def apart(results: list[Any], want: Any) -> float:
    """The largest difference, which must be 0."""
    difference = max(float((x.float() - want.float()).abs().max()) for x in results)
    if difference != 0:
        raise AssertionError(f"{difference} apart")
    return difference


def repeated() -> float:
    """A repeated call gives the same bits."""
    given = problem(64, 300 if DRY else 2000, torch.float32)
    return apart([call(given) for _ in range(5)], call(given))


def side_stream() -> float:
    """A stream of torch can still be used after a call on it, and the result is that of the default stream."""
    given = problem(64, 300, torch.bfloat16)
    want, results = call(given), []
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(stream):
            results.append(call(given))
        gc.collect()  # CuPy's object for the stream is deleted, which must not destroy the stream
        stream.synchronize()
    with torch.cuda.stream(stream):
        x = torch.ones(10, device="cuda") * 2
    stream.synchronize()
    assert float(x.sum()) == 20
    return apart(results, want)


def memory_of_temporaries() -> float:
    """The host does not wait for calls, and other work reuses the memory that they have freed."""
    given = problem(64, 4096, torch.float32)
    want, results = call(given), []
    torch.cuda.synchronize()
    for _ in range(20):
        results.append(call(given))
        torch.full((2**22,), float("nan"), device="cuda")
    torch.cuda.synchronize()
    return apart(results, want)


def graphs() -> float:
    """A captured call can be replayed with new points."""
    given = problem(64, 500, torch.bfloat16)
    for _ in range(2):
        call(given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(given)
    given[0].mul_(-0.5)
    graph.replay()
    return apart([out], call(given))


def threads() -> str:
    """Two threads launch one instance with different sizes of shared memory at the same time."""
    problems = [problem(d, 300, torch.bfloat16) for d in (64, 33)]
    wanted, faults = [call(x) for x in problems], []

    def work(given: Given, want: Any) -> None:
        try:
            apart([call(given) for _ in range(60)], want)
        except Exception as error:
            faults.append(short(error))

    running = [threading.Thread(target=work, args=x) for x in zip(problems, wanted, strict=True)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if faults:
        raise AssertionError("; ".join(faults))
    return "60 calls each"


def check(function: Callable[[], object]) -> None:
    """Record the result of a check; `turns` records a check that fails."""
    with torch.no_grad():
        record("streams", name=function.__name__, ok=True, value=function())


def steps() -> list[Step]:
    """Every check."""
    checks = (repeated,) if DRY else (repeated, side_stream, memory_of_temporaries, graphs, threads)
    return [Step("streams", {"name": x.__name__}, partial(check, x)) for x in checks]


if __name__ == "__main__":
    sys.exit(turns.main(steps))
