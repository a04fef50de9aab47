"""Estimators beside those of scikit-learn."""

from collections.abc import Iterator
from functools import partial

import numpy as np
from sklearn.kernel_approximation import Nystroem, RBFSampler
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline

from benchmarks.measure import Table, compare
from favorsharp.sklearn import FeatureRidge, NadarayaWatsonRegressor, RandomFeatures


def tables(*, quick: bool = False) -> Iterator[Table]:
    """All rows of this script."""
    yield from features(quick)
    yield from regressors(quick)


def features(quick: bool) -> Iterator[Table]:
    """Fit and transform, on few and on many columns."""
    n, m = (200, 16) if quick else (20_000, 256)
    for d in (8,) if quick else (8, 784):
        x = np.random.default_rng(0).standard_normal((n, d), dtype=np.float32)
        common = {"n_components": m, "random_state": 0}
        ours, theirs = RandomFeatures(method="optimal", **common), RBFSampler(gamma=1 / d, **common)
        fits = {"favorsharp": partial(ours.fit, x), "RBFSampler": partial(theirs.fit, x)}
        least = 2.0 * n * d * d
        yield compare(f"RandomFeatures, optimal: fit of {n} x {d}", fits, flops=least, part=1 / 1.5)
        ours.fit(x), theirs.fit(x)
        maps = {"favorsharp": partial(ours.transform, x), "RBFSampler": partial(theirs.transform, x)}
        yield compare(
            f"RandomFeatures, optimal: transform of {n} x {d}", maps, flops=2.0 * n * d * m, moved=4.0 * n * (d + m),
            part=1 / 1.5, label=f"RandomFeatures of {n:,} x {d}",
        )  # fmt: skip
        chosen, centres = RandomFeatures(**common), Nystroem(gamma=1 / d, **common)
        both = {"favorsharp": partial(chosen.fit_transform, x), "Nystroem": partial(centres.fit_transform, x)}
        yield compare(f"RandomFeatures, auto: fit and transform of {n} x {d}", both, rounds=3, goal=None)


def regressors(quick: bool) -> Iterator[Table]:
    """Kernel ridge regression with a choice among penalties, and a smoother: fit and predict."""
    n, m = (200, 16) if quick else (20_000, 256)
    x = np.random.default_rng(0).standard_normal((n, 8))
    y = np.sin(x[:, 0]) * x[:, 1] + x[:, 2] ** 2 / 2
    alphas = np.geomspace(1e-4, 1e2, 19)
    ridge = FeatureRidge(n_components=m, alpha=alphas, random_state=0)
    pipeline = make_pipeline(Nystroem(n_components=m, gamma=1 / 8, random_state=0), RidgeCV(alphas))
    sides = {"favorsharp": partial(ridge.fit, x, y), "Nystroem and RidgeCV": partial(pipeline.fit, x, y)}
    label = f"FeatureRidge, {n:,} points"
    yield compare(f"FeatureRidge, 19 penalties: fit of {n} x 8", sides, goal=1.0, rounds=3, label=label)
    smooth, exact = NadarayaWatsonRegressor(random_state=0), NadarayaWatsonRegressor(method="exact")
    sides = {
        "favorsharp": lambda: smooth.fit(x, y).predict(x[:2000]),
        "exact sums (ours)": lambda: exact.fit(x, y).predict(x[:2000]),
    }
    label = f"NadarayaWatsonRegressor, {n:,} points"
    yield compare(f"NadarayaWatsonRegressor: fit of {n} x 8, predict of 2000", sides, goal=1.0, rounds=3, label=label)
