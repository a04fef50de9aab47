"""CPU kernels for favorsharp, compiled by Numba: for NumPy arrays and torch tensors on the CPU.

Importing this package imports nothing: kernels are strings until they are first used.
"""

from itertools import combinations

from favorsharp.dispatch import Backend, Kernel

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_DTYPES = frozenset("+".join(names) for count in (1, 2, 3, 4) for names in combinations(_FLOATS, count))


_OPS = {
    "exponential_features": "exponential_features",
    "attention": "attention",
    "causal_attention": "causal_attention",
    "update": "state",
    "read": "state",
    "decode_step": "state",
    "kernel_matvec": "kernel_matvec",
    "attention_vjp": "vjp",
    "exponential_features_vjp": "vjp",
}
"""The module of each op."""
_DIFFERENTIABLE = ("exponential_features", "attention", "causal_attention")


def _kernel(op: str, module: str, library: str, *, differentiable: bool = False) -> Kernel:
    return Kernel(
        op=op,
        target=f"favorsharp_numba.{module}:{op}",
        libraries=frozenset({library}),
        devices=frozenset({"cpu"}),
        dtypes=_DTYPES,
        differentiable=differentiable,
    )


BACKEND = Backend(
    "numba",
    requires=("numba",),
    kernels=(
        *(_kernel(op, module, "numpy") for op, module in _OPS.items()),
        *(_kernel(op, "torch_ops", "torch", differentiable=True) for op in _DIFFERENTIABLE),
        *(_kernel(op, module, "torch") for op, module in _OPS.items() if op not in _DIFFERENTIABLE),
    ),
)
