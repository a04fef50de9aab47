"""One call of attention, of a kernel product or of a state, prepared for the kernels and run in steps.

The functions of the ops and of the gradients make an `AttentionProblem` and call its methods.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from favorsharp.backend import State, has_low_parts
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
from favorsharp_numba.host.threads import pieces_of, share
from favorsharp_numba.kernels.arguments import TILE, Problem
from favorsharp_numba.kernels.attention import gather_keys, merge_segments, read_queries
from favorsharp_numba.kernels.block_sums import kept_sums
from favorsharp_numba.kernels.causal_attention import causal
from favorsharp_numba.kernels.packed_sequences import packed, packed_causal, packed_windowed
from favorsharp_numba.kernels.single_column import gather_column, read_column
from favorsharp_numba.kernels.two_sided_windows import two_sided
from favorsharp_numba.kernels.window_rule import NEIGHBOURS
from favorsharp_numba.kernels.windowed_attention import windowed
from favorsharp_numba.kernels.workspace import items_of

SHORTEST, MOST_KEPT = 16, 2**27
"""The shortest window with which the sums of all blocks are kept, and the most bytes that they may take in each thread;
an eighth of that for windows of less than half a tile, whose sums gain little once they do not fit in the cache."""


class AttentionProblem:
    """The arguments of the kernels for a call: batches, packed map, addresses, and sums.

    Parameters
    ----------
    feature_map : DenseExponentialMap
    q, k, v : arrays
        q may be None, and so may k and v.
    key_mask : array, optional
    state : State, optional
        The sums have its batch axes too.
    window : int
        The length of a block, or 0 for no window.
    backward : bool
        Whether the problem is for the backward kernels, whose values have a further column.
    exchanged : bool
        Whether queries get the key features of the map, and keys its query features.
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
        # in a backward pass values have a further column of ones, and every query head has keys of its own
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
        self.num_keys = k.shape[-2] if k is not None else 0
        self.num_queries = q.shape[-2] if q is not None else 0
        self.k, self.v = (None if x is None else self.held.points(x, self.key_batch) for x in (k, v))
        self.q = self.held.points(q, self.batch) if q is not None else None
        self.mask = self.held.mask(key_mask, self.key_batch)
        self.window = window
        self.stats: Any = None
        self.lows: Any = None
        self.fixed = self._fixed_arguments(query_constants, key_constants)

    def _fixed_arguments(self, query_constants: Any, key_constants: Any) -> dict[str, int]:
        """The arguments that do not depend on the sums: addresses of constants and of lists of heads."""
        # several query heads read the same key head if only the queries have an axis
        order, starts = members(self.key_batch, self.batch)
        return {
            "query_side": self.held.place(query_constants),
            "key_side": self.held.place(key_constants),
            "map_of": self.held.constant(indices(self.packed.batch, self.key_batch)),
            "members": self.held.constant(order),
            "member_starts": self.held.constant(starts),
            "key_head_of": self.held.constant(indices(self.key_batch, self.batch)),
        }

    def new_sums(self, *, segments: int = 1, transposed: bool = False, empty: Any = np.zeros) -> Any:
        """Make the sums those of no keys: (heads * segments, items of kv, z and top)."""
        s = self.s
        self.segments, self.transposed = segments, transposed
        self.kv_size = s.e * s.m_pad if transposed else s.m * s.e_pad
        # kv has m rows and no padded ones; z and top have m_pad items
        sums = empty((self.heads * segments, self.kv_size + 2 * s.m_pad), self.packed.dtype)
        sums[:, self.kv_size + s.m_pad :] = -np.inf
        self.sums = sums
        return sums

    def load_state(self, state: Any) -> None:
        """Make the sums those of a state."""
        s = self.s
        empty = np.empty if (s.m, s.e) == (s.m_pad, s.e_pad) else np.zeros  # kernels read the padding
        sums = self.new_sums(empty=empty)
        top = self.kv_size + s.m_pad
        sums[:, top : top + s.m] = self._of_state(state.c, 1, s.m)[:, 0] * LOG2E
        self._fill(sums, state.kv, state.z)

    def load_lows(self, state: Any) -> None:
        """Take over the low parts of a state, which the next state continues. float64 has none."""
        if not has_low_parts(state.kv):
            return
        known = state.kv_low is not None and state.z_low is not None
        self.lows = (np.empty if known and (self.s.m, self.s.e) == (self.s.m_pad, self.s.e_pad) else np.zeros)(
            (self.heads, self.kv_size + self.s.m_pad), self.packed.dtype
        )
        if known:
            self._fill(self.lows, state.kv_low, state.z_low)

    def _fill(self, sums: Any, kv: Any, z: Any) -> None:
        """Copy kv and z of a state, or their low parts, into `sums`."""
        s = self.s
        sums[:, self.kv_size : self.kv_size + s.m] = self._of_state(z, 1, s.m)[:, 0]
        sums[:, : self.kv_size].reshape(self.heads, s.m, s.e_pad)[:, :, : s.e] = self._of_state(kv, s.m, s.e)

    def _of_state(self, x: Any, rows: int, columns: int) -> Any:
        """An array of a state, repeated for each head."""
        return np.broadcast_to(host(x), (*self.key_batch, rows, columns)).reshape(self.heads, rows, columns)

    def state_arrays(self) -> dict[str, Any]:
        """The sums as the arrays of a state: kv (*b, m, e), z and c (*b, 1, m), and their low parts."""
        s, batch = self.s, self.key_batch
        first = self.sums[:: self.segments]
        c = first[:, self.kv_size + s.m_pad : self.kv_size + s.m_pad + s.m] / LOG2E
        kv, z = (np.ascontiguousarray(x) for x in self.state_sums())
        kv_low, z_low = (None, None) if self.lows is None else self._taken_out(self.lows)
        c = c.astype(self.packed.dtype).reshape(*batch, 1, s.m)
        return {"kv": kv, "z": z, "c": c, "kv_low": kv_low, "z_low": z_low}

    def state_arrays_like(self, like: Any) -> dict[str, Any]:
        """As `state_arrays`, as arrays of the library of `like`."""
        return {name: None if x is None else numpy_or_torch(like, x) for name, x in self.state_arrays().items()}

    def state_sums(self) -> tuple[Any, Any]:
        """The sums as kv (*b, m, e) and z (*b, 1, m) of a state, without a copy."""
        return self._taken_out(self.sums[:: self.segments])

    def _taken_out(self, sums: Any) -> tuple[Any, Any]:
        """kv and z in the shapes of a state, from sums or from their low parts, without a copy."""
        s, batch = self.s, self.key_batch
        kv = sums[:, : self.kv_size].reshape(self.heads, s.m, s.e_pad)[:, :, : s.e]
        z = sums[:, self.kv_size : self.kv_size + s.m]
        return kv.reshape(*batch, s.m, s.e), z.reshape(*batch, 1, s.m)

    def keep_stats(self) -> Any:
        """Have the kernels store what a backward pass needs, (query heads, n, 2): 1 / total and the reference."""
        self.stats = np.zeros((self.query_heads, self.num_queries, 2), self.packed.dtype)
        return self.stats

    def arguments(self, *, causal: bool = False, first_query: int = 0) -> Any:
        """The arguments of the forward kernels that are not arrays of points."""
        return Problem(
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
            **self.fixed,
        )

    def run(self, kernel: Any, tasks: int, work: float, *arguments: Any, extra: int = 0) -> None:
        """Run a kernel for all tasks, shared among threads; `work` is the number of multiplications in all.

        `extra` is the number of items that each thread has behind its workspace.
        """
        items, of_torch = items_of(kernel, self.s) + extra, self.held.of_torch
        share(kernel, tasks, work, items, self.one, self.s, *arguments, of_torch=of_torch)

    def gather(self, *, normalised: bool = True) -> None:
        """Add up all keys, in segments if there are fewer heads than the threads need.

        If results are not `normalised`, the sums of weights may be left out.
        """
        s = self.s
        work = float(self.heads * self.num_keys * s.m * (s.d + s.e))
        segments = pieces_of(self.heads, self.num_keys, work)
        self.new_sums(segments=segments, transposed=2 * s.e <= self.packed.lanes)
        p = self.arguments()
        given, tasks = (p, self.k, self.v, self.mask), self.heads * segments
        if self._one_column():
            self.run(gather_column, tasks, work, *given, int(normalised))
        else:
            self.run(gather_keys, tasks, work, *given)
        if segments > 1:
            self.run(merge_segments, self.heads, 0.0, p)

    def _one_column(self) -> bool:
        """Whether values have one column, so that their sums are a line."""
        return bool(self.transposed and self.s.e == 1)

    def absorb(self) -> None:
        """Add all keys to sums that exist already."""
        s = self.s
        work = float(self.heads * self.num_keys * s.m * (s.d + s.e))
        self.run(gather_keys, self.heads, work, self.arguments(), self.k, self.v, self.mask)

    def read(self, out: Any, *, normalised: bool = True, recent: int = 0) -> None:
        """Queries read the sums, and the first `recent` keys exactly."""
        target = self.held.points(out, self.batch)
        self.read_points(self.arguments(), self.q, target, normalised=normalised, recent=recent)

    def read_points(self, p: Any, q: Any, target: Any, *, normalised: bool = True, recent: int = 0) -> None:
        """As `read`, for queries laid out like those of the problem; `p` are its `arguments()`."""
        s = self.s
        work = float(self.query_heads * self.num_queries * s.m * (s.d + s.e))
        per_head = pieces_of(self.query_heads, self.num_queries, work)
        tasks = self.query_heads * per_head
        if self._one_column() and recent == 0:
            self.run(read_column, tasks, work, p, q, target, int(normalised), per_head)
            return
        k, v = (q, q) if recent == 0 else (self.k, self.v)
        self.run(read_queries, tasks, work, p, q, k, v, self.mask, recent, target, int(normalised), per_head)

    def windowed(self, out: Any, *, causal: bool, first_query: int = 0) -> None:
        """Queries read near blocks exactly, and the others by features."""
        s = self.s
        near = self.window * (1 + 2 * NEIGHBOURS)
        cost = float(self.query_heads * self.num_queries * (s.m * (s.d + s.e) + near * s.d))
        p = self.arguments(causal=causal, first_query=first_query)
        target = self.held.points(out, self.batch)
        kept = 0 if self.in_one_pass(causal) else self._kept_between_passes(causal)
        given = (p, self.q, self.k, self.v, self.mask, target)
        if self.in_one_pass(causal):
            extra = kept_sums(s, self.num_keys, self.window)
            self.run(two_sided, self.heads, cost, *given, extra=extra)
        else:
            self.run(windowed, self.heads, cost, *given, kept)

    def in_one_pass(self, causal: bool) -> bool:
        """Whether attention with a window keeps the sums of all blocks, so that points read far ones in one pass."""
        if causal or self.window < SHORTEST:
            return False
        most = MOST_KEPT if 2 * self.window >= TILE else MOST_KEPT // 8
        return kept_sums(self.s, self.num_keys, self.window) * self.packed.dtype.itemsize <= most

    def _kept_between_passes(self, causal: bool) -> int:
        """The place of partial results of queries between the two passes of bidirectional attention with a window."""
        size = self.query_heads * self.num_queries * (self.s.e_pad + 2) if self.window > 0 and not causal else 0
        return self.held.place(np.empty(size, self.packed.dtype))

    def causal(self, out: Any) -> None:
        """Every query reads the keys up to its own; the sums take all keys."""
        s = self.s
        cost = float(self.query_heads * self.num_queries * (2 * s.m * (s.d + s.e)))
        target = self.held.points(out, self.batch)
        self.run(causal, self.heads, cost, self.arguments(causal=True), self.q, self.k, self.v, self.mask, target)

    def each_sequence(self, out: Any, bounds: list[int], *, causal: bool) -> None:
        """Attention within each of the packed sequences, from bounds[i] to bounds[i + 1]."""
        s = self.s
        self.segments, self.transposed = 1, not causal and self.window == 0 and 2 * s.e <= self.packed.lanes
        self.kv_size = s.e * s.m_pad if self.transposed else s.m * s.e_pad
        self.sums = np.zeros((1, self.kv_size + 2 * s.m_pad), self.packed.dtype)  # each thread has its own elsewhere
        sequences = len(bounds) - 1
        cost = float(self.query_heads * self.num_queries * 2 * s.m * (s.d + s.e))
        kernel = packed_windowed if self.window > 0 else packed_causal if causal else packed
        self.run(
            kernel, self.heads * sequences, cost, self.arguments(causal=causal), self.q, self.k, self.v, self.mask,
            self.held.points(out, self.batch), self.held.keep(np.array(bounds, np.int64)), sequences,
            self.query_heads, self._kept_between_passes(causal),
        )  # fmt: skip


def absorbed(state: State, k: Any, v: Any, key_mask: Any, feature_map: Any) -> State:
    """The state after further keys and values, without regard to its window."""
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
    """Attention within packed sequences, bounds[i] .. bounds[i + 1] of the point axis each.

    The result is written to `out` if that shares no memory with the inputs.
    """
    problem = AttentionProblem(feature_map, q, k, v, key_mask=key_mask, window=window)
    out = target(out, (q, k, v, key_mask), (*problem.batch, q.shape[-2], v.shape[-1]), problem.result)
    problem.each_sequence(out, bounds, causal=causal)
    return out
