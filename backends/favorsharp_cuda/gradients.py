"""Gradients of attention by the backward kernels (kernels/attention_gradients.cu and its neighbours)."""

import math
from typing import Any

import numpy as np

from favorsharp._arrays import broadcast_shapes, namespace_of
from favorsharp.features.map_gradients import summed_to
from favorsharp_cuda import arrays
from favorsharp_cuda.launch import run, shared_room
from favorsharp_cuda.maps import plain_map
from favorsharp_cuda.problem import AXES, PROBLEM, Problem, Sums, key_batch_of, new_sums
from favorsharp_cuda.source import SWEEPS, Sweep, expression

THREADS, ROWS = 128, 32
WIDEST = 128
"""Entries of a point; other kernels than sweeps know 64 and 128."""
ENOUGH_BLOCKS = 512
"""Blocks that keep a large card busy."""
SHORTEST_SEGMENT = 512
"""Points that a segment has at least: its sums cost as much as reading some hundred points."""
LONGEST_SEGMENT = 2048
"""Points that it has at most, or one block of a window: within one, sums in float32 keep no low parts."""

_ARRAY = PROBLEM["q"]
_ARRAYS = (
    *("q", "k", "v", "mask", "out", "stats", "gradient", "target"),
    *("given_kv", "given_z", "given_c"),
)
GRADIENTS = np.dtype(
    [
        *((name, _ARRAY) for name in _ARRAYS),
        *((name, "i8", (AXES,)) for name in ("shape", "map_axis", "member")),
        *((name, "i8") for name in ("query", "key", "constants", "m", "d", "e", "slices", "slice")),
        *((name, "i8") for name in ("width", "value_width", "gaussian", "has_dense")),
        *((name, "i8") for name in ("num_queries", "num_keys", "window", "causal", "of_factors")),
        *((name, "i8") for name in ("segments", "span")),
        *((name, "i8") for name in ("state_segments", "state_span")),
        *((name, "i8") for name in ("keys_read", "backwards", "added", "only_states", "measuring", "heads", "targets")),
        *((name, "i8") for name in ("query_factor", "query_near", "query_last", "query_weights")),
        *((name, "i8") for name in ("key_factor", "key_near")),
        *((name, "i8") for name in ("dq", "dk", "dv", "query_slopes", "key_slopes")),
        *((name, "i8") for name in ("states", "map_sums", "factor_sums")),
        *((name, "i8") for name in ("total_kv", "total_z", "total_c", "largest", "largest_at", "of_largest", "before")),
        *((name, "i8") for name in ("from", "to", "outer", "inner")),
        *((name, "i8") for name in ("num_rows", "num_columns", "row_step", "column_step", "head_step")),
    ]
)
"""The layout of `Gradients` in kernels/gradient_tiles.cuh."""


