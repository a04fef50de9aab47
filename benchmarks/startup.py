"""The first call in a new process, with an empty and with a filled cache; and the memory of a long call."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from benchmarks.measure import Table

FIRST = """
import time, numpy as np, favorsharp as fs
q, k, v = np.random.default_rng(0).standard_normal((3, 2, 64, 16)).astype("float32")
fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
start = time.perf_counter()
fs.linear_attention(q, k, v, fm)
print(time.perf_counter() - start)
"""
MEMORY = """
import re, numpy as np, favorsharp as fs
from pathlib import Path
n = {n}
def memory(kind):  # of this process alone: what getrusage tells is inherited from the parent
    return int(re.search(kind + r":\\s*(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024
q, k, v = np.random.default_rng(0).standard_normal((3, 8, n, 64), dtype="float32")
fm = fs.feature_map(fs.fit(q[:, :64], k[:, :64], method="posrf"), 64, rng=0)
fs.linear_attention(q[:, :640], k[:, :640], v[:, :640], fm, is_causal={causal})
out = np.ones_like(v) if {into} else None
before = memory("VmRSS")
result = fs.linear_attention(q, k, v, fm, is_causal={causal}, out=out)
print(memory("VmHWM") - before - (0 if {into} else result.nbytes / 2**20))
"""


def run(code: str, **environment: str) -> float:
    """Run code in a new process, and return the number that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def tables(*, quick: bool = False) -> Iterator[Table]:
    """First calls, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: run(FIRST, NUMBA_CACHE_DIR=folder) for name in ("first call, cold cache", "first call, warm cache")
        }
    yield Table("the first call of attention in a process", found)


def scratch(*, quick: bool = False) -> dict[str, float]:
    """MiB that a call needs beyond inputs and output at L = 65,536."""
    n = 2048 if quick else 65_536
    return {
        f"{name}, L={n}{', out=' if into else ''}": run(MEMORY.format(n=n, causal=causal, into=into))
        for name, causal in (("bidirectional", False), ("causal", True))
        for into in (False, True)
    }
