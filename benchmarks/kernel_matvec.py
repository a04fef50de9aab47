"""Time the product of a Gaussian kernel matrix with a vector, for a million points."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import favorsharp as fs
from benchmarks.measure import Table, compare
from benchmarks.peers import compiled
from favorsharp._values import astype


def torch_matvec(x: Any, v: Any, rows: Any) -> Any:
    """The product by positive features of the Gaussian kernel, all of them in memory."""
    p = torch.exp(x @ rows.mT - (x * x).sum(-1, keepdim=True)) / len(rows) ** 0.5
    return p @ (p.mT @ v)


def tables(*, quick: bool = False) -> Iterator[Table]:
    """n = 1e6, d = 8, m = 256."""
    n, d, m = (2000 if quick else 1_000_000), 8, 256
    rng = np.random.default_rng(0)
    x, v = (rng.standard_normal((n, size)).astype(np.float32) / 2 for size in (d, 1))
    p = fs.fit(x[:1000], x[:1000], method="posrf", kernel="gaussian")
    fm = astype(fs.feature_map(p, m, rng=0), np.float32)
    tensors = [torch.from_numpy(a) for a in (x, v, fm.rows)]
    sides = {
        "favorsharp": lambda: fs.kernel_matvec(x, x, v, fm),
        "torch": lambda: torch_matvec(*tensors),
        "torch.compile": lambda: compiled(torch_matvec)(*tensors),
    }
    yield compare(f"Gaussian matvec, n={n}, d={d}, m={m}", sides, goal=10.0, rounds=5, flops=4.0 * n * m * (d + 1))