def attention_backward(
    gradient: Any, q: Any, k: Any, v: Any, feature_map: Any, out: Any, stats: Any, *, key_mask: Any = None,
    window: int = 0, causal: bool = False, of_map: bool = False, state: Sums | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The gradients of q, k and v, in their shapes and dtypes; of a state; the sums that those of a map are made of.

    Parameters
    ----------
    gradient : array, shape (*b, n, e)
        Of the result `out`.
    stats : array, shape (*b, n, 2), or None
        1 / total and the reference of every query, of the type computed in; None where weights are not normalised.
    of_map : bool
        Whether the sums are wanted: otherwise the last is None.
    state : (kv, z, c), optional
        That causal attention began with, in the type computed in; its gradients follow those of v.
    """
    b = Backward(
        gradient, q, k, v, feature_map, out, stats, key_mask=key_mask, window=window, causal=causal, state=state
    )  # fmt: skip
    sums = b.pass_back(of_map)
    of_state = () if state is None else b.of_state()
    return b.of_points(0), b.of_points(1), b.of_values(), *of_state, sums


def sweep_of(like: Any, d: int, e: int) -> Sweep:
    """The sweep that takes values in the fewest parts, has the narrowest points of those and works on most features.

    Of those that the device has room for.

    Refuses points that are too wide; callers ask before the forward pass.
    """
    width_of(d)
    dtype, device = arrays.name_of(like), arrays.device_number(like)
    room = shared_room(device)
    if wide_enough := sweeps_for(dtype, d, room):
        return min(wide_enough, key=lambda x: (-(-e // x.values), x.points, -x.features, x.values))
    item = arrays.computed_item(dtype)
    needed = min(shared_of(sweep, item) for sweep in SWEEPS[arrays.WIDER[dtype]] if sweep.points >= d)
    fitting = sweeps_for(dtype, 0, room)
    served = [f"d of at most {max(sweep.points for sweep in fitting)}"] if fitting else []
    served += ["float32"] if dtype == "float64" else []
    raise ValueError(
        f"gradients in {dtype} of d={d} need {needed} bytes of shared memory for a block, and device {device} has "
        f"{room}; accepted there: {', or '.join(served) or 'none'}"
    )


def sweeps_for(dtype: str, d: int, room: int) -> list[Sweep]:
    """Those that serve points of size d where a block has so much shared memory."""
    item = arrays.computed_item(dtype)
    return [x for x in SWEEPS[arrays.WIDER[dtype]] if x.points >= d and shared_of(x, item) <= room]


def width_of(d: int) -> int:
    """The width that points of size d are padded to by kernels that know 64 and 128 alone."""
    if d > WIDEST:
        raise ValueError(
            f"gradients on a GPU need d of at most {WIDEST}, got d={d}; use('reference') takes any, and keeps features"
        )
    return wider_of(d)


def columns_of(e: int, widest: int) -> list[slice]:
    """Values in parts that a sweep takes: gradients of points are linear in dout.v and dout.out, and so add up."""
    parts = max(1, -(-e // widest))
    size = -(-e // parts)
    return [slice(i * size, min(e, (i + 1) * size)) for i in range(parts)]


def shared_of(sweep: Sweep, item: int) -> int:
    """Bytes of shared memory that the largest block of a backward pass takes."""
    wider = wider_of(sweep.points)
    return max(shared_of_sweep(sweep, item), shared_of_factors(wider, item), shared_of_near(wider, item))


def shared_of_sweep(sweep: Sweep, item: int) -> int:
    """Those of `gradient_sweep`."""
    size = sweep.features
    points, values, features, pairs = sweep.points + 4, sweep.values + 4, size + 4, ROWS + 4
    items = ROWS * (points + 2 * values) + 2 * sweep.points * features + 3 * ROWS * features + 2 * ROWS * pairs
    return item * (items + size * values + 5 * size + 4 * ROWS + 2)


def shared_of_factors(wider: int, item: int) -> int:
    """Those of `gradient_factors` and `gradient_points`; in float64 a map's matrix stays in global memory."""
    return item * ((wider if item == 4 else 0) + 2 * ROWS) * (wider + 4)


def shared_of_near(wider: int, item: int) -> int:
    """Those of `near_gradients`."""
    return item * (4 * ROWS * (wider + 4) + 2 * ROWS * (ROWS + 4) + 6 * ROWS)


def wider_of(width: int) -> int:
    """The width of the kernels that know 64 and 128 alone."""
    return max(64, -(-width // 64) * 64)


def segments_of(heads: int, points: int, block: int) -> tuple[int, int]:
    """Into how many segments to cut the points of each head, and the points of one, in whole blocks."""
    wanted = max(1, min(-(-ENOUGH_BLOCKS // max(1, heads)), points // SHORTEST_SEGMENT))
    blocks = max(1, -(-points // block))
    span = max(1, min(-(-blocks // wanted), LONGEST_SEGMENT // block)) * block
    return max(1, -(-points // span)), span


class Backward:
    """One backward pass: its structure, and what the kernels leave on the way.

    Parameters
    ----------
    gradient : array, shape (*b, n, e)
        Of the result `out`.
    stats : array, shape (*b, n, 2), or None
        1 / total and the reference of every query; None where weights are not normalised.
    state : (kv, z, c), optional
        What queries find in the features beside the keys.
    only_near : bool
        Whether the keys are scored exactly by all queries, and are in no features.
    read_by_keys : (kv, z, c), optional
        What keys find beside the queries; where there is some, sweeps note each feature's largest weight, for `route`.
    batch : tuple of int
        That heads have besides.
    """

    def __init__(
        self, gradient: Any, q: Any, k: Any, v: Any, feature_map: Any, out: Any, stats: Any, *, key_mask: Any = None,
        window: int = 0, causal: bool = False, state: Sums | None = None, only_near: bool = False,
        read_by_keys: Sums | None = None, batch: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.q, self.k, self.v = q, k, v
        self.dtype = arrays.name_of(q)
        self.wide = arrays.WIDER[self.dtype]
        self.item = arrays.computed_item(self.dtype)
        self.n, self.s, self.d, self.e = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
        self.m = feature_map.num_features
        self.columns = columns_of(self.e, sweep_of(q, self.d, self.e).values)
        self.sizes = sweep_of(q, self.d, self.columns[0].stop)
        self.width, value_width, self.slice = self.sizes
        self.wider = wider_of(self.width)
        self.slices = -(-self.m // self.slice)
        self.window, self.causal, self.only_near = window, causal, only_near
        self.spans = [1, 1]
        self.gradient, self.out, self.measuring = gradient, out, False
        self.normalised = stats is not None
        self.state, self.read_by_keys = state, read_by_keys
        self.totals: list[Sums] = []
        self.of_columns: list[tuple[slice, int]] = []
        keys = key_batch_of(feature_map, k, v, key_mask)
        of_state = () if state is None else tuple(state[0].shape[:-2])
        self.batch = broadcast_shapes(tuple(q.shape[:-2]), keys, of_state, batch)
        packed = plain_map(feature_map, self.wide)
        p = self.problem = Problem(self.batch, GRADIENTS)
        self.heads = p.heads
        p.number("map_axis", tuple(feature_map.batch_shape))
        for name, x in (("q", q), ("k", k), ("stats", stats)):
            if x is not None:
                p.array(name, x)
        if key_mask is not None:
            p.array("mask", key_mask, trailing=1)
        p.set(
            query=p.hold(packed.query), key=p.hold(packed.key), constants=packed.size, has_dense=packed.has_dense,
            gaussian=feature_map.parameters.kernel == "gaussian", m=self.m, d=self.d, slices=self.slices,
            slice=self.slice, width=self.width, value_width=value_width,
            num_queries=self.n, num_keys=self.s, window=window, causal=causal, heads=self.heads,
            of_factors=window > 0 or only_near or not self.normalised,
        )  # fmt: skip
        for name, shape in (
            *((f"query_{name}", (self.n,)) for name in ("factor", "near", "last", "weights", "slopes")),
            *((name, (self.s,)) for name in ("key_factor", "key_near", "key_slopes")),
            *(("dq", (self.n, self.d)), ("dk", (self.s, self.d))),
        ):
            # no sweep writes of keys that are in no features
            p.set(**{name: self._place(*shape, zero=only_near and name in ("key_slopes", "dk"))})

    def pass_back(self, of_map: bool) -> "MapSums | None":
        """Leave all that gradients of points are made of, and give the sums for those of a map."""
        sums = MapSums(self) if of_map else None
        for columns in self.columns:
            self.take(columns)
            self.factors()
            self.measure()
            for keys_read in (0, 1):
                self.sweep(keys_read, sums)
            if self.window or (self.only_near and self.s):
                for keys_read in (0, 1):
                    self.near(keys_read)
            if self.state is not None:
                self.add_totals()
        return sums

    def take(self, columns: slice) -> None:
        """Work on these columns of the values from here on."""
        for name, x in (("v", self.v), ("out", self.out), ("gradient", self.gradient)):
            if x is not None:
                self.problem.array(name, x[..., columns])
        size = columns.stop - columns.start
        # from the second part on, sweeps add to what is there
        dv = self._place(self.s, size, zero=self.only_near or len(self.of_columns) > 0)
        self.of_columns.append((columns, dv))
        self.problem.set(e=size, dv=dv)

    def _place(self, *shape: int, zero: bool = False) -> int:
        """The address of a new array with an entry for each head."""
        x = arrays.empty(self.q, (self.heads, *shape), self.wide)
        if zero:
            x[...] = 0
        return self.problem.hold(x)

    def _give(self, sums: Sums | None) -> None:
        """Let readers find these sums before any point of the other side."""
        if sums is None:
            self.problem.values["given_kv"]["start"] = 0
            return
        kv, z, c = sums
        columns = self.of_columns[-1][0]
        if sums is self.read_by_keys and columns.start:
            z = namespace_of(z).zeros_like(
                z
            )  # keys have read it with the first columns; what queries read of it adds up
        for name, x in (("given_kv", kv[..., columns]), ("given_z", z), ("given_c", c)):
            self.problem.array(name, x)

    def run(self, kernel: str, blocks: int, shared: int = 0, *, over: tuple[str | int, ...]) -> None:
        """Launch an instance of a kernel."""
        run(expression(kernel, *over), self.q, blocks, THREADS, self.problem.values, shared)

    def factors(self) -> None:
        """What log features hold of each point alone."""
        shared = shared_of_factors(self.wider, self.item)
        for keys, points in ((0, self.n), (1, self.s)):
            self.problem.set(keys_read=keys)
            self.run("gradient_factors", self.heads * -(-points // ROWS), shared, over=(self.dtype, self.wider))

    def sweep(self, keys_read: int, sums: "MapSums | None") -> None:
        """One side reads the other: the gradients of z = sqrt(scale) x - center, of factors, and of values."""
        keys = 0 if self.only_near else self.s
        readers, taken = (keys, self.n) if keys_read else (self.n, keys)
        if not readers:
            if sums is not None:
                sums.of_features(keys_read, 1, zero=True)
            return
        p, window, again = self.problem, self.window, len(self.of_columns) > 1 and not self.measuring
        both = window > 0 and not self.causal
        block = window or ROWS
        segments, span = segments_of(self.heads, readers, block)
        ordered = self.causal or both
        cut = (segments, span) if ordered else segments_of(self.heads, taken, block)
        self.spans[keys_read] = span
        p.set(
            num_keys=keys, keys_read=keys_read, segments=segments, span=span,
            map_sums=0 if sums is None else sums.of_features(keys_read, segments),
            largest=0, largest_at=0,
        )  # fmt: skip
        if keys_read and self.read_by_keys is not None:
            of_features = (self.heads, self.slices, segments, self.slice)
            p.set(
                largest=p.hold(arrays.empty(self.q, of_features, self.wide)),
                largest_at=p.hold(arrays.empty(self.q, of_features, "int64")),
            )
        self._give(self.read_by_keys if keys_read else self.state)
        for turn, backwards in enumerate((0, 1) if both else (keys_read,)):
            p.set(backwards=backwards, added=turn > 0 or again)
            self._states(*cut)
            self.run_sweep(self.heads * segments)
        p.set(num_keys=self.s)

    def _states(self, segments: int, span: int) -> None:
        """What segments hold, and then what comes before each."""
        size = (3 + self.sizes.values) * self.slice
        self.problem.set(
            state_segments=segments, state_span=span, states=self._place(self.slices * segments, size), only_states=1
        )  # fmt: skip
        self.run_sweep(self.heads * self.slices * segments)
        numbers = self.heads * self.slices * (size - 2 * self.slice)
        self.run("gradient_scan", -(-numbers // THREADS), over=(self.wide,))
        self.problem.set(only_states=0)

    def run_sweep(self, blocks: int) -> None:
        """Launch `gradient_sweep`."""
        self.run("gradient_sweep", blocks, shared_of_sweep(self.sizes, self.item), over=(self.dtype, *self.sizes))

    def add_totals(self) -> None:
        """The sums over all queries, which are the gradients of a state, but for references: of these columns."""
        size = self.of_columns[-1][0].stop - self.of_columns[-1][0].start
        sums = new_sums(self.q, self.batch, self.m, size, self.wide)
        kv, z, c = (self.problem.hold(x) for x in sums)
        self._give(None)
        p = self.problem
        p.set(keys_read=1, causal=0, window=0, backwards=0, total_kv=kv, total_z=z, total_c=c)
        self._states(*segments_of(self.heads, self.n, ROWS))
        p.set(causal=self.causal, window=self.window, total_kv=0)
        self.totals.append(sums)

    def of_state(self) -> Sums:
        """The gradients of the state that queries have read."""
        if self.state is None:
            raise ValueError("no state was read")
        kv, z, c = self.state
        xp = namespace_of(kv)
        weight = xp.exp(self.totals[0][2] + c)  # 0 where a feature has seen no key, or nobody reads it
        of_kv = xp.concat([own[0] for own in self.totals], axis=-1) * xp.matrix_transpose(weight)
        of_z = sum(own[1] for own in self.totals) * weight
        of_c = of_references(of_kv, kv) + of_z * z
        return tuple(summed_to(x, tuple(like.shape)) for x, like in zip((of_kv, of_z, of_c), self.state, strict=True))

    def route(self, rest: Any, before: Any) -> Any:
        """Give each feature's largest log feature its gradient, after the keys have read; what is left, of sums before.

        Parameters
        ----------
        rest, before : array, shape (*b, 1, m)
            The gradient, and the weight of the sums before.
        """
        left, weight = (arrays.empty(self.q, (*self.batch, 1, self.m), self.wide) for _ in range(2))
        left[...], weight[...] = rest, before
        if self.s:
            self.problem.set(of_largest=self.problem.hold(left), before=self.problem.hold(weight))
            self.run("gradient_largest", self.heads, over=(self.dtype,))
        return left

    def measure(self) -> None:
        """dout.out of every query from what it reads, and its total: those of the result are of 16 bits."""
        if self.dtype == self.wide or not self.normalised or not self.n:
            return
        self.measuring = True
        self.problem.set(measuring=1)
        self.sweep(0, None)
        if self.window or self.only_near:
            self.near(0)
        self.measuring = False
        self.problem.set(measuring=0)
        self.run("gradient_normalise", -(-self.heads * self.n // THREADS), over=(self.wide,))

    def near(self, keys_read: int) -> None:
        """Add what goes through the exactly scored keys."""
        w = max(self.n, self.s, 1) if self.only_near else self.window  # one block, in which all see all
        tiles = -(-(self.s if keys_read else self.n) // w) * -(-w // ROWS)
        self.problem.set(keys_read=keys_read, window=w)
        self.run(
            "near_gradients", self.heads * tiles, shared_of_near(self.wider, self.item), over=(self.dtype, self.wider)
        )
        self.problem.set(window=self.window)

    def of_points(self, keys_read: int) -> Any:
        """The gradient of q, or of k."""
        x, points = (self.k, self.s) if keys_read else (self.q, self.n)
        target = arrays.empty(x, tuple(x.shape), self.dtype)
        targets = set_target(self.problem, target)
        self.problem.set(keys_read=keys_read)
        shared = shared_of_factors(self.wider, self.item)
        self.run("gradient_points", targets * -(-points // ROWS), shared, over=(self.dtype, self.wider))
        return target

    def of_values(self) -> Any:
        """The gradient of v."""
        target = arrays.empty(self.v, tuple(self.v.shape), self.dtype)
        for columns, dv in self.of_columns:
            size = columns.stop - columns.start
            sum_members(self.problem, target[..., columns], dv, (size, 1, self.s * size))
        return target


def of_references(gradient: Any, sums: Any) -> Any:
    """Of the references that sums (*b, m, e) are relative to, the gradient through the sums: (*b, 1, m)."""
    xp = namespace_of(sums)
    return xp.sum(gradient * sums, axis=-1)[..., None, :]


def set_target(problem: Problem, target: Any) -> int:
    """Have kernels write here the gradient of an array of this shape; the number of its heads.

    One of its heads takes the sum of those that the array was broadcast to.
    """
    problem.array("target", target)
    shape = (1,) * (len(problem.batch) - target.ndim + 2) + tuple(target.shape[:-2])
    targets: int = math.prod(shape)
    problem.axes("member", [size if own == 1 else 1 for size, own in zip(problem.batch, shape, strict=True)])
    problem.set(targets=targets)
    return targets


def sum_members(problem: Problem, target: Any, source: int, steps: tuple[int, int, int]) -> None:
    """Write a gradient, summed over the heads that its array was broadcast to.

    Parameters
    ----------
    source : int
        Address of the numbers, which lie `steps` apart along rows, columns and heads.
    """
    targets = set_target(problem, target)
    rows, columns = target.shape[-2:]
    problem.set(
        **{"from": source}, num_rows=rows, num_columns=columns, row_step=steps[0], column_step=steps[1],
        head_step=steps[2],
    )  # fmt: skip
    blocks = -(-targets * rows * columns // THREADS)
    run(expression("sum_members", arrays.name_of(target)), target, blocks, THREADS, problem.values)


class MapSums:
    """Sums over points that the gradients of a map are made of, per head; see `favorsharp.features.map_gradients`."""

    def __init__(self, backward: Backward) -> None:
        self.b = backward
        self.partial: list[Any] = [None, None]
        self.segments = [0, 0]

    def of_features(self, keys: int, segments: int, *, zero: bool = False) -> int:
        """The address of what a sweep leaves of each segment; zeros where none comes."""
        b = self.b
        if self.partial[keys] is None:  # later columns of the values add to it
            self.segments[keys] = segments
            self.partial[keys] = arrays.empty(b.q, (b.heads, b.slices, segments, b.slice, b.width + 1), b.wide)
            if zero:
                self.partial[keys][...] = 0
        return b.problem.hold(self.partial[keys])

    def finished(self) -> dict[str, Any]:
        """Every sum, (*b, ., .), by the names of `map_gradients`."""
        b, sums = self.b, {}
        for keys, side in enumerate(("query", "key")):
            segments = self.segments[keys]
            whole = self._summed(self.partial[keys], b.heads * b.slices, segments, b.slice * (b.width + 1))
            features = whole.reshape(*b.batch, b.slices * b.slice, b.width + 1)[..., : b.m, :]
            sums[f"{side}_points"] = features[..., : b.d]
            sums[f"{side}_column"] = features[..., -1:].swapaxes(-1, -2)
            width = b.wider
            size = width * width + width + 1
            partial = arrays.empty(b.q, (b.heads, segments, size), b.wide)
            span = b.spans[keys]
            b.problem.set(keys_read=keys, segments=segments, span=span, factor_sums=b.problem.hold(partial))
            shared = b.item * 2 * ROWS * (width + 4)
            b.run("gradient_factor_sums", b.heads * segments * (width // 32), shared, over=(b.dtype, width))
            factors = self._summed(partial, b.heads, segments, size).reshape(*b.batch, 1, size)
            products = factors[..., 0, : width * width].reshape(*b.batch, width, width)
            sums[f"{side}_factor_products"] = products[..., : b.d, : b.d]
            sums[f"{side}_factor_points"] = factors[..., width * width : width * width + b.d]
            sums[f"{side}_factor"] = factors[..., -1:]
        return sums

    def _summed(self, partial: Any, outer: int, segments: int, inner: int) -> Any:
        b = self.b
        result = arrays.empty(b.q, (outer, inner), b.wide)
        b.problem.set(
            **{"from": b.problem.hold(partial), "to": b.problem.hold(result)}, outer=outer, segments=segments,
            inner=inner,
        )  # fmt: skip
        b.run("sum_segments", -(-outer * inner // THREADS), over=(b.wide,))
        return result

    def rows_and_weights(self, feature_map: Any) -> tuple[Any, Any]:
        """The gradients of the map's rows and log_weight, in their shapes."""
        b, p = self.b, feature_map.parameters
        problem = b.problem
        whole = []
        for keys in (0, 1):
            sums = self._summed(self.partial[keys], b.heads * b.slices, self.segments[keys], b.slice * (b.width + 1))
            whole.append(sums)
        problem.array("q", p.g1)
        problem.array("k", p.g2)
        problem.set(**{"from": problem.hold(whole[0]), "to": problem.hold(whole[1])}, inner=b.slices * b.slice)
        found = []
        for of_weights, like in enumerate((feature_map.rows, feature_map.log_weight)):
            target = arrays.empty(like, tuple(like.shape), b.wide)
            targets = set_target(problem, target)
            problem.set(keys_read=of_weights)
            numbers = targets * like.shape[-1] * like.shape[-2]
            b.run("gradient_map", -(-numbers // THREADS), over=(b.wide,))
            found.append(arrays.cast(target, arrays.name_of(like)))
        return found[0], found[1]
