"""The kernels as one text for the compiler, and the list of everything that may be compiled from it."""

from functools import cache
from importlib.resources import files
from typing import NamedTuple

FILES = (
    *("primitives.cuh", "arguments.cuh", "tiles.cuh", "plain.cu", "exponential_features.cu"),
    *("state.cu", "decode.cu", "attention.cu", "walk.cuh", "causal_attention.cu"),
)
"""In the order in which they are joined."""

GRADIENT_FILES = (
    *("gradient_tiles.cuh", "attention_gradients.cu", "gradient_points.cu", "near_gradients.cu"),
    "exponential_features_gradients.cu",
)
"""The backward kernels, after the others."""

TYPES = {
    "float16": "favorsharp::half",
    "bfloat16": "favorsharp::bfloat16",
    "float32": "float",
    "float64": "double",
}


@cache
def source() -> str:
    """All files in one text, each with its name for the compiler's messages.

    They must not include each other: CuPy's cache of compiled kernels looks at this text alone.
    """
    folder = files("favorsharp_cuda") / "kernels"
    return "".join(f'#line 1 "{name}"\n{(folder / name).read_text()}\n' for name in (*FILES, *GRADIENT_FILES))


def expression(kernel: str, *arguments: str | int) -> str:
    """The name of an instance of a kernel: its template arguments are dtypes' names and numbers."""
    names = ", ".join(TYPES.get(x, x) if isinstance(x, str) else str(x) for x in arguments)
    return f"favorsharp::{kernel}<{names}>" if names else f"favorsharp::{kernel}"


TILE_TYPES = ("float16", "bfloat16", "float32")
"""What tensor-core kernels read and write; they compute in float32."""

VALUE_SIZES = (32, 64, 96, 128)
"""Sizes of a value that they are compiled for; others are padded to the next."""


WALKED_SIZES = (16, 32, 64)
"""Those that `walk` is compiled for: for larger ones a block has neither the shared memory nor the registers.

16 is for blocks of 99 KB (compute capability 8.6, 8.9, 12.0) beside points of more than 64 entries.
"""


DECODED_HEADS = (1, 8)
"""Query heads of one key head that a block of `decode` takes at most; more of them are several blocks'."""


class Sweep(NamedTuple):
    """What `gradient_sweep` pads points and values to, and how many features it works on at once."""

    points: int
    values: int
    features: int


SWEEPS = {
    "float32": (
        *(Sweep(32, 32, 64), Sweep(64, 64, 64), Sweep(96, 96, 32), Sweep(128, 128, 32)),
        *(Sweep(64, 64, 32), Sweep(128, 128, 16)),
    ),
    "float64": (
        *(Sweep(32, 32, 32), Sweep(64, 64, 32), Sweep(96, 96, 16), Sweep(128, 128, 16), Sweep(128, 64, 16)),
        Sweep(64, 32, 16),
    ),
}
"""Those that it is compiled for, by the dtype computed in.

Blocks of compute capability 8.0 have no room for points and values of 128 doubles: (128, 64) serves them, in parts.
The second line of each is for blocks of 99 KB (8.6, 8.9, 12.0), which have none for doubles of more than 64 entries.
(96, 96, 16) would fit them too, but spills in float32: points of 65 to 96 entries are padded to 128 there.
"""


def _gradients() -> tuple[str, ...]:
    """Backward kernels: over dtypes and the width that points and values are padded to."""
    computed = ("float32", "float64")
    kernels = (
        *("gradient_factors", "near_gradients", "gradient_points", "gradient_factor_sums"),
        "exponential_features_gradients",
    )
    return (
        *(
            expression("gradient_sweep", dtype, *sweep)
            for dtype in TYPES
            for sweep in SWEEPS["float64" if dtype == "float64" else "float32"]
        ),
        *(expression(name, dtype, width) for name in kernels for dtype in TYPES for width in (64, 128)),
        *(expression(name, dtype) for name in ("sum_members", "gradient_largest") for dtype in TYPES),
        expression("gradient_normalise", "float32"),
        *(expression(name, dtype) for name in ("gradient_scan", "gradient_map", "sum_segments") for dtype in computed),
    )


INSTANTIATIONS = (
    *(expression("plain_attention", dtype) for dtype in TYPES),
    *(expression("plain_features", dtype) for dtype in TYPES),
    *(expression("decode", dtype, heads, near) for dtype in TYPES for heads in DECODED_HEADS for near in (0, 1)),
    *(expression(kernel, dtype) for kernel in ("features", "factors") for dtype in TILE_TYPES),
    *(expression(kernel, dtype, e) for kernel in ("absorb", "read") for dtype in TILE_TYPES for e in VALUE_SIZES),
    *(expression("walk", dtype, e) for dtype in TILE_TYPES for e in WALKED_SIZES),
    expression("scan"),
    *_gradients(),
)
"""Every name that `launch.run` may be asked for: what the tests run, NVRTC compiles and the resource table lists."""
