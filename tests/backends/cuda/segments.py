"""Several segments at the lengths of tests, where they would not pay."""

from collections.abc import Callable
from typing import Any

from favorsharp_cuda.host import attention_gradients, occupancy, tiles


def cut_short(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Cut lengths into the shortest segments, as if more of them cost nothing; `put` sets an attribute of a module."""
    put(tiles, "SHORTEST", 64)
    put(tiles, "ABSORBED", 0.0)
    put(attention_gradients, "SHORTEST_SEGMENT", 40)
    put(occupancy, "START", 0)
    put(occupancy, "SCAN", 0)
    occupancy.cut.cache_clear()
