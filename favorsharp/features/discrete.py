"""Poisson and geometric features of Chefs' Random Tables (arXiv 2205.15317): products of powers of the coordinates."""

import math
from dataclasses import dataclass
from typing import Any

from favorsharp._arrays import from_host, namespace_of, to_host
from favorsharp._autodiff import is_traced
from favorsharp._typing import Array
from favorsharp.features.base import SignedFeatureMap
from favorsharp.parameters import Parameters


@dataclass(frozen=True, eq=False, repr=False)
class DiscreteMap(SignedFeatureMap):
    """prod_l x_l^(w_l) times exp(column), with integer counts w as the projection.

    Attributes
    ----------
    column : array, shape (*b, 1, m)
        The part of a log feature that depends on the feature alone.
    """

    column: Array

    @classmethod
    def from_rows(cls, parameters: Parameters, num_features: int, rows: Any) -> "DiscreteMap":
        """Make the map whose counts are the quantiles at Phi(rows), so that every Gaussian draw gives a discrete one.

        Counts and their weights are computed on the host in float64, so the parameters cannot be tracers.
        """
        if is_traced(parameters.rate):
            raise ValueError(
                f"method {parameters.method_name!r} draws on the host, and the parameters are traced: build its "
                "feature map outside of jit"
            )
        from favorsharp.draws import discrete_rows  # imports NumPy, which `import favorsharp` must not load

        counts, log_density = discrete_rows(str(parameters.method), to_host(rows), to_host(parameters.rate))
        column = log_density[..., None, :] - 0.5 * math.log(num_features)
        like = parameters.g1
        return cls(parameters, num_features, from_host(counts, like), from_host(column, like))

    def query_parts(self, x: Array) -> tuple[Array, Array]:
        """Signed products of powers, and the log factor, (*b, n, m) and (*b, n, 1)."""
        xp = namespace_of(x)
        x = x * math.sqrt(self.parameters.scale)
        counts = xp.matrix_transpose(self.projection)
        zero = x == 0
        log_size = xp.log(xp.where(zero, 1.0, xp.abs(x))) @ counts + self.column
        ones = xp.ones_like(x)
        vanishes = xp.where(zero, ones, 0 * ones) @ xp.where(counts > 0, 1.0, 0.0 * counts) > 0
        odd = xp.where(x < 0, ones, 0 * ones) @ xp.remainder(counts, xp.ones_like(counts) * 2)
        sign = 1 - 2 * xp.remainder(odd, xp.ones_like(odd) * 2)
        features = xp.where(vanishes, 0.0, sign * xp.exp(log_size))
        half = 0.5 * xp.sum(x * x, axis=-1, keepdims=True)
        return features, -half if self.parameters.kernel == "gaussian" else xp.zeros_like(half)
