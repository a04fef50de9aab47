"""Time one token: the state takes a key and a value, then a query reads it."""

from collections.abc import Iterator
from typing import Any

import torch

import favorsharp as fs
from benchmarks.attention import D, problem
from benchmarks.measure import Table, compare
from benchmarks.peers import compiled

GOALS = {1: 4.0, 64: 1.7}


def torch_step(q: Any, k: Any, v: Any, rows: Any, kv: Any, z: Any, root: float) -> Any:
    """One step without maxima, which returns a new state as ours does."""
    pq, pk = (torch.exp((x * root) @ rows.mT - (x * x).sum(-1, keepdim=True) * (root * root / 2)) for x in (q, k))
    kv, z = kv + pk.mT * v, z + pk
    return (pq @ kv) / (pq * z).sum(-1, keepdim=True), kv, z


def decode(step: Any, state: tuple, tokens: int) -> None:
    """Decode some tokens, each with the state that the one before left: `step` returns a result and the next state."""
    for _ in range(tokens):
        _, *state = step(*state)


def tables(*, quick: bool = False) -> Iterator[Table]:
    """Batches of 1 and of 64, eight heads, m = 64."""
    m, root = 64, D**-0.25
    for batch, goal in GOALS.items():
        *_, fm = problem(64, m)
        q, k, v = (torch.randn(batch, 8, 1, D) for _ in range(3))
        own = fs.feature_map(fs.fit(torch.randn(64, D), torch.randn(64, D), method="posrf"), m, rng=0)
        state = fs.update(
            fs.init_state(own, D, like=k), torch.randn(batch, 8, 32, D), torch.randn(batch, 8, 32, D), own
        )
        theirs, rows = (torch.rand(batch, 8, m, D), torch.rand(batch, 8, 1, m)), torch.from_numpy(fm.rows)
        tokens = 5 if quick else 1000 if batch == 1 else 100
        sides = {
            "favorsharp": lambda x=(q, k, v), own=own, state=state, n=tokens: decode(
                lambda held: fs.decode_step(*x, held, own), (state,), n
            ),
            "torch": lambda x=(q, k, v, rows), state=theirs, n=tokens: decode(
                lambda *held: torch_step(*x, *held, root), state, n
            ),
            "torch.compile": lambda x=(q, k, v, rows), state=theirs, n=tokens: decode(
                lambda *held: compiled(torch_step)(*x, *held, root), state, n
            ),
        }
        yield compare(f"decode, B={batch}, m={m}, {tokens} tokens", sides, goal=goal)
