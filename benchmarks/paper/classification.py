"""Kernel classification on eight UCI sets: `python -m benchmarks.paper.classification`.

Nadaraya-Watson estimates with the Gaussian kernel: the class with the largest kernel-weighted sum of one-hot labels.
Rows are permuted with seed 42. The last 5 % are the test rows, the 5 % before them the validation rows, and the others
are the training rows. Columns are standardised by the training rows. Each method gets its own bandwidth, which is
chosen on the validation rows.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import Progress, track

import favorsharp as fs
from benchmarks.paper.page import COLOURS, DOCS, emphasised, picture, stamp, table, write
from favorsharp import datasets
from favorsharp.sklearn import NadarayaWatsonClassifier

NAMES = ("abalone", "banknote", "car", "yeast", "cmc", "nursery", "wifi", "chess")
METHODS = ("trig", "poisson", "geometric", "posrf", "hyperbolic", "oprf", "saderf", "aderf", "sderf", "optimal",
           "relu", "elu")  # fmt: skip
WITHOUT_DRAWS = ("nystrom", "landmarks")
"""Methods that choose points, which are biased."""
ALL = (*METHODS, *WITHOUT_DRAWS)
DRAWS = ("orthogonal", "iid", "simplex", "sobol", "antithetic")
WIDTHS = tuple(2.0 ** np.arange(-4, 2.51, 0.5))
"""Factors of the standardised points: the candidates for the bandwidth."""

PUBLISHED_WIDTHS = dict(zip(NAMES, (0.4133, 1.0645, 0.7766, 0.9092, 0.4839, 0.1879, 0.2200, 0.2575), strict=True))
"""The widths of the authors of the simplex draw (arXiv 2301.13856), for the protocol without validation."""

INDEPENDENT = {
    "abalone": (18.8, 13.0, 17.8, 17.4, 17.5, 17.7, 18.0, 18.1, 18.0),
    "banknote": (94.1, 66.2, 91.0, 85.1, 91.7, 91.3, 92.9, 91.5, 91.7),
    "car": (86.0, 65.1, 40.4, 68.0, 72.3, 71.2, 70.1, 72.2, 72.4),
    "yeast": (44.6, 28.4, 39.5, 34.4, 38.6, 36.8, 38.6, 41.6, 39.9),
    "cmc": (50.7, 46.6, 45.9, 44.0, 47.3, 46.8, 45.5, 48.0, 46.7),
    "nursery": (82.4, 31.3, 81.4, 72.4, 76.7, 73.1, 78.9, 75.3, 75.2),
    "wifi": (94.0, 15.0, 93.1, 85.5, 87.5, 90.7, 86.1, 88.8, 87.9),
    "chess": (20.9, 16.5, 21.7, 20.1, 20.2, 19.3, 20.3, 21.3, 21.1),
}
"""Per cent right, measured by other code with 20 draws: exact, majority, then COMPARED (the last one not centred)."""
COMPARED = ("trig", "posrf", "oprf", "saderf", "aderf", "sderf", "optimal")


@dataclass(frozen=True)
class Split:
    """Training and test points in float32, their class indices, and the one-hot labels of the training points."""

    x: np.ndarray
    labels: np.ndarray
    y: np.ndarray
    known: np.ndarray
    shares: np.ndarray

    @property
    def majority(self) -> float:
        return float(np.mean(self.labels == np.bincount(self.known).argmax()))


def splits(name: str) -> tuple[Split, Split, Split]:
    """The splits for tuning, for the test, and for the test with the validation rows in the training set."""
    data = getattr(datasets, f"fetch_{name}")()
    order = np.random.default_rng(42).permutation(len(data.data))
    points, classes = data.data[order], np.searchsorted(data.target_names, data.target)[order]
    n = len(points)
    test = n - int(0.05 * n)
    validation = test - int(0.05 * n)

    def split(train: slice, asked: slice) -> Split:
        mean, deviation = points[train].mean(0), points[train].std(0)
        scaled = ((points - mean) / np.where(deviation > 0, deviation, 1.0)).astype(np.float32)
        shares = np.eye(len(data.target_names), dtype=np.float32)[classes[train]]
        return Split(scaled[asked], classes[asked], scaled[train], classes[train], shares)

    return (
        split(slice(validation), slice(validation, test)),
        split(slice(validation), slice(test, n)),
        split(slice(test), slice(test, n)),
    )


def exact(split: Split, width: float) -> float:
    """Share of right answers, in per cent, by exact sums."""
    model = NadarayaWatsonClassifier(method="exact", gamma=width**2 / 2)
    return 100 * float(model.fit(split.y, split.known).score(split.x, split.labels))


def by_features(split: Split, method: str, width: float, seeds: range, *, draw: str = "orthogonal", m: int = 128,
                ridge: float | None = None) -> np.ndarray:  # fmt: skip
    """Shares of right answers, in per cent, one for each seed."""
    dtype = np.float64 if method in ("trig", "poisson", "geometric", "nystrom") else np.float32
    x, y = split.x.astype(dtype), split.y.astype(dtype)
    if method not in WITHOUT_DRAWS:
        parameters = fs.fit(x, y, method=method, kernel="gaussian", scale=width**2, ridge=ridge)
    found = []
    for seed in seeds:
        if method == "landmarks":
            model = NadarayaWatsonClassifier("landmarks", n_components=m, gamma=width**2 / 2, random_state=seed)
            found.append(100 * model.fit(y, split.known).score(x, split.labels))
            continue
        if method == "nystrom":
            feature_map = fs.fit_map(y, y, m, method=method, kernel="gaussian", scale=width**2, rng=seed)
        else:
            feature_map = fs.feature_map(parameters, m, draw=draw, rng=seed)
        # only the order of a row's sums counts; signed maps give sums, positive ones give means, which never underflow
        estimate = fs.nadaraya_watson if feature_map.positive else fs.kernel_matvec
        sums = estimate(x, y, split.shares.astype(x.dtype), feature_map)
        found.append(100 * np.mean(np.argmax(sums, axis=1) == split.labels))
    return np.array(found)


def summary(found: np.ndarray) -> tuple[float, float]:
    return float(found.mean()), float(found.std(ddof=1) / len(found) ** 0.5) if len(found) > 1 else 0.0


def main(
    output: Annotated[Path, typer.Option(help="The folder of the documentation.")] = DOCS,
    draws: Annotated[int, typer.Option(help="Draws of each setting.")] = 50,
    tuning_draws: Annotated[int, typer.Option(help="Draws that a bandwidth is chosen by.")] = 5,
    m: Annotated[int, typer.Option(help="Features.")] = 128,
    only: Annotated[list[str] | None, typer.Option(help=f"Methods, of {', '.join(ALL)}; all by default.")] = None,
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(NAMES)}; all by default.")] = None,
) -> None:
    """Write the tables and the picture."""
    start = time.perf_counter()
    names, methods = names or list(NAMES), tuple(only or ALL)
    bounds: dict[str, tuple[float, float, float]] = {}
    widths: dict[tuple[str, str], float] = {}
    found: dict[tuple[str, str, str], np.ndarray] = {}
    anchored: dict[tuple[str, str], np.ndarray] = {}
    with Progress() as progress:
        task = progress.add_task("classification", total=len(names) * (len(methods) + len(COMPARED)))
        for name in names:
            tune, test, whole = splits(name)
            best = max(WIDTHS, key=lambda width, tune=tune: exact(tune, width))
            bounds[name] = (best, exact(test, best), 100 * test.majority)
            for method in methods:
                widths[name, method] = max(
                    WIDTHS,
                    key=lambda width, method=method, tune=tune: by_features(
                        tune, method, width, range(1000, 1000 + tuning_draws), m=m
                    ).mean(),
                )
                for draw in DRAWS if method in METHODS else DRAWS[:1]:
                    found[name, method, draw] = by_features(
                        test, method, widths[name, method], range(draws), draw=draw, m=m
                    )
                progress.advance(task)
            for method in set(COMPARED) & set(methods):
                anchored[name, method] = by_features(whole, method, PUBLISHED_WIDTHS[name], range(20), m=m, ridge=1e-3)
                progress.advance(task)
    lines = _main_table(names, methods, bounds, widths, found)
    if methods == ALL:
        lines += _draws_table(names, found)
        lines += _comparison(names, anchored, {name: splits(name)[2] for name in track(names, "exact")})
        _draw(names, bounds, found, output)
    write("classification", [stamp(time.perf_counter() - start), "", *lines], output)


def _main_table(names, methods, bounds, widths, found) -> list[str]:
    means = {(name, method): summary(found[name, method, "orthogonal"]) for name in names for method in methods}
    best = {name: max(means[name, method][0] for method in methods) for name in names}
    rows = []
    for title, place in (("exact", 1), ("majority", 2)):
        values = [bounds[name][place] for name in names]
        rows.append([title, *(f"{value:.1f}" for value in values), f"{np.mean(values):.1f}"])
    for method in methods:
        cells = []
        for name in names:
            mean, error = means[name, method]
            cells.append(f"**{mean:.1f}** ± {error:.1f}" if mean == best[name] else f"{mean:.1f} ± {error:.1f}")
        mean, error = summary(np.mean([found[name, method, "orthogonal"] for name in names], axis=0))
        rows.append([f"`{method}`", *cells, f"{mean:.1f} ± {error:.1f}"])
    lines = ["**Per cent right on the test rows, orthogonal draws: mean ± standard error over the draws**", ""]
    lines += table(["", *names, "mean"], rows)
    rows = [["exact", *(f"{bounds[name][0]:.3g}" for name in names)]]
    rows += [[f"`{method}`", *(f"{widths[name, method]:.3g}" for name in names)] for method in methods]
    lines += ["**The factor chosen for standardised points**", ""]
    return lines + table(["", *names], rows)


def _draws_table(names, found) -> list[str]:
    rows = []
    for method in METHODS:
        averages = [summary(np.mean([found[name, method, draw] for name in names], axis=0)) for draw in DRAWS]
        cells = emphasised([mean for mean, _ in averages], ".2f", least=False)
        rows.append([f"`{method}`", *(f"{cell} ± {se:.2f}" for cell, (_, se) in zip(cells, averages, strict=True))])
    return ["**Mean over the sets, by draw**", "", *table(["method", *(f"`{d}`" for d in DRAWS)], rows)]


def _comparison(names, anchored, whole) -> list[str]:
    ours = {
        "exact": [exact(whole[name], PUBLISHED_WIDTHS[name]) for name in names],
        "majority": [100 * whole[name].majority for name in names],
        **{f"`{method}`": [anchored[name, method].mean() for name in names] for method in COMPARED},
    }
    rows = []
    for place, (title, values) in enumerate(ours.items()):
        theirs = [INDEPENDENT[name][place] for name in names]
        pairs = zip([*values, np.mean(values)], [*theirs, np.mean(theirs)], strict=True)
        rows.append([title, *(f"{here:.1f} / {there:.1f}" for here, there in pairs)])
    return [
        "**The protocol without validation: this run / the independent one**",
        "",
        *table(["", *names, "mean"], rows),
    ]


def _draw(names, bounds, found, output) -> None:
    with picture("classification", output, nrows=2, ncols=4, figsize=(12, 5.4)) as axes:
        for ax, name in zip(axes.ravel(), names, strict=False):
            means = [summary(found[name, method, "orthogonal"]) for method in ALL]
            places = np.arange(len(ALL))
            ax.bar(places, [mean for mean, _ in means], yerr=[se for _, se in means],
                   color=[COLOURS[m] for m in ALL], error_kw={"lw": 1})  # fmt: skip
            ax.axhline(bounds[name][1], color="black", lw=1)
            ax.axhline(bounds[name][2], color="black", lw=1, ls=":")
            ax.set_ylim(bottom=0.7 * min(bounds[name][2], *(mean for mean, _ in means)))
            ax.set(title=name, ylabel="per cent right" if ax in axes[:, 0] else "")
            ax.set_xticks(places, ALL, rotation=90, fontsize=7)


if __name__ == "__main__":
    typer.run(main)
