"""Time the features of 131,072 points."""

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks import peers
from benchmarks.measure import Table, compare
from favorsharp.ops.exponential_features import exponential_features

GOALS = {"fresh": 1.7, "out": 2.2}


def tables(*, quick: bool = False) -> Iterator[Table]:
    """New arrays against new arrays; `out` against the fastest new array; ours against the matrix product alone."""
    n, d = (1024 if quick else 131_072), 64
    rng = np.random.default_rng(0)
    u = (rng.standard_normal((n, d)) * 0.3).astype(np.float32)
    row = -(u * u).sum(-1, keepdims=True) / 2
    for m in (64,) if quick else (64, 128, 256):
        rows, column = rng.standard_normal((m, d)).astype(np.float32), np.zeros((1, m), np.float32)
        given = u, rows, row, column
        tensors = tuple(torch.from_numpy(x) for x in given)
        want = peers.numpy_features(*(x.astype(np.float64) for x in given))
        out, product = np.zeros((n, m), np.float32), torch.zeros((n, m))
        others = {
            "numpy": lambda given=given: peers.numpy_features(*given),
            "numpy, tiled": lambda given=given: peers.numpy_features_tiled(*given),
            "torch": lambda tensors=tensors: peers.torch_features(*tensors),
            "torch, in place": lambda tensors=tensors: peers.torch_features_in_place(*tensors),
            "torch.compile": lambda tensors=tensors: peers.compiled(peers.torch_features)(*tensors),
            "jax.jit": lambda given=given: peers.jitted("features")(*given),
        }
        fresh = {"favorsharp": lambda given=given: exponential_features(*given), **others}
        flops = 2.0 * n * d * m
        yield compare(f"features {n} x {d}, m={m}, fresh", fresh, want=want, goal=GOALS["fresh"], flops=flops)
        into = {"favorsharp, out=": lambda given=given, out=out: exponential_features(*given, out=out), **others}
        yield compare(
            f"features {n} x {d}, m={m}, out= against fresh", into, want=want, goal=GOALS["out"], flops=2.0 * n * d * m
        )
        floor = {
            "favorsharp, out=": into["favorsharp, out="],
            "sgemm alone, out=": lambda t=tensors, product=product: torch.mm(t[0], t[1].T, out=product),
        }
        yield compare(f"features {n} x {d}, m={m}, against the product alone", floor, goal=1 / 1.1)
