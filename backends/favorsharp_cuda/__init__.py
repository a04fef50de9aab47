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


def _kernel(op: str, module: str, library: str, device: str = "cuda") -> Kernel:
    return Kernel(
        op=op,
        target=f"favorsharp_cuda.{module}:{op}",
        libraries=frozenset({library}),
        devices=frozenset({device}),
        dtypes=_DTYPES,
    )


BACKEND = Backend(
    "cuda",
    requires=("cupy",),
    kernels=tuple(_kernel(op, module, library) for library in ("cupy", "torch") for op, module in _OPS.items()),
)
