"""One token in one pass over the state: what its calls share is worked out once for each layout of their arrays.

The arithmetic of a token takes microseconds, less than it takes to describe its arrays to a kernel.
"""

import math
from typing import Any
from weakref import WeakKeyDictionary

from favorsharp_numba.arguments import (
    KINDS,
    Held,
    Layout,
    broadcast,
    empty,
    indices,
    layout_of,
    offsets_of,
    pack,
    start_of,
    versions_of,
)
from favorsharp_numba.decode_kernel import Sides, turn, turn_scratch
from favorsharp_numba.run import share
from favorsharp_numba.tiles import Points


class Turn:
    """One token, for a feature map and the layouts of q, k, v, kv, z and c."""

    def __init__(self, feature_map: Any, layouts: tuple[Layout, ...], like: Any) -> None:
        q, state = layouts[0], layouts[3:]
        self.dtype = state[0].name
        batch, size = tuple(state[0].shape[:-2]), state[0].shape[-1]
        packed, self.sizes, query, key = pack(feature_map, self.dtype, size)
        self.one = packed.one
        self.shape = (*batch, 1, size)
        alike = all(tuple(x.shape[:-2]) == batch for x in layouts) and broadcast(packed.batch, batch) == batch
        self.possible = alike and all(x.is_whole and x.name == self.dtype for x in state)
        if not self.possible:
            return
        self.heads = math.prod(batch)
        self.work = float(self.heads * self.sizes.m * (4 * size + 2 * self.sizes.d))
        self.scratch = turn_scratch(self.sizes)
        self.held = Held()
        self.sides = Sides(self.held.place(query), self.held.place(key), self.held.keep(indices(packed.batch, batch)))
        self.out_name = q.name
        points = (*layouts[:3], layout_of(empty(like, self.shape, q.name)))
        self.points = [(KINDS[x.name], *x.steps[-2:], x.item) for x in points]
        self.offsets = [offsets_of(tuple(x.shape[:-2]), x.steps[:-2], batch) for x in points]

    def run(self, q: Any, k: Any, v: Any, *state: Any) -> tuple[Any, ...]:
        """The result, kv, z and c."""
        out = empty(q, self.shape, self.out_name)
        new = [empty(q, tuple(x.shape), self.dtype) for x in state]
        item = self.one.itemsize
        places = [start_of(x) // item for x in (*state, *new)]
        addresses = [offsets + start_of(x) for offsets, x in zip(self.offsets, (q, k, v, out), strict=True)]
        points = [
            Points(kind, start_of(at), row, column, size)
            for (kind, row, column, size), at in zip(self.points, addresses, strict=True)
        ]
        share(turn, self.heads, self.work, self.scratch, self.one, self.sizes, self.sides, *points, *places)
        return out, *new


_turns: "WeakKeyDictionary[Any, dict[Any, Turn]]" = WeakKeyDictionary()
"""By feature map; the last layouts. A tensor of a map that is written to has another version, and another turn."""


def turn_of(feature_map: Any, layouts: tuple[Layout, ...], like: Any) -> Turn | None:
    """The turn for arrays of these layouts and of like's library; None where the kernel cannot take them."""
    known = _turns.setdefault(feature_map, {})
    key = (layouts, type(like), versions_of(feature_map))
    found = known.get(key)
    if found is None:
        known.clear()
        found = known[key] = Turn(feature_map, layouts, like)
    return found if found.possible else None
