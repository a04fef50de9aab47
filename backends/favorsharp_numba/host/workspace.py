"""Allocates the workspaces in which kernels run, one for each thread of a call."""

from typing import Any

import numpy as np

CACHE_LINE = 64
"""The alignment of workspaces in bytes: the length of a cache line."""


def workspaces(threads: int, items: int, dtype: Any) -> Any:
    """Memory for several threads, with a row for each thread.

    `place_in` the row is room for a workspace of so many items.
    """
    return np.empty((threads, items + CACHE_LINE), dtype)


def place_in(memory: Any) -> int:
    """The first place in an array that lies at the beginning of a cache line."""
    address: int = memory.__array_interface__["data"][0]
    return -(-address // CACHE_LINE) * CACHE_LINE // int(memory.itemsize)
