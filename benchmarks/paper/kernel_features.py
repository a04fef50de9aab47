"""Features of the Gaussian kernel beside scikit-learn's: `python -m benchmarks.paper.kernel_features`.

A quarter of the rows, at most 1,000, is held out, and at most 4,000 of the others are fitted; columns are standardised
by these. There are two relative errors. One is that of the kernel matrix of as many rows as were fitted, estimated from
held-out rows. The other is for smoothing: the error of held-out rows of the matrix after division by their sums (root
mean square over rows). A row counts with an error of 1, that of an estimate of zeros, if its own error is larger.
"""

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import Progress
from sklearn import datasets as shipped
from sklearn.kernel_approximation import Nystroem, RBFSampler
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from benchmarks.paper.classification import NAMES
from benchmarks.paper.page import DOCS, emphasised, stamp, table, write
from favorsharp import datasets
from favorsharp.map_choice import PURPOSES, product_error, smoothing_error
from favorsharp.sklearn import RandomFeatures

OURS = ("nystrom", "trig", "optimal")
COLUMNS = ("RBFSampler", "Nystroem", "auto", *OURS)


def normal(rows: int = 50_000) -> tuple[np.ndarray, np.ndarray]:
    """Normal points of 8 columns, and a smooth function of three of them with noise."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 8))
    return x, np.sin(x[:, 0]) * x[:, 1] + x[:, 2] ** 2 / 2 + 0.1 * rng.standard_normal(rows)


def regressions() -> Iterator[tuple[str, np.ndarray, np.ndarray, float, float, int]]:
    """Name, points, values, gamma, penalty and the number of held-out rows."""
    yield "friedman1", *shipped.make_friedman1(4000, n_features=10, noise=1.0, random_state=0), 0.1, 0.1, 1000
    x, y = shipped.load_digits(return_X_y=True)
    for gamma in (1 / 64, 0.1 / 64):
        yield "digits", x, y.astype(float), gamma, 0.1, 450
    yield "normal", *normal(), 1 / 8, 1e-3, 2000


def points_of() -> dict[str, np.ndarray]:
    """The points of each set."""
    found = {"friedman1": shipped.make_friedman1(4000, n_features=10, random_state=0)[0], "normal": normal(5000)[0]}
    found |= {name: getattr(shipped, f"load_{name}")().data for name in ("digits", "breast_cancer", "wine", "diabetes")}
    return found | {name: getattr(datasets, f"fetch_{name}")().data for name in NAMES}


ERRORS = dict(zip(PURPOSES, (product_error, smoothing_error), strict=True))


def errors(train: np.ndarray, test: np.ndarray, gamma: float, m: int, seed: int) -> dict[tuple[str, str], float]:
    """The error for each purpose and column."""
    exact = rbf_kernel(test, gamma=gamma)
    common: dict[str, Any] = {"n_components": m, "gamma": gamma, "random_state": seed}
    made: dict[str, Any] = {name: RandomFeatures(method=name, **common) for name in OURS}
    made |= {"RBFSampler": RBFSampler(**common), "Nystroem": Nystroem(**common)}
    found = {}
    for name, features in made.items():
        f = features.fit(train).transform(test)
        for purpose in PURPOSES:
            found[purpose, name] = ERRORS[purpose](f @ f.T, exact, len(train))
    for purpose in PURPOSES:
        chosen = RandomFeatures(purpose=purpose, **common).fit(train).method_
        found[purpose, "auto"] = found[purpose, chosen]
    return found


def main(
    output: Annotated[Path, typer.Option(help="The folder of the documentation.")] = DOCS,
    seeds: Annotated[int, typer.Option(help="Splits and draws of each set.")] = 5,
    m: Annotated[int, typer.Option(help="Features.")] = 256,
    regression_seeds: Annotated[int, typer.Option(help="Splits and draws of each regression; 0: none.")] = 20,
    names: Annotated[list[str] | None, typer.Argument(help="Sets; all by default.")] = None,
) -> None:
    """Write the tables."""
    warnings.filterwarnings("ignore", message="n_components > n_samples")
    start = time.perf_counter()
    sets = {name: x for name, x in points_of().items() if name in (names or (name,))}
    lines: list[str] = []
    means: dict[tuple[str, str, str], dict[tuple[str, str], float]] = {}
    with Progress() as progress:
        task = progress.add_task("kernel features", total=2 * len(sets) * seeds + regression_seeds)
        for name, x in sets.items():
            for factor in (1, 8):
                gamma, runs = factor / x.shape[1], []
                for seed in range(seeds):
                    rows = np.random.default_rng(seed).permutation(len(x))
                    held = min(1000, len(x) // 4)
                    scaler = StandardScaler().fit(x[rows[held : held + 4000]])
                    train, test = scaler.transform(x[rows[held : held + 4000]]), scaler.transform(x[rows[:held]])
                    runs.append(errors(train, test, gamma, m, seed))
                    progress.advance(task)
                means[name, f"{factor}/d"] = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
        if regression_seeds:
            lines += _regressions(regression_seeds, m, progress, task)
    for purpose in PURPOSES:
        rows = []
        for (name, gamma), found in means.items():
            cells = [found[purpose, column] for column in COLUMNS]
            behind = 100 * (found[purpose, "auto"] / min(cells) - 1)
            rows.append([name, gamma, *emphasised(cells, ".3g"), f"{behind:.1f}"])
        lines += [f'**Relative error, `purpose="{purpose}"`, mean of {seeds} seeds**', ""]
        lines += table(["data", "gamma", *(f"`{name}`" for name in COLUMNS), "`auto` behind the best, %"], rows)
    write("kernel-features", [stamp(time.perf_counter() - start), "", *lines], output)


def _regressions(seeds: int, m: int, progress: Progress, task: Any) -> list[str]:
    """The table of ridge regressions."""
    scores: dict[tuple[str, str], list[tuple[float, float]]] = {}
    makers = {"RBFSampler": RBFSampler, "Nystroem": Nystroem, "auto": RandomFeatures}
    for seed in range(seeds):
        for name, x, y, gamma, alpha, held in regressions():
            title = f"{name}, {gamma:.3g}, {alpha:g}"
            x, test, y, wanted = train_test_split(x, y, test_size=held, random_state=seed)
            scaler = StandardScaler().fit(x)
            x, test = scaler.transform(x), scaler.transform(test)
            exact = rbf_kernel(test, gamma=gamma)
            for column, make in makers.items():
                features = make(gamma=gamma, n_components=m, random_state=seed)
                model = Ridge(alpha=alpha).fit(features.fit_transform(x), y)
                f = features.transform(test)
                pair = r2_score(wanted, model.predict(f)), product_error(f @ f.T, exact, len(x))
                scores.setdefault((title, column), []).append(pair)
        progress.advance(task)
    rows = []
    for title in dict.fromkeys(title for title, _ in scores):
        pairs = [np.array(scores[title, column]) for column in makers]
        spread = [pair[:, 0].std(ddof=1) / seeds**0.5 if seeds > 1 else 0.0 for pair in pairs]
        best = emphasised([pair[:, 0].mean() for pair in pairs], ".3f", least=False)
        cells = [f"{text} ± {se:.3f}" for text, se in zip(best, spread, strict=True)]
        rows.append([title, *cells, *emphasised([pair[:, 1].mean() for pair in pairs], ".3g")])
    header = ["data, gamma, alpha", *(f"$R^2$: `{name}`" for name in makers), *(f"error: `{name}`" for name in makers)]
    text = (
        f"**Ridge regression on held-out rows: mean of {seeds} seeds ± standard error; the error of the kernel matrix**"
    )
    return [text, "", *table(header, rows)]


if __name__ == "__main__":
    typer.run(main)
