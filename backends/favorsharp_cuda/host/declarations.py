"""The declarations that Python and the kernels share: sizes, flags, and the structures that kernels take.

They are declared here once. The modules of this folder import them, and `prelude` writes them in C++ for `source`.
"""

from enum import IntEnum, IntFlag
from typing import Any, NamedTuple

import numpy as np

from favorsharp.backend import NEIGHBOURS, RECENT_BLOCKS

AXES = 8
"""The most leading axes longer than 1 that a batch may have."""

TILE, THREADS = 64, 128
"""Rows and columns of a tile of the tensor-core kernels, and threads of their blocks."""

PLAIN_THREADS, DECODE_THREADS = 128, 256
"""Threads of a block of the plain kernels, and of the kernel of single tokens."""

SEED_THREADS = 512
"""Threads of the block that draws the seeds of a head's landmarks."""

GRADIENT_THREADS, GRADIENT_ROWS = 128, 32
"""Threads of a block of the backward kernels, and the points that it processes at once."""

PART = 2048
"""The most keys or points whose sums are added without low parts."""

_SIZES = {
    "AXES": AXES,
    "TILE": TILE,
    "THREADS": THREADS,
    "PLAIN_THREADS": PLAIN_THREADS,
    "DECODE_THREADS": DECODE_THREADS,
    "SEED_THREADS": SEED_THREADS,
    "GRADIENT_THREADS": GRADIENT_THREADS,
    "GRADIENT_ROWS": GRADIENT_ROWS,
    "PART": PART,
    "NEIGHBOURS": NEIGHBOURS,
    "RECENT_BLOCKS": RECENT_BLOCKS,
}


class Plain(IntFlag):
    """Flags of `plain_attention`."""

    ENTER = 1  # the keys that a query may read enter the sums before it reads
    NEAR = 2  # near blocks, or the recent keys of a state, are scored exactly
    LOAD_PARTIAL = 4  # the partial results of an earlier launch are merged with those of this one
    STORE_PARTIAL = 8  # partial results are stored, not the result


class Scan(IntFlag):
    """Flags of `scan`."""

    TOTALS = 1  # the sums of all segments are written for `read`
    BEFORE = 2  # the sums of each segment are replaced by those of all earlier segments
    STATE = 4  # the sums of all segments are written as a state
    EMPTY = 8  # segments contain no sums yet


class Walk(IntFlag):
    """Flags of `walk`."""

    LOAD = 1  # the partial results of an earlier launch are merged with those of this one
    STORE = 2  # partial results are stored, not the result
    NEAR = 4  # near blocks are scored exactly


START = IntEnum(
    "START",
    "Q K V KEY_FACTORS QUERY_FACTORS OUT PARTIAL STATS KV_OUT Z_OUT C_OUT KV_LOW_OUT Z_LOW_OUT QUERY QUERY_PLANES "
    "KEY KEY_PLANES",
    start=0,
)
"""The addresses that a block of `walk` keeps in shared memory, in their order."""


class Field(NamedTuple):
    """Fields of a structure that have one type: their names, separated by spaces; and a comment for the C++ source."""

    type: str
    names: str
    comment: str = ""


_ARRAY = (
    Field("address", "start", "the address"),
    Field("i64", "row column", "strides in items"),
    Field("i64[AXES]", "axis", "strides along the axes of the batch; 0 if the array is broadcast over one"),
)

_SIDE = (Field("address", "header rows planes", "addresses of the constants of one side of the maps (maps.py)"),)

_PROBLEM = (
    Field("Array", "q k v mask out stats partial_sums"),
    Field("Array", "query_factors key_factors", "the part of log features that depends only on the point"),
    Field("Array", "kv_in z_in c_in", "the sums of a state to start from"),
    Field("Array", "kv_out z_out c_out", "the sums after all keys"),
    Field("Array", "kv_low_in z_low_in kv_low_out z_low_out", "low parts of kv and z, if computed in float32"),
    Field("Array", "recent_k recent_v recent_mask", "the recent keys of a state, which are not in its sums"),
    Field("Array", "recent_k_out recent_v_out recent_mask_out", "the recent keys of the next state"),
    Field("i64[AXES]", "shape", "of the batch; unused axes have length 1"),
    Field("i64[AXES]", "map_axis", "the number of a head's map is the sum of index * map_axis"),
    Field("i64[AXES]", "key_axis", "the number of its key head is the sum of index * key_axis"),
    Field("Side", "query key"),
    Field("i64", "m m_pad d e", "features, features in whole tiles; sizes of points and values"),
    Field("i64", "gaussian has_dense map_rows"),
    Field("i64", "num_queries num_keys first_query window"),
    Field("i64", "causal reverse normalised"),
    Field("i64", "limit", "number of keys that have entered the sums in the end"),
    Field("i64", "recent", "number of recent keys, which every query scores exactly"),
    Field("i64", "segments span", "number of segments of positions, positions in each; or as a kernel says"),
    Field("address", "sums scratch totals", "addresses of intermediate sums; tiles.cuh has the layouts"),
    Field("i64", "padded_d padded_e plane_rows header_size stages"),
    Field("i64", "flags shift", "flags of the kernel; how far entering keys lie behind the positions"),
)

