"""Register the library's values as JAX pytrees, so that `jax.jit`, `jax.vmap` and `jax.lax.scan` take and return them.

Users import it once: ``import favorsharp.jax``. Arrays are leaves; names, sizes and the fingerprint of a state are
static.
"""

from dataclasses import fields

import jax

from favorsharp.features.dense_exponential import DenseExponentialMap
from favorsharp.features.discrete import DiscreteMap
from favorsharp.features.elementwise import ElementwiseMap
from favorsharp.features.nystrom import NystromMap
from favorsharp.features.trigonometric import TrigonometricMap
from favorsharp.landmarks.settings import Landmarks
from favorsharp.landmarks.state import LandmarkState
from favorsharp.moments import Moments
from favorsharp.ops.state import State
from favorsharp.parameters import Parameters

_STATIC = frozenset(
    {"dtype", "method", "kernel", "scale", "num_features", "window", "fingerprint", "num_seen", "settings"}
)

for _kind in (
    Moments,
    Parameters,
    DenseExponentialMap,
    DiscreteMap,
    ElementwiseMap,
    NystromMap,
    TrigonometricMap,
    State,
    LandmarkState,
):
    _names = [field.name for field in fields(_kind)]
    jax.tree_util.register_dataclass(
        _kind,
        data_fields=[name for name in _names if name not in _STATIC],
        meta_fields=[name for name in _names if name in _STATIC],
    )

jax.tree_util.register_static(Landmarks)
