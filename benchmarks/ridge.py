"""Ridge regression on kernel features: beside exact kernel ridge regression, and in one pass over millions of rows.

`python -m benchmarks.ridge`. Rows are made block by block, so memory is what the regression itself needs. Seconds are
of the processor, summed over threads.
"""

import resource
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from sklearn.kernel_approximation import Nystroem
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline

from favorsharp.sklearn import FeatureRidge

SIZE, GAMMA, BLOCK = 8, 1 / 8, 100_000


def block(seed: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal points, and values with noise of standard deviation 0.1."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, SIZE), dtype=np.float32)
    y = np.sin(x[:, 0]) * x[:, 1] + x[:, 2] ** 2 / 2 + 0.1 * rng.standard_normal(rows, dtype=np.float32)
    return x, y


def models(alpha: float) -> Iterator[tuple[str, Any]]:
    yield "KernelRidge", KernelRidge(kernel="rbf", gamma=GAMMA, alpha=alpha)
    for m in (256, 1024):
        features = Nystroem(gamma=GAMMA, n_components=m, random_state=0)
        yield f"Nystroem({m}), Ridge", make_pipeline(features, Ridge(alpha=alpha))
        yield f"FeatureRidge({m})", FeatureRidge(n_components=m, gamma=GAMMA, alpha=alpha, random_state=0)


def main(rows: int = 20_000_000, exact_rows: int = 6_000, alpha: float = 0.1) -> None:
    """Fit all models to `exact_rows`, and `FeatureRidge` to `rows` in blocks."""
    console = Console()
    asked = block(2**32 - 1, 5_000)
    model = FeatureRidge(gamma=GAMMA, alpha=alpha, random_state=0)
    wall, start = time.perf_counter(), time.process_time()
    for seed in track(range(rows // BLOCK), "partial_fit", console=console):
        model.partial_fit(*block(seed, BLOCK))
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    console.print(
        f"FeatureRidge, {rows:,} rows of {SIZE}, 256 features: {seconds:.0f} s of the processor ({wall:.0f} s by the "
        f"clock), R2 {model.score(*asked):.4f}, peak resident memory {peak:.2f} GiB"
    )
    data = tuple(a.astype(np.float64) for a in block(2**32 - 2, exact_rows))
    for name, model in models(alpha):
        start = time.process_time()
        model.fit(*data)
        fitted = time.process_time() - start
        score = model.score(*asked)
        console.print(f"{name}, {exact_rows:,} rows: R2 {score:.4f}, {fitted:.1f} s for the fit")


if __name__ == "__main__":
    typer.run(main)
