"""Time bidirectional attention, and find the length from which it is faster than exact attention."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import favorsharp as fs
from benchmarks import peers
from benchmarks.measure import Table, compare
from favorsharp._values import astype

H, D = 8, 64
GOALS = {(4096, 64): 1.6, (4096, 128): 1.7, (4096, 256): 1.8, (65_536, 64): 3.3, (65_536, 256): 3.3}


def problem(n: int, m: int) -> tuple:
    """Arrays of (1, 8, n, 64) and a FAVOR+ map in float32, small enough for the peers that take no maxima."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, H, n, D)).astype(np.float32) for _ in range(3))
    fm = astype(fs.feature_map(fs.fit(q[0, 0], k[0, 0], method="posrf"), m, rng=0, draw="iid"), np.float32)
    return q, k, v, fm


def compare_long(work: str, n: int, sides: dict[str, Callable[[], Any]], **options: Any) -> Table:
    """Compare peers with ours, which writes to an existing array above 4096 tokens and else to a new one."""
    first, second = ("favorsharp, out=", "favorsharp") if n > 4096 else ("favorsharp", "favorsharp, out=")
    work = f"{work}, out=" if n > 4096 else work
    return compare(work, {first: sides[first]} | sides, beside=(second,), **options)


def tables(*, quick: bool = False) -> Iterator[Table]:
    """Bidirectional attention, with and without a window, and the crossover with exact attention."""
    root = D**-0.25
    for n, m in ((256, 64),) if quick else GOALS:
        q, k, v, fm = problem(n, m)
        tensors = [torch.from_numpy(x) for x in (q, k, v)]
        rows = fm.rows
        theirs = torch.from_numpy(rows)
        want = None
        if n <= 4096:
            with fs.use("reference"):
                wide = [x.astype(np.float64) for x in (q, k, v)]
                want = fs.linear_attention(*wide, fm)
        others = {
            "torch": lambda t=tensors, w=theirs: peers.torch_attention(*t, w, root),
            "torch.compile, plain": lambda t=tensors, w=theirs: peers.compiled(peers.torch_attention_plain)(
                *t, w, root
            ),
            "jax.jit": lambda q=q, k=k, v=v, w=rows: peers.jitted("attention")(q, k, v, w, root),
            "numpy, tiled, plain": lambda q=q, k=k, v=v, w=rows: peers.numpy_attention_tiled(q, k, v, w, root),
        }
        fast = peers.performer(m, D)
        if fast is not None:
            others["performer-pytorch"] = lambda fast=fast, t=tensors: fast(*t)
        out = np.zeros_like(v)
        ours = {
            "favorsharp": lambda q=q, k=k, v=v, fm=fm: fs.linear_attention(q, k, v, fm),
            "favorsharp, out=": lambda q=q, k=k, v=v, fm=fm, out=out: fs.linear_attention(q, k, v, fm, out=out),
        }
        yield compare_long(
            f"bidirectional, L={n}, m={m}", n, ours | others, want=want, goal=GOALS.get((n, m)), rounds=7,
            flops=2.0 * H * n * m * 4 * D,
        )  # fmt: skip
    for n in (128,) if quick else (256, 512, 1024):
        for m in (64, 128):
            q, k, v, fm = problem(n, m)
            tensors = [torch.from_numpy(x) for x in (q, k, v)]
            both = {
                "favorsharp": lambda q=q, k=k, v=v, fm=fm: fs.linear_attention(q, k, v, fm),
                "exact": lambda t=tensors: peers.exact(*t),
            }
            yield compare(f"against exact attention, L={n}, m={m}", both, goal=1.0 if n == 512 else None, rounds=21)
