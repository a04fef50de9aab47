"""CPU kernels for favorsharp, compiled by Numba, for NumPy arrays and for torch tensors on the CPU.

favorsharp finds `BACKEND` through an entry point. Importing this package imports neither Numba nor torch: kernels are
declared as strings, and are imported when they are first used.
"""

from itertools import combinations

from favorsharp.backend import FLOATS, Backend, bundled_kernels

_DTYPES = ["+".join(names) for count in range(1, len(FLOATS) + 1) for names in combinations(FLOATS, count)]

BACKEND = Backend(
    "numba",
    requires=("numba",),
    kernels=bundled_kernels("favorsharp_numba", "numpy", "cpu", _DTYPES, plans=True, landmarks=True, of_points=True),
)
