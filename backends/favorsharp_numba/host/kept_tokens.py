"""Keeps the tokens of `decode_step` and of short updates, before they are added to the sums of a state together.

To add a token to the sums at once, all sums and their low parts would be read and written. So the features and the
value of a token are kept beside an earlier state, and its query reads both (`kernels/decode_step.py`). A state after
such a token computes its sums when someone reads them, or when SPAN tokens are kept.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from favorsharp.backend import State, absorb_features, is_compiling, outside_modes, unsettled
from favorsharp_numba.host import workspace
from favorsharp_numba.host.arguments import (
    Held,
    broadcast,
    check_memory,
    indices,
    is_torch,
    name_of,
    numpy_or_torch,
    pack,
    start_of,
    usable_where_it_lies,
)
from favorsharp_numba.host.threads import share
from favorsharp_numba.kernels.arguments import Sizes
from favorsharp_numba.kernels.decode_step import SPAN, fold, keep
from favorsharp_numba.kernels.workspace import items_of

FEW = SPAN
"""The most keys of an `update` that are kept; more enter the sums at once."""


class Layout(NamedTuple):
    """The sizes of the map of kept tokens, the scalar `one`, and the number of heads."""

    sizes: Sizes
    one: Any
    heads: int


class Kept:
    """A state with its sums, and the features and values of the tokens since then. The states after these share it.

    A row is written once. If two states follow the same state, the second one finds its row taken, and makes new sums.
    """

    def __init__(self, layout: Layout, since: State) -> None:
        lows = {name: _without_gaps(x) for name in ("kv_low", "z_low") if (x := getattr(since, name)) is not None}
        self.layout, self.since = layout, replace(since, **lows)
        s, heads = layout.sizes, layout.heads
        line = workspace.CACHE_LINE
        marks = -(-(1 + heads) // line) * line
        size = marks + heads * SPAN * (s.m_pad + s.e_pad)
        self.memory = workspace.workspaces(1, size, layout.one.dtype)[0]
        start = workspace.place_in(self.memory)
        shift = start - start_of(self.memory) // self.memory.itemsize
        self.marks = self.memory[shift : shift + 1 + heads]
        self.marks[:] = 0
        features = start + marks
        self.places = start, features, features + heads * SPAN * s.m_pad
        rows = self.memory[shift + marks : shift + size]
        batch, split = since.kv.shape[:-2], heads * SPAN * s.m_pad
        self.features = numpy_or_torch(since.kv, rows[:split].reshape(*batch, SPAN, s.m_pad))
        self.values = numpy_or_torch(since.kv, rows[split:].reshape(*batch, SPAN, s.e_pad))
        self.sums = tuple(map(start_of, (since.kv, since.z, since.c)))
        if not all(self.sums):
            check_memory((since.kv, since.z, since.c))
        self.owners: dict[int, object] = {}

    def claim(self, position: int) -> bool:
        """Whether the caller may write a row: no other caller has claimed it, and the row exists."""
        own = object()
        return position < SPAN and self.owners.setdefault(position, own) is own

    def folded(self, count: int, *, raised: bool = False) -> dict[str, Any]:
        """The sums of the state after the first `count` tokens.

        If `raised`, the tops also rise to the log features of the next token, which are too large to be kept.
        """
        since, layout = self.since, self.layout
        known = since.kv_low is not None and since.z_low is not None
        given = since.kv, since.z, since.c, *((since.kv_low, since.z_low) if known else ())
        names = ("kv", "z", "c") if layout.one.dtype == np.float64 else ("kv", "z", "c", "kv_low", "z_low")
        # in NumPy's memory, because torch's may belong to a graph, which does not see what a kernel writes
        new = {name: np.empty(getattr(since, name.removesuffix("_low")).shape, layout.one.dtype) for name in names}
        places = [*map(start_of, given), 0, 0][:5] + [*map(start_of, new.values()), 0, 0][:5]
        marks, features, values = self.places
        work = float(layout.heads * layout.sizes.m * layout.sizes.e * (count + 8))
        share(
            fold, layout.heads, work, items_of(fold, layout.sizes), layout.one, layout.sizes, *places,
            marks if raised else 0, features, values, count, of_torch=is_torch(since.kv),
        )  # fmt: skip
        return {"kv_low": None, "z_low": None, **{name: numpy_or_torch(since.kv, x) for name, x in new.items()}}

    def begun_again(self, count: int, *, raised: bool = False) -> "Kept":
        """Kept tokens that begin after the first `count` of these."""
        since = self.since
        sums = self.folded(count, raised=raised)
        fields = {name: getattr(since, name) for name in ("window", "recent_k", "recent_v", "recent_mask")}
        return Kept(self.layout, State(**sums, **fields, fingerprint=since.fingerprint))


def kept_at(state: State, layout: Layout, count: int = 1) -> tuple[Kept, int]:
    """Where the next `count` tokens of a state are kept, and the number of the first of their rows."""
    if "kv" in vars(state):  # its sums have been read, so it continues from them, as a saved copy would
        kept = Kept(layout, state)
    else:
        kept, position = state.single_tokens
        if position + count <= SPAN and kept.claim(position):
            return kept, position
        kept = kept.begun_again(position)
    return kept, 0  # no other caller knows these rows yet


class After(NamedTuple):
    """The tokens of a state: the kept tokens, and how many of the first of them the state contains."""

    kept: Kept
    taken: int

    @property
    def like(self) -> Any:
        """An array with the shape, dtype and device of kv."""
        return self.kept.since.kv

    def sums(self) -> dict[str, Any]:
        """kv, z, c and the low parts of the state."""
        kept, since, taken = self.kept, self.kept.since, self.taken
        if not is_compiling():  # compilers cannot trace kernels
            with outside_modes(since.kv):
                return kept.folded(taken)
        features = kept.features[..., :taken, : since.num_features]
        state = absorb_features(since, features.log() + since.c, kept.values[..., :taken, : since.v_size])
        return {name: getattr(state, name) for name in ("kv", "z", "c", "kv_low", "z_low")}

    @property
    def num_bytes(self) -> int:
        """The memory of the tokens and of the state before them."""
        since = self.kept.since
        held = self.kept.memory, since.kv, since.z, since.c, since.kv_low, since.z_low
        return sum(int(x.nbytes) for x in held if x is not None)


def keeps(state: State, k: Any, v: Any, key_mask: Any, feature_map: Any) -> bool:
    """Whether `with_few` takes these keys."""
    if state.window or key_mask is not None or not 0 < k.shape[-2] <= FEW:
        return False
    batch = tuple(state.like.shape[:-2])
    known = state.single_tokens is not None or is_whole(state)
    alike = all(tuple(x.shape[:-2]) == batch and usable_where_it_lies(x) for x in (k, v))
    return known and alike and batch == broadcast(feature_map.batch_shape, batch)


def is_whole(state: State) -> bool:
    """Whether kernels can read the sums of a state in place, without strides."""
    arrays = state.kv, state.z, state.c
    alike = all(x.dtype == state.kv.dtype and x.shape[:-2] == state.kv.shape[:-2] for x in arrays)
    return alike and all(usable_where_it_lies(x) and _without_gaps(x) is x for x in arrays)


def with_few(state: State, k: Any, v: Any, feature_map: Any) -> State:
    """The state after a few further keys, which are kept."""
    batch, size = tuple(state.like.shape[:-2]), v.shape[-1]
    packed, sizes, _, key = pack(feature_map, name_of(state.like), size)
    layout, held = Layout(sizes, packed.one, math.prod(batch)), Held()
    points = held.points(k, batch), held.points(v, batch)
    sides, map_of = held.place(key), held.constant(indices(packed.batch, batch))
    for first in range(0, k.shape[-2], SPAN):
        count = min(SPAN, k.shape[-2] - first)
        kept, position = kept_at(state, layout, count)
        work = float(layout.heads * count * sizes.m * (2 * sizes.d + 8))

        def run(kept: Kept, position: int, first: int = first, count: int = count, work: float = work) -> None:
            share(
                keep, layout.heads, work, items_of(keep, sizes), layout.one, sizes, sides, map_of, *points, first,
                count, kept.sums[2], *kept.places, position, of_torch=held.of_torch,
            )  # fmt: skip

        run(kept, position)
        if kept.marks[0]:
            kept, position = kept.begun_again(position, raised=True), 0
            run(kept, position)
        state = unsettled(state, After(kept, position + count))
    return state


def _without_gaps(x: Any) -> Any:
    """The array, or a copy of it if its items do not lie side by side."""
    if is_torch(x):
        return x.contiguous()
    return x if x.flags.c_contiguous else np.ascontiguousarray(x)
