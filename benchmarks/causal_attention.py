"""Time causal attention: forward, with a window, and forward with backward."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import favorsharp as fs
from benchmarks import peers
from benchmarks.attention import D, H, compare_long, problem
from benchmarks.measure import Table, compare

GOALS = {(4096, 64): 2.4, (4096, 128): None, (4096, 256): 3.0, (16_384, 256): 5.0, (65_536, 64): 8.0}
TRAINING = {(16_384, 64): 4.5, (16_384, 256): 5.0}


def gradients(function: Any, leaves: list[Any], weights: Any) -> Any:
    """Forward and backward."""
    return torch.autograd.grad(function(*leaves), leaves, weights)[0]


def tables(*, quick: bool = False) -> Iterator[Table]:
    """Forward; with a window against without one; training."""
    root = D**-0.25
    for n, m in ((256, 64),) if quick else GOALS:
        q, k, v, fm = problem(n, m)
        tensors = [torch.from_numpy(x) for x in (q, k, v)]
        theirs = torch.from_numpy(fm.rows)
        want = None
        if n <= 4096:
            with fs.use("reference"):
                want = fs.linear_attention(*(x.astype(np.float64) for x in (q, k, v)), fm, is_causal=True)

        def ours(q=q, k=k, v=v, fm=fm, **options):
            return fs.linear_attention(q, k, v, fm, is_causal=True, **options)

        others = {
            "torch, chunked": lambda t=tensors, w=theirs: peers.torch_causal_chunked(*t, w, root),
            "torch, chunked 128": lambda t=tensors, w=theirs: peers.torch_causal_chunked(*t, w, root, 128),
            "torch.compile, chunked": lambda t=tensors, w=theirs: peers.compiled(peers.torch_causal_chunked)(
                *t, w, root
            ),
            "jax.jit, chunked": lambda q=q, k=k, v=v, w=fm.rows: peers.jitted("causal")(q, k, v, w, root),
        }
        fast = peers.performer(m, D, causal=True)
        if fast is not None:
            others["performer-pytorch"] = lambda fast=fast, t=tensors: fast(*t)
        out = np.zeros_like(v)
        sides = {"favorsharp": ours, "favorsharp, out=": lambda ours=ours, out=out: ours(out=out)}
        table = compare_long(
            f"causal, L={n}, m={m}", n, sides | others, want=want, rounds=5,
            flops=2.0 * H * n * (4 * m * D + 32 * (m + D)),
        )  # fmt: skip
        yield table
        if (goal := GOALS.get((n, m))) is not None:  # the goal is relative to chunked torch
            seconds = {name: x for i, (name, x) in enumerate(table.seconds.items()) if i == 0 or "torch" in name}
            seconds.pop("performer-pytorch", None)
            yield replace(table, work=f"{table.work}, against chunked torch", seconds=seconds, goal=goal, flops=None)
        for window in (16, 32, 64) if n <= 4096 else ():
            both = {
                f"favorsharp, window={window}": lambda ours=ours, window=window: ours(window=window),
                "favorsharp, no window": ours,
            }
            yield compare(
                f"causal with window={window}, L={n}, m={m}", both, rounds=15, goal=1.0 if m >= 2 * D else None
            )
    for n, m in ((256, 64),) if quick else TRAINING:
        q, k, v, fm = problem(n, m)
        leaves = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
        weights = torch.randn(leaves[2].shape)
        theirs = torch.from_numpy(fm.rows)
        own = fs.feature_map(fs.fit(*(x[0, 0].detach() for x in leaves[:2]), method="posrf"), m, rng=0, draw="iid")
        sides = {
            "favorsharp": lambda l=leaves, w=weights, fm=own: gradients(
                lambda *x: fs.linear_attention(*x, fm, is_causal=True), l, w
            ),
            "torch, chunked": lambda l=leaves, g=weights, w=theirs: gradients(
                lambda *x: peers.torch_causal_chunked(*x, w, root), l, g
            ),
            "torch, chunked 128": lambda l=leaves, g=weights, w=theirs: gradients(
                lambda *x: peers.torch_causal_chunked(*x, w, root, 128), l, g
            ),
        }
        yield compare(
            f"causal forward and backward, L={n}, m={m}", sides, goal=TRAINING.get((n, m)), rounds=5, budget=40
        )
