"""Attention of NumPy arrays, as the guide calls it: fits, one call, maps, landmarks, windows, training, tokens."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

import favorsharp as fs
from benchmarks import peers
from benchmarks.measure import Table, compare, table_of
from favorsharp._values import astype

H, D, M = 8, 64, 128
ROOT = D**-0.25
EXACT = "exact attention (torch)"


def points(n: int) -> list[Any]:
    """Queries, keys and values of eight heads of 64, float32."""
    return list(np.random.default_rng(0).standard_normal((3, H, n, D), dtype=np.float32))


def favor_plus(q: Any, k: Any, m: int) -> Any:
    """A FAVOR+ map in float32: its features are those of the peers."""
    return astype(fs.feature_map(fs.fit(q[0], k[0], method="posrf"), m, rng=0, draw="iid"), np.float32)


def tables(*, quick: bool = False) -> Iterator[Table]:
    """All rows of this script."""
    for part in (fits, landmarks, one_call, given_maps, causal_maps, windows, training, tokens):
        yield from part(quick)


def fits(quick: bool) -> Iterator[Table]:
    """Fits, beside attention with a given map of the same points."""
    for n, goal in ((64, None),) if quick else ((512, None), (2048, 1.0), (8192, 2.0)):
        q, k, v = points(n)
        fm = fs.feature_map(fs.fit(q, k), M, rng=0)
        sides = {
            "favorsharp": partial(fs.fit, q, k),
            "linear_attention with a map": partial(fs.linear_attention, q, k, v, fm),
        }
        yield compare(f"fit, n={n}", sides, goal=goal, flops=4.0 * H * n * D * D, own=True)


def landmarks(quick: bool) -> Iterator[Table]:
    """Landmarks in one call, beside exact attention; and beside features with a given map."""
    for n in (128,) if quick else (1024, 4096):
        q, k, v = points(n)
        fm = fs.feature_map(fs.fit(q, k), M, rng=0)
        tensors = [torch.from_numpy(x) for x in (q, k, v)]
        for causal, kind, goal in ((False, "", 0.4), (True, ", causal", 0.25)):
            marks = partial(fs.attention, q, k, v, method="landmarks", num_features=M, is_causal=causal)
            exact = partial(peers.exact, *tensors, is_causal=causal)
            features = partial(fs.linear_attention, q, k, v, fm, is_causal=causal)
            table = compare(
                f"attention through landmarks{kind}, n={n}",
                {"favorsharp": marks, EXACT: exact, "features with a given map": features},
                goal=1.0, beside=("features with a given map",), label=f"{M} landmarks{kind}, {n:,} tokens",
            )  # fmt: skip
            yield table
            if n == 4096 or quick:
                pair = {name: table.rounds[name] for name in ("favorsharp", "features with a given map")}
                work = f"attention through landmarks{kind}, n={n}, beside features"
                yield table_of(work, pair, goal=goal, own=True)


def one_call(quick: bool) -> Iterator[Table]:
    """Features with their fit and their draw."""
    for n in (128,) if quick else (1024, 4096):
        q, k, v = points(n)
        sides = {
            "favorsharp": partial(fs.attention, q, k, v, num_features=M, rng=0),
            EXACT: partial(peers.exact, *(torch.from_numpy(x) for x in (q, k, v))),
        }
        work = f"attention through features, fit and draw included, n={n}"
        label = f"{M} features with their fit, {n:,} tokens"
        yield compare(work, sides, goal=1.0, flops=4.0 * H * n * D * (D + 2 * M), label=label)


def given_maps(quick: bool) -> Iterator[Table]:
    """Bidirectional attention through a given map, beside FAVOR+ elsewhere."""
    for n in (128,) if quick else (512, 4096, 65_536):
        q, k, v = points(n)
        own, theirs = fs.feature_map(fs.fit(q, k), M, rng=0), favor_plus(q, k, M)
        tensors, rows, out = [torch.from_numpy(x) for x in (q, k, v)], torch.from_numpy(theirs.rows), np.zeros_like(v)
        same = partial(fs.linear_attention, q, k, v, theirs)
        want = None
        if n <= 4096:
            with fs.use("reference"):
                want = fs.linear_attention(*(x.astype(np.float64) for x in (q, k, v)), theirs)
        plain = peers.compiled(peers.torch_attention_plain)
        sides = {
            "favorsharp": partial(fs.linear_attention, q, k, v, own, out=out if n > 4096 else None),
            "ours with a map of FAVOR+": same,
            "torch.compile, no maxima": partial(plain, *tensors, rows, ROOT),
            "jax.jit": partial(peers.jitted("attention"), q, k, v, theirs.rows, ROOT),
            "numpy in tiles, no maxima": partial(peers.numpy_attention_tiled, q, k, v, theirs.rows, ROOT),
        }
        if n <= 4096:
            sides[EXACT] = partial(peers.exact, *tensors)
        into = ", out=" if n > 4096 else ""
        yield compare(
            f"linear_attention with a given map{into}, n={n}", sides, want=want, unchecked=("favorsharp", EXACT),
            goal=1.0 if n == 512 else 1.7 if n == 4096 else None, part=None if n <= 4096 else 1 / 1.5,
            flops=8.0 * H * n * M * D,
            beside=("ours with a map of FAVOR+",), label=f"{M} features of a given map, {n:,} tokens",
        )  # fmt: skip


def causal_maps(quick: bool) -> Iterator[Table]:
    """Causal attention through a given map."""
    for n in (128,) if quick else (4096, 16_384):
        q, k, v = points(n)
        own, theirs = fs.feature_map(fs.fit(q, k), M, rng=0), favor_plus(q, k, M)
        tensors, rows = [torch.from_numpy(x) for x in (q, k, v)], torch.from_numpy(theirs.rows)
        want = None
        if n <= 4096:
            with fs.use("reference"):
                want = fs.linear_attention(*(x.astype(np.float64) for x in (q, k, v)), theirs, is_causal=True)
        chunked = peers.compiled(peers.torch_causal_chunked)
        sides: dict[str, Callable[[], Any]] = {
            "favorsharp": partial(fs.linear_attention, q, k, v, own, is_causal=True),
            "ours with a map of FAVOR+": partial(fs.linear_attention, q, k, v, theirs, is_causal=True),
            "torch.compile, chunks, no maxima": partial(chunked, *tensors, rows, ROOT),
            "jax.jit, chunks, no maxima": partial(peers.jitted("causal"), q, k, v, theirs.rows, ROOT),
        }
        if n <= 4096:
            sides[EXACT] = partial(peers.exact, *tensors, is_causal=True)
        yield compare(
            f"linear_attention with a given map, causal, n={n}", sides, want=want, unchecked=("favorsharp", EXACT),
            goal=2.4, flops=2.0 * H * n * (4 * M * D + 32 * (M + D)),
            beside=("ours with a map of FAVOR+",), label=f"{M} features of a given map, causal, {n:,} tokens",
        )  # fmt: skip


def windows(quick: bool) -> Iterator[Table]:
    """Features with a window beside features without one; and landmarks with a window beside exact attention."""
    n = 128 if quick else 4096
    q, k, v = points(n)
    fm, lm = fs.feature_map(fs.fit(q, k), M, rng=0), fs.landmarks(M)
    for causal, window, kind, goal in (
        (False, 64, "", 0.5),
        (True, 64, ", causal", None),
        (True, 16, ", causal", 0.9),
    ):
        call = partial(fs.linear_attention, q, k, v, fm, is_causal=causal)
        sides = {"favorsharp": partial(call, window=window), "the same without a window": call}
        yield compare(f"features with window {window}{kind}, n={n}", sides, goal=goal, own=True)
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    for causal, kind in ((False, ""), (True, ", causal")):
        sides = {
            "favorsharp": partial(fs.linear_attention, q, k, v, lm, window=16, is_causal=causal),
            EXACT: partial(peers.exact, *tensors, is_causal=causal),
        }
        label = f"{M} landmarks, window 16{kind}, {n:,} tokens"
        yield compare(f"landmarks with window 16{kind}, n={n}", sides, goal=1.0, label=label)


def training(quick: bool) -> Iterator[Table]:
    """Causal attention of tensors, forward and backward."""
    n = 128 if quick else 16_384
    leaves = [torch.from_numpy(x).requires_grad_() for x in points(n)]
    weights = torch.randn(leaves[2].shape)
    q, k = (x.detach() for x in leaves[:2])
    own = fs.feature_map(fs.fit(q, k), M, rng=0)
    rows = torch.randn(M, D)

    def gradients(function: Callable[..., Any]) -> Any:
        with torch.enable_grad():
            return torch.autograd.grad(function(*leaves), leaves, weights)[0]

    sides = {
        "favorsharp": partial(gradients, lambda *x: fs.linear_attention(*x, own, is_causal=True)),
        "torch, chunks of 128": partial(gradients, lambda *x: peers.torch_causal_chunked(*x, rows, ROOT, 128)),
    }
    label = f"training on {n:,} causal tokens, {M} features"
    yield compare(f"causal, forward and backward, n={n}", sides, goal=4.5, rounds=5, budget=12, label=label)


def decoded(q: Any, k: Any, v: Any, x: Any, start: int, count: int) -> Callable[[], Any]:
    """A run that decodes some tokens after a prompt, one by one."""
    prompt = (a[:, :start] for a in (q, k, v))
    _, first = fs.linear_attention(*prompt, x, is_causal=True, return_state=True)

    def run() -> Any:
        state = first
        for i in range(start, start + count):
            out, state = fs.decode_step(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1], state, x)
        return out

    return run


def decoded_by_torch(step: Callable[..., Any], q: Any, k: Any, v: Any, start: int, count: int) -> Callable[[], Any]:
    """The same by FAVOR+ in torch, which starts from given sums."""
    rows = torch.randn(M, D)
    first = torch.rand(H, M, D), torch.rand(H, 1, M)
    q, k, v = (torch.from_numpy(x) for x in (q, k, v))

    def run() -> Any:
        held = first
        for i in range(start, start + count):
            out, *held = step(*(x[:, i : i + 1] for x in (q, k, v)), rows, *held, ROOT)
        return out

    return run


def tokens(quick: bool) -> Iterator[Table]:
    """Tokens one after the other, enough for landmarks to compress their keys twice."""
    n, count = (128, 8) if quick else (4096, 2 * M + 4)
    q, k, v = points(n)
    fm = fs.feature_map(fs.fit(q, k), M, rng=0)
    begin = n // 2
    features = decoded(q, k, v, fm, begin, count)
    sides = {
        "favorsharp": features,
        "torch.compile": decoded_by_torch(peers.compiled(peers.torch_step), q, k, v, begin, count),
        "torch": decoded_by_torch(peers.torch_step, q, k, v, begin, count),
    }
    state = 4.0 * H * M * (D + 2)
    label = f"a token by a state of {M} features"
    yield compare("a token, features (decode_step)", sides, goal=2.0, moved=2 * state, times=count, label=label)
    sides = {"favorsharp": decoded(q, k, v, fs.landmarks(M), begin, count), "features": features}
    yield compare("a token, landmarks (decode_step)", sides, goal=0.33, times=count, own=True)
