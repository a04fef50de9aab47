"""Feature maps as kernels read them: constants folded on the host in float64, packed, and kept beside the arrays.

A map is packed once for each device and layout, which copies it to the host and back: the first call with a map waits
for the GPU, later ones do not.
"""

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
