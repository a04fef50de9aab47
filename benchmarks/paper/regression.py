"""Kernel regression against the number of features and against time: `python -m benchmarks.paper.regression`.

The error is the root mean square error on a fifth of the rows, in units of the target's standard deviation: predicting
the mean gives 1. Columns are standardised by the training rows. Where a signed method has no estimate, Nadaraya-Watson
takes the mean.
"""

import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import Progress
from sklearn.base import clone
from sklearn.datasets import load_diabetes, make_friedman1
from sklearn.kernel_approximation import Nystroem, RBFSampler
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.paper.page import COLOURS, DOCS, emphasised, picture, powers, stamp, table, write
from favorsharp.sklearn import NadarayaWatsonRegressor, RandomFeatures

METHODS = ("trig", "posrf", "oprf", "saderf", "aderf", "sderf", "optimal")
KINDS = {"nw": (*METHODS, "landmarks"), "ridge": ("RBFSampler", "Nystroem", *METHODS, "nystrom")}
THEIRS = {"RBFSampler": RBFSampler, "Nystroem": Nystroem}
Found = dict[tuple[str, str, str, int], tuple[float, float, float]]
"""Errors, their standard errors and times, by set, kind, method and number of features."""
SAMPLE = 1000
"""Number of training rows for tuning and solving exact kernel ridge regression, whose cost is cubic in it."""


