"""CUDA kernels for favorsharp: for CuPy arrays and torch tensors on NVIDIA GPUs.

Importing this package imports nothing: kernels are strings until they are first used, and are compiled then.
"""

from favorsharp._arrays import FLOATS
from favorsharp.backend import Backend, bundled_kernels

BACKEND = Backend(
    "cuda", requires=("cupy",), kernels=bundled_kernels("favorsharp_cuda", "cupy", "cuda", FLOATS, traceable=True)
)
