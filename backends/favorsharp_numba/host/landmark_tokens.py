"""The plan of a token of a stream of landmarks, and the store in which tokens between two compressions are kept.

Most tokens only add a key and read all keys of the state. A store has room for the keys until the next compression, so
that a token writes one row of each head. States are values: a state refers to the first rows of a store. A token is
written to the next row if no other token is there; otherwise a new store is made, beginning with a copy.
"""

import math
import threading
from typing import Any

import numpy as np

from favorsharp.backend import LandmarkState, grown, segments_of
from favorsharp_numba.host.arguments import Held, empty, host, is_torch, name_of, start_of, usable_where_it_lies
from favorsharp_numba.host.landmark_stream import StreamProblem
from favorsharp_numba.host.reading import reading_constants, reading_places
from favorsharp_numba.host.threads import share
from favorsharp_numba.kernels.landmark_token import ROOM, TOKEN_SIZES, take_token
from favorsharp_numba.kernels.workspace import items_of
from favorsharp_numba.vectors.compiling import TAGS
from favorsharp_numba.vectors.emitter import BYTES


class Store:
    """Rows of keys, values and queries of each head, and log weights, with room for the tokens until a compression.

    Rows are padded to whole vectors. `used` rows are in use; the first ones, up to `start`, were held before.
    """

    def __init__(
        self, state: LandmarkState, room: int, group: tuple[int, ...], pads: tuple[int, int], plan: list[int]
    ) -> None:
        batch, dtype, held = state.batch_shape, name_of(state.log_weight), state.held
        (d_pad, e_pad), like = pads, state.keys
        self.keys = empty(like, (*batch, room, d_pad), dtype)
        self.values = empty(like, (*batch, room, e_pad), dtype)
        self.weight = empty(like, (*batch, room), dtype)
        self.queries = empty(like, (*batch, *group, room, d_pad), dtype)
        for target, source in ((self.keys, state.keys), (self.values, state.values)):
            target[..., :held, source.shape[-1] :] = 0
            target[..., :held, : source.shape[-1]] = source
        self.weight[..., :held] = state.log_weight
        hidden = host(state.log_weight) == -np.inf
        if hidden.any():
            host(self.keys)[..., :held, :][np.broadcast_to(hidden, (*batch, held))] = 0
            host(self.values)[..., :held, :][np.broadcast_to(hidden, (*batch, held))] = 0
        self.places = tuple(start_of(x) // x.itemsize for x in (self.keys, self.weight, self.values, self.queries))
        self.moments, self.start, self.used, self.room = state.moments, held, held, room
        self.plan = np.array([*plan[:ROOM], room, *plan[ROOM + 1 :]], dtype=np.int64)
        self.lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """The memory of the queries, which a state in the store does not have itself."""
        return int(self.queries.nbytes)

    def claim(self, position: int) -> bool:
        """Take the row behind `position` rows, if there is room and no other token has taken it."""
        with self.lock:
            if self.used != position or position == self.room:
                return False
            self.used += 1
            return True


class Token:
    """A plan: a function of q, k, v and a state, for arrays laid out like those of the first call."""

    def __init__(self, q: Any, k: Any, v: Any, state: LandmarkState, grouped: bool) -> None:
        self.batch = state.batch_shape
        self.group = (q.shape[-3],) if grouped else ()
        self.d, self.e = state.keys.shape[-1], state.v_size
        self.dtype = name_of(state.log_weight)
        self.one, lanes = TAGS[self.dtype], BYTES // np.dtype(self.dtype).itemsize
        d_pad, e_pad = (max(1, -(-x // lanes)) * lanes for x in (self.d, self.e))
        self.pads = d_pad, e_pad
        self.heads = math.prod(self.batch)
        self.shape = (*self.batch, *self.group, 1, self.e)
        scale = state.settings.scale_of(self.d)
        self.held = Held()
        side = self.held.place(reading_constants(*self.pads, scale, self.dtype))
        self.plan = [self.d, self.pads[0], self.e, self.pads[1], math.prod(self.group), 0, side]
        self.plan += [reading_places(lanes, *self.pads)[0], 0, 0]
        assert len(self.plan) == TOKEN_SIZES
        out = empty(state.keys, self.shape, self.dtype)
        for x, batch in ((q, self.shape[:-2]), (k, self.batch), (v, self.batch), (out, self.shape[:-2])):
            self.plan += self.held.layout(x, batch)
        self.held.arrays = [x for x in self.held.arrays if not hasattr(x, "owner")]
        self.lanes = lanes

    def __call__(
        self, q: Any, k: Any, v: Any, state: LandmarkState, *, key_mask: None = None, grouped: bool = False
    ) -> tuple[Any, LandmarkState]:  # fmt: skip
        """The result of a token, and the state after it."""
        store, held = state.store, state.held
        if store is None or not store.claim(held):
            first = next(iter(segments_of(state, 1 << 62)))
            if first.due:
                return StreamProblem(q, k, v, state, None, grouped).run()
            store = Store(state, held + first.stop, self.group, self.pads, self.plan)
            store.claim(held)
        out = empty(state.keys, self.shape, self.dtype)
        room = -(-store.room // self.lanes) * self.lanes
        work = float(self.heads * math.prod(self.group) * held * (self.d + self.e))
        share(
            take_token, self.heads, work, items_of(take_token, (*self.pads, room)), self.one, start_of(store.plan),
            start_of(q), start_of(k), start_of(v), start_of(out), *store.places, held, of_torch=is_torch(q),
        )  # fmt: skip
        n, keys, values = held + 1, store.keys, store.values
        after = grown(
            state, keys[..., :n, : self.d], store.weight[..., :n], values[..., :n, : self.e], store.moments,
            store.queries, store.start, grouped,
        )  # fmt: skip
        after.remember("store", store)
        return out, after


def token_of(
    q: Any, k: Any, v: Any, state: LandmarkState, *, key_mask: Any | None = None, grouped: bool = False
) -> Token | None:  # fmt: skip
    """The plan for arrays of these layouts, or None if there is none: for more than one token, or with a mask."""
    if key_mask is not None or q.shape[-2] != 1 or k.shape[-2] != 1:
        return None
    lead = tuple(q.shape[: -3 if grouped else -2])
    if any(x != state.batch_shape for x in (lead, tuple(k.shape[:-2]), tuple(v.shape[:-2]))):
        return None
    return Token(q, k, v, state, grouped) if all(usable_where_it_lies(x) for x in (q, k, v)) else None
