"""Joins the kernels into one text for the compiler, and lists all instances that may be compiled from it.

`launch` compiles them; the modules that launch kernels name them with `expression`.
"""

from functools import cache, lru_cache
from importlib.resources import files
from typing import NamedTuple

from favorsharp_cuda.host.declarations import prelude

FILES = (
    *("primitives.cuh", "arguments.cuh", "tiles.cuh", "tile_memory.cuh", "tile_products.cuh", "plain.cu"),
    *(
        "exponential_features.cu",
        "state.cu",
        "decode.cu",
        "attention.cu",
        "walk.cuh",
        "causal_attention.cu",
        "seeds.cu",
    ),
)
"""The forward kernels, in the order in which the files are joined."""

GRADIENT_FILES = (
    *("gradient_tiles.cuh", "attention_gradients.cu", "gradient_points.cu", "near_gradients.cu"),
    "exponential_features_gradients.cu",
)
"""The backward kernels, which are joined after the others."""

TYPES = {
    "float16": "favorsharp::half",
    "bfloat16": "favorsharp::bfloat16",
    "float32": "float",
    "float64": "double",
}
"""The type in the kernels for each dtype."""


@cache
def source() -> str:
    """All files joined into one text; directives give the compiler the names of the files for its messages.

    Files must not include each other: CuPy looks up compiled kernels by this text, and would miss changes elsewhere.
    """
    folder = files("favorsharp_cuda") / "kernels"
    texts = {name: (folder / name).read_text() for name in (*FILES, *GRADIENT_FILES)}
    texts["primitives.cuh"] += f'#line 1 "declarations.py"\n{prelude()}'  # with the types that it declares
    return "".join(f'#line 1 "{name}"\n{text}\n' for name, text in texts.items())


@lru_cache(maxsize=1024)
def expression(kernel: str, *arguments: str | int) -> str:
    """The name of an instance of a kernel. The template arguments are given as numbers and names of dtypes."""
    names = ", ".join(TYPES.get(x, x) if isinstance(x, str) else str(x) for x in arguments)
    return f"favorsharp::{kernel}<{names}>" if names else f"favorsharp::{kernel}"


TILE_TYPES = ("float16", "bfloat16", "float32")
"""The dtypes that tensor-core kernels read and write; they compute in float32."""

VALUE_SIZES = (32, 64, 96, 128)
"""The sizes of values for which `absorb` and `read` are compiled; other sizes are padded to the next one."""


WALKED_SIZES = (16, 32, 64)
"""The numbers of columns of the values for which `walk` is compiled; larger values are processed in such parts.

For larger parts a block has neither the shared memory nor the registers. Parts of 16 are for GPUs with 99 KB of shared
memory for a block (compute capability 8.6, 8.9, 12.0) and points of more than 64 entries.
"""


DECODED_HEADS = (1, 8)
"""The largest numbers of query heads of one key head for which `decode` is compiled; more heads need several blocks."""


class Sweep(NamedTuple):
    """An instance of `gradient_sweep`: the padded sizes of points and values, and the features processed at a time."""

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
"""The instances of `gradient_sweep`, by the dtype that is computed in.

On compute capability 8.0, points and values of 128 doubles do not fit into shared memory together; (128, 64) is used
there, with values in parts. The second line of each dtype is for GPUs with 99 KB for a block (8.6, 8.9, 12.0), where
points of more than 64 doubles do not fit at all. In float32, (96, 96, 16) would fit there too, but its registers spill,
so points of 65 to 96 entries are padded to 128.
"""


def _gradients() -> tuple[str, ...]:
    """The instances of the backward kernels, for each dtype and each padded width of points and values."""
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
    *(expression("draw_seeds", dtype) for dtype in ("float32", "float64")),
    *_gradients(),
)
"""All instances that `launch.run` accepts. The tests run each of them, compile each with NVRTC, and compare its use of
registers with a table."""
