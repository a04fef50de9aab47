"""Launches the tensor-core kernels: points and values of up to 128 entries, in float16, bfloat16 and float32.

The modules of the ops ask `tile_sizes.fit` whether these kernels serve a call, and then call the functions at the end
of this file. `Tiles` has one method for each kernel.
"""

import math
from typing import Any

from favorsharp.backend import RECENT_BLOCKS, broadcast_shapes
from favorsharp_cuda.host import arrays
from favorsharp_cuda.host.declarations import THREADS, TILE, Scan, Walk
from favorsharp_cuda.host.launch import multiprocessors, run
from favorsharp_cuda.host.maps import tile_map
from favorsharp_cuda.host.occupancy import ABSORBED, cut, resident, stages_of
from favorsharp_cuda.host.problem import Lows, Problem, Sums, key_batch_of, new_lows, new_sums
from favorsharp_cuda.host.repeats import repeated
from favorsharp_cuda.host.source import expression
from favorsharp_cuda.host.tile_sizes import (
    parts_of,
    points_bytes,
    room_of,
    shared_of_absorb,
    shared_of_read,
    shared_of_walk,
    sums_size,
    value_size,
    walked_size,
    walked_value_size,
)

SHORTEST = 128
"""The fewest positions of a segment."""

PROBLEMS_KEPT = 64
"""The most problems that are kept with a packed map."""

LONGEST = 1 << 30
"""The limit for positions: kernels count them in 32 bits, and a window shifts them by twice its length."""


