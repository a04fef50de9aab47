"""Packs feature maps into the layouts that kernels read, and caches the packed forms.

`plain`, `tiles`, `gradients` and `packed` call this module. `favorsharp.features.folding` computes the constants in
float64, with the map's own library, on the map's device and on the caller's stream.

One number is read back to the host: whether either side has a quadratic form. If not, kernels skip the product with it.
No number is read back for a map whose tensors require gradients, or that is packed while a CUDA graph is captured. Such
a call does not wait for the GPU, and its kernels always compute the product, with zeros if there is no quadratic form.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from favorsharp.backend import FoldedSide, cast, derived, fold, named_dtype, namespace_of, on_device_of
from favorsharp_cuda.host import arrays
from favorsharp_cuda.host.declarations import TILE
from favorsharp_cuda.host.launch import stream_of
from favorsharp_cuda.host.recording import active


@dataclass(frozen=True)
class PlainMap:
    """Both sides of a map for kernels of plain arithmetic: an array (count, size) each, with natural logarithms.

    The first axis runs over the maps of a batch. A row holds 8 scalars (root, offset, beta, the rest unused), center,
    linear and near_center (d each), column (m), rows (d, m) and dense (d, d); see `FoldedSide`.
    """

    query: Any
    key: Any
    size: int
    has_dense: bool


def plain_map(feature_map: Any, dtype: str) -> PlainMap:
    """The packed form of a map for plain kernels that compute in the given dtype."""
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
    """The map for points with one more leading axis. It is cached, so that its packed forms can be reused."""
    if not feature_map.batch_shape:
        return feature_map
    return _kept(feature_map, ("expanded",), lambda may_read: feature_map.expanded())


LOG2E = 1 / math.log(2)


@dataclass(frozen=True)
class TileMap:
    """Both sides of a map for tensor-core kernels, with logarithms to base 2.

    The first axis of all arrays, `count`, runs over the maps of a batch. A side's header (count, header_size) is in
    float32: 8 scalars, center, linear and near_center (padded_d each), and two columns (padded_m; -inf from m on), for
    centred points and for points as they are.

    Rows are in two planes of 16 bits: the numbers rounded, and the remainders. They lie as in shared memory, in tiles
    (count, rows // 64, 2, 64, padded_d + 8). A side's planes, for centred points, are in float16: the rows of the map
    (padded_m), then those of the quadratic form (plane_rows in all). Each of the two matrices is scaled by a power of
    two, so that its largest entry is between 2**12 and 2**13. A side's rows, for points of bfloat16 as they are, are
    the bits of bfloat16: the rows of the map times its root.
    """

    query_header: Any
    query_planes: Any
    query_rows: Any
    key_header: Any
    key_planes: Any
    key_rows: Any
    padded_d: int
    padded_m: int
    plane_rows: int
    header_size: int
    has_dense: bool
    problems: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """What `tiles` keeps with the map: problems in which its constants are set."""


def tile_map(feature_map: Any) -> TileMap:
    """The packed form of a map for tensor-core kernels."""
    return _kept(feature_map, ("tiles",), partial(_pack_tiles, feature_map))  # type: ignore[no-any-return]


def _pack_tiles(feature_map: Any, may_read: bool) -> TileMap:
    sides = fold(feature_map)
    _, m, d = sides[0].rows.shape
    padded_d, padded_m = -(-d // 16) * 16, -(-m // TILE) * TILE
    plane_rows = padded_m + -(-d // TILE) * TILE
    query, key = (_tile_side(side, padded_d, padded_m, plane_rows) for side in sides)
    header_size = query[0].shape[1]
    return TileMap(*query, *key, padded_d, padded_m, plane_rows, header_size, not may_read or _has_dense(sides))


def _tile_side(side: FoldedSide, padded_d: int, padded_m: int, plane_rows: int) -> tuple[Any, Any, Any]:
    xp = namespace_of(side.rows)
    device = on_device_of(side.rows)
    count, m, d = side.rows.shape
    rows, of_rows = _split(LOG2E * side.rows)
    dense, of_dense = _split(math.sqrt(LOG2E) * xp.matrix_transpose(side.dense))
    planes = xp.zeros((count, 2, plane_rows, padded_d + 8), dtype=rows.dtype, **device)
    planes[:, :, :m, :d] = rows
    planes[:, :, padded_m : padded_m + d, :d] = dense
    plain = _bfloat16_planes(LOG2E * side.root * side.rows)
    plain_rows = xp.zeros((count, 2, padded_m, padded_d + 8), dtype=plain.dtype, **device)
    plain_rows[:, :, :m, :d] = plain
    header = xp.zeros((count, 8 + 3 * padded_d + 2 * padded_m), dtype=xp.float32, **device)
    header[:, 0], header[:, 1], header[:, 2] = side.root, LOG2E * side.offset, LOG2E * side.beta
    header[:, 3], header[:, 4], header[:, 5] = 1 / of_rows, 1 / of_dense, LOG2E
    for place, x in enumerate((side.center, LOG2E * side.linear, side.near_center)):
        header[:, 8 + place * padded_d : 8 + place * padded_d + d] = x
    moved = side.column - xp.matmul(side.rows, side.center[..., None])[..., 0]
    for first, column in ((8 + 3 * padded_d, side.column), (8 + 3 * padded_d + padded_m, moved)):
        header[:, first : first + m] = LOG2E * column
        header[:, first + m : first + padded_m] = -math.inf
    return header, _tiles(planes), _tiles(plain_rows)


def _tiles(planes: Any) -> Any:
    """Planes (count, 2, n, width) as tiles (count, n // 64, 2, 64, width), one after the other in memory."""
    xp = namespace_of(planes)
    count, _, n, width = planes.shape
    tiles = xp.empty((count, n // TILE, 2, TILE, width), dtype=planes.dtype, **on_device_of(planes))
    tiles[...] = xp.permute_dims(xp.reshape(planes, (count, 2, n // TILE, TILE, width)), (0, 2, 1, 3, 4))
    return tiles


def _bfloat16_planes(matrix: Any) -> Any:
    """Each matrix (count, n, d) as the bits of two planes of bfloat16, (count, 2, n, d), in int16.

    Not every library has a dtype for bfloat16. Its bits are the upper half of those of float32.
    """
    xp = namespace_of(matrix)

    def rounded(x: Any) -> Any:  # to the nearest number whose lower half is zero, and to even
        bits = cast(x, xp.float32).view(xp.int32)
        return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16

    high = rounded(matrix)
    low = rounded(matrix - cast((high << 16).view(xp.float32), matrix.dtype))
    return cast(xp.stack([high, low], axis=1), xp.int16)


def _split(matrix: Any) -> tuple[Any, Any]:
    """Each matrix (count, n, d) as two planes of float16, (count, 2, n, d), and the factor of its scaling, (count,)."""
    xp = namespace_of(matrix)
    largest = xp.max(xp.abs(matrix), axis=(1, 2))
    usable = xp.where((largest > 0) & (largest < math.inf), largest, 1.0)
    # If log2 is rounded across a power of two, one bit of 22 is lost; the header has the inverse of this very factor.
    scale = 2.0 ** (12.0 - xp.floor(xp.log2(usable)))
    scaled = matrix * scale[:, None, None]
    high = cast(scaled, named_dtype(xp, "float16"))
    return xp.stack([high, cast(scaled - cast(high, scaled.dtype), high.dtype)], axis=1), scale


# The cache -----------------------------------------------------------------------------------------------------------

_captured: dict[int, Any] = {}
"""Packed forms that captured graphs use, by identity. They are kept for ever: a graph holds addresses only, and nothing
tells when it is deleted."""


def _kept(feature_map: Any, key: tuple[Any, ...], make: Callable[[bool], Any]) -> Any:
    """The result of `make` for a map, from the cache if it was made on the caller's stream before.

    Each stream has its own entry, because on another stream the arrays may not be ready yet. The argument of `make`
    says whether it may read a number back to the host, and so wait for the GPU.

    If a tensor of the map requires gradients, the cache is not used: replaying a graph changes the numbers of such a
    tensor, but not its version. While a graph is captured, the result of an earlier call on any stream is used. If
    there is none, the result is not cached, because its arrays are filled only when the graph runs.
    """
    for x in feature_map.arrays:
        if arrays.is_torch(x) and x.requires_grad:
            return make(False)
    stream, is_capturing = stream_of(feature_map.rows)
    streams = derived(feature_map, ("cuda", *key), dict)
    if is_capturing:
        if not streams:
            return make(False)
        found = next(iter(streams.values()))
        _captured[id(found)] = found
        return found
    if stream not in streams:
        streams[stream] = make(True)
    found = streams[stream]
    if active.recording is not None:
        active.recording.constants += [x for x in vars(found).values() if arrays.is_torch(x)]
    return found
