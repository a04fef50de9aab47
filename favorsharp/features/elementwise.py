"""Feature maps by non-negative functions of projected inputs: relu, elu + 1 or a function of the caller.

Their products do not estimate the kernel.
"""

import math
from dataclasses import dataclass
from typing import Any

from favorsharp._arrays import is_array, namespace_of
from favorsharp._autodiff import is_traced
from favorsharp._typing import Array
from favorsharp.features.base import PositiveFeatureMap
from favorsharp.methods import method_of
from favorsharp.parameters import Parameters


@dataclass(frozen=True, eq=False, repr=False)
class ElementwiseMap(PositiveFeatureMap):
    """f(x W^T) / sqrt(m) for queries and keys alike (generalised attention, arXiv 2009.14794, section 2.1)."""

    @classmethod
    def from_rows(cls, parameters: Parameters, num_features: int, w: Array) -> "ElementwiseMap":
        """Make the map from rows w; a callable may return any number of features, which is then m."""
        method = parameters.method
        if callable(method):
            xp = namespace_of(w)
            probe = method(xp.zeros_like(xp.matrix_transpose(w)[:1, :]))
            if not is_array(probe) or probe.ndim != 2:
                got = f"an array of {probe.ndim} axes" if is_array(probe) else type(probe).__name__
                raise TypeError(
                    f"method must turn projected inputs (n, m) into features, an array (n, any number); "
                    f"{parameters.method_name} gave {got}"
                )
            num_features = int(probe.shape[-1])
        return cls(parameters, num_features, w)

    def _log_features(self, side: str, x: Array) -> Array:
        projected = (x * math.sqrt(self.parameters.scale)) @ namespace_of(x).matrix_transpose(self.projection)
        method: Any = self.parameters.method
        known = method_of(method).logarithm
        logarithm = _log(method(projected)) if known is None else known(projected)
        return logarithm - 0.5 * math.log(self.num_features)


def _log(features: Array) -> Array:
    """Logarithms of a caller's features; -inf for features that are 0."""
    xp = namespace_of(features)
    if not is_traced(features) and bool(xp.any(features < 0)):
        raise ValueError("method must return non-negative features; the callable returned negative ones")
    return xp.where(features == 0, -xp.inf, xp.log(xp.where(features == 0, 1.0, features)))
