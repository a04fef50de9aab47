"""Random Fourier features (Rahimi and Recht 2007): cosines and sines."""

import math
from dataclasses import dataclass

from favorsharp._arrays import namespace_of
from favorsharp._typing import Array
from favorsharp.features.base import SignedFeatureMap


@dataclass(frozen=True, eq=False, repr=False)
class TrigonometricMap(SignedFeatureMap):
    """exp(|x|^2 / 2) [cos(x W^T), sin(x W^T)] sqrt(2 / m); without the factor for the Gaussian kernel."""

    def query_parts(self, x: Array) -> tuple[Array, Array]:
        """Cosines and sines, and the log factor, (*b, n, m) and (*b, n, 1)."""
        xp = namespace_of(x)
        root = math.sqrt(self.parameters.scale)
        angles = x @ xp.matrix_transpose(self.projection * root)
        waves = xp.concat([xp.cos(angles), xp.sin(angles)], axis=-1) * math.sqrt(2 / self.num_features)
        if self.parameters.kernel == "gaussian":
            return waves, xp.zeros_like(waves[..., :1])
        x = x * root
        return waves, 0.5 * xp.sum(x * x, axis=-1, keepdims=True)
