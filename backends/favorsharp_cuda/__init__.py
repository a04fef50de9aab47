"""CUDA kernels of favorsharp, for CuPy arrays and torch tensors on NVIDIA GPUs: the declaration of the backend.

`favorsharp.dispatch` finds `BACKEND` through the entry points `favorsharp.backends`. Importing this package imports
neither CuPy nor torch and compiles nothing: a kernel is compiled when it is first launched on a device.
"""

from favorsharp.backend import FLOATS, Backend, Kernel, bundled_kernels

_CHOICE = tuple(
    Kernel(
        op="choose_landmarks",
        target="favorsharp_cuda.landmarks:choose_landmarks",
        libraries=frozenset({library}),
        devices=frozenset({"cuda"}),
        dtypes=frozenset(FLOATS),
        differentiable=True,  # array functions do all but the constant seeds
    )
    for library in ("cupy", "torch")
)

BACKEND = Backend(
    "cuda",
    requires=("cupy",),
    kernels=(*bundled_kernels("favorsharp_cuda", "cupy", "cuda", FLOATS, traceable=True, plans=True), *_CHOICE),
)
