"""Dask arrays in the estimators: a sample of rows in memory, and functions that run on chunks of rows."""

from collections.abc import Callable
from typing import Any

import numpy as np

from favorsharp._chunks import as_chunked, point_blocks, tree_reduce

ROWS = 10_000
"""The number of rows of a dask array from which features are made, if it has so many."""


def rows_in_memory(x: Any, seed: int) -> Any:
    """Up to `ROWS` random rows of a dask array of two axes, as an array in memory."""
    (x,) = as_chunked(X=x)
    if x.shape[0] > ROWS:
        x = x[np.sort(np.random.default_rng(seed).choice(x.shape[0], ROWS, replace=False))]
    return x.compute()


def reduced(function: Callable[..., Any], join: Callable[[list[Any]], Any], x: Any, *others: Any) -> Any:
    """The results of a function for each chunk of rows of x, with the same rows of the other arrays, joined by a tree.

    None stands for an array that is not given.
    """
    import dask
    import dask.array as da

    (x,) = as_chunked(X=x)
    columns = [None if a is None else da.asarray(a).reshape((len(a), -1)) for a in others]
    parts = [point_blocks(x)]
    parts += [[None] * len(parts[0]) if a is None else point_blocks(a, like=x) for a in columns]
    return tree_reduce(join, [dask.delayed(function)(*blocks) for blocks in zip(*parts, strict=True)]).compute()


def mapped(function: Callable[[Any], Any], x: Any, columns: int | None, dtype: Any) -> Any:
    """The lazy results of a function of chunks of rows, with as many rows, and `columns` columns or (None) one axis."""
    (x,) = as_chunked(X=x)
    x = x.rechunk({1: -1})
    if columns is None:
        return x.map_blocks(function, dtype=dtype, drop_axis=1)
    return x.map_blocks(function, dtype=dtype, chunks=(x.chunks[0], (columns,)))
