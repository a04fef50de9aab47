"""Attention by other libraries beside ours: `python -m benchmarks.paper.neighbours`.

The first table has errors on six real heads. WildCat (arXiv 2602.10056) is computed from its formulas.
performer-pytorch and Thinformer (arXiv 2502.12063) are the authors' own packages. Their rows are left out unless
`pip install performer-pytorch` and `pip install git+https://github.com/microsoft/thinformer.git` were run. The second
table has the times of performer-pytorch and of our calls.
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


def performer(q: Any, k: Any, v: Any, m: int, rng: np.random.Generator) -> Any:
    """FAVOR+ by performer-pytorch, which adds 1e-4 to each feature."""
    import torch

    torch.manual_seed(int(rng.integers(2**31)))
    with torch.no_grad():
        out = _performer(q.shape[-1], m)(*(torch.from_numpy(x)[None] for x in (q, k, v)))
    return out[0].numpy()


def _performer(size: int, m: int, *, causal: bool = False) -> Any:
    from performer_pytorch import FastAttention

    return FastAttention(size, nb_features=m, causal=causal)


def favor(q: Any, k: Any, v: Any, m: int, rng: np.random.Generator) -> Any:
    """FAVOR+ by this library."""
    return fs.attention(q, k, v, method="posrf", num_features=m, rng=rng)


def features(q: Any, k: Any, v: Any, m: int, rng: np.random.Generator) -> Any:
    """`optimal` features."""
    return fs.attention(q, k, v, num_features=m, rng=rng)


def ours(q: Any, k: Any, v: Any, m: int, rng: np.random.Generator) -> Any:
    """`landmarks`."""
    return fs.attention(q, k, v, method="landmarks", num_features=m, rng=rng)


WAYS = {
    "FAVOR+, `posrf` (unbiased)": favor,
    "FAVOR+, performer-pytorch": performer,
    "`optimal` features (unbiased)": features,
    "keys drawn uniformly": uniform,
    "Thinformer": thinformer,
    "WildCat": wildcat,
    "landmarks": ours,
}
PACKAGES = {performer: "performer_pytorch", thinformer: "thinformer"}


def has(way: Any) -> bool:
    """Whether the package that a way calls is installed."""
    return way not in PACKAGES or importlib.util.find_spec(PACKAGES[way]) is not None


def errors(seeds: int) -> list[str]:
    """The table of relative errors on the shipped sample, in float64."""
    q, k, v = (x.astype(np.float64) for x in load_sample())
    exact = fs.softmax_attention(q, k, v)
    rows = {
        name: [
            np.mean([relative_error(way(q, k, v, m, np.random.default_rng(s)), exact) for s in range(seeds)])
            for m in SIZES
        ]
        for name, way in WAYS.items()
        if has(way)
    }
    best = [emphasised(column, ".3f") for column in zip(*rows.values(), strict=True)]
    return table(["", *(f"m = {m}" for m in SIZES)], zip(rows, *best, strict=True))


def calls(n: int) -> dict[str, Any]:
    """Calls on float32 tensors of eight heads of 64 with m = 128, by name; the first is torch's exact attention."""
    import torch

    q, k, v = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 1, 8, n, 64), dtype=np.float32))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    fm = fs.feature_map(fs.fit(q, k, method="posrf"), 128, rng=0)
    few = fs.landmarks(128)
    found = {
        "exact attention (torch)": lambda: sdpa(q, k, v),
        "FAVOR+, `posrf`": lambda: fs.linear_attention(q, k, v, fm),
        "landmarks": lambda: fs.linear_attention(q, k, v, few),
        "exact attention (torch), causal": lambda: sdpa(q, k, v, is_causal=True),
        "FAVOR+, `posrf`, causal": lambda: fs.linear_attention(q, k, v, fm, is_causal=True),
        "landmarks, causal": lambda: fs.linear_attention(q, k, v, few, is_causal=True),
    }
    if has(performer):
        whole, causal = _performer(64, 128), _performer(64, 128, causal=True)
        found |= {"FAVOR+, performer-pytorch": lambda: whole(q, k, v)}
        found |= {"FAVOR+, performer-pytorch, causal": lambda: causal(q, k, v)}
    return dict(sorted(found.items(), key=lambda item: "causal" in item[0]))


def times(lengths: tuple[int, ...], rounds: int = 5) -> list[str]:
    """The table of processor milliseconds: the least of calls that take turns."""
    import torch

    columns = [dict.fromkeys(calls(n), math.inf) for n in lengths]
    for n, least in zip(lengths, columns, strict=True):
        ways = calls(n)
        for name in [*ways] * rounds:
            start = time.process_time()
            with torch.no_grad():
                ways[name]()
            least[name] = min(least[name], time.process_time() - start)
    rows = [[name, *(f"{1e3 * column[name]:.1f}" for column in columns)] for name in columns[0]]
    return table(["milliseconds", *(f"n = {n:,}" for n in lengths)], rows)


def main(
    output: Annotated[Path, typer.Option(help="The folder of the documentation.")] = DOCS,
    seeds: Annotated[int, typer.Option(help="Draws averaged over.")] = 10,
    lengths: Annotated[str, typer.Option(help="Numbers of tokens that are timed, with commas between.")] = "512,4096",
) -> None:
    """Write both tables."""
    import torch

    start = time.perf_counter()
    torch.set_num_threads(1)
    lines = [*errors(seeds), *times(tuple(map(int, lengths.split(","))))]
    write("neighbours", [stamp(time.perf_counter() - start), "", *lines], output)


if __name__ == "__main__":
    typer.run(main)
