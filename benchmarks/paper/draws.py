"""Compare the draws at equal numbers of features: `python -m benchmarks.paper.draws`.

There are two errors. That of single kernel values is the root mean square over draws of estimate / kernel - 1, and then
the median over pairs, because a mean would be dominated by a few large values. That of attention is measured on six
real heads, relative to the exact output.
"""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import Progress

import favorsharp as fs
from benchmarks.paper.page import DOCS, emphasised, picture, powers, stamp, table, write
from favorsharp.diagnostics import load_sample, relative_error

DRAWS = {"iid": "#999999", "antithetic": "#ccbb44", "orthogonal": "#4477aa", "simplex": "#228833", "sobol": "#cc3311"}
METHODS = ("posrf", "oprf", "sderf", "optimal", "trig")
SCALE = 0.25
"""The scale of the synthetic problem: with N(0, I) points at d = 16, the excess of `optimal` is then 2."""


def kernel_error(q: np.ndarray, k: np.ndarray, method: str, draw: str, m: int, seeds: int) -> float:
    parameters = fs.fit(q, k, method=method, scale=SCALE)
    exact = fs.kernel_matrix(q, k, kernel="softmax", scale=SCALE)
    squares = np.zeros(exact.shape)
    for seed in range(seeds):
        feature_map = fs.feature_map(parameters, m, draw=draw, rng=seed)
        squares += (feature_map.query(q) @ feature_map.key(k).T / exact - 1) ** 2
    return float(np.median(np.sqrt(squares / seeds)))


def attention_errors(heads: tuple[np.ndarray, ...], method: str, draw: str, m: int, seeds: int) -> np.ndarray:
    """Means over heads, one for each seed."""
    q, k, v = heads
    parameters, exact = fs.fit(q, k, method=method), fs.softmax_attention(q, k, v)
    found = []
    for seed in range(seeds):
        feature_map = fs.feature_map(parameters, m, draw=draw, rng=seed)
        found.append(np.mean(relative_error(fs.linear_attention(q, k, v, feature_map), exact)))
    return np.array(found)


def main(
    output: Annotated[Path, typer.Option(help="The folder of the documentation.")] = DOCS,
    seeds: Annotated[int, typer.Option(help="Draws averaged over.")] = 40,
    largest: Annotated[int, typer.Option(help="The largest number of features.")] = 512,
) -> None:
    """Write the tables and the picture."""
    start = time.perf_counter()
    sizes = [m for m in (16, 32, 64, 128, 256, 512) if m <= largest]
    q, k = np.random.default_rng(0).standard_normal((2, 64, 16))
    heads = tuple(x.astype(np.float32) for x in load_sample())
    single: dict[tuple[str, str, int], float] = {}
    whole: dict[tuple[str, str, int], np.ndarray] = {}
    with Progress() as progress:
        task = progress.add_task("draws", total=len(METHODS) * len(DRAWS) * len(sizes))
        for method in METHODS:
            for draw in DRAWS:
                for m in sizes:
                    single[method, draw, m] = kernel_error(q, k, method, draw, m, 4 * seeds)
                    if method != "trig":  # its features are signed, so attention refuses it
                        whole[method, draw, m] = attention_errors(heads, method, draw, m, seeds)
                    progress.advance(task)
    _draw(single, whole, sizes, output)
    write("draws", [stamp(time.perf_counter() - start), "", *_tables(single, whole, sizes[::2])], output)


def _tables(single, whole, sizes) -> list[str]:
    """The lines of both tables."""
    head = ["method", "m", *(f"`{draw}`" for draw in DRAWS)]
    kernels = [
        [f"`{method}`", m, *emphasised([single[method, draw, m] for draw in DRAWS], ".3f")]
        for method in METHODS
        for m in sizes
    ]
    heads = []
    for method in METHODS[:-1]:
        for m in sizes:
            cells = [whole[method, draw, m] for draw in DRAWS]
            texts = emphasised([float(cell.mean()) for cell in cells], ".4f")
            errors = [f"{cell.std(ddof=1) / len(cell) ** 0.5:.4f}" for cell in cells]
            heads.append([f"`{method}`", m, *(f"{a} ± {b}" for a, b in zip(texts, errors, strict=True))])
    return [
        *("**Error of single kernel values (d = 16, N(0, I), softmax kernel of scale 1/4)**", ""),
        *table(head, kernels),
        *("**Error of attention on six heads (512 tokens, d = 32): mean ± standard error over the draws**", ""),
        *table(head, heads),
    ]


def _draw(single, whole, sizes, output) -> None:
    """Write the picture."""
    with picture("draws", output, nrows=2, ncols=len(METHODS), figsize=(13, 5.2)) as axes:
        for column, method in enumerate(METHODS):
            for draw, colour in DRAWS.items():
                base = np.array([single[method, "iid", m] for m in sizes])
                axes[0, column].plot(sizes, [single[method, draw, m] for m in sizes] / base, color=colour, label=draw)
                if method != "trig":
                    base = np.array([whole[method, "iid", m].mean() for m in sizes])
                    means = np.array([whole[method, draw, m].mean() for m in sizes])
                    axes[1, column].plot(sizes, means / base, color=colour)
            axes[0, column].set_title(method)
            for ax in axes[:, column]:
                powers(ax, "features" if ax is axes[1, column] or method == "trig" else "", sizes)
        axes[0, 0].set_ylabel("kernel error / iid")
        axes[1, 0].set_ylabel("attention error / iid")
        axes[1, -1].axis("off")
        axes[0, 0].legend(frameon=False, fontsize=7)


if __name__ == "__main__":
    typer.run(main)
