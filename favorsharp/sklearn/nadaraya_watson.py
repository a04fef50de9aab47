"""Sums of weighted values: the public estimators `NadarayaWatsonRegressor` and `NadarayaWatsonClassifier`."""

from typing import Any, Self

import numpy as np
from sklearn.base import (
    ClassifierMixin,
    RegressorMixin,
)
from sklearn.utils._array_api import (  # private, and imported in this folder only
    check_same_namespace,
    get_namespace,
)
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted

from favorsharp._arrays import (
    cast,
    compute_dtype,
    dtype_name,
    from_host,
    named_dtype,
    namespace_of,
    on_device_of,
    statistics_dtype,
    to_host,
)
from favorsharp._checks import check_integer
from favorsharp._chunks import is_chunked
from favorsharp._values import astype
from favorsharp.exact import gaussian_means, kernel_matrix
from favorsharp.landmarks import landmarks
from favorsharp.landmarks.settings import GAUSSIAN_TILT
from favorsharp.landmarks.state import map_of_points, state_of_points
from favorsharp.methods import LANDMARKS, SIGNED, check_method
from favorsharp.moments import combine
from favorsharp.regression import gather, left_out, means, products
from favorsharp.sklearn.base import KernelEstimator

NARROW = ("float16", "bfloat16", "float32", "bool", "int8", "uint8", "int16", "uint16")
"""Dtypes of values that float32 holds without loss."""

NW_CANDIDATES = (LANDMARKS, "optimal")
"""The methods that Nadaraya-Watson estimators compare: these have non-negative weights."""

GRID = tuple(2.0**power for power in range(-4, 7))
"""The factors of the "scale" value that `gamma="auto_cv"` tries."""