_GRADIENTS = (
    Field("Array", "q k v mask out stats gradient", "stats: 1 / total and the reference of every query"),
    Field("Array", "target", "what gradient_points, gradient_map and sum_members write"),
    Field("Array", "given_kv given_z given_c", "sums that readers start from, before any point of the other side"),
    Field("i64[AXES]", "shape", "of the batch"),
    Field("i64[AXES]", "map_axis", "the number of a head's map is the sum of index * map_axis"),
    Field("i64[AXES]", "member", "how many heads along each axis are added up for one head of target"),
    Field("i64", "query key constants", "addresses of the maps' two sides (PlainSide), and items of a side"),
    Field("i64", "m d e slices slice", "features are processed in `slices` slices of `slice` features"),
    Field("i64", "width value_width", "padded sizes of points and values in a sweep"),
    Field("i64", "gaussian has_dense num_queries num_keys window causal"),
    Field("i64", "of_factors", "0 if all weights are normalised features: then factors of queries have no gradients"),
    Field("i64", "segments span", "of the readers: number of segments, points in each"),
    Field("i64", "state_segments state_span", "the same of points that enter sums; equal if points have an order"),
    Field("i64", "keys_read backwards added", "whether keys read, whether from the end, whether results are added up"),
    Field("i64", "only_states", "whether a sweep only computes the sums of segments, for the scan"),
    Field("i64", "measuring", "whether queries read only for dout.out and the sums of weights"),
    Field("i64", "heads targets", "number of heads of the batch and of target"),
    Field("i64", "query_factor query_near query_last", "(heads, n): parts of log features and near scores, -dout.out"),
    Field("i64", "query_weights", "(heads, n): the sums of weights, if queries measure"),
    Field("i64", "key_factor key_near", "(heads, s): the key's part; -inf if the key is hidden"),
    Field("i64", "dq dk dv", "(heads, n, d), (heads, s, d), (heads, s, e)"),
    Field("i64", "query_slopes key_slopes", "(heads, n), (heads, s)"),
    Field("i64", "states map_sums factor_sums"),
    Field("i64", "total_kv total_z total_c", "(heads, m, e), (heads, m): the sums over all points, if wanted"),
    Field("i64", "largest largest_at", "for each segment and feature: the largest weight, and its key"),
    Field("i64", "of_largest before", "(heads, m): see gradient_largest"),
    Field("i64", "from to outer inner", "what sum_segments reads and writes; gradient_map reads both addresses"),
    Field("i64", "num_rows num_columns row_step column_step head_step", "what sum_members reads, and its strides"),
)

_TYPES: dict[str, Any] = {"i64": "i8", "address": "i8", "i64[AXES]": ("i8", (AXES,))}


def _layout(fields: tuple[Field, ...]) -> np.dtype[np.void]:
    return np.dtype([(name, _TYPES[field.type]) for field in fields for name in field.names.split()])


_TYPES |= {"Array": _layout(_ARRAY), "Side": _layout(_SIDE)}
PROBLEM, GRADIENTS = _layout(_PROBLEM), _layout(_GRADIENTS)
"""The structures that forward and backward kernels take by value, as NumPy dtypes; all numbers have eight bytes."""


def _addresses(fields: tuple[Field, ...], names: Any, first: int = 0) -> list[int]:
    """Where a structure of these fields holds addresses, counted in numbers of eight bytes."""
    inner = {"Array": _ARRAY, "Side": _SIDE}
    found = []
    for field in fields:
        for name in field.names.split():
            kind, offset = names[name][:2]
            place = first + offset // 8
            found += [place] if field.type == "address" else []
            found += _addresses(inner[field.type], kind.fields, place) if field.type in inner else []
    return found


ADDRESSES = tuple(_addresses(_PROBLEM, PROBLEM.fields))
"""Where a `PROBLEM` holds addresses, counted in numbers of eight bytes."""


def prelude() -> str:
    """The declarations in C++."""
    lines = ["namespace favorsharp {"]
    lines += [f"constexpr int {name} = {value};" for name, value in _SIZES.items()]
    lines += [f"enum {flags.__name__}Flags {{ {_numbered(flags)} }};" for flags in (Plain, Scan)]
    lines += [f"enum WalkFlags {{ {_numbered(Walk, 'WALK_')} }};"]
    lines += [f"enum class Start {{ {_numbered(START)} }};"]
    lines += _structure("Array", _ARRAY) + _structure("Side", _SIDE)
    lines += _structure("Problem", _PROBLEM) + _structure("Gradients", _GRADIENTS)
    return "\n".join([*lines, "}  // namespace favorsharp", ""])


def _numbered(members: type[IntEnum] | type[IntFlag], prefix: str = "") -> str:
    return ", ".join(f"{prefix}{member.name} = {member.value}" for member in members)


def _structure(name: str, fields: tuple[Field, ...]) -> list[str]:
    lines = []
    for field in fields:
        kind, _, length = field.type.replace("address", "i64").partition("[")
        names = ", ".join(f"{each}[{length}" if length else each for each in field.names.split())
        lines.append(f"  {kind} {names};" + (f"  // {field.comment}" if field.comment else ""))
    return [f"struct {name} {{", *lines, "};"]
