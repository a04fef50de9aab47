"""A Nadaraya-Watson fit from memory-mapped files that exceed the memory it may use: rows a second, and memory.

`python -m benchmarks.out_of_core` writes files of a million rows each to a temporary folder, and removes them
afterwards.
"""

import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from sklearn.kernel_approximation import RBFSampler
from sklearn.linear_model import SGDRegressor

from favorsharp.sklearn import NadarayaWatsonRegressor

SHARD, BLOCK = 1_000_000, 100_000


def values_at(x: np.ndarray) -> np.ndarray:
    return np.sin(x[:, 0]) + x[:, 1] * x[:, 2]


def main(shards: int = 20, size: int = 32, features: int = 256, slice_rows: int = 500_000) -> None:
    """Fit `shards` million rows; on a slice also fit RBFSampler with SGD, and take exact sums for 100 queries."""
    console = Console()
    gamma = 0.5 / size
    with tempfile.TemporaryDirectory() as folder:
        for shard in track(range(shards), "writing", console=console):
            rng = np.random.default_rng(shard)
            x = rng.standard_normal((SHARD, size), dtype=np.float32)
            np.save(Path(folder) / f"{shard}.npy", x)
            del x
        model = NadarayaWatsonRegressor(n_components=features, gamma=gamma, random_state=0)
        start = time.perf_counter()
        for shard in track(range(shards), "favorsharp", console=console):
            points = np.load(Path(folder) / f"{shard}.npy", mmap_mode="r")
            for a in range(0, SHARD, BLOCK):
                block = points[a : a + BLOCK]
                model.partial_fit(block, values_at(block))
            del points, block
        ours = shards * SHARD / (time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        console.print(f"favorsharp, {shards} million rows of {size}, {features} features: {ours:,.0f} rows/s")
        console.print(f"peak resident memory of the process, writing included: {peak:.2f} GiB")
        points = np.load(Path(folder) / "0.npy", mmap_mode="r")[:slice_rows]
        sampler = RBFSampler(gamma=gamma, n_components=features, random_state=0).fit(points[:1])
        linear = SGDRegressor(random_state=0)
        start = time.perf_counter()
        for a in range(0, slice_rows, BLOCK):
            block = points[a : a + BLOCK]
            linear.partial_fit(sampler.transform(block), values_at(block))
        theirs = slice_rows / (time.perf_counter() - start)
        console.print(f"RBFSampler and SGDRegressor, {slice_rows:,} rows: {theirs:,.0f} rows/s")
        exact = NadarayaWatsonRegressor(method="exact", gamma=gamma).fit(points, values_at(points))
        queries = np.random.default_rng(-1 % 2**32).standard_normal((100, size), dtype=np.float32)
        timings, outs = [], []
        for estimator in (exact, model):
            start = time.perf_counter()
            outs.append(estimator.predict(queries))
            timings.append(time.perf_counter() - start)
        console.print(
            f"100 queries: exact tiled sums over the slice {timings[0]:.2f} s ({slice_rows / timings[0]:,.0f} rows/s), "
            f"features over everything {timings[1]:.4f} s"
        )
        truth = values_at(queries)
        names = ("exact on the slice", "features on everything")
        for name, out in zip(names, outs, strict=True):
            console.print(f"root mean square error of {name}: {np.sqrt(np.mean((out - truth) ** 2)):.3f}")


if __name__ == "__main__":
    typer.run(main)
