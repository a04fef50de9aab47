"""The tiles in which references process points, so that no intermediate result is large."""

import math
from collections.abc import Iterator

from favorsharp._arrays import is_on_gpu
from favorsharp._typing import Array

TILE_ELEMENTS = 1 << 20
"""Number of log features held at once, over all heads: 4 MiB of float32."""
ON_GPU = 16
"""How many times more there are on a GPU, where launches cost more than memory."""


def tiles_of(
    length: int, width: int, batch: tuple[int, ...], like: Array | None = None
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Bounds of the tiles in which points are processed; one empty tile if there are no points.

    The tiles of an array `like` on a GPU are longer.
    """
    if not isinstance(length, int):  # a symbolic size of torch.export: the number of tiles is not known
        return iter(((0, length),))
    factor = ON_GPU if like is not None and is_on_gpu(like) else 1
    step = tile_length(width, batch, 1 << 20, factor)
    return ((start, min(start + step, length)) for start in range(0, length, step) or (0,))


def tile_length(width: int, batch: tuple[int, ...], most: int, factor: int = 1) -> int:
    """Points in a tile: a power of two from 16 to `most` that keeps its entries near `factor` TILE_ELEMENTS."""
    entries = math.prod([size for size in batch if isinstance(size, int)])  # symbolic sizes are not known yet
    points = factor * TILE_ELEMENTS // max(1, width * entries)
    return min(most, max(16, 1 << (points.bit_length() - 1 if points else 0)))
