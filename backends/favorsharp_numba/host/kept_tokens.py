"""Keeps the tokens of `decode_step` for a while, to add them up again without rounding errors.

A token reads and writes all sums of a state; with low parts it would read and write twice as much. So a single token is
added without low parts. The state keeps with it an earlier state, which has low parts, and the tokens since then. After
SPAN tokens it is computed again from these, so that errors accumulate over at most SPAN tokens.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from favorsharp.backend import State
from favorsharp_numba.host.arguments import numpy_or_torch
from favorsharp_numba.host.problem import absorbed

SPAN = 256
"""The number of tokens that are kept."""


class Kept:
    """A state, and the keys and values of the tokens since then. All states after these tokens share it.

    A row is written once. If two states follow the same state, the second one finds its row taken and begins again.
    """

    def __init__(self, since: State, heads: int, d: int, dtype: Any) -> None:
        self.since = since
        self.keys = np.empty((SPAN, heads, d), dtype)
        self.values = np.empty((SPAN, heads, since.v_size), dtype)
        self.places = self.keys.ctypes.data, self.values.ctypes.data
        self.steps = self.keys.strides[0], self.values.strides[0]
        self.owners: dict[int, object] = {}

    def rows_at(self, position: int) -> tuple[int, int] | None:
        """The addresses of a row of keys and of a row of values; None for all callers but the first, and behind the
        end.
        """
        if position == SPAN:
            return None
        own = object()
        if self.owners.setdefault(position, own) is not own:
            return None
        return self.places[0] + position * self.steps[0], self.places[1] + position * self.steps[1]

    def tokens(self, count: int) -> tuple[Any, Any]:
        """The first `count` keys and values, (*b, count, .), without a copy."""
        batch = tuple(self.since.kv.shape[:-2])
        arrays = (np.moveaxis(x[:count], 0, -2) for x in (self.keys, self.values))
        k, v = (numpy_or_torch(self.since.kv, x.reshape(*batch, count, x.shape[-1])) for x in arrays)
        return k, v


class After(NamedTuple):
    """What a state after single tokens holds: the kept tokens, and the number of the first of them that it contains."""

    kept: Kept
    taken: int

    @property
    def num_bytes(self) -> int:
        """The memory of the tokens and of the state before them, which the state after them does not have itself."""
        since = self.kept.since
        held = self.kept.keys, self.kept.values, since.kv, since.z, since.c, since.kv_low, since.z_low
        return sum(int(x.nbytes) for x in held if x is not None)

    def __reduce__(self) -> Any:
        return type(None), ()  # copies and pickles of a state do not have it


def settled(state: State, feature_map: Any) -> State:
    """The state, computed again with low parts if it contains single tokens."""
    if state.single_tokens is None:
        return state
    kept, taken = state.single_tokens
    k, v = kept.tokens(taken)
    return replace(absorbed(kept.since, k, v, None, feature_map), fingerprint=state.fingerprint)
