"""Feature maps as kernels read them: constants folded in float64, packed, and kept beside the map.

A map is packed by its own library, where its arrays lie, on the caller's stream. What is kept has one number read back:
whether a side has a quadratic form, which kernels leave out where there is none. A map that is trained, or that a CUDA
graph packs, has nothing read: its call does not wait for the GPU, and its kernels multiply by a form of zeros.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from favorsharp._arrays import cast, named_dtype, namespace_of, on_device_of
from favorsharp.features.folding import FoldedSide, fold
from favorsharp_cuda import arrays
from favorsharp_cuda.launch import stream_of


@dataclass(frozen=True)
class PlainMap:
    """Both sides of a map for kernels of plain arithmetic: (count, size) each, natural logarithms.

    A side has 8 scalars (root, offset, beta), center, linear and near_center (d each), column (m), rows (d, m) and
    dense (d, d).
    """

    query: Any
    key: Any
    size: int
    has_dense: bool


def plain_map(feature_map: Any, dtype: str) -> PlainMap:
    """The map for plain kernels that compute in a dtype."""
    return _kept(feature_map, ("plain", dtype), partial(_pack_plain, feature_map, dtype))  # type: ignore[no-any-return]


def _pack_plain(feature_map: Any, dtype: str, may_read: bool) -> PlainMap:
    sides = fold(feature_map)
    query, key = (_plain_side(side, dtype) for side in sides)
    return PlainMap(query, key, query.shape[1], not may_read or _has_dense(sides))


def _has_dense(sides: tuple[FoldedSide, FoldedSide]) -> bool:
    xp = namespace_of(sides[0].dense)
    return bool(xp.any(xp.stack([side.dense for side in sides]) != 0))


def _plain_side(side: FoldedSide, dtype: str) -> Any:
    xp = namespace_of(side.rows)
    count, m, d = side.rows.shape
    packed = xp.zeros((count, 8 + 3 * d + m + m * d + d * d), dtype=named_dtype(xp, dtype), **on_device_of(side.rows))
    packed[:, 0], packed[:, 1], packed[:, 2] = side.root, side.offset, side.beta
    first = 8
    columns = xp.matrix_transpose(side.rows)
    for x in (side.center, side.linear, side.near_center, side.column, columns, side.dense):
        numbers = xp.reshape(x, (count, -1))
        packed[:, first : first + numbers.shape[1]] = numbers
        first += numbers.shape[1]
    return packed


def expanded_map(feature_map: Any) -> Any:
    """The map for points with a further leading axis; the same object, and what is packed of it, at every call."""
    if not feature_map.batch_shape:
        return feature_map
    return _kept(feature_map, ("expanded",), lambda may_read: feature_map.expanded())


LOG2E = 1 / math.log(2)
TILE = 64


@dataclass(frozen=True)
class TileMap:
    """Both sides of a map for tensor-core kernels, base 2.

    A side's header (count, header_size), float32: 8 scalars, center, linear and near_center (padded_d each), column
    (padded_m, -inf beyond m). Its planes (count, 2, plane_rows, padded_d), float16: rows (padded_m), then those of the
    quadratic form, each scaled by a power of two to 2**12 .. 2**13; the second plane is what the first leaves.
    """

    query_header: Any
    query_planes: Any
    key_header: Any
    key_planes: Any
    padded_d: int
    padded_m: int
    plane_rows: int
    header_size: int
    has_dense: bool


def tile_map(feature_map: Any) -> TileMap:
    """The map for tensor-core kernels."""
    return _kept(feature_map, ("tiles",), partial(_pack_tiles, feature_map))  # type: ignore[no-any-return]


def _pack_tiles(feature_map: Any, may_read: bool) -> TileMap:
    sides = fold(feature_map)
    _, m, d = sides[0].rows.shape
    padded_d, padded_m = -(-d // 16) * 16, -(-m // TILE) * TILE
    plane_rows = padded_m + -(-d // TILE) * TILE
    (query_header, query_planes), (key_header, key_planes) = (
        _tile_side(side, padded_d, padded_m, plane_rows) for side in sides
    )
    return TileMap(
        query_header, query_planes, key_header, key_planes, padded_d, padded_m, plane_rows, query_header.shape[1],
        not may_read or _has_dense(sides),
    )  # fmt: skip


def _tile_side(side: FoldedSide, padded_d: int, padded_m: int, plane_rows: int) -> tuple[Any, Any]:
    xp = namespace_of(side.rows)
    device = on_device_of(side.rows)
    count, m, d = side.rows.shape
    rows, of_rows = _split(LOG2E * side.rows)
    dense, of_dense = _split(math.sqrt(LOG2E) * xp.matrix_transpose(side.dense))
    planes = xp.zeros((count, 2, plane_rows, padded_d), dtype=rows.dtype, **device)
    planes[:, :, :m, :d] = rows
    planes[:, :, padded_m : padded_m + d, :d] = dense
    header = xp.zeros((count, 8 + 3 * padded_d + padded_m), dtype=xp.float32, **device)
    header[:, 0], header[:, 1], header[:, 2] = side.root, LOG2E * side.offset, LOG2E * side.beta
    header[:, 3], header[:, 4], header[:, 5] = 1 / of_rows, 1 / of_dense, LOG2E
    for place, x in enumerate((side.center, LOG2E * side.linear, side.near_center)):
        header[:, 8 + place * padded_d : 8 + place * padded_d + d] = x
    header[:, 8 + 3 * padded_d : 8 + 3 * padded_d + m] = LOG2E * side.column
    header[:, 8 + 3 * padded_d + m :] = -math.inf
    return header, planes


def _split(matrix: Any) -> tuple[Any, Any]:
    """Each matrix (count, n, d) as two planes (count, 2, n, d) of float16, and what it was multiplied by, (count,)."""
    xp = namespace_of(matrix)
    largest = xp.max(xp.abs(matrix), axis=(1, 2))
    usable = xp.where((largest > 0) & (largest < math.inf), largest, 1.0)
    # a logarithm rounded across a power of two would cost one bit of 22: the kernels divide by what they find
    scale = 2.0 ** (12.0 - xp.floor(xp.log2(usable)))
    scaled = matrix * scale[:, None, None]
    high = cast(scaled, named_dtype(xp, "float16"))
    return xp.stack([high, cast(scaled - cast(high, scaled.dtype), high.dtype)], axis=1), scale


# Kept as long as the map is ------------------------------------------------------------------------------------------

_known: "weakref.WeakKeyDictionary[Any, dict[Any, Any]]" = weakref.WeakKeyDictionary()
"""By feature map: a map is frozen. A tensor changed in place has another version, and is packed again."""

_captured: dict[int, Any] = {}
"""What graphs were captured with, by identity: a graph has addresses alone, and nobody says when it goes."""


def _kept(feature_map: Any, key: tuple[Any, ...], make: Callable[[bool], Any]) -> Any:
    """What was made of a map before, on the caller's stream: on others it may not be ready yet.

    `make` is told whether it may read a number, and so wait.

    A map that is trained is packed at each use: a graph that is replayed changes its numbers, but not their versions. A
    capture takes what an earlier call left on any stream; what it makes itself is there only once the graph has run.
    """
    if any(arrays.is_torch(x) and x.requires_grad for x in feature_map.arrays):
        return make(False)
    stream, is_capturing = stream_of(feature_map.rows)
    known = _known.setdefault(feature_map, {})
    versions = tuple(None if x.is_inference() else x._version for x in feature_map.arrays if arrays.is_torch(x))
    if known.get("versions", versions) != versions:
        known.clear()
    known["versions"] = versions
    streams = known.setdefault(key, {})
    if is_capturing:
        if not streams:
            return make(False)
        found = next(iter(streams.values()))
        _captured[id(found)] = found
        return found
    if stream not in streams:
        streams[stream] = make(True)
    return streams[stream]