class _NadarayaWatson(KernelEstimator):
    """The base of both Nadaraya-Watson estimators: kernel-weighted means from sums that are added up block by block."""

    _GAMMAS = ("scale", "auto_cv")

    def __init__(
        self,
        method: Any = "optimal",
        n_components: int = 256,
        gamma: Any = "scale",
        draw: Any = "orthogonal",
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.method = method
        self.n_components = n_components
        self.gamma = gamma
        self.draw = draw
        self.random_state = random_state
        self.verbose = verbose

    def _points(self, x: Any, *, reset: bool, **options: Any) -> Any:
        lazy = [name for name, a in (("X", x), ("y", options.get("y"))) if is_chunked(a)]
        if lazy:
            raise TypeError(
                f"{', '.join(lazy)} must be in memory, got dask arrays; accepted: one block of points after the other, "
                "in memory, in calls of partial_fit or predict"
            )
        return super()._points(x, reset=reset, **options)

    def _start(self, x: Any, v: Any, weight: Any) -> None:
        check_method(self.method, also=("auto", "exact", LANDMARKS))
        seed = self._seed()
        self.gamma_, self.method_ = self._bandwidth(x, weight), self.method
        gammas = [self.gamma_]
        if isinstance(self.gamma, str) and self.gamma == "auto_cv":
            gammas = [factor * self.gamma_ for factor in GRID]
        methods = NW_CANDIDATES if self.method == "auto" else (self.method,)
        if len(gammas) * len(methods) > 1:
            self.method_, self.gamma_ = self._tuned(x, v, seed, weight, methods, gammas)
        self._beside: Any = self._landmarks(self.gamma_, seed) if self.method_ in (LANDMARKS, *SIGNED) else None
        self._near: Any = None  # landmarks beside the sums of a signed map, for rows where these give no estimate
        if self.method_ == LANDMARKS:
            self.feature_map_: Any = self._beside
        elif self.method_ == "exact":
            self.feature_map_ = None
        else:
            self.feature_map_ = self._map(x, self.gamma_, seed, weight, method=self.method_)
        self._reference = x[:1, ...]  # the library, device and dtype of the fit
        self._sums: Any = None

    def _tuned(self, x: Any, v: Any, seed: int, weight: Any, methods: Any, gammas: list[float]) -> tuple[Any, float]:
        """The method and gamma whose leave-one-out estimates are closest to v; each pair costs a pass over the data."""
        from tqdm import tqdm

        host = to_host(v).astype(np.float64)
        size = float(np.abs(host).max()) or 1.0  # so that squares of errors do not overflow
        counts = np.ones((len(host), 1)) if weight is None else to_host(weight).astype(np.float64)[:, None]
        own = counts * host
        rest = counts.sum() - counts
        others = (own.sum(axis=0) - own) / np.where(rest > 0, rest, 1.0)
        errors: dict[tuple[Any, float], float] = {}
        pairs = [(method, gamma) for method in methods for gamma in gammas]
        for method, gamma in tqdm(pairs, desc="bandwidth", disable=not self.verbose):
            out = to_host(self._left_out(x, v, gamma, seed, weight, method))
            out = np.where(np.isnan(out), others, out)  # a point without neighbours gets the mean of all others
            error = ((out / size - host / size) ** 2).mean(axis=1)
            errors[method, gamma] = float(np.average(error, weights=counts[:, 0]))
        return min(pairs, key=lambda pair: errors[pair])

    def _left_out(self, x: Any, v: Any, gamma: float, seed: int, weight: Any, method: Any) -> Any:
        """The estimate at each point from all others; NaN where they have hardly any weight."""
        if method == "exact":
            return _exact_leave_one_out(x, v, gamma, weight)
        if method == LANDMARKS:
            made = map_of_points(x, self._landmarks(gamma, seed), weight)
        else:
            made = self._map(x, gamma, seed, weight, method=method)
        return left_out(x, v, astype(made, compute_dtype(namespace_of(x, v), x, v)), weight)

    def _landmarks(self, gamma: float, seed: int) -> Any:
        check_integer("n_components", self.n_components, 1)
        return landmarks(self.n_components, kernel="gaussian", scale=2 * gamma, tilt=GAUSSIAN_TILT, rng=seed)

    def _take(self, x: Any, v: Any, sample_weight: Any) -> None:
        """Add checked points and values, and unchecked weights; the first block chooses the map."""
        xp, first = namespace_of(x), not self.__sklearn_is_fitted__()
        weight = None
        if sample_weight is not None:
            weight = _check_sample_weight(
                sample_weight, x, dtype=statistics_dtype(x), ensure_non_negative=True, allow_all_zero_weights=not first
            )
            counted, range_of = weight > 0, xp.finfo(v.dtype)
            x, v, weight = x[counted], v[counted], weight[counted]
            if bool(xp.any((weight < float(range_of.smallest_normal)) | (weight > float(range_of.max)))):
                raise ValueError(f"sample_weight exceeds the range of {dtype_name(v)}, the dtype of the fit; divide it")
            if x.shape[0] == 0:
                return
        if first:
            self._start(x, v, weight)
        x, v, weight = (None if a is None else cast(a, self._reference.dtype) for a in (x, v, weight))
        held = self._sums
        if self.method_ == "exact":
            points = (x, v, xp.zeros_like(v[:, 0]) if weight is None else xp.log(weight))
            self._sums = points if held is None else tuple(map(xp.concat, zip(held, points, strict=True)))
            return
        if self.method_ == LANDMARKS:
            sums: Any = state_of_points(x, v, self.feature_map_, weight)
        else:
            sums = gather(x, v, self.feature_map_, weight)
        if self.method_ in SIGNED:
            near = state_of_points(x, v, self._beside, weight)
            self._near = near if held is None else combine(self._near, near)
        self._sums = sums if held is None else combine(held, sums)

    def _estimate(self, x: Any, method: str, finish: Any = means) -> Any:
        """The estimates at unchecked points. Where a signed map gives NaN, they are those of landmarks."""
        check_is_fitted(self)
        check_same_namespace(x, self, attribute="_reference", method=method)
        x = cast(self._points(x, reset=False), self._reference.dtype)
        if self.method_ == "exact":
            y, v, log_weight = self._sums
            weighted = bool(namespace_of(x).any(log_weight != 0))
            return gaussian_means(x, y, v, 2 * self.gamma_, log_weight if weighted else None)
        if self.method_ == LANDMARKS:
            return self._read(self._sums, x)
        out = finish(self._sums, x, self.feature_map_)
        lost = namespace_of(out).isnan(out)
        if self.method_ in SIGNED and bool(namespace_of(out).any(lost)):
            out = namespace_of(out).where(lost, self._read(self._near, x), out)
        return out

    def _read(self, state: Any, x: Any) -> Any:
        return gaussian_means(x, state.keys, state.values, 2 * self.gamma_, state.log_weight)

    def __sklearn_is_fitted__(self) -> bool:
        return getattr(self, "_sums", None) is not None


def _positive_shares(sums: Any, x: Any, feature_map: Any) -> Any:
    """Shares of the positive numerators, as the denominator of a signed map may be negative; NaN if there are none."""
    parts = products(sums, x, feature_map)
    xp = namespace_of(parts)
    parts = xp.clip(parts, 0.0, None)
    total = xp.sum(parts, axis=1, keepdims=True)
    return xp.where(total > 0, parts / xp.where(total > 0, total, 1.0), xp.nan)


def _exact_leave_one_out(x: Any, v: Any, gamma: float, weight: Any) -> Any:
    xp = namespace_of(x, v)
    n = x.shape[0]
    rows = max(1, (1 << 20) // n)
    where = xp.arange(n, **on_device_of(x))
    outs = []
    for a in range(0, n, rows):
        b = min(a + rows, n)
        weights = cast(kernel_matrix(x[a:b, :], x, kernel="gaussian", scale=2 * gamma), v.dtype)
        weights = xp.where(where[a:b, None] == where[None, :], 0.0, weights if weight is None else weights * weight)
        total = xp.sum(weights, axis=1, keepdims=True)
        outs.append(xp.where(total > 0, (weights @ v) / xp.where(total > 0, total, 1.0), xp.nan))
    return xp.concat(outs)


class NadarayaWatsonRegressor(RegressorMixin, _NadarayaWatson):  # numpydoc ignore=PR02
    """Nadaraya-Watson regression: kernel-weighted means of the training values, in time linear in the number of points.

    It computes and predicts in float32 if X is float32 and float32 can represent all values of the dtype of y;
    otherwise it uses float64.

    Parameters
    ----------
    method : str or callable, default="optimal"
        As in `favorsharp.fit`; "exact" for exact sums in quadratic time; or "landmarks", which replaces the points by
        n_components weighted ones. Landmarks are biased, but on continuous data their error is several times smaller.
        "auto" takes "landmarks" or "optimal", whichever has the smaller leave-one-out square error on the first block.
        With a signed method (`trig`, `poisson`, `geometric`) a row whose estimated denominator is not positive gets the
        estimate of n_components landmarks, which are kept, too: far from all points, the value of the nearest one.
        `favorsharp.nadaraya_watson` gives NaN.
    n_components : int, default=256
        Features or landmarks. `partial_fit` holds up to twice as many landmarks.
    gamma : {"scale", "auto_cv"} or float, default="scale"
        "scale" is 1 / (n_features X.var()). "auto_cv" tries multiples of it from 1/16 to 64, one pass over the data
        for each, and keeps the one with the smallest leave-one-out square error. `partial_fit` chooses gamma on its
        first block.
    draw : str, default="orthogonal"
        Not used with "exact" and "landmarks".
    random_state : int, RandomState or None, default=None
    verbose : bool, default=False
        Show a progress bar while "auto_cv" runs.

    Attributes
    ----------
    feature_map_ : FeatureMap, Landmarks or None
        None for "exact".
    gamma_ : float
    method_ : str or callable
        The method that is used.
    n_features_in_ : int

    Examples
    --------
    >>> import numpy as np
    >>> from favorsharp.sklearn import NadarayaWatsonRegressor
    >>> X = np.linspace(-3, 3, 500)[:, None]
    >>> model = NadarayaWatsonRegressor(gamma=20.0, random_state=0).fit(X, np.sin(X[:, 0]))
    >>> model.predict(X).shape
    (500,)
    >>> bool(model.score(X, np.sin(X[:, 0])) > 0.9)
    True
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:  # noqa: N803
        """Fit to points X, shape (n, d), and values y, shape (n,) or (n, e); earlier blocks are discarded.

        The optional sample_weight, shape (n,), holds weights of 0 or more; a weight of 3 has the same effect as
        repeating the point three times.
        """
        self._sums = None
        return self.partial_fit(X, y, sample_weight=sample_weight)

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:  # noqa: N803
        """Add a further block of points and values; the first block determines the bandwidth and the features."""
        first = not self.__sklearn_is_fitted__()
        X, y = self._points(  # noqa: N806
            X, reset=first, y=y, multi_output=True, y_numeric=True
        )
        if first:
            self._single = y.ndim == 1
        values = namespace_of(X).asarray(y, **on_device_of(X))
        dtype = X.dtype if dtype_name(values) in NARROW else statistics_dtype(X)
        values = cast(values, dtype)
        self._take(cast(X, dtype), values[:, None] if values.ndim == 1 else values, sample_weight)
        return self

    def predict(self, X: Any) -> Any:  # noqa: N803
        """Estimate the values at X, shape (n, d) -> (n,) or (n, e)."""
        out = self._estimate(X, "predict")
        return out[:, 0] if self._single else out

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True  # a local mean is weak in many dimensions
        tags.target_tags.multi_output = True
        return tags


class NadarayaWatsonClassifier(ClassifierMixin, _NadarayaWatson):
    """Classification by kernel-weighted shares of the classes, in time linear in the number of points.

    The parameters are those of `NadarayaWatsonRegressor`. "auto_cv" compares the shares with the labels by square
    error.

    Attributes
    ----------
    classes_ : array
    feature_map_ : FeatureMap, Landmarks or None
    gamma_ : float
    method_ : str or callable
    n_features_in_ : int

    Examples
    --------
    >>> import numpy as np
    >>> from favorsharp.sklearn import NadarayaWatsonClassifier
    >>> X = np.random.default_rng(0).standard_normal((200, 2))
    >>> model = NadarayaWatsonClassifier(random_state=0).fit(X, X[:, 0] > 0)
    >>> bool(model.score(X, X[:, 0] > 0) > 0.9)
    True
    >>> model.predict_proba(X).shape
    (200, 2)
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:  # noqa: N803
        """Fit to points X, shape (n, d), and labels y, shape (n,); earlier blocks are discarded.

        The optional sample_weight, shape (n,), holds weights of 0 or more; a weight of 3 has the same effect as
        repeating the point three times.
        """
        self._sums = None
        return self.partial_fit(X, y, sample_weight=sample_weight)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:  # noqa: N803
        """Add a further block of points and labels; the first block determines the bandwidth and the features.

        All classes must be known at the first block: they are the optional `classes`, or else the labels in that block.
        """
        first = not self.__sklearn_is_fitted__()
        X, y = self._points(X, reset=first, y=y)  # noqa: N806
        check_classification_targets(y)
        labels = to_host(y) if get_namespace(y)[1] else np.asarray(y)
        if first:
            named = np.unique(labels if classes is None else np.asarray(classes))
            _, dispatched = get_namespace(X)
            move = dispatched and named.dtype.kind in "iuf"  # strings stay NumPy arrays: no other library has them
            self.classes_ = from_host(named, X, dtype=named_dtype(namespace_of(X), named.dtype.name)) if move else named
        named = self._named()
        index = np.minimum(np.searchsorted(named, labels), len(named) - 1)
        known = named[index] == labels
        if not known.all():
            unknown = np.unique(labels[~known])
            raise ValueError(f"y has labels {unknown}; accepted: those of the first block or of classes, {named}")
        shares = from_host(np.eye(len(named))[index], X)
        self._take(X, shares, sample_weight)
        return self

    def predict(self, X: Any) -> Any:  # noqa: N803
        """Predict the classes with the largest shares, shape (n, d) -> (n,)."""
        shares = self._shares(X, "predict")
        found = self._named()[np.argmax(to_host(shares), axis=1)]
        return found if isinstance(self.classes_, np.ndarray) else from_host(found, shares, dtype=self.classes_.dtype)

    def predict_proba(self, X: Any) -> Any:  # noqa: N803
        """Estimate the shares of the classes, shape (n, d) -> (n, classes).

        With a signed method, estimates below 0 are taken as 0. If there is none above 0, the shares are those of
        landmarks, as in `NadarayaWatsonRegressor`.
        """
        return self._shares(X, "predict_proba")

    def decision_function(self, X: Any) -> Any:  # noqa: N803
        """The shares of `predict_proba`, or for two classes the second minus the first, (n, d) -> (n, classes) or (n,).

        They are finite for every method.
        """
        shares = self._shares(X, "decision_function")
        return shares[:, 1] - shares[:, 0] if len(self._named()) == 2 else shares

    def _shares(self, x: Any, method: str) -> Any:
        signed = getattr(self, "method_", None) in SIGNED  # raises later if there was no fit
        return self._estimate(x, method, _positive_shares if signed else means)

    def _named(self) -> Any:
        """The classes as a NumPy array."""
        return to_host(self.classes_)
