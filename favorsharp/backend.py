"""What a backend needs from this package: the public kit for the authors of backends.

A backend is a package of its own, which declares kernels in a `Backend`. It should import what it needs of favorsharp
from this module, and nothing from private modules. Here are the declaration of kernels, functions that say what an
array is (library, dtype, device), the constants of a dense-exponential map, the arrays of a state, and the gradients
that the references compute where kernels cannot. Each name is documented where it is defined. CONTRIBUTING.md says how
to add a backend and what the author of a kernel may do; `favorsharp.testing.check_backend` compares its kernels with
the references.

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

from collections.abc import Iterable

from favorsharp._arrays import (
    FLOATS,
    broadcast_shapes,
    cast,
    dtype_name,
    library_of,
    named_dtype,
    namespace_of,
    on_device_of,
    to_host,
)
from favorsharp._autodiff import is_compiling, is_followed, outside_modes, recorded_or_followed
from favorsharp._checks import check_unfollowed
from favorsharp._derived import derived
from favorsharp.dispatch import Backend, Kernel
from favorsharp.features.folding import FoldedSide, fold
from favorsharp.features.map_gradients import arrays_of, map_gradients, summed_to
from favorsharp.landmarks.attention import landmark_keys, landmark_stream
from favorsharp.landmarks.metric import RIDGE, STREAM_RIDGE
from favorsharp.landmarks.state import LandmarkState, grown, segments_of
from favorsharp.moments import Moments
from favorsharp.ops.compensated_sums import has_low_parts
from favorsharp.ops.landmark_seeds import CANDIDATES, draw_seeds, noise_of
from favorsharp.ops.state import State, absorb_features, empty_state, in_store, unsettled, with_recent, with_sums
from favorsharp.ops.window_rule import NEIGHBOURS, RECENT_BLOCKS, num_leaving

__all__ = [
    "CANDIDATES",
    "FLOATS",
    "NEIGHBOURS",
    "RECENT_BLOCKS",
    "RIDGE",
    "STREAM_RIDGE",
    "Backend",
    "FoldedSide",
    "Kernel",
    "LandmarkState",
    "Moments",
    "State",
    "absorb_features",
    "arrays_of",
    "broadcast_shapes",
    "bundled_kernels",
    "cast",
    "check_unfollowed",
    "derived",
    "draw_seeds",
    "dtype_name",
    "empty_state",
    "fold",
    "grown",
    "has_low_parts",
    "in_store",
    "is_compiling",
    "is_followed",
    "landmark_keys",
    "landmark_stream",
    "library_of",
    "map_gradients",
    "named_dtype",
    "namespace_of",
    "noise_of",
    "num_leaving",
    "on_device_of",
    "outside_modes",
    "recorded_or_followed",
    "segments_of",
    "summed_to",
    "to_host",
    "unsettled",
    "with_recent",
    "with_sums",
]

MODULES = {
    "exponential_features": "exponential_features",
    "attention": "attention",
    "causal_attention": "causal_attention",
    "update": "state",
    "read": "state",
    "decode_step": "state",
    "kernel_matvec": "kernel_matvec",
    "attention_vjp": "vjp",
    "kernel_matvec_vjp": "vjp",
    "exponential_features_vjp": "vjp",
}
"""For each op, the module of a bundled backend that has its function."""
LANDMARKS = {
    "choose_landmarks": "landmarks",
    "condense": "landmarks",
    "landmark_keys": "landmarks",
    "landmark_stream": "landmark_stream",
    "landmark_window": "landmark_window",
    "point_moments": "point_moments",
    "weighted_attention": "weighted_attention",
}
"""The same for the ops of landmarks, for which not every bundled backend has kernels."""
DIFFERENTIABLE = ("exponential_features", "attention", "causal_attention", "kernel_matvec")
"""The ops that the bundled backends implement for torch's autograd, in their modules `torch_ops`."""
TRACEABLE = ("update", "read", "decode_step")
"""Ops that `torch_ops` of a traceable backend has too, for traced calls and for calls that record gradients."""
PACKED = ("attention", "causal_attention", "attention_vjp")
"""The ops whose modules also have a function for packed sequences, named like the op with `_packed` behind it."""
OF_POINTS = ("exponential_features",)
"""The ops whose modules may have a function for points and a map, named like the op with `_of_points` behind it."""
WITH_OUT = ("attention", "causal_attention")
"""The ops whose functions take `out`."""


PLANNED = ("decode_step", "landmark_stream")
"""The ops whose modules have a function for plans, named like the op with `_plan` behind it."""


def bundled_kernels(
    package: str,
    library: str,
    device: str,
    dtypes: Iterable[str],
    *,
    traceable: bool = False,
    plans: bool = False,
    landmarks: bool = False,
    of_points: bool = False,
) -> tuple[Kernel, ...]:
    """The kernels of a bundled backend: for the arrays of one library, and for torch tensors on the same device.

    With `traceable`, the kernels for torch's autograd also run on traced tensors, and `torch_ops` also has the ops in
    `TRACEABLE`. With `plans`, the modules of the ops in `PLANNED` have functions for plans. With `landmarks`, the
    backend has the ops in `LANDMARKS`. With `of_points`, the modules of `OF_POINTS` have those functions.
    """

    def kernel(
        op: str, module: str, library: str, *, differentiable: bool = False, traceable: bool = False
    ) -> Kernel:  # fmt: skip
        target = f"{package}.{module}:{op}"
        return Kernel(
            op=op,
            target=target,
            packed=f"{target}_packed" if op in PACKED else None,
            plan=f"{target}_plan" if op in PLANNED and plans else None,
            takes_out=op in WITH_OUT,
            of_points=f"{package}.{modules[op]}:{op}_of_points" if op in OF_POINTS and of_points else None,
            libraries=frozenset({library}),
            devices=frozenset({device}),
            dtypes=frozenset(dtypes),
            differentiable=differentiable,
            traceable=traceable,
        )

    modules = MODULES | LANDMARKS if landmarks else MODULES
    return (
        *(kernel(op, module, library) for op, module in modules.items()),
        *(kernel(op, "torch_ops", "torch", differentiable=True, traceable=traceable) for op in DIFFERENTIABLE),
        *(kernel(op, module, "torch") for op, module in modules.items() if op not in DIFFERENTIABLE),
        *(kernel(op, "torch_ops", "torch", differentiable=True, traceable=True) for op in TRACEABLE if traceable),
    )
