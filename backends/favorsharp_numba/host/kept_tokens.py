"""Tokens that came one at a time: they are kept for a while, and then added up again with low parts.

A token that enters the sums of a state reads and writes all of them, and their low parts would double that. So a token
is added without low parts. Beside its state are kept an earlier state, which has low parts, and the tokens since. After
SPAN tokens the state is made anew from these: an error has no more than SPAN tokens to grow.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from favorsharp.backend import State
from favorsharp_numba.host.arguments import numpy_or_torch
from favorsharp_numba.host.problem import absorbed

SPAN = 256
"""How many tokens are kept."""


class Kept:
    """A state, and the keys and values that states after it have taken since; shared by all of these.

    Rows are written once. A second state that follows the same one finds its row taken, and is to begin anew.
    """

    def __init__(self, since: State, heads: int, d: int, dtype: Any) -> None:
        self.since = since
        self.keys = np.empty((SPAN, heads, d), dtype)
        self.values = np.empty((SPAN, heads, since.v_size), dtype)
        self.places = self.keys.ctypes.data, self.values.ctypes.data
        self.steps = self.keys.strides[0], self.values.strides[0]
        self.owners: dict[int, object] = {}

    def rows_at(self, position: int) -> tuple[int, int] | None:
        """The addresses of a row of keys and one of values, for the first who asks."""
        if position == SPAN:
            return None
        own = object()
        if self.owners.setdefault(position, own) is not own:
            return None
        return self.places[0] + position * self.steps[0], self.places[1] + position * self.steps[1]

    def tokens(self, count: int) -> tuple[Any, Any]:
        """The first keys and values, (*b, count, .), not copied."""
        batch = tuple(self.since.kv.shape[:-2])
        arrays = (np.moveaxis(x[:count], 0, -2) for x in (self.keys, self.values))
        k, v = (numpy_or_torch(self.since.kv, x.reshape(*batch, count, x.shape[-1])) for x in arrays)
        return k, v


class After(NamedTuple):
    """What a state after some of these tokens remembers: them all, and how many of the first it has taken."""

    kept: Kept
    count: int

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy or a pickle of a state goes without


def settled(state: State, feature_map: Any) -> State:
    """The state with the low parts of tokens that came one at a time."""
    if state.single_tokens is None:
        return state
    kept, count = state.single_tokens
    return replace(absorbed(kept.since, *kept.tokens(count), None, feature_map), fingerprint=state.fingerprint)
