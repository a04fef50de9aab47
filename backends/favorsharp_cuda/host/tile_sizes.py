"""The sizes that the tensor-core kernels serve, and the shared memory that their blocks need.

`fit` says whether they serve a call. `host.tiles` launches the kernels.
"""

from functools import lru_cache
from typing import Any

from favorsharp_cuda.host import arrays
from favorsharp_cuda.host.declarations import START, TILE
from favorsharp_cuda.host.launch import shared_room
from favorsharp_cuda.host.source import TILE_TYPES, VALUE_SIZES, WALKED_SIZES

LARGEST = 128
"""The most entries that a point or a value can have."""


def fit(x: Any, e: int, *, walks: bool = False) -> bool:
    """Whether these kernels serve points x and values of size e on x's device; with `walks`, whether `walk` does."""
    dtype, d = arrays.name_of(x), x.shape[-1]
    if not (dtype in TILE_TYPES and 0 < d <= LARGEST and 0 < e <= LARGEST):
        return False
    room = room_of(x)
    return walked_size(dtype, d, e, room) > 0 if walks else widest_value(dtype, d, room) > 0


@lru_cache(maxsize=1024)
def value_size(e: int) -> int:
    """The size to which `absorb` and `read` pad values."""
    return next(size for size in VALUE_SIZES if e <= size)


def planes(dtype: str) -> int:
    """The number of planes of bfloat16 into which weights and values are split."""
    return 1 if dtype == "bfloat16" else 2


def room_of(x: Any) -> int:
    """The most bytes of shared memory that a block can use on x's device."""
    return shared_room(arrays.device_number(x))


def points_bytes(d: int, number: int = 2) -> int:
    """Bytes of a tile of 64 points, or of 64 rows of a map, in so many planes of 16 bits."""
    return 2 * number * TILE * (-(-d // 16) * 16 + 8)


def values_bytes(dtype: str, e: int) -> int:
    """Bytes of 64 values, or of the sums of 64 features, in planes of bfloat16."""
    return 2 * planes(dtype) * TILE * (e + 8)


def shared_of_absorb(dtype: str, d: int, e: int) -> int:
    """Bytes of shared memory for a block of `absorb`."""
    return points_bytes(d, planes(dtype)) + points_bytes(d) + values_bytes(dtype, e) + 8 * TILE


def shared_of_read(dtype: str, d: int, e: int, stages: int = 1) -> int:
    """Bytes of shared memory for a block of `read`."""
    return points_bytes(d, planes(dtype)) + stages * (points_bytes(d) + values_bytes(dtype, e)) + 4 * TILE


def shared_of_walk(dtype: str, d: int, e: int, stages: int = 1, *, near: bool = True) -> int:
    """Bytes of shared memory for a block of `walk` that processes e columns of the values.

    With near keys, points of every dtype take two planes.
    """
    numbers = 4 * (9 * TILE + 20) + 8 * len(START)
    points = 2 * points_bytes(d, 2 if near else planes(dtype)) + stages * points_bytes(d)
    return points + 2 * values_bytes(dtype, e) + values_bytes(dtype, TILE) + numbers


@lru_cache(maxsize=1024)
def widest_value(dtype: str, d: int, room: int) -> int:
    """The largest size of values that fits into `absorb` and `read` together with points of size d; 0 if none does."""
    sizes = (e for e in VALUE_SIZES if max(shared_of_absorb(dtype, d, e), shared_of_read(dtype, d, e)) <= room)
    return max(sizes, default=0)


@lru_cache(maxsize=1024)
def walked_size(dtype: str, d: int, e: int, room: int) -> int:
    """The number of columns of the values that a block of `walk` processes: the largest that fits; 0 if none does."""
    for size in sorted(WALKED_SIZES, reverse=True):
        if size > value_size(e) or shared_of_walk(dtype, d, size) > room:
            continue
        if shared_of_absorb(dtype, d, walked_value_size(e, size)) <= room:
            return size
    return 0


@lru_cache(maxsize=1024)
def walked_value_size(e: int, size: int) -> int:
    """The size to which values are padded if `walk` processes them in parts of the given size."""
    return next(padded for padded in VALUE_SIZES if e <= padded and padded % size == 0)


def parts_of(x: Any, e: int) -> list[Any]:
    """The ranges of columns in which `absorb` and `read` process values; usually one range of all columns."""
    parts = -(-e // widest_value(arrays.name_of(x), x.shape[-1], room_of(x)))
    if parts == 1:
        return [...]
    size = -(-e // parts)
    return [(..., slice(first, min(e, first + size))) for first in range(0, e, size)]


def sums_size(m: int, e: int) -> int:
    """Items of the sums of a segment in global memory, low parts included (`Layout` in kernels/tiles.cuh)."""
    return m * (2 * e + 3)
