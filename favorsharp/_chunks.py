"""Functions for dask arrays: one delayed call for each chunk of points, and a tree that merges the results.

`moments`, `fit` and the functions of `regression` use it. dask is imported only if a caller passes one of its arrays.
"""

import sys
from collections.abc import Callable
from typing import Any

from favorsharp._arrays import is_array, library_of
from favorsharp._typing import Array

_FAN = 8
"""Number of parts that one merge joins."""


def is_chunked(*arrays: Array) -> bool:
    """Whether any of the arrays is a dask array."""
    return any(is_array(x) and library_of(x) == "dask" for x in arrays)


def as_chunked(**named: Array) -> list[Array]:
    """Convert the named arrays to dask arrays, and check that their shapes are known."""
    import dask.array as da

    arrays = {name: da.asarray(x) for name, x in named.items()}
    for name, x in arrays.items():
        if any(size != size for size in x.shape):  # NaN stands for a size that dask does not know
            raise ValueError(
                f"{name} has chunks of unknown size; accepted: known sizes, as compute_chunk_sizes() gives"
            )
        if x.ndim < 2:
            raise ValueError(f"{name} has shape {x.shape}; accepted: two axes at least")
    return list(arrays.values())


def point_blocks(x: Array, like: Array | None = None) -> list[Any]:
    """Delayed chunks of x along the point axis -2, cut at the places where `like` is cut; other axes are not cut."""
    points = x.chunks[-2] if like is None else like.chunks[-2]
    x = x.rechunk({axis: points if axis == x.ndim - 2 else -1 for axis in range(x.ndim)})
    return list(x.to_delayed().ravel())


def tree_reduce(join: Callable[[list[Any]], Any], parts: list[Any]) -> Any:
    """Join delayed parts in order, a few at a time, in a tree."""
    delayed = sys.modules["dask"].delayed
    while len(parts) > 1:
        parts = [delayed(join)(parts[start : start + _FAN]) for start in range(0, len(parts), _FAN)]
    return parts[0]
