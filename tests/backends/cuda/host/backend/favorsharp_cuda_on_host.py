"""The backend `cuda` for NumPy arrays and torch tensors on the CPU: the kernels of CuPy arrays and of CUDA tensors."""

from dataclasses import replace

import favorsharp_cuda
from favorsharp.dispatch import Backend

LIBRARIES = {"cupy": "numpy", "torch": "torch"}

BACKEND = Backend(
    "cuda_on_host",
    kernels=tuple(
        replace(kernel, libraries={LIBRARIES[library]}, devices={"cpu"})
        for kernel in favorsharp_cuda.BACKEND.kernels
        for library in kernel.libraries
    ),
)
