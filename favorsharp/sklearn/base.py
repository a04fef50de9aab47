"""What the estimators share: checks of points, the bandwidth and the feature map."""

import math
from typing import Any

import numpy as np
from sklearn.base import (
    BaseEstimator,
)
from sklearn.utils import check_random_state
from sklearn.utils._array_api import (  # private, and imported in this folder only
    get_namespace_and_device,
    supported_float_dtypes,
)
from sklearn.utils.validation import validate_data

from favorsharp._arrays import (
    dtype_name,
    from_host,
    namespace_of,
    to_host,
)
from favorsharp._checks import check_choice, check_in_memory, check_integer
from favorsharp.features import feature_map
from favorsharp.fitting import fit, fit_map
from favorsharp.methods import check_method, method_of
from favorsharp.moments import weighted_moments
from favorsharp.nystrom import sample_size


class KernelEstimator(BaseEstimator):
    """The base of the three estimators: checks of points, the bandwidth, the feature map and the tags."""

    def _points(self, x: Any, *, reset: bool, **options: Any) -> Any:
        check_in_memory(X=x)
        xp, _, device = get_namespace_and_device(x)
        # as elsewhere in scikit-learn, dtypes other than float32 and float64 are converted to the widest float dtype
        dtypes = [dtype for dtype in supported_float_dtypes(xp, device) if dtype_name(dtype) != "float16"]
        return validate_data(self, x, dtype=dtypes, reset=reset, **options)

    def _bandwidth(self, x: Any, weight: Any = None) -> float:
        """The value of gamma as a number: "scale" is 1 / (d var(x)), or 1 if x does not vary."""
        if isinstance(self.gamma, str):
            check_choice("gamma", self.gamma, self._GAMMAS, also=", or a positive number")
            host = to_host(x).astype(np.float64)
            counts = None if weight is None else np.broadcast_to(to_host(weight)[:, None], host.shape)
            spread = float(np.average((host - np.average(host, weights=counts)) ** 2, weights=counts))
            return 1.0 / (x.shape[1] * spread) if spread > 0 else 1.0
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, int | float | np.number):
            raise TypeError(f"gamma must be {self._accepted()}, got {type(self.gamma).__name__}")
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise ValueError(f"gamma must be {self._accepted()}, got {self.gamma}")
        return float(self.gamma)

    def _accepted(self) -> str:
        return f"{' or '.join(map(repr, self._GAMMAS))} or a positive finite number"

    def _map(self, x: Any, gamma: float, seed: int, weight: Any = None, method: Any = None) -> Any:
        """The map of a method, by default the method of the estimator."""
        check_integer("n_components", self.n_components, 1)
        method = self.method if method is None else method
        if method == "trig" and self.n_components % 2:
            pairs = "whose features are cosine and sine pairs"
            raise ValueError(f"n_components must be even for method 'trig', {pairs}; got {self.n_components}")
        if method == "nystrom" and weight is None:
            draw = self.draw if self.method == "nystrom" else "orthogonal"
            if x.shape[0] > sample_size(self.n_components):
                x = rows_of(x, shuffled(x, seed)[: sample_size(self.n_components)])
            return fit_map(
                x, x, self.n_components, method="nystrom", draw=draw, kernel="gaussian", scale=2 * gamma, rng=seed
            )
        check_method(method)
        if not method_of(method).is_fitted:  # such a method does not depend on data
            x, weight = x[:1, ...], None
        data = (x, x) if weight is None else (weighted_moments(x, weight),)
        parameters = fit(*data, method=method, kernel="gaussian", scale=2 * gamma)
        return feature_map(parameters, self.n_components, draw=self.draw, rng=seed)

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.array_api_support = True
        tags.input_tags.sparse = False
        return tags


def shuffled(x: Any, seed: int) -> Any:
    """The indices of points in a random order; the first ones are those that a map is made from."""
    return np.random.default_rng(seed).permutation(x.shape[0])


def rows_of(x: Any, chosen: Any) -> Any:
    """The points with some indices, in the order of x."""
    xp = namespace_of(x)
    return xp.take(x, from_host(np.sort(chosen), x, dtype=xp.int64), axis=0)
