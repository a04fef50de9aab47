"""The operations that backends accelerate. Each file holds contracts and references, written in array API functions.

The public functions call these ops. The references are plain array functions that run on every library and device.
Kernels for the same ops are in `backends/`: `favorsharp_numba` for CPUs and `favorsharp_cuda` for NVIDIA GPUs, in
modules of the same names as here. They are compared with the references.
"""