def waves(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """A smooth function of three coordinates, with noise of standard deviation 0.3."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, (rows, 3))
    return x, np.sin(3 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.3 * rng.standard_normal(rows)


SETS: dict[str, tuple[str, Callable[[int], Any]]] = {
    "diabetes": ("442 patients, d = 10, scikit-learn's", lambda rows: load_diabetes(return_X_y=True)),
    "friedman": ("`make_friedman1`, d = 10, noise 1", lambda rows: make_friedman1(rows, noise=1.0, random_state=0)),
    "waves": ("sin 3x + yz, d = 3, noise 0.3", waves),
}


def split(name: str, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    x, y = SETS[name][1](rows)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    test = len(x) // 5
    scaler = StandardScaler().fit(x[test:])
    x = scaler.transform(x).astype(np.float32)
    return x[test:], y[test:].astype(np.float32), x[:test], y[:test].astype(np.float32)


def error_and_time(model: Any, data: tuple[np.ndarray, ...], rounds: int = 3) -> tuple[float, float]:
    """Relative error on the test rows, and the median processor time of fit and predict, summed over threads."""
    x, y, asked, truth = data
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        out = clone(model).fit(x, y).predict(asked)
        seconds.append(time.process_time() - start)
    error = float(np.sqrt(np.mean((out - truth) ** 2)) / truth.std())
    return error, float(np.median(seconds))


def nadaraya_watson(method: str, m: int, seed: int, data: tuple[np.ndarray, ...]) -> Any:
    """An estimator with the bandwidth of least leave-one-out error for this method and this number of features."""
    model = NadarayaWatsonRegressor(method=method, n_components=m, gamma="auto_cv", random_state=seed)
    if method == "exact":
        model.fit(data[0][:SAMPLE], data[1][:SAMPLE])
    else:
        model.fit(data[0], data[1])
    return clone(model).set_params(gamma=model.gamma_)


def tuned_ridge(data: tuple[np.ndarray, ...]) -> Any:
    """Exact kernel ridge regression on a sample; cross-validation chooses bandwidth and penalty for all methods."""
    x, y = data[0][:SAMPLE].astype(np.float64), data[1][:SAMPLE].astype(np.float64)
    grid = {"gamma": np.geomspace(0.001, 1.0, 7), "alpha": np.geomspace(1e-3, 10, 5)}
    search = GridSearchCV(KernelRidge(kernel="rbf"), grid, cv=5, scoring="neg_mean_squared_error")
    return search.fit(x, y - y.mean()).best_estimator_


def ridge(method: str, m: int, seed: int, best: Any, rows: int) -> Any:
    alpha = best.alpha * rows / min(rows, SAMPLE)  # the penalty for each row is the same as in the sample
    if method in THEIRS:
        features = THEIRS[method](gamma=best.gamma, n_components=m, random_state=seed)
    else:
        features = RandomFeatures(method=method, n_components=m, gamma=best.gamma, random_state=seed)
    return make_pipeline(features, Ridge(alpha=alpha))


def main(
    output: Annotated[Path, typer.Option(help="The folder of the documentation.")] = DOCS,
    rows: Annotated[int, typer.Option(help="Rows of the made-up sets.")] = 8_000,
    largest: Annotated[int, typer.Option(help="The largest number of features.")] = 256,
    seeds: Annotated[int, typer.Option(help="Draws averaged over.")] = 3,
) -> None:
    """Write the tables and the picture."""
    start = time.perf_counter()
    sizes = [m for m in (16, 64, 256, 1024) if m <= largest]
    found: Found = {}
    bounds: dict[tuple[str, str], tuple[float, float, int]] = {}
    with Progress() as progress:
        task = progress.add_task("regression", total=len(SETS) * len(sizes) * sum(map(len, KINDS.values())))
        for name in SETS:
            data = split(name, rows)
            best = tuned_ridge(data)
            centre = data[1][:SAMPLE].mean()
            sample = (data[0][:SAMPLE], data[1][:SAMPLE] - centre, data[2], data[3] - centre)
            bounds[name, "nw"] = (*error_and_time(nadaraya_watson("exact", 0, 0, data), data, 1), len(data[0]))
            bounds[name, "ridge"] = (*error_and_time(best, sample, 1), len(sample[0]))
            for kind, methods in KINDS.items():
                for method, m in product(methods, sizes):
                    found[name, kind, method, m] = _over_draws(kind, method, m, seeds, data, best)
                    progress.advance(task)
    lines = [line for kind in KINDS for name in SETS for line in _table(kind, name, found, bounds[name, kind], sizes)]
    _draw(found, bounds, sizes, output)
    write("regression", [stamp(time.perf_counter() - start), "", *lines], output)


def _over_draws(kind, method, m, seeds, data, best) -> tuple[float, float, float]:
    """The mean error over draws, its standard error, and the median of the times."""
    pairs = []
    for seed in range(seeds):
        model = nadaraya_watson(method, m, seed, data) if kind == "nw" else ridge(method, m, seed, best, len(data[0]))
        pairs.append(error_and_time(model, data, 3 if seed == 0 else 1))
    errors, seconds = np.array(pairs).T
    return errors.mean(), errors.std(ddof=1) / seeds**0.5, np.median(seconds)


def _table(kind: str, name: str, found: Found, bound: tuple[float, float, int], sizes: list[int]) -> list[str]:
    """The lines of one table: a row for each method, the best errors bold."""
    error, seconds, points = bound
    title = {"nw": "Nadaraya-Watson", "ridge": "Ridge regression on features"}[kind]
    columns = [[found[name, kind, method, m] for method in KINDS[kind]] for m in sizes]
    errors = [emphasised([cell[0] for cell in column], ".3f") for column in columns]
    body = [
        [
            f"`{method}`",
            *(
                f"{texts[i]} ± {column[i][1]:.3f}, {1e3 * column[i][2]:.0f} ms"
                for texts, column in zip(errors, columns, strict=True)
            ),
        ]
        for i, method in enumerate(KINDS[kind])
    ]
    return [
        f"**{title}, {name}** ({SETS[name][0]}). Exact on {points} rows: error {error:.3f} in {1e3 * seconds:.0f} ms.",
        "",
        *table(["method", *(f"m = {m}" for m in sizes)], body),
    ]


def _draw(found, bounds, sizes, output) -> None:
    with picture("regression", output, nrows=2, ncols=2 * len(SETS), figsize=(15, 5.6)) as axes:
        for row, (kind, methods) in enumerate(KINDS.items()):
            for column, name in enumerate(SETS):
                by_size, by_time = axes[row, 2 * column], axes[row, 2 * column + 1]
                for method in methods:
                    cells = [found[name, kind, method, m] for m in sizes]
                    look = {"color": COLOURS.get(method, "black"), "lw": 2 if method == "optimal" else 1.2}
                    if method in THEIRS:
                        look["ls"] = {"RBFSampler": ":", "Nystroem": "--"}[method]
                    by_size.plot(sizes, [cell[0] for cell in cells], marker="o", ms=3, label=method, **look)
                    by_time.plot(
                        [1e3 * cell[2] for cell in cells], [cell[0] for cell in cells], marker="o", ms=3, **look
                    )
                powers(by_size, "features", sizes)
                by_time.set(xlabel="fit and predict, ms of processor")
                by_time.set_xlim(left=0)
                for ax in (by_size, by_time):
                    ax.axhline(bounds[name, kind][0], color="black", lw=1)
                    ax.set_ylim(0.9 * bounds[name, kind][0], min(1.15, ax.get_ylim()[1]))
                by_size.set(title=f"{name}, {'Nadaraya-Watson' if kind == 'nw' else 'ridge'}", ylabel="relative error")
        marks = {}
        for ax in axes[:, 0]:
            marks |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        axes[1, 3].legend(marks.values(), marks.keys(), frameon=False, fontsize=6, loc="upper right")


if __name__ == "__main__":
    typer.run(main)
