"""Features of points through a map, and a product with a kernel matrix."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

import favorsharp as fs
from benchmarks import peers
from benchmarks.attention import D, M
from benchmarks.measure import Table, compare, table_of
from favorsharp._values import astype
from favorsharp.ops.exponential_features import exponential_features

KERNEL = "the kernel alone"


def tables(*, quick: bool = False) -> Iterator[Table]:
    """All rows of this script."""
    yield from features(quick)
    yield from products(quick)


def features(quick: bool) -> Iterator[Table]:
    """`query` with a transform that is a rotation, and with another one.

    Beside peers, and beside the op on prepared arguments.
    """
    n = 512 if quick else 131_072
    x = np.random.default_rng(0).standard_normal((n, D), dtype=np.float32)
    for kind, y in (("equal moments", x), ("different moments", 2 * x[:, ::-1] + x)):
        fm = fs.feature_map(fs.fit(x, y), M, rng=0)
        u, row = (np.ascontiguousarray(a) for a in fm.query_terms(x))
        rows, column = (np.ascontiguousarray(a, dtype=np.float32) for a in (fm.rows, fm.column))
        given = u, rows, row, column
        tensors = [torch.from_numpy(a) for a in given]
        ready = {}
        if kind == "equal moments":
            ready["torch.compile, FAVOR+"] = partial(peers.compiled(peers.torch_features), *tensors)
            ready["jax.jit, FAVOR+"] = partial(peers.jitted("features"), *given)
            want = peers.numpy_features(*(a.astype(np.float64) for a in given))
        for into, out in (("", None), (", out=", fm.query(x))):
            alone = partial(exponential_features, *given, out=None if out is None else np.empty_like(out))
            sides = {"favorsharp": partial(fm.query, x, out=out), KERNEL: alone, **ready}
            work = f"query of {n} points, m={M}, {kind}{into}"
            least = 2.0 * n * D * (M if kind == "equal moments" else M + D / 2)
            if ready:
                label = "" if out is None else f"{M} features of {n:,} points"
                table = compare(work, sides, want=want, goal=1.7, flops=least, beside=(KERNEL,), label=label)
                yield table
                pair = {name: table.rounds[name] for name in ("favorsharp", KERNEL)}
                yield table_of(f"{work}, beside the kernel", pair, goal=0.87, own=True)
            else:
                yield compare(work, sides, goal=0.7, flops=least, own=True)


def products(quick: bool) -> Iterator[Table]:
    """A Gaussian kernel matrix of a million points times a vector."""
    n, d, m = (2000 if quick else 1_000_000), 8, 256
    rng = np.random.default_rng(0)
    x, v = (rng.standard_normal((n, size), dtype=np.float32) / 2 for size in (d, 1))
    p = fs.fit(x[:1000], x[:1000], method="posrf", kernel="gaussian")
    fm = astype(fs.feature_map(p, m, rng=0), np.float32)
    tensors = [torch.from_numpy(a) for a in (x, v, fm.rows)]
    sides = {
        "favorsharp": partial(fs.kernel_matvec, x, x, v, fm),
        "torch.compile": partial(peers.compiled(peers.torch_matvec), *tensors),
    }
    label = f"a kernel sum over {n:,} points"
    yield compare(f"kernel_matvec, n={n}, d={d}, m={m}", sides, part=0.37, flops=4.0 * n * m * (d + 1), label=label)
