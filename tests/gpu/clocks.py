"""Measures the time of a call on the GPU, on the host, of each kernel and of a graph.

It also measures the peak rates of the card.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from records import DRY, record

from benchmarks import gpu

DEVICE = "cpu" if DRY else "cuda"


def clock(run: Callable[[], Any]) -> float:
    """The median time over about half a second, in rounds that begin while the GPU is busy, so without the host."""
    if DRY:
        return gpu.seconds_on_cpu(run, 1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    scratch = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    pairs = []
    for _ in range(max(3, min(15, int(0.5 / max(once, 1e-6))))):
        scratch.zero_()  # the second-level cache
        torch.cuda._sleep(int(2e9 * min(0.02, 2 * once)))  # cycles, during which launches queue up
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def host_seconds(run: Callable[[], Any], calls: int = 10) -> float:
    """The host's time for a call, without waiting for the GPU."""
    wait = (lambda: None) if DRY else torch.cuda.synchronize
    times = []
    for _ in range(calls):
        wait()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    wait()
    return statistics.median(times)


def kernels(run: Callable[[], Any], calls: int = 3) -> dict[str, list[float]]:
    """The launches and microseconds per call of every kernel, the slowest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in seen.events():
        if "cuda" in str(event.device_type).lower():
            spent = getattr(event, "device_time", None) or getattr(event, "cuda_time", 0)
            entry = found[event.name.replace("favorsharp::", "").replace("void ", "").split("(")[0][:70]]
            entry[0] += 1 / calls
            entry[1] += spent / calls
    longest = sorted(found.items(), key=lambda item: -item[1][1])
    return {name: [round(x, 2) for x in entry] for name, entry in longest[:12]}


def graph_seconds(run: Callable[[], Any]) -> float:
    """The time of a replay of the captured call."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return clock(graph.replay)


def ceilings() -> None:
    """Record the peak rates of the card: bytes copied (read and written), products of bfloat16, and empty launches."""
    x = torch.empty(2**30, dtype=torch.float32, device="cuda").normal_()
    y = torch.empty_like(x)
    copy = clock(lambda: y.copy_(x))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = clock(lambda: a @ b)
    small = torch.zeros(1, device="cuda")
    launch = clock(lambda: small.add_(1))
    record("ceilings", bytes_a_second=2 * 4 * 2**30 / copy, flops_a_second=2 * 8192**3 / product, launch=launch)
