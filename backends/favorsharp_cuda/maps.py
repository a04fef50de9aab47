"""Feature maps as kernels read them: constants folded on the host in float64, packed, and kept beside the arrays.

A map is packed once for each device and layout, which copies it to the host and back: the first call with a map waits
for the GPU, later ones do not.
"""

import math
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from favorsharp.features.folding import FoldedSide, fold
from favorsharp_cuda import arrays


@dataclass(frozen=True)
class PlainMap:
    """Both sides of a map for kernels of plain arithmetic: (count, size) each, natural logarithms.

    A side has 8 scalars (root, offset, beta), center, linear and near_center (d each), column (m), rows (d, m) and, if
    one of the sides needs it, dense (d, d).
    """

    query: Any
    key: Any
    size: int
    has_dense: bool


def plain_map(feature_map: Any, like: Any, dtype: str) -> PlainMap:
    """The map for plain kernels that compute in a dtype."""
    return _kept(feature_map, ("plain", dtype, _place(like)), lambda: _pack_plain(feature_map, like, dtype))  # type: ignore[no-any-return]


def _pack_plain(feature_map: Any, like: Any, dtype: str) -> PlainMap:
    sides = fold(feature_map)
    has_dense = any(side.dense is not None for side in sides)
    packed = [_plain_side(side, has_dense).astype(dtype) for side in sides]
    query, key = (arrays.upload(like, x) for x in packed)
    return PlainMap(query, key, packed[0].shape[1], has_dense)


def _plain_side(side: FoldedSide, has_dense: bool) -> Any:
    count, _, d = side.rows.shape
    head = np.zeros((count, 8))
    head[:, 0], head[:, 1], head[:, 2] = side.root, side.offset, side.beta
    parts = [head, side.center, side.linear, side.near_center, side.column, side.rows.swapaxes(-1, -2)]
    if has_dense:
        parts.append(np.zeros((count, d, d)) if side.dense is None else side.dense)
    return np.concatenate([x.reshape(count, -1) for x in parts], axis=1)


def expanded_map(feature_map: Any) -> Any:
    """The map for points with a further leading axis; the same object, and what is packed of it, at every call."""
    if not feature_map.batch_shape:
        return feature_map
    if any(arrays.is_torch(x) and x.requires_grad for x in feature_map.arrays):  # of one backward pass alone
        return feature_map.expanded()
    return _kept(feature_map, ("expanded",), feature_map.expanded)


LOG2E = 1 / math.log(2)
TILE = 64


@dataclass(frozen=True)
class TileMap:
    """Both sides of a map for tensor-core kernels, base 2.

    A side's header (count, header_size), float32: 8 scalars, center, linear and near_center (padded_d each), column
    (padded_m, -inf beyond m). Its planes (count, 2, plane_rows, padded_d), float16: rows (padded_m), then those of the
    quadratic form, if one of the sides needs it, each scaled by a power of two to 2**12 .. 2**13; the second plane is
    what the first leaves.
    """

    query_header: Any
    query_planes: Any
    key_header: Any
    key_planes: Any
    padded_d: int
    padded_m: int
    plane_rows: int
    header_size: int
    query_has_dense: bool
    key_has_dense: bool


def tile_map(feature_map: Any, like: Any) -> TileMap:
    """The map for tensor-core kernels."""
    return _kept(feature_map, ("tiles", _place(like)), lambda: _pack_tiles(feature_map, like))  # type: ignore[no-any-return]


def _pack_tiles(feature_map: Any, like: Any) -> TileMap:
    sides = fold(feature_map)
    _, m, d = sides[0].rows.shape
    padded_d, padded_m = -(-d // 16) * 16, -(-m // TILE) * TILE
    has_dense = [side.dense is not None for side in sides]
    plane_rows = padded_m + (-(-d // TILE) * TILE if any(has_dense) else 0)
    (query_header, query_planes), (key_header, key_planes) = (
        [arrays.upload(like, x) for x in _tile_side(side, padded_d, padded_m, plane_rows)] for side in sides
    )
    return TileMap(
        query_header, query_planes, key_header, key_planes, padded_d, padded_m, plane_rows, query_header.shape[1],
        *has_dense,
    )  # fmt: skip


def _tile_side(side: FoldedSide, padded_d: int, padded_m: int, plane_rows: int) -> tuple[Any, Any]:
    count, m, d = side.rows.shape
    matrix = np.zeros((count, plane_rows, padded_d))
    matrix[:, :m, :d] = LOG2E * side.rows
    if side.dense is not None:
        matrix[:, padded_m : padded_m + d, :d] = math.sqrt(LOG2E) * side.dense.swapaxes(-1, -2)
    scales = np.ones((count, plane_rows))
    for rows in (slice(0, padded_m), slice(padded_m, plane_rows)):
        largest = np.max(np.abs(matrix[:, rows]), axis=(1, 2), initial=0)
        exponent = np.frexp(np.where(np.isfinite(largest) & (largest > 0), largest, 1.0))[1]
        scales[:, rows] = np.exp2(13.0 - exponent)[:, None]
    scaled = matrix * scales[..., None]
    planes = np.empty((count, 2, plane_rows, padded_d), np.float16)
    planes[:, 0] = scaled
    planes[:, 1] = scaled - planes[:, 0]
    header = np.zeros((count, 8 + 3 * padded_d + padded_m), np.float32)
    header[:, 0], header[:, 1], header[:, 2] = side.root, LOG2E * side.offset, LOG2E * side.beta
    header[:, 3], header[:, 4], header[:, 5] = 1 / scales[:, 0], 1 / scales[:, -1], LOG2E
    for place, x in enumerate((side.center, LOG2E * side.linear, side.near_center)):
        header[:, 8 + place * padded_d : 8 + place * padded_d + d] = x
    header[:, 8 + 3 * padded_d :] = -np.inf
    header[:, 8 + 3 * padded_d : 8 + 3 * padded_d + m] = LOG2E * side.column
    return header, planes


# Kept as long as the map is ------------------------------------------------------------------------------------------

_known: "weakref.WeakKeyDictionary[Any, dict[Any, Any]]" = weakref.WeakKeyDictionary()
"""By feature map: a map is frozen. A tensor changed in place has another version, and is packed again."""


def _place(like: Any) -> tuple[str, int]:
    return type(like).__module__.partition(".")[0], arrays.device_number(like)


def _kept(feature_map: Any, key: tuple[Any, ...], make: Any) -> Any:
    known = _known.setdefault(feature_map, {})
    versions = tuple(None if x.is_inference() else x._version for x in feature_map.arrays if arrays.is_torch(x))
    if known.get("versions", versions) != versions:
        known.clear()
    known["versions"] = versions
    if key not in known:
        known[key] = make()
    return known[key]
