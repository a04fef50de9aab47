"""One problem for the attention kernels: batches, packed map and sums, ready to be run."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from favorsharp.backend import has_low_parts
from favorsharp_numba.host.arguments import (
    LOG2E,
    Held,
    broadcast,
    host,
    indices,
    members,
    name_of,
    numpy_or_torch,
    pack,
    promoted,
    target,
    widened,
)
from favorsharp_numba.host.threads import num_threads, share
from favorsharp_numba.kernels import attention as kernels
from favorsharp_numba.kernels import single_column
from favorsharp_numba.kernels.packed_sequences import packed, packed_causal, packed_scratch, packed_windowed
from favorsharp_numba.kernels.tiles import TILE
from favorsharp_numba.kernels.windowed_attention import windowed, windowed_scratch


class AttentionProblem:
    """Queries, keys and values of a call, in the terms of the kernels.

    Parameters
    ----------
    feature_map : DenseExponentialMap
    q, k, v : arrays
        q or k and v may be missing.
    key_mask : array, optional
    state : State, optional
        Whose batch the sums have too.
    exchanged : bool
        Whether queries have the map's key features, and keys its query features.
    """

    def __init__(
        self,
        feature_map: Any,
        q: Any,
        k: Any,
        v: Any,
        *,
        key_mask: Any = None,
        state: Any = None,
        window: int = 0,
        backward: bool = False,
        exchanged: bool = False,
    ) -> None:
        given = [x for x in (q, k, v) if x is not None]
        self.result = promoted(*(name_of(x) for x in given))
        self.dtype = widened(self.result) if state is None else name_of(state.kv)
        e = v.shape[-1] if v is not None else state.kv.shape[-1]
        # a backward pass has a further value, 1, whose sum is the normaliser, and no heads that share keys
        self.packed, self.s, query_constants, key_constants = pack(feature_map, self.dtype, e + backward)
        if exchanged:
            query_constants, key_constants = key_constants, query_constants
        self.one = self.packed.one
        shapes = [self.packed.batch]
        shapes += [x.shape[:-2] for x in (k, v) if x is not None]
        shapes += [key_mask.shape[:-1]] if key_mask is not None else []
        shapes += [state.kv.shape[:-2]] if state is not None else []
        self.key_batch = broadcast(*shapes)
        self.batch = broadcast(q.shape[:-2], self.key_batch) if q is not None else self.key_batch
        if backward:
            self.key_batch = self.batch
        self.heads, self.query_heads = math.prod(self.key_batch), math.prod(self.batch)
        self.held = Held()
        # an axis that only the queries have makes the key heads repeat: those are the groups of query heads
        key_head_of = indices(self.key_batch, self.batch)
        order, starts = members(self.key_batch, self.batch)
        self.num_keys = k.shape[-2] if k is not None else 0
        self.num_queries = q.shape[-2] if q is not None else 0
        self.k = self.held.points(k, self.key_batch) if k is not None else None
        self.v = self.held.points(v, self.key_batch) if v is not None else None
        self.q = self.held.points(q, self.batch) if q is not None else None
        self.mask = self.held.mask(key_mask, self.key_batch)
        self.window = window
        self.stats: Any = None
        self.lows: Any = None
        self._fixed = {
            "query_side": self.held.place(query_constants),
            "key_side": self.held.place(key_constants),
            "map_of": self.held.constant(indices(self.packed.batch, self.key_batch)),
            "members": self.held.constant(order),
            "member_starts": self.held.constant(starts),
            "key_head_of": self.held.constant(key_head_of),
        }

    def new_sums(self, *, segments: int = 1, transposed: bool = False, empty: Any = np.zeros) -> Any:
        """Sums of no keys: (heads * segments, kv, z and top)."""
        s = self.s
        self.segments, self.transposed = segments, transposed
        self.kv_size = s.e * s.m_pad if transposed else s.m * s.e_pad
        # padded rows of kv are read by nobody, and z and top are as long as a padded row
        sums = empty((self.heads * segments, self.kv_size + 2 * s.m_pad), self.packed.dtype)
        sums[:, self.kv_size + s.m_pad :] = -np.inf
        self.sums = sums
        return sums

    def load_state(self, state: Any) -> None:
        """The sums of a state."""
        s = self.s
        empty = np.empty if (s.m, s.e) == (s.m_pad, s.e_pad) else np.zeros  # kernels read what pads hold
        sums = self.new_sums(empty=empty)
        top = self.kv_size + s.m_pad
        sums[:, top : top + s.m] = self._of_state(state.c, 1, s.m)[:, 0] * LOG2E
        self._fill(sums, state.kv, state.z)

    def load_lows(self, state: Any) -> None:
        """The low parts of a state, which go on in the next."""
        if not has_low_parts(state.kv):
            return
        known = state.kv_low is not None and state.z_low is not None
        self.lows = (np.empty if known and (self.s.m, self.s.e) == (self.s.m_pad, self.s.e_pad) else np.zeros)(
            (self.heads, self.kv_size + self.s.m_pad), self.packed.dtype
        )
        if known:
            self._fill(self.lows, state.kv_low, state.z_low)

    def _fill(self, sums: Any, kv: Any, z: Any) -> None:
        """Put arrays of a state into sums, or into their low parts."""
        s = self.s
        sums[:, self.kv_size : self.kv_size + s.m] = self._of_state(z, 1, s.m)[:, 0]
        sums[:, : self.kv_size].reshape(self.heads, s.m, s.e_pad)[:, :, : s.e] = self._of_state(kv, s.m, s.e)

    def _of_state(self, x: Any, rows: int, columns: int) -> Any:
        """An array of a state, for each head."""
        return np.broadcast_to(host(x), (*self.key_batch, rows, columns)).reshape(self.heads, rows, columns)

    def state_arrays(self) -> dict[str, Any]:
        """The sums as the arrays of a state: kv (*b, m, e), z and c (*b, 1, m), and their low parts."""
        s, batch = self.s, self.key_batch
        first = self.sums.reshape(self.heads, self.segments, -1)[:, 0]
        c = first[:, self.kv_size + s.m_pad : self.kv_size + s.m_pad + s.m] / LOG2E
        kv, z = (np.ascontiguousarray(x) for x in self._taken_out(first))
        kv_low, z_low = (None, None) if self.lows is None else self._taken_out(self.lows)
        c = c.astype(self.packed.dtype).reshape(*batch, 1, s.m)
        return {"kv": kv, "z": z, "c": c, "kv_low": kv_low, "z_low": z_low}

    def state_arrays_like(self, like: Any) -> dict[str, Any]:
        """As `state_arrays`, in the library of an array."""
        return {name: None if x is None else numpy_or_torch(like, x) for name, x in self.state_arrays().items()}

    def _taken_out(self, sums: Any) -> tuple[Any, Any]:
        """Arrays of a state in sums, or in their low parts: not copied."""
        s, batch = self.s, self.key_batch
        kv = sums[:, : self.kv_size].reshape(self.heads, s.m, s.e_pad)[:, :, : s.e]
        z = sums[:, self.kv_size : self.kv_size + s.m]
        return kv.reshape(*batch, s.m, s.e), z.reshape(*batch, 1, s.m)

    def keep_stats(self) -> Any:
        """Have the kernels put aside what a backward pass needs: (query heads, n, 2), 1 / total and reference."""
        self.stats = np.zeros((self.query_heads, self.num_queries, 2), self.packed.dtype)
        return self.stats

    def arguments_fixed(self) -> dict[str, int]:
        """Addresses that do not depend on the sums."""
        return self._fixed

    def arguments(self, *, causal: bool = False, first_query: int = 0) -> Any:
        """What kernels take besides points."""
        return kernels.Problem(
            num_keys=self.num_keys,
            num_queries=self.num_queries,
            first_query=first_query,
            window=self.window,
            causal=int(causal),
            transposed=int(self.transposed),
            segments=self.segments,
            sums=self.held.place(self.sums),
            sums_size=self.sums.shape[-1],
            kv_size=self.kv_size,
            stats=0 if self.stats is None else self.held.place(self.stats),
            lows=0 if self.lows is None else self.held.place(self.lows),
            **self._fixed,
        )

    def gather(self, *, normalised: bool = True) -> None:
        """Sum up all keys, in segments where there are too few heads for the threads.

        Sums that are not read `normalised` may lack those of the weights.
        """
        s = self.s
        work = float(self.heads * self.num_keys * s.m * (s.d + s.e))
        segments = self.pieces(self.heads, self.num_keys, work)
        self.new_sums(segments=segments, transposed=2 * s.e <= self.packed.lanes)
        p = self.arguments()
        given, tasks = (self.one, s, p, self.k, self.v, self.mask), self.heads * segments
        if self._one_column():
            share(
                single_column.gather_column, tasks, work, single_column.column_scratch(s), *given, int(normalised)
            )  # fmt: skip
        else:
            share(kernels.gather_keys, tasks, work, kernels.gather_scratch(self.one, s), *given)
        if segments > 1:
            small = 2 * s.m_pad + max(s.m_pad, s.e_pad)
            share(kernels.merge_segments, self.heads, 0.0, small, self.one, s, p)

    def _one_column(self) -> bool:
        """Whether values are numbers, and their sums a line."""
        return self.transposed and self.s.e == 1

    def absorb(self) -> None:
        """Take all keys into sums that are there already."""
        s = self.s
        work = float(self.heads * self.num_keys * s.m * (s.d + s.e))
        scratch = kernels.gather_scratch(self.one, s)
        p = self.arguments()
        share(kernels.gather_keys, self.heads, work, scratch, self.one, s, p, self.k, self.v, self.mask)

    def read(self, out: Any, *, normalised: bool = True, recent: int = 0) -> None:
        """Queries read the sums, and `recent` keys exactly."""
        s = self.s
        work = float(self.query_heads * self.num_queries * s.m * (s.d + s.e))
        per_head = self.pieces(self.query_heads, self.num_queries, work)
        target = self.held.points(out, self.batch)
        if self._one_column() and recent == 0:
            share(
                single_column.read_column, self.query_heads * per_head, work, single_column.column_scratch(s), self.one,
                s, self.arguments(), self.q, target, int(normalised), per_head,
            )  # fmt: skip
            return
        k, v = (self.q, self.q) if recent == 0 else (self.k, self.v)
        share(
            kernels.read_queries, self.query_heads * per_head, work, kernels.read_scratch(self.one, s), self.one, s,
            self.arguments(), self.q, k, v, self.mask, recent, target, int(normalised), per_head,
        )  # fmt: skip

    def windowed(self, out: Any, *, causal: bool, first_query: int = 0) -> None:
        """Near blocks exactly, the others by features."""
        s = self.s
        size = 0 if causal else self.query_heads * self.num_queries * (s.e_pad + 2)
        work = np.empty(size, self.packed.dtype)
        cost = float(self.query_heads * self.num_queries * (s.m * (s.d + s.e) + 3 * self.window * s.d))
        share(
            windowed, self.heads, cost, windowed_scratch(self.one, s), self.one, s,
            self.arguments(causal=causal, first_query=first_query), self.q, self.k, self.v, self.mask,
            self.held.points(out, self.batch), self.held.place(work),
        )  # fmt: skip

    def causal(self, out: Any) -> None:
        """Every query reads the keys up to its own; the sums take all keys in."""
        s = self.s
        cost = float(self.query_heads * self.num_queries * (2 * s.m * (s.d + s.e)))
        share(
            kernels.causal, self.heads, cost, kernels.causal_scratch(self.one, s), self.one, s,
            self.arguments(causal=True), self.q, self.k, self.v, self.mask, self.held.points(out, self.batch),
        )  # fmt: skip

    def each_sequence(self, out: Any, bounds: list[int], *, causal: bool) -> None:
        """Every sequence alone, from bounds[i] to bounds[i + 1]."""
        s, size = self.s, 0
        self.segments, self.transposed = 1, not causal and self.window == 0 and 2 * s.e <= self.packed.lanes
        self.kv_size = s.e * s.m_pad if self.transposed else s.m * s.e_pad
        self.sums = np.zeros((1, self.kv_size + 2 * s.m_pad), self.packed.dtype)  # of which each thread has its own
        if self.window > 0 and not causal:
            size = self.query_heads * self.num_queries * (s.e_pad + 2)
        sequences = len(bounds) - 1
        cost = float(self.query_heads * self.num_queries * 2 * s.m * (s.d + s.e))
        kernel = packed_windowed if self.window > 0 else packed_causal if causal else packed
        share(
            kernel, self.heads * sequences, cost, packed_scratch(self.one, s, self.sums.shape[-1]), self.one, s,
            self.arguments(causal=causal), self.q, self.k, self.v, self.mask, self.held.points(out, self.batch),
            self.held.keep(np.array(bounds, np.int64)), sequences, self.query_heads,
            self.held.place(np.empty(size, self.packed.dtype)),
        )  # fmt: skip

    def pieces(self, heads: int, length: int, work: float) -> int:
        """Into how many pieces to cut each head, so that the threads have enough to share."""
        threads = num_threads()
        if work < 4e6 or heads == 0 or heads >= 2 * threads:
            return 1
        return max(1, min(-(-4 * threads // heads), length // (4 * TILE)))


def absorbed(state: Any, k: Any, v: Any, key_mask: Any, feature_map: Any) -> Any:
    """A state with further keys in its features."""
    problem = AttentionProblem(feature_map, None, k, v, key_mask=key_mask, state=state)
    problem.load_state(state)
    problem.load_lows(state)
    problem.absorb()
    return replace(state, **problem.state_arrays_like(k))


def packed_attention(
    q: Any,
    k: Any,
    v: Any,
    feature_map: Any,
    bounds: list[int],
    *,
    causal: bool,
    key_mask: Any = None,
    window: int = 0,
    out: Any = None,
) -> Any:
    """Attention within sequences packed along the point axis, in `out` where that shares no memory with the inputs."""
    problem = AttentionProblem(feature_map, q, k, v, key_mask=key_mask, window=window)
    out = target(out, (q, k, v, key_mask), (*problem.batch, q.shape[-2], v.shape[-1]), problem.result)
    problem.each_sequence(out, bounds, causal=causal)
    return out
