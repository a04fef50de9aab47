"""Features of the Gaussian kernel for linear models: the public estimator `RandomFeatures`."""

from typing import Any, Self

from sklearn.base import (
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
)
from sklearn.utils._array_api import (  # private, and imported in this folder only
    check_same_namespace,
)
from sklearn.utils.validation import check_is_fitted

from favorsharp._checks import check_choice, check_integer
from favorsharp._chunks import is_chunked
from favorsharp.draws import DRAWS
from favorsharp.map_choice import PURPOSES, SAMPLE, choose_map
from favorsharp.methods import check_method
from favorsharp.nystrom import sample_size
from favorsharp.sklearn.base import KernelEstimator, rows_of, shuffled
from favorsharp.sklearn.chunks import mapped, rows_in_memory


class RandomFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, KernelEstimator):
    """Features of the Gaussian kernel, fitted to the data; a replacement for RBFSampler and Nystroem.

    The dot product of two transformed points approximates exp(-gamma |x - y|^2). By default the method is chosen by its
    error on a sample. The estimator accepts NumPy and dask arrays and, with scikit-learn's array API dispatch, torch
    tensors and other arrays. float32 points give float32 features.

    Parameters
    ----------
    method : str or callable, default="auto"
        "auto" compares "nystrom", "trig" and, up to 256 columns, "optimal". "nystrom" is as in `favorsharp.fit_map`:
        its features are biased and can be negative, and their products are closest to smooth kernels. Others are as in
        `favorsharp.fit`, unbiased except "relu", "elu" and callables.
    n_components : int, default=256
        Number of features; even for `trig`.
    gamma : {"scale"}, float or None, default=None
        None is 1 / n_features, as in scikit-learn; "scale" is 1 / (n_features X.var()).
    draw : str, default="orthogonal"
        As in `favorsharp.feature_map`; not used with "nystrom".
    random_state : int, RandomState or None, default=None
    purpose : {"inner product", "smoothing"}, default="inner product"
        What "auto" compares: the products, which linear models use, or the products with each row divided by its sum,
        for averages of values.

    Attributes
    ----------
    feature_map_ : FeatureMap
    gamma_ : float
    method_ : str or callable
        The method that was used.
    reason_ : str
        Why: the errors of the methods, if they were compared.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Only if the data have feature names.

    Examples
    --------
    >>> import numpy as np
    >>> from favorsharp.sklearn import RandomFeatures
    >>> X = np.random.default_rng(0).standard_normal((100, 3))
    >>> features = RandomFeatures(n_components=64, random_state=0)
    >>> features.fit_transform(X).shape
    (100, 64)
    >>> features.method_
    'nystrom'
    """

    _GAMMAS = ("scale",)

    def __init__(
        self,
        method: Any = "auto",
        n_components: int = 256,
        gamma: Any = None,
        draw: Any = "orthogonal",
        random_state: Any = None,
        purpose: str = "inner product",
    ) -> None:
        self.method = method
        self.n_components = n_components
        self.gamma = gamma
        self.draw = draw
        self.random_state = random_state
        self.purpose = purpose

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: N803
        """Fit the features to X, shape (n, d), and draw them; of a dask array, to 10,000 random rows at most."""
        check_choice("purpose", self.purpose, PURPOSES)
        check_method(self.method, also=("auto", "nystrom"))
        seed = self._seed()
        X = self._points(rows_in_memory(X, seed) if is_chunked(X) else X, reset=True)  # noqa: N806
        self.gamma_ = 1.0 / X.shape[1] if self.gamma is None else self._bandwidth(X)
        if self.method == "auto":
            check_choice("draw", self.draw, tuple(DRAWS))
            self._choose(X, seed)
        else:
            self.feature_map_, self.method_ = self._map(X, self.gamma_, seed), self.method
            self.reason_ = "the method was given"
        self._projection = self.feature_map_.projection
        self._n_features_out = self.feature_map_.num_features
        return self

    def _choose(self, x: Any, seed: int) -> None:
        """Compare methods at points from which no map was made, if there are four such points or more."""
        n, m = x.shape[0], check_integer("n_components", self.n_components, 1)
        order, held = shuffled(x, seed), min(SAMPLE, n // 4)
        fitted = order[: min(n - held, sample_size(m))]
        asked = order[len(fitted) : len(fitted) + held] if held else order

        def make(method: str) -> Any:
            return self._map(rows_of(x, fitted) if method == "nystrom" else x, self.gamma_, seed, method=method)

        choice = choose_map(rows_of(x, asked), n, 2 * self.gamma_, m, self.purpose, make)
        self.feature_map_, self.method_, self.reason_ = choice.feature_map, choice.method, choice.reason
        if self.method_ == "nystrom" and len(fitted) < min(n, sample_size(m)):  # these points are needed, too
            self.feature_map_ = self._map(x, self.gamma_, seed, method="nystrom")

    def _accepted(self) -> str:
        return "'scale', None or a positive finite number"

    def transform(self, X: Any) -> Any:  # noqa: N803
        """Compute the features of X, shape (n, d) -> (n, n_components), in the dtype of X; of a dask array, lazily."""
        check_is_fitted(self)
        if is_chunked(X):
            return mapped(self.transform, X, self._n_features_out, X.dtype)
        check_same_namespace(X, self, attribute="_projection", method="transform")
        return self.feature_map_.query(self._points(X, reset=False))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
