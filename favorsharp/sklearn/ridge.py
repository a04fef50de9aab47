"""Kernel ridge regression on features: the public estimator `FeatureRidge`."""

from collections.abc import Iterable
from functools import partial
from typing import Any, Self

import numpy as np
from sklearn.base import (
    RegressorMixin,
)
from sklearn.utils._array_api import (  # private, and imported in this folder only
    check_same_namespace,
)
from sklearn.utils.validation import _check_sample_weight, check_is_fitted

from favorsharp._arrays import (
    cast,
    namespace_of,
    on_device_of,
    statistics_dtype,
)
from favorsharp._checks import check_in_memory
from favorsharp._chunks import is_chunked
from favorsharp.ops.tiles import tiles_of
from favorsharp.ridge import RidgePath, joined, ridge_path, sums_of
from favorsharp.sklearn.base import KernelEstimator
from favorsharp.sklearn.chunks import mapped, reduced
from favorsharp.sklearn.random_features import RandomFeatures


class FeatureRidge(RegressorMixin, KernelEstimator):  # numpydoc ignore=PR02
    """Ridge regression on features of the Gaussian kernel: kernel ridge regression in time linear in the points.

    The penalty is chosen by exact leave-one-out errors, which all come from one decomposition. Features are made and
    summed in blocks, so the memory beyond the data does not grow with the number of points.

    Parameters
    ----------
    method : str or callable, default="auto"
        As in `RandomFeatures`.
    alpha : float, sequence of floats or None, default=None
        The penalty, 0 or more, of the square length of the coefficients; the intercept has none. Of several, the one
        with the least leave-one-out square error is used. None is 19 values from 1e-7 to 100.
    n_components : int, default=256
    gamma : {"scale"}, float or None, default=None
        As in `RandomFeatures`.
    draw : str, default="orthogonal"
        As in `RandomFeatures`.
    random_state : int, RandomState or None, default=None

    Attributes
    ----------
    alpha_ : float
        The penalty that was used.
    alpha_errors_ : array, shape (n_alphas,)
        Only with several penalties: the mean square leave-one-out error of each, in the order given. After
        `partial_fit`, which does not keep earlier points, it is the estimate of generalised cross-validation.
    coef_ : array, shape (n_components,) or (n_targets, n_components)
    intercept_ : float or array, shape (n_targets,)
    features_ : RandomFeatures
    gamma_ : float
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Only if the data have feature names.

    Examples
    --------
    >>> import numpy as np
    >>> from favorsharp.sklearn import FeatureRidge
    >>> X = np.random.default_rng(0).uniform(-3, 3, (500, 1))
    >>> model = FeatureRidge(n_components=64, random_state=0).fit(X, np.sin(2 * X[:, 0]))
    >>> bool(model.score(X, np.sin(2 * X[:, 0])) > 0.99)
    True
    """

    _sums: Any

    def __init__(
        self,
        method: Any = "auto",
        alpha: Any = None,
        n_components: int = 256,
        gamma: Any = None,
        draw: Any = "orthogonal",
        random_state: Any = None,
    ) -> None:
        self.method = method
        self.alpha = alpha
        self.n_components = n_components
        self.gamma = gamma
        self.draw = draw
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:  # noqa: N803
        """Fit to points X, shape (n, d), and values y, shape (n,) or (n, e); earlier blocks are discarded.

        The optional sample_weight, shape (n,), holds weights of 0 or more; a weight of 3 has the same effect on the
        regression as repeating the point three times; the features do not depend on the weights. A point is left out
        with all its weight. With a dask array X, chunks of rows are summed where dask computes them, and joined; y and
        sample_weight may be dask arrays, too.
        """
        self._sums = None
        penalties = self._penalties()
        if is_chunked(X):
            return self._fit_chunks(X, y, sample_weight, penalties)
        check_in_memory(X=X, y=y, sample_weight=sample_weight)
        data = self._add(X, y, sample_weight)
        path = ridge_path(self._sums, penalties)
        errors = None
        if len(penalties) > 1:
            errors = sum(path.left_out(*block) for block in _blocks(self.features_, *data))
        self._finish(path, penalties, errors)
        return self

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:  # noqa: N803
        """Add a further block of points and values; the first block determines the features.

        The penalty is chosen anew, by generalised cross-validation, because earlier points are not kept.
        """
        check_in_memory(X=X, y=y, sample_weight=sample_weight)
        penalties = self._penalties()
        self._add(X, y, sample_weight)
        path = ridge_path(self._sums, penalties)
        self._finish(path, penalties, None if len(penalties) == 1 else path.generalised())
        return self

    def predict(self, X: Any) -> Any:  # noqa: N803
        """Predict the values at X, shape (n, d) -> (n,) or (n, e); of a dask array, lazily."""
        check_is_fitted(self)
        if is_chunked(X):
            return mapped(self.predict, X, None if self._single else self.coef_.shape[0], self._dtype)
        check_same_namespace(X, self, attribute="coef_", method="predict")
        X = self._points(X, reset=False)  # noqa: N806
        coefficients = self.coef_[None, :] if self._single else self.coef_
        transpose = namespace_of(X).matrix_transpose(coefficients)
        tiles = tiles_of(X.shape[0], self.n_components, ())  # their features fit into little memory
        out = [cast(self.features_.transform(X[a:b, ...]), transpose.dtype) @ transpose for a, b in tiles]
        found = namespace_of(X).concat(out) + self.intercept_
        return cast(found[:, 0] if self._single else found, self._dtype)

    def _penalties(self) -> list[float]:
        given = [10.0 ** (power / 2) for power in range(-14, 5)] if self.alpha is None else self.alpha
        penalties = np.atleast_1d(np.asarray(given))
        if penalties.ndim != 1 or penalties.size == 0 or penalties.dtype.kind not in "iuf":
            raise TypeError(f"alpha must be a number, a sequence of numbers or None, got {self.alpha!r}")
        if not (np.isfinite(penalties).all() and (penalties >= 0).all()):
            raise ValueError(f"alpha must be finite and 0 or more, got {self.alpha!r}")
        return [float(penalty) for penalty in penalties]

    def _add(self, x: Any, y: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
        """Add a block to the sums, and return its points, values and weights."""
        first = not self.__sklearn_is_fitted__()
        x, y, weight = self._checked(x, y, sample_weight, first)
        if first:
            self._start(x, y)
        data = x, y[:, None] if y.ndim == 1 else y, weight
        held = _summed(self.features_, *data)
        self._sums = held if first else _joined_all([self._sums, held])
        return data

    def _checked(self, x: Any, y: Any, sample_weight: Any, first: bool) -> tuple[Any, Any, Any]:
        """The points, values and weights of a block, without points of weight 0."""
        x, y = self._points(x, reset=first, y=y, multi_output=True, y_numeric=True)
        wide = statistics_dtype(x)
        y = cast(namespace_of(x).asarray(y, **on_device_of(x)), wide)
        weight = namespace_of(x).ones_like(x[:, 0], dtype=wide)
        if sample_weight is not None:
            weight = _check_sample_weight(
                sample_weight, x, dtype=wide, ensure_non_negative=True, allow_all_zero_weights=not first
            )
            x, y, weight = x[weight > 0], y[weight > 0], weight[weight > 0]
        return x, y, weight

    def _start(self, x: Any, y: Any) -> None:
        """Make the features from points, which may be a dask array."""
        self._single, self._dtype = y.ndim == 1, x.dtype
        names = ("method", "n_components", "gamma", "draw", "random_state")
        self.features_ = RandomFeatures(**{name: getattr(self, name) for name in names}).fit(x)
        self.gamma_ = self.features_.gamma_

    def _fit_chunks(self, x: Any, y: Any, sample_weight: Any, penalties: list[float]) -> Self:
        """Fit to dask arrays: one pass for the sums, and with several penalties one for the errors."""
        for name, a in (("y", y), ("sample_weight", sample_weight)):
            if a is not None and len(a) != len(x):
                raise ValueError(f"{name} has {len(a)} rows, and X has {len(x)}; accepted: as many")
        self._start(x, y)
        self.n_features_in_, self._dtype = x.shape[1], self.features_.feature_map_.projection.dtype
        data = x, y, sample_weight
        self._sums = reduced(self._sums_of_chunk, _joined_all, *data)
        if self._sums is None:
            raise ValueError("sample_weight must have at least one non-zero number, got zeros only")
        path, errors = ridge_path(self._sums, penalties), None
        if len(penalties) > 1:
            errors = reduced(partial(self._errors_of_chunk, path), sum, *data)
        self._finish(path, penalties, errors)
        return self

    def _sums_of_chunk(self, x: Any, y: Any, weight: Any) -> Any:
        return _summed(self.features_, *self._of_chunk(x, y, weight))

    def _errors_of_chunk(self, path: RidgePath, x: Any, y: Any, weight: Any) -> Any:
        return sum(path.left_out(*block) for block in _blocks(self.features_, *self._of_chunk(x, y, weight)))

    def _of_chunk(self, x: Any, y: Any, weight: Any) -> tuple[Any, Any, Any]:
        return self._checked(x, y, None if weight is None else weight[:, 0], False)

    def _finish(self, path: RidgePath, penalties: list[float], errors: Any) -> None:
        best = 0
        if errors is not None:
            xp = namespace_of(errors)
            self.alpha_errors_ = xp.mean(errors, axis=1) / self._sums.weight[0, 0]
            best = int(xp.argmin(self.alpha_errors_))
        self.alpha_ = penalties[best]
        coefficients, intercept = path.coefficients(best)
        self.coef_ = coefficients[:, 0] if self._single else namespace_of(coefficients).matrix_transpose(coefficients)
        self.intercept_ = intercept[0, 0] if self._single else intercept[0, :]

    def __sklearn_is_fitted__(self) -> bool:
        return getattr(self, "_sums", None) is not None

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _summed(features: RandomFeatures, x: Any, y: Any, weight: Any) -> Any:
    """The sums over all blocks; None if there is no point."""
    return _joined_all(sums_of(*block) for block in _blocks(features, x, y, weight))


def _joined_all(parts: Iterable[Any]) -> Any:
    """Sums joined one after the other, so that two of them are held at a time; None stands for those of no points."""
    held = None
    for part in parts:
        held = part if held is None else held if part is None else joined(held, part)
    return held


def _blocks(features: RandomFeatures, x: Any, y: Any, weight: Any) -> Any:
    """Features, values and weights of blocks of points."""
    for a, b in tiles_of(x.shape[0], features.n_components, ()):
        if a < b:
            yield cast(features.transform(x[a:b, ...]), y.dtype), y[a:b, ...], weight[a:b, ...]
