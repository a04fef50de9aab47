"""The data that the ranks exchange: states of their keys and, with a window, the blocks of keys next to a border.

With a window of w, a query scores its own block and the two neighbouring blocks exactly. At the border of a shard, one
of these blocks lies on the neighbouring rank. That rank sends the keys and values of the block, and a state without
them. All other ranks send the state of all their keys. So nothing is subtracted, and the outputs are the same as if the
shard continued. `favorsharp.distributed.attention` uses this module.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from favorsharp._arrays import cast
from favorsharp._typing import Array
from favorsharp.calls import Call
from favorsharp.moments import combine
from favorsharp.ops.state import State, update, with_sums

WHOLE, BUT_LAST, BUT_FIRST = 0, 1, 2
"""Which keys of a shard a state covers: all, all but the last block, or all but the first block."""


@dataclass(frozen=True, eq=False)
class Shard(Call):
    """The checked call of a rank.

    Attributes
    ----------
    empty : State
        The state of no keys.
    told : dict
        The values that the ranks compare.
    """

    empty: State
    told: dict[str, Any]

    @property
    def inputs(self) -> tuple[Array, ...]:
        """All arrays that a gradient may flow to."""
        return (self.q, self.k, self.v, *self.feature_map.arrays)

    def state_of(self, start: int, stop: int) -> State:
        """The state of the keys between two positions."""
        mask = None if self.key_mask is None else self.key_mask[..., start:stop]
        k, v = self.k[..., start:stop, :], self.v[..., start:stop, :]
        state: State = update(self.empty, k, v, self.feature_map, key_mask=mask)
        return state


def agreed(told: list[dict[str, Any]]) -> list[int]:
    """The lengths of the shards; raises if the ranks' calls differ."""
    for name in told[0]:
        for rank, one in enumerate(told):
            if name != "length" and one[name] != told[0][name]:
                hint = ": make it from one fit and one seed on every rank" if name == "feature_map" else ""
                raise ValueError(
                    f"the ranks must agree in {name}{hint}; rank 0 has {told[0][name]}, rank {rank} has {one[name]}"
                )
    lengths, window = [one["length"] for one in told], told[0]["window"]
    holders = [rank for rank, length in enumerate(lengths) if length]
    for rank in holders[:-1] if window else ():
        if lengths[rank] % window:
            raise ValueError(
                f"window={window} needs shards of whole blocks: rank {rank} holds {lengths[rank]} positions; accepted: "
                f"multiples of {window}, and any length for the last shard"
            )
    return lengths


@dataclass(frozen=True)
class Routes:
    """Which rank sends what to which rank; every rank computes this from the lengths of all shards."""

    lengths: Sequence[int]
    window: int
    is_causal: bool

    def neighbours(self, rank: int) -> tuple[int | None, int | None]:
        """The nearest ranks before and after that hold keys, if this rank scores some of those keys exactly."""
        if not self.window or not self.lengths[rank]:
            return None, None
        holders = [i for i, length in enumerate(self.lengths) if length]
        before, after = [i for i in holders if i < rank], [i for i in holders if i > rank]
        return before[-1] if before else None, after[0] if after and not self.is_causal else None

    def part(self, source: int, to: int) -> int | None:
        """Which state of its keys `source` sends to `to`; None if it sends none."""
        if source == to or 0 in (self.lengths[source], self.lengths[to]) or (self.is_causal and source > to):
            return None
        before, after = self.neighbours(to)
        return BUT_LAST if source == before else BUT_FIRST if source == after else WHOLE

    def block(self, source: int, to: int) -> tuple[int, int]:
        """Bounds of the positions whose keys and values `source` sends to `to`."""
        before, after = self.neighbours(to)
        length = self.lengths[source]
        if source == before:
            return length - self.window, length
        return (0, min(self.window, length)) if source == after else (0, 0)


def packed_states(shard: Shard, parts: Sequence[int | None]) -> Array:
    """The states to send, one in each row: kv, z and c, (r, *b, m, e + 2)."""
    empty, s, window = shard.empty, shard.k.shape[-2], shard.window
    wanted = [part for part in parts if part is not None]
    if not wanted:
        return _row(empty)[:0]
    if window == 0:
        states = {WHOLE: shard.state_of(0, s)}
    elif s <= window:
        states = {WHOLE: shard.state_of(0, s), BUT_LAST: empty, BUT_FIRST: empty}
    else:
        last = (s - 1) // window * window
        first, middle, end = (shard.state_of(*bounds) for bounds in ((0, window), (window, last), (last, s)))
        but_last = combine(first, middle)
        states = {WHOLE: combine(but_last, end), BUT_LAST: but_last, BUT_FIRST: combine(middle, end)}
    return torch.cat([_row(states[part]) for part in wanted])


def taken_in(empty: State, rows: Array) -> State:
    """The combined state of states that were packed into rows."""
    if rows.shape[0] == 0:
        return empty
    # the output does not depend on the reference of the sums, so the reference needs no gradient
    top = rows[..., -1:].detach().amax(0)
    sums = (rows[..., :-1] * torch.exp(rows[..., -1:] - finite(top))).sum(0)
    return with_sums(empty, sums[..., :-1], sums[..., -1:].mT, top.mT)


def packed_keys(shard: Shard, start: int, stop: int) -> Array:
    """Keys, values and mask between two positions, with the point axis first: (r, *b, d + e + 1)."""
    k, v = (cast(x[..., start:stop, :], shard.dtype) for x in (shard.k, shard.v))
    mask = torch.ones_like(k[..., 0]) if shard.key_mask is None else cast(shard.key_mask[..., start:stop], k.dtype)
    batch = shard.empty.kv.shape[:-2]
    rows = [x.expand((*batch, stop - start, x.shape[-1])) for x in (k, v, mask[..., None])]
    return torch.cat(rows, -1).movedim(-2, 0)


def unpacked_keys(shard: Shard, rows: Array) -> tuple[Array, Array, Array]:
    """Keys (*b, r, d), values (*b, r, e) and mask (*b, r) of packed rows."""
    d, rows = shard.k.shape[-1], rows.movedim(0, -2)
    return cast(rows[..., :d], shard.k.dtype), cast(rows[..., d:-1], shard.v.dtype), rows[..., -1] > 0.5


def finite(reference: Array) -> Array:
    """The reference, with 0 in place of the -inf of a feature that has seen no key, so that it can be subtracted."""
    return torch.where(reference == -torch.inf, 0.0, reference)


def _row(state: State) -> Array:
    return torch.cat([state.kv, state.z.mT, state.c.mT], -1)[None]
