"""Makes the kernels use several segments for the short inputs of tests, for which they would use one."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from favorsharp_cuda.host import gradient_sizes, occupancy, repeats, tiles


@contextmanager
def short_segments() -> Iterator[None]:
    """Cut lengths into the shortest segments, as if each segment cost nothing."""
    _forget()
    try:
        with (
            patch.multiple(tiles, SHORTEST=64, ABSORBED=0.0),
            patch.object(gradient_sizes, "SHORTEST_SEGMENT", 40),
            patch.multiple(occupancy, START=0, SCAN=0),
        ):
            yield
    finally:
        _forget()


def _forget() -> None:
    occupancy.cut.cache_clear()
    repeats.forget()
