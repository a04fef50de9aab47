"""CUDA kernels for favorsharp: for CuPy arrays and torch tensors on NVIDIA GPUs.

Importing this package imports nothing: kernels are strings until they are first used, and are compiled then.
"""

from favorsharp.dispatch import Backend, Kernel

_DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})

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
"""What torch differentiates and compiles."""


def _kernel(op: str, module: str, library: str, *, through_torch: bool = False) -> Kernel:
    return Kernel(
        op=op,
        target=f"favorsharp_cuda.{module}:{op}",
        libraries=frozenset({library}),
        devices=frozenset({"cuda"}),
        dtypes=_DTYPES,
        differentiable=through_torch,
        traceable=through_torch,
    )


BACKEND = Backend(
    "cuda",
    requires=("cupy",),
    kernels=(
        *(_kernel(op, module, "cupy") for op, module in _OPS.items()),
        *(_kernel(op, "torch_ops", "torch", through_torch=True) for op in _DIFFERENTIABLE),
        *(_kernel(op, module, "torch") for op, module in _OPS.items() if op not in _DIFFERENTIABLE),
    ),
)
