"""CPU kernels for favorsharp, compiled by Numba: for NumPy arrays and torch tensors on the CPU.

Importing this package imports nothing: kernels are strings until they are first used.
"""

from itertools import combinations

from favorsharp.dispatch import Backend, Kernel

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_DTYPES = frozenset("+".join(names) for count in (1, 2, 3, 4) for names in combinations(_FLOATS, count))


def _kernel(op: str, target: str) -> Kernel:
    return Kernel(
        op=op,
        target=f"favorsharp_numba.{target}",
        libraries=frozenset({"numpy", "torch"}),
        devices=frozenset({"cpu"}),
        dtypes=_DTYPES,
    )


BACKEND = Backend(
    "numba",
    requires=("numba",),
    kernels=(
        _kernel("exponential_features", "exponential_features:exponential_features"),
        _kernel("attention", "attention:attention"),
        _kernel("causal_attention", "causal_attention:causal_attention"),
        _kernel("update", "state:update"),
        _kernel("read", "state:read"),
        _kernel("decode_step", "state:decode_step"),
        _kernel("kernel_matvec", "kernel_matvec:kernel_matvec"),
    ),
)
