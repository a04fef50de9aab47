"""Landmarks beside other ways to replace n keys by m: `python -m benchmarks.paper.neighbours`.

Bidirectional attention on six real heads, in float64. WildCat (arXiv 2602.10056) is computed
from its formulas. Thinformer (arXiv 2502.12063) is its authors' own package, and its row is left out unless
`pip install git+https://github.com/microsoft/thinformer.git` was run.
"""

import importlib.util
import math
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.special import lambertw

import favorsharp as fs
from benchmarks.paper.page import DOCS, emphasised, stamp, table, write
from favorsharp.diagnostics import load_sample, relative_error

SIZES = (16, 32, 64, 128)


def uniform(q: Any, k: Any, v: Any, m: int, rng: np.random.Generator) -> Any:
    """Exact attention to m keys drawn without replacement."""
    chosen = np.stack([rng.permutation(k.shape[-2])[:m] for _ in k])[..., None]
    return fs.softmax_attention(q, np.take_along_axis(k, chosen, -2), np.take_along_axis(v, chosen, -2))


def wildcat(q: Any, k: Any, v: Any, m: int, rng: np.random.Generator) -> Any:
    """Keys by randomly pivoted Cholesky, their Nystroem weights, and results kept within the range of the values."""
    return np.stack([_wildcat_head(*head, m, rng) for head in zip(q, k - k.mean(-2, keepdims=True), v, strict=True)])


def _wildcat_head(q: Any, k: Any, v: Any, m: int, rng: np.random.Generator) -> Any:
    scale = k.shape[-1] ** -0.5
    largest = np.max(np.sum(k * k, axis=-1))
    b = math.log(len(k)) / (scale * largest) + 2
    constant = 2 * math.sqrt(1 + math.exp(2 * lambertw(2 * math.exp(-2)).real + 2))
    temperature = math.sqrt(b / (2 * lambertw(b / constant).real))
    x = k * (math.sqrt(scale) / temperature)
    chosen, columns = _pivots(x, m, rng)
    half_norms = np.sum(x * x, axis=-1) / 2
    weights = np.linalg.lstsq(columns[chosen], columns.T, rcond=1e-10)[0]
    weights *= np.exp(half_norms[None, :] - half_norms[chosen][:, None])
    scores = scale * (q @ k[chosen].T)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    out = (scores @ (weights @ v)) / (scores @ weights.sum(-1, keepdims=True))
    return np.clip(out, v.min(0), v.max(0))


def _pivots(x: Any, m: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """Indices of m points by randomly pivoted Cholesky of the Gaussian kernel, and the kernel's columns for them."""
    residual, factor, chosen, columns = np.ones(len(x)), np.zeros((len(x), m)), [], np.zeros((len(x), m))
    for i in range(m):
        pivot = rng.choice(len(x), p=residual / residual.sum())
        columns[:, i] = np.exp(-np.sum((x - x[pivot]) ** 2, axis=-1) / 2)
        column = columns[:, i] - factor[:, :i] @ factor[pivot, :i]
        factor[:, i] = column / math.sqrt(max(column[pivot], 1e-12))
        residual = np.maximum(residual - factor[:, i] ** 2, 0)
        residual[pivot] = 0
        chosen.append(pivot)
    return np.array(chosen), columns


def thinformer(q: Any, k: Any, v: Any, m: int, rng: np.random.Generator) -> Any:
    """The authors' module; it keeps 2^g sqrt(n) keys, n a power of four."""
    import torch
    from thinformer import ThinformerAttention

    torch.manual_seed(int(rng.integers(2**31)))
    rounds = round(math.log2(m / 2 ** math.floor(math.log(k.shape[-2], 4))))
    arrays = [torch.from_numpy(x).movedim(0, 1)[None] for x in (q, k, v)]
    with torch.compiler.set_stance("force_eager"):
        out, _ = ThinformerAttention(g=rounds, use_torch_spda=True)(*arrays)
    return out[0].movedim(1, 0).numpy()


def features(q: Any, k: Any, v: Any, m: int, rng: np.random.Generator) -> Any:
    """`optimal` features."""
    return fs.attention(q, k, v, num_features=m, rng=rng)


def ours(q: Any, k: Any, v: Any, m: int, rng: np.random.Generator) -> Any:
    """`landmarks`."""
    return fs.attention(q, k, v, method="landmarks", num_features=m, rng=rng)


WAYS = {
    "`optimal` features (unbiased)": features,
    "keys drawn uniformly": uniform,
    "Thinformer": thinformer,
    "WildCat": wildcat,
    "landmarks": ours,
}


def main(
    output: Annotated[Path, typer.Option(help="The folder of the documentation.")] = DOCS,
    seeds: Annotated[int, typer.Option(help="Draws averaged over.")] = 10,
) -> None:
    """Write the table."""
    start = time.perf_counter()
    q, k, v = (x.astype(np.float64) for x in load_sample())
    exact = fs.softmax_attention(q, k, v)
    rows = {}
    for name, way in WAYS.items():
        if way is thinformer and importlib.util.find_spec("thinformer") is None:
            continue
        rows[name] = [
            np.mean([relative_error(way(q, k, v, m, np.random.default_rng(s)), exact) for s in range(seeds)])
            for m in SIZES
        ]
    best = [emphasised(column, ".3f") for column in zip(*rows.values(), strict=True)]
    lines = [stamp(time.perf_counter() - start), ""]
    lines += table(["", *(f"m = {m}" for m in SIZES)], zip(rows, *best, strict=True))
    write("neighbours", lines, output)


if __name__ == "__main__":
    typer.run(main)