class Tiles:
    """Launches the kernels of one call, which share a feature map and sizes; one method for each kernel."""

    def __init__(self, feature_map: Any, like: Any, dtype: str, e: int, *, walks: bool = False) -> None:
        self.feature_map, self.like, self.dtype, self.e = feature_map, like, dtype, e
        self.map = tile_map(feature_map)
        self.d, self.room = feature_map.parameters.g1.shape[-1], room_of(like)
        self.multiprocessors = multiprocessors(arrays.device_number(like))
        self.part = walked_size(dtype, self.d, e, self.room) if walks else 0
        self.padded_e = walked_value_size(e, self.part) if walks else value_size(e)

    def problem(self, batch: tuple[int, ...], key_batch: tuple[int, ...]) -> Problem:
        """A problem in which the map's constants and the sizes are set; they are kept with the packed map."""
        known, key = self.map.problems, (batch, key_batch, self.e, self.padded_e)
        if key not in known:
            if len(known) >= PROBLEMS_KEPT:
                known.clear()
            known[key] = self._new_problem(batch, key_batch)
        kept: Problem = known[key]
        return kept.copy()

    def _new_problem(self, batch: tuple[int, ...], key_batch: tuple[int, ...]) -> Problem:
        p, m = Problem(batch), self.map
        p.number("map_axis", tuple(self.feature_map.batch_shape))
        p.number("key_axis", key_batch)
        p.side("query", header=p.hold(m.query_header), planes=p.hold(m.query_planes), rows=p.hold(m.query_rows))
        p.side("key", header=p.hold(m.key_header), planes=p.hold(m.key_planes), rows=p.hold(m.key_rows))
        p.set(
            m=self.feature_map.num_features, m_pad=m.padded_m, d=self.d, e=self.e, padded_d=m.padded_d,
            padded_e=self.padded_e, plane_rows=m.plane_rows, header_size=m.header_size, segments=1, normalised=1,
            gaussian=self.feature_map.parameters.kernel == "gaussian",
        )  # fmt: skip
        return p

    def factors(self, x: Any, mask: Any, batch: tuple[int, ...], *, query: bool) -> Any:
        """The part of log features that depends only on the point, (*b, n, 1); -inf for hidden points."""
        n = x.shape[-2]
        out = arrays.empty(self.like, (*batch, n, 1), "float32")
        p = self.problem(batch, ())
        if not query:
            p.side("query", header=p.hold(self.map.key_header), planes=p.hold(self.map.key_planes))
        p.array("q", x)
        p.array("out", out)
        if mask is not None:
            p.array("mask", mask, trailing=1)
        blocks = -(-n // TILE)
        p.set(num_queries=n, segments=blocks, has_dense=self.map.has_dense)
        shared = 2 * points_bytes(self.d) + 8 * TILE
        run(expression("factors", self.dtype), self.like, p.heads * blocks, THREADS, p.values, shared)
        return out

    def absorb(
        self, k: Any, v: Any, factors: Any, batch: tuple[int, ...], cut: tuple[int, int, int, int], mask: Any = None
    ) -> Any:
        """The sums of each segment of the keys, (heads, segments, size).

        `cut` holds the number of segments, their span, the shift of keys relative to positions, and the number of keys
        that enter. If `factors` is None, the kernel computes them, and needs the mask.
        """
        segments, span, shift, limit = cut
        if k.shape[-2] >= LONGEST:
            raise ValueError(
                f"k has s={k.shape[-2]}; accepted by the CUDA kernels: fewer than {LONGEST} keys in one call"
            )
        heads = math.prod(batch)
        size = sums_size(self.map.padded_m, self.padded_e)
        sums = arrays.empty(self.like, (heads, segments, size), "float32")
        p = self.problem(batch, batch)
        p.array("k", k)
        p.array("v", v)
        if factors is not None:
            p.array("key_factors", factors)
        elif mask is not None:
            p.array("mask", mask, trailing=1)
        p.set(segments=segments, span=span, shift=shift, limit=limit, sums=p.hold(sums))
        shared = shared_of_absorb(self.dtype, self.d, self.padded_e)
        blocks = heads * segments * (self.map.padded_m // TILE)
        run(expression("absorb", self.dtype, self.padded_e), self.like, blocks, THREADS, p.values, shared)
        return sums

    def scan(
        self,
        sums: Any,
        batch: tuple[int, ...],
        *,
        state: Sums | None = None,
        low: Lows = (None, None),
        before: bool = False,
        totals: bool = False,
        new: Sums | None = None,
        new_low: Lows = (None, None),
        reverse: bool = False,
        empty: bool = False,
    ) -> Any:
        """Combine the sums of segments, starting from those of a state if one is given.

        With `before`, the sums of each segment are replaced by the sums of all segments before it (after it, with
        `reverse`). With `totals`, the sums over all segments are returned, as `read` takes them. `new` and `new_low`
        receive the sums over all segments as those of a state. `empty` says that the segments contain no sums yet.
        """
        p = self.problem(batch, batch)
        out = None
        if totals:
            out = arrays.empty(self.like, (math.prod(batch), self.map.padded_m * (9 + self.padded_e)), "float32")
            p.set(totals=p.hold(out))
        p.sums("in", state, low)
        p.sums("out", new, new_low)
        if sums is not None:
            p.set(sums=p.hold(sums))
        p.set(
            segments=0 if sums is None else sums.shape[1], reverse=reverse,
            flags=Scan.TOTALS * totals + Scan.BEFORE * before + Scan.STATE * (new is not None) + Scan.EMPTY * empty,
        )  # fmt: skip
        blocks = p.heads * self.map.padded_m // (THREADS // 32)
        run(expression("scan"), self.like, blocks, THREADS, p.values)
        return out

    def read(
        self,
        q: Any,
        totals: Any,
        out: Any,
        key_batch: tuple[int, ...],
        *,
        normalised: bool = True,
        stats: Any = None,
    ) -> None:
        """Queries read the totals that `scan` has made; the result is written to `out`."""
        p = self.problem(tuple(out.shape[:-2]), key_batch)
        p.array("q", q)
        p.array("out", out)
        if stats is not None:
            p.array("stats", stats)
        if not normalised or stats is not None:
            p.array("query_factors", self.factors(q, None, p.batch, query=True))
        blocks = -(-q.shape[-2] // TILE)
        sizes = (self.dtype, self.d, self.padded_e)
        one, two = shared_of_read(*sizes), shared_of_read(*sizes, 2)
        stages = stages_of("read", self.padded_e, one, two, self.room) if self.map.padded_m > TILE else 1
        p.set(
            num_queries=q.shape[-2], segments=blocks, totals=p.hold(totals), normalised=normalised, stages=stages
        )  # fmt: skip
        shared = shared_of_read(*sizes, stages)
        run(expression("read", self.dtype, self.padded_e), self.like, p.heads * blocks, THREADS, p.values, shared)

    def walk(
        self, q: Any, k: Any, v: Any, factors: Any, key_batch: tuple[int, ...], *, out: Any, window: int, limit: int,
        state: Sums | None = None, low: Lows = (None, None), new: Sums | None = None, new_low: Lows = (None, None),
        first_query: int = 0, causal: bool = True, reverse: bool = False, partial: Any = None, stats: Any = None,
    ) -> None:  # fmt: skip
        """Causal attention, or one direction of bidirectional attention with a window.

        Queries read the sums of the keys before them (after them, with `reverse`), and near keys exactly.
        """
        n, heads, parts = k.shape[-2], math.prod(out.shape[:-2]), self.padded_e // self.part
        if n >= LONGEST:
            raise ValueError(f"k has s={n}; accepted by the CUDA kernels: fewer than {LONGEST} positions in one call")
        # a sequence has at most two such blocks, so all keys are near
        window = min(window, LONGEST // RECENT_BLOCKS)
        stages, shared, segments, span = self._cut_of_walk(heads * parts, n, window)
        cut = segments, span, RECENT_BLOCKS * window * (-1 if reverse else 1), limit
        sums = self._sums_before(k, v, factors, key_batch, cut, state, low, reverse)
        p = self.problem(tuple(out.shape[:-2]), key_batch)
        for name, x in (("k", k), ("v", v), ("q", q), ("out", out), ("key_factors", factors)):
            p.array(name, x)
        flags = Walk.NEAR if window and not reverse else Walk(0)
        if stats is not None:
            p.array("stats", stats)
        if window or stats is not None:
            p.array("query_factors", self.factors(q, None, p.batch, query=True))
        if partial is not None:
            flags |= Walk.LOAD if reverse else Walk.STORE
            p.array("partial_sums", partial)
        p.sums("out", new, new_low)
        blocks = heads * segments * parts
        scratch = arrays.empty(self.like, (blocks, 2 * sums_size(self.map.padded_m, self.part)), "float32")
        p.set(
            num_queries=q.shape[-2], num_keys=n, first_query=first_query, window=window, causal=causal,
            reverse=reverse, limit=limit, segments=segments, span=span, shift=cut[2], flags=flags, stages=stages,
            scratch=p.hold(scratch), sums=0 if sums is None else p.hold(sums),
        )  # fmt: skip
        run(expression("walk", self.dtype, self.part), self.like, blocks, THREADS, p.values, shared)

    def _cut_of_walk(self, blocks: int, n: int, window: int) -> tuple[int, int, int, int]:
        """The stages and the shared memory of `walk`, the number of segments and their span.

        `blocks` is the number of blocks for each segment. A segment has whole blocks of the window, or whole tiles.
        """
        unit = window if window >= TILE else TILE // window * window if window else TILE
        one, two = (shared_of_walk(self.dtype, self.d, self.part, stages, near=window > 0) for stages in (1, 2))
        stages = stages_of("walk", self.part, one, two, self.room)
        shared = two if stages == 2 else one
        slots = self.multiprocessors * resident("walk", self.part, shared, self.room)
        return stages, shared, *cut(blocks, n, unit, slots, SHORTEST, ABSORBED)

    def _sums_before(
        self, k: Any, v: Any, factors: Any, key_batch: tuple[int, ...], cut: tuple[int, int, int, int],
        state: Sums | None, low: Lows, reverse: bool,
    ) -> Any:  # fmt: skip
        """The sums from which `walk` starts in each segment, with those of a state; None if there are none.

        `cut` is that of `absorb`.
        """
        if cut[0] > 1:
            sums = self.absorb(k, v, factors, key_batch, cut)
            self.scan(sums, key_batch, state=state, low=low, before=True, reverse=reverse)
            return sums
        if state is None:
            return None
        size = sums_size(self.map.padded_m, self.padded_e)
        sums = arrays.empty(self.like, (math.prod(key_batch), 1, size), "float32")
        self.scan(sums, key_batch, state=state, low=low, before=True, empty=True)
        return sums


def features(u: Any, rows: Any, row: Any, column: Any, out: Any) -> None:
    """Write exp(u W^T + row + column) to `out`."""
    p, n, d = Problem(tuple(out.shape[:-2])), out.shape[-2], u.shape[-1]
    padded_d, blocks = -(-d // 16) * 16, -(-n // TILE)
    p.set(m=out.shape[-1], d=d, padded_d=padded_d, num_queries=n, segments=blocks)
    for name, x in (("q", u), ("k", rows), ("v", row), ("mask", column), ("out", out)):
        p.array(name, x)
    shared = 8 * TILE * (padded_d + 8) + 8 * TILE + 4 * padded_d
    run(expression("features", arrays.name_of(u)), u, p.heads * blocks, THREADS, p.values, shared)


@repeated
def attention(
    q: Any,
    k: Any,
    v: Any,
    feature_map: Any,
    key_mask: Any,
    *,
    normalised: bool = True,
    stats: Any = None,
    out: Any = None,
) -> Any:
    """Bidirectional attention without a window, or the product with the kernel matrix if it is not normalised.

    The result is in `out` if a kernel can write to it.
    """
    dtype, e = arrays.name_of(q), v.shape[-1]
    keys = key_batch_of(feature_map, k, v, key_mask)
    batch = broadcast_shapes(tuple(q.shape[:-2]), keys)
    out = arrays.target(out, (q, k, v, key_mask), (*batch, q.shape[-2], e), dtype)
    for columns in parts_of(q, e):
        values, results = v[columns], out[columns]
        t = Tiles(feature_map, q, dtype, values.shape[-1])
        totals = t.scan(gather(t, k, values, key_mask, keys), keys, totals=True)
        t.read(q, totals, results, keys, normalised=normalised, stats=stats)
    return out


@repeated
def windowed(
    q: Any, k: Any, v: Any, feature_map: Any, key_mask: Any, window: int, *, stats: Any = None, out: Any = None
) -> Any:
    """Bidirectional attention with a window: one walk forwards and one backwards, and near keys are scored exactly.

    The result is in `out` if a kernel can write to it.
    """
    dtype, e, n = arrays.name_of(q), v.shape[-1], q.shape[-2]
    keys = key_batch_of(feature_map, k, v, key_mask)
    batch = broadcast_shapes(tuple(q.shape[:-2]), keys)
    out = arrays.target(out, (q, k, v, key_mask), (*batch, n, e), dtype)
    partial = arrays.empty(q, (*batch, n, e + 2), "float32")
    t = Tiles(feature_map, q, dtype, e, walks=True)
    factors = t.factors(k, key_mask, keys, query=False)
    for reverse in (False, True):
        t.walk(
            q, k, v, factors, keys, out=out, window=window, limit=n, causal=False, reverse=reverse, partial=partial,
            stats=stats if reverse else None,
        )  # fmt: skip
    return out


@repeated
def causal(
    out: Any,
    q: Any,
    k: Any,
    v: Any,
    feature_map: Any,
    key_mask: Any,
    state: Sums | None,
    low: Lows,
    *,
    key_batch: tuple[int, ...],
    window: int,
    first_query: int,
    limit: int,
    stats: Any = None,
) -> tuple[Sums, Lows]:
    """Every query reads the keys up to its own position; the result is written to `out`.

    Returns the sums of the first `limit` keys and their low parts, for every head of the queries.
    """
    t = Tiles(feature_map, q, arrays.name_of(q), v.shape[-1], walks=True)
    new = new_sums(q, tuple(out.shape[:-2]), feature_map.num_features, v.shape[-1], "float32")
    new_low = new_lows(new)
    factors = t.factors(k, key_mask, key_batch, query=False)
    t.walk(
        q, k, v, factors, key_batch, out=out, window=window, state=state, low=low, new=new, new_low=new_low,
        first_query=first_query, limit=limit, stats=stats,
    )  # fmt: skip
    return new, new_low


@repeated
def absorb(k: Any, v: Any, feature_map: Any, key_mask: Any, sums: Sums, low: Lows) -> tuple[Sums, Lows]:
    """The sums after further keys, and their low parts."""
    keys = broadcast_shapes(key_batch_of(feature_map, k, v, key_mask), tuple(sums[0].shape[:-2]))
    kv, z, c = new = new_sums(k, keys, feature_map.num_features, v.shape[-1], "float32")
    kv_low, z_low = new_low = new_lows(new)
    for columns in parts_of(k, v.shape[-1]):
        values = v[columns]
        t = Tiles(feature_map, k, arrays.name_of(k), values.shape[-1])
        t.scan(
            gather(t, k, values, key_mask, keys), keys, state=(sums[0][columns], *sums[1:]),
            low=(None if low[0] is None else low[0][columns], low[1]),
            new=(kv[columns], z, c), new_low=(kv_low[columns], z_low),
        )  # fmt: skip
    return new, new_low


@repeated
def read(out: Any, q: Any, feature_map: Any, sums: Sums, key_batch: tuple[int, ...], *, stats: Any = None) -> None:
    """Queries read the sums of a state; the result is written to `out`."""
    for columns in parts_of(q, out.shape[-1]):
        results = out[columns]
        t = Tiles(feature_map, q, arrays.name_of(q), results.shape[-1])
        totals = t.scan(None, key_batch, state=(sums[0][columns], *sums[1:]), totals=True)
        t.read(q, totals, results, key_batch, stats=stats)


def gather(t: Tiles, k: Any, v: Any, key_mask: Any, keys: tuple[int, ...]) -> Any:
    """The sums of each segment of the keys; the number of segments is chosen to fill the GPU."""
    s, shared = k.shape[-2], shared_of_absorb(t.dtype, t.d, t.padded_e)
    slots = t.multiprocessors * resident("absorb", t.padded_e, shared, t.room)
    segments, span = cut(math.prod(keys) * (t.map.padded_m // TILE), s, TILE, slots, SHORTEST)
    factors = t.factors(k, key_mask, keys, query=False) if t.map.has_dense else None
    return t.absorb(k, v, factors, keys, (segments, span, 0, s), key_mask)
