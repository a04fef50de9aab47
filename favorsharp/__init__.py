"""Linear-time attention and kernel methods from positive random features, on the arrays you already have.

Data go one way: `moments` -> `fit` -> `feature_map` -> `linear_attention`, `kernel_matvec` or `nadaraya_watson`;
`attention` does it in one call. Importing this package imports no array library and no backend.
"""

from favorsharp.attention_moments import attention_moments
from favorsharp.diagnostics import suggest
from favorsharp.dispatch import explain, use
from favorsharp.exact import kernel_matrix, softmax_attention
from favorsharp.features import FeatureMap, feature_map
from favorsharp.fitting import fit, fit_map
from favorsharp.gradients import vjp
from favorsharp.landmarks import Landmarks, LandmarkState, landmarks
from favorsharp.linear_attention import attention, decode_step, init_state, linear_attention, read, update
from favorsharp.methods import METHODS
from favorsharp.moments import Moments, combine, moments
from favorsharp.ops.state import State
from favorsharp.parameters import Parameters
from favorsharp.regression import kernel_matvec, leave_one_out, nadaraya_watson
from favorsharp.second_moments import excess, log_second_moment
from favorsharp.storage import load, save

__version__ = "0.2.0"

__all__ = [
    "METHODS",
    "FeatureMap",
    "LandmarkState",
    "Landmarks",
    "Moments",
    "Parameters",
    "State",
    "attention",
    "attention_moments",
    "combine",
    "decode_step",
    "excess",
    "explain",
    "feature_map",
    "fit",
    "fit_map",
    "init_state",
    "kernel_matrix",
    "kernel_matvec",
    "landmarks",
    "leave_one_out",
    "linear_attention",
    "load",
    "log_second_moment",
    "moments",
    "nadaraya_watson",
    "read",
    "save",
    "softmax_attention",
    "suggest",
    "update",
    "use",
    "vjp",
]
