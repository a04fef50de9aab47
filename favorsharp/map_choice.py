"""Chooses a feature map for points: candidates are made and compared with the exact kernel on other points.

`favorsharp.sklearn.RandomFeatures(method="auto")` calls this module.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from favorsharp._arrays import to_host
from favorsharp._typing import Array
from favorsharp.exact import kernel_matrix
from favorsharp.features import FeatureMap
from favorsharp.methods import FOR_KERNELS

PURPOSES = ("inner product", "smoothing")
"""What features may be for: products that are near the kernel, or near the kernel with rows divided by their sums."""

SAMPLE = 256
"""The number of points at which candidates are to be compared."""

WIDE = 256
"""With more columns `optimal` is not tried: its fit alone would take longer than all the rest."""

CLEAR = 0.5
"""A first candidate with less than this share of the error that is expected of `trig` is chosen without the others."""

MARGIN = 0.5
"""Others must be better than the first candidate by this share over the root of the number of points."""


@dataclass(frozen=True)
class Choice:
    """The chosen map, the method that made it, and why."""

    feature_map: FeatureMap
    method: str
    reason: str


def choose_map(points: Array, n: int, scale: float, m: int, purpose: str, make: Callable[[str], FeatureMap]) -> Choice:
    """The map of m features with the least error for the Gaussian kernel of n points like those given, (k, d).

    `make` makes the map of a method from other points, so that no method has an advantage.
    """
    exact = to_host(kernel_matrix(points, points, kernel="gaussian", scale=scale)).astype(np.float64)
    expected = _expected_of_trig(exact, m, n)
    error = smoothing_error if purpose == "smoothing" else product_error
    made, errors = {}, {}
    for method in FOR_KERNELS:
        if (method == "trig" and m % 2) or (method == "optimal" and points.shape[1] > WIDE):
            continue
        made[method] = make(method)
        features = to_host(made[method].query(points))
        errors[method] = error((features @ features.T).astype(np.float64), exact, n)
        if purpose != "smoothing" and errors[method] < CLEAR * expected:
            break
    first, best = next(iter(errors)), min(errors, key=lambda method: errors[method])
    if errors[best] > (1 - MARGIN / len(exact) ** 0.5) * errors[first]:
        best = first
    found = ", ".join(f"{method} {value:.3g}" for method, value in errors.items())
    what = "rows of the smoothing matrix" if purpose == "smoothing" else "the kernel matrix"
    reason = f"relative error of {what} on {len(exact)} points: {found}"
    if len(errors) == 1 and best == FOR_KERNELS[0] and purpose != "smoothing":
        reason += f"; about {expected:.2g} is expected of trig"
    return Choice(made[best], best, reason)


def product_error(found: Any, exact: Any, n: int) -> float:
    """The relative error of the kernel matrix of all n points. The diagonal of a sample would count too much in it."""
    return float(np.sqrt(square_sum(found - exact, n) / square_sum(exact, n)))


def square_sum(matrix: Any, n: int) -> float:
    """The sum of squares of the matrix of n points, estimated from the matrix of a sample."""
    own = np.mean(np.diagonal(matrix) ** 2)
    size = len(matrix)
    others = (np.sum(matrix**2) - size * own) / (size * (size - 1)) if size > 1 else 0.0
    return float(n * own + n * (n - 1.0) * others)


def _expected_of_trig(exact: Any, m: int, n: int) -> float:
    """The expected error of iid Fourier features, whose products have the variance (1 - K^2)^2 / m."""
    return float(np.sqrt(square_sum((1 - exact**2) / np.sqrt(m), n) / square_sum(exact, n)))


def smoothing_error(found: Any, exact: Any, n: int) -> float:
    """The root mean square of the relative errors of rows of the kernel matrix, each divided by its sum.

    A row whose error exceeds that of zeros, or whose sum is not positive, counts like zeros. Otherwise a single row
    with a sum near 0 would decide the comparison. All rows have the same weight: rows of points far out have the
    largest entries, and a sample may hold one of these or none. `n`, the number of points, is not used.
    """
    total = found.sum(axis=1, keepdims=True)
    wanted = exact / exact.sum(axis=1, keepdims=True)
    weights = np.where(total > 0, found / np.where(total > 0, total, 1.0), 0.0)
    errors = np.sum((weights - wanted) ** 2, axis=1) / np.sum(wanted**2, axis=1)
    return float(np.sqrt(np.mean(np.minimum(errors, 1.0))))
