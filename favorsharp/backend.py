"""What a backend needs from this package: the public kit for the authors of backends.

A backend is a package of its own, which declares kernels in a `Backend` and never imports a private module of
favorsharp. The names below are all that the bundled backends use: the declaration of kernels, the facts about arrays of
any library, the constants of a dense-exponential map, the arrays of a state, and the gradients that the references
compute where kernels cannot. Each name is documented where it is defined. CONTRIBUTING.md says how a backend is
added, and `favorsharp.testing.check_backend` compares its kernels with the references.

Examples
--------
A backend with one kernel for NumPy arrays on the CPU:

>>> from favorsharp.backend import FLOATS, Backend, Kernel
>>> kernel = Kernel(
...     "attention", target="my_backend.attention:attention", libraries={"numpy"}, devices={"cpu"}, dtypes=FLOATS
... )
>>> BACKEND = Backend("mine", kernels=(kernel,))
>>> BACKEND.why_not() is None
True
"""

from favorsharp._arrays import (
    FLOATS,
    broadcast_shapes,
    cast,
    dtype_name,
    is_followed,
    library_of,
    named_dtype,
    namespace_of,
    on_device_of,
    recorded_or_followed,
    to_host,
)
from favorsharp._checks import check_unfollowed
from favorsharp.dispatch import Backend, Kernel, bundled_kernels
from favorsharp.features.folding import FoldedSide, fold
from favorsharp.features.map_gradients import map_gradients, summed_to
from favorsharp.ops.state import State, empty_state, has_low_parts, num_leaving, with_recent, with_sums
from favorsharp.ops.vjp import (
    attention_gradients,
    features_gradients,
    gradients_through_map,
    kernel_matvec_gradients,
    state_gradients,
)

__all__ = [
    "FLOATS",
    "Backend",
    "FoldedSide",
    "Kernel",
    "State",
    "attention_gradients",
    "broadcast_shapes",
    "bundled_kernels",
    "cast",
    "check_unfollowed",
    "dtype_name",
    "empty_state",
    "features_gradients",
    "fold",
    "gradients_through_map",
    "has_low_parts",
    "is_followed",
    "kernel_matvec_gradients",
    "library_of",
    "map_gradients",
    "named_dtype",
    "namespace_of",
    "num_leaving",
    "on_device_of",
    "recorded_or_followed",
    "state_gradients",
    "summed_to",
    "to_host",
    "with_recent",
    "with_sums",
]
