"""The gradients of attention and of kernel products: launches the backward kernels (docs/design/cuda-gradients.md).

`vjp` and `torch.operators` call `attention_backward`; `state_gradients` uses `Backward` for states. The
kernels are in kernels/attention_gradients.cu, gradient_points.cu and near_gradients.cu.
"""

import math
from typing import Any

from favorsharp.backend import broadcast_shapes, namespace_of, summed_to
from favorsharp_cuda.host import arrays
from favorsharp_cuda.host.declarations import GRADIENT_ROWS, GRADIENT_THREADS, GRADIENTS, PART
from favorsharp_cuda.host.launch import run, shared_room
from favorsharp_cuda.host.maps import plain_map
from favorsharp_cuda.host.occupancy import MULTIPROCESSORS, cut
from favorsharp_cuda.host.problem import Problem, Sums, key_batch_of, new_sums
from favorsharp_cuda.host.source import SWEEPS, Sweep, expression

WIDEST = 128
"""The most entries that a point can have. Kernels other than `gradient_sweep` are compiled for widths 64 and 128."""
BLOCKS = 2 * MULTIPROCESSORS
"""The number of blocks that a large GPU runs at the same time."""
SHORTEST_SEGMENT = 256
"""The fewest points of a segment: its sums cost as much as reading some hundred points."""


def attention_backward(
    gradient: Any, q: Any, k: Any, v: Any, feature_map: Any, out: Any, stats: Any, *, key_mask: Any = None,
    window: int = 0, causal: bool = False, of_map: bool = False, state: Sums | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The gradients of q, k and v, then those of the state, then the sums from which gradients of the map follow.

    Gradients have the shapes and dtypes of their arrays.

    Parameters
    ----------
    gradient : array, shape (*b, n, e)
        The gradient of the result `out`.
    stats : array, shape (*b, n, 2), or None
        1 / total and the reference of every query, in the dtype that is computed in; None if weights are not
        normalised.
    of_map : bool
        Whether the sums for the map are wanted; if not, the last result is None.
    state : (kv, z, c), optional
        The sums of the state that causal attention began with, in the dtype that is computed in. Without it, there are
        no gradients between that of v and the last result.
    """
    b = Backward(
        gradient, q, k, v, feature_map, out, stats, key_mask=key_mask, window=window, causal=causal, state=state
    )  # fmt: skip
    sums = b.pass_back(of_map)
    of_state = () if state is None else b.of_state()
    return b.of_points(0), b.of_points(1), b.of_values(), *of_state, sums


def sweep_of(like: Any, d: int, e: int) -> Sweep:
    """The instance of `gradient_sweep` to use for points of size d and values of size e, on the device of `like`.

    Among the instances that fit into shared memory, it processes values in the fewest parts. Among those, it pads
    points the least, and then has the most features at a time.

    It is an error if points are too wide or nothing fits. Callers ask before the forward pass, so that the error comes
    early.
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
    """The instances of `gradient_sweep` that serve points of size d and need at most `room` bytes of shared memory."""
    item = arrays.computed_item(dtype)
    return [x for x in SWEEPS[arrays.WIDER[dtype]] if x.points >= d and shared_of(x, item) <= room]


def width_of(d: int) -> int:
    """The width, 64 or 128, to which kernels other than `gradient_sweep` pad points of size d."""
    if d > WIDEST:
        raise ValueError(
            f"gradients on a GPU need d of at most {WIDEST}, got d={d}; use('reference') takes any d, "
            "but keeps all features in memory"
        )
    return wider_of(d)


def columns_of(e: int, widest: int) -> list[slice]:
    """The parts in which values are processed, as slices of at most `widest` columns.

    Gradients of points are linear in dout.v and dout.out, so those of the parts add up.
    """
    parts = max(1, -(-e // widest))
    size = -(-e // parts)
    return [slice(i * size, min(e, (i + 1) * size)) for i in range(parts)]


def shared_of(sweep: Sweep, item: int) -> int:
    """Bytes of shared memory for a block of a backward pass: the most that any of its kernels takes."""
    wider = wider_of(sweep.points)
    return max(shared_of_sweep(sweep, item), shared_of_factors(wider, item), shared_of_near(wider, item))


def shared_of_sweep(sweep: Sweep, item: int) -> int:
    """Bytes of shared memory for a block of `gradient_sweep`."""
    size = sweep.features
    points, values, features, pairs = sweep.points + 4, sweep.values + 4, size + 4, GRADIENT_ROWS + 4
    items = (
        GRADIENT_ROWS * (points + 2 * values)
        + 2 * sweep.points * features
        + 3 * GRADIENT_ROWS * features
        + 2 * GRADIENT_ROWS * pairs
    )
    return item * (items + size * values + 5 * size + 4 * GRADIENT_ROWS + 2)


def shared_of_factors(wider: int, item: int) -> int:
    """Bytes of shared memory for a block of `gradient_factors` or `gradient_points`.

    The matrix of a map's quadratic form is in shared memory in float32; in float64 it stays in global memory.
    """
    return item * ((wider if item == 4 else 0) + 2 * GRADIENT_ROWS) * (wider + 4)


def shared_of_near(wider: int, item: int) -> int:
    """Bytes of shared memory for a block of `near_gradients`."""
    return item * (4 * GRADIENT_ROWS * (wider + 4) + 2 * GRADIENT_ROWS * (GRADIENT_ROWS + 4) + 6 * GRADIENT_ROWS)


def wider_of(width: int) -> int:
    """The given width rounded up to a multiple of 64, as kernels other than `gradient_sweep` need it."""
    return max(64, -(-width // 64) * 64)


def segments_of(heads: int, points: int, block: int) -> tuple[int, int]:
    """How many segments to cut the points of a head into, and the points of a segment, a multiple of `block`."""
    _, span = cut(heads, points, block, BLOCKS, SHORTEST_SEGMENT)
    span = min(span, PART // block * block)
    return max(1, -(-points // span)), span


class Backward:
    """One backward pass: the structure that its kernels take, and their intermediate results.

    Call `pass_back` first; then `of_points`, `of_values` and `of_state` return the gradients.

    Parameters
    ----------
    gradient : array, shape (*b, n, e)
        The gradient of the result `out`.
    stats : array, shape (*b, n, 2), or None
        1 / total and the reference of every query; None if weights are not normalised.
    state : (kv, z, c), optional
        Sums that queries read in addition to the keys.
    only_near : bool
        Whether every query scores every key exactly, so that no key is read through features.
    read_by_keys : (kv, z, c), optional
        Sums that keys read in addition to the queries. If they are given, sweeps record the largest weight of each
        feature, which `route` needs.
    batch : tuple of int
        Further leading axes, to which those of the arrays are broadcast.
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
        self.problem = Problem(self.batch, GRADIENTS)
        self.heads = self.problem.heads
        self._fill(feature_map, stats, key_mask, value_width)

    def _fill(self, feature_map: Any, stats: Any, key_mask: Any, value_width: int) -> None:
        """Set what is the same in all launches."""
        p, q, k = self.problem, self.q, self.k
        packed = plain_map(feature_map, self.wide)
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
            num_queries=self.n, num_keys=self.s, window=self.window, causal=self.causal, heads=self.heads,
            of_factors=self.window > 0 or self.only_near or not self.normalised,
        )  # fmt: skip
        for name, shape in (
            *((f"query_{name}", (self.n,)) for name in ("factor", "near", "last", "weights", "slopes")),
            *((name, (self.s,)) for name in ("key_factor", "key_near", "key_slopes")),
            *(("dq", (self.n, self.d)), ("dk", (self.s, self.d))),
        ):
            # no sweep writes these arrays if keys are not read through features
            p.set(**{name: self._place(*shape, zero=self.only_near and name in ("key_slopes", "dk"))})

    def pass_back(self, of_map: bool) -> "MapSums | None":
        """Run the kernels whose results `of_points`, `of_values` and `of_state` return.

        With `of_map`, the result is the sums from which the gradients of the map follow.
        """
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
        """Let the following launches work on these columns of the values."""
        for name, x in (("v", self.v), ("out", self.out), ("gradient", self.gradient)):
            if x is not None:
                self.problem.array(name, x[..., columns])
        size = columns.stop - columns.start
        # zeros for keys that no sweep writes, and for later parts, for which sweeps add to what is there
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
        """Let the following sweeps start from these sums, before they add any point of the other side."""
        if sums is None:
            self.problem.side("given_kv", start=0)
            return
        kv, z, c = sums
        columns = self.of_columns[-1][0]
        if sums is self.read_by_keys and columns.start:
            z = namespace_of(z).zeros_like(
                z
            )  # keys have read z with the first columns; queries multiply it by each part of dout.out
        for name, x in (("given_kv", kv[..., columns]), ("given_z", z), ("given_c", c)):
            self.problem.array(name, x)

    def run(self, kernel: str, blocks: int, shared: int = 0, *, over: tuple[str | int, ...]) -> None:
        """Launch an instance of a kernel."""
        run(expression(kernel, *over), self.q, blocks, GRADIENT_THREADS, self.problem.values, shared)

    def factors(self) -> None:
        """Compute the part of log features that depends only on the point, for all queries and keys."""
        shared = shared_of_factors(self.wider, self.item)
        for keys, points in ((0, self.n), (1, self.s)):
            self.problem.set(keys_read=keys)
            self.run(
                "gradient_factors", self.heads * -(-points // GRADIENT_ROWS), shared, over=(self.dtype, self.wider)
            )

    def sweep(self, keys_read: int, sums: "MapSums | None") -> None:
        """Let one side read the other: keys read queries if `keys_read` is 1, otherwise queries read keys.

        This computes the gradients of the readers' z = sqrt(scale) x - center, of their factors (the part of log
        features that depends only on the point) and, if keys read, of values. Sums for the map are left in `sums`.
        """
        keys = 0 if self.only_near else self.s
        readers, taken = (keys, self.n) if keys_read else (self.n, keys)
        if not readers:
            if sums is not None:
                sums.of_features(keys_read, 1, zero=True)
            return
        p, window, again = self.problem, self.window, len(self.of_columns) > 1 and not self.measuring
        both = window > 0 and not self.causal
        block = window or GRADIENT_ROWS
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
        """Compute the sums of each segment, then replace them by the sums that readers of the segment start from.

        These are the sums of all segments before it (after it, if backwards), or of all segments if readers see all.
        """
        size = (3 + self.sizes.values) * self.slice
        self.problem.set(
            state_segments=segments, state_span=span, states=self._place(self.slices * segments, size), only_states=1
        )  # fmt: skip
        self.run_sweep(self.heads * self.slices * segments)
        numbers = self.heads * self.slices * (size - 2 * self.slice)
        self.run("gradient_scan", -(-numbers // GRADIENT_THREADS), over=(self.wide,))
        self.problem.set(only_states=0)

    def run_sweep(self, blocks: int) -> None:
        """Launch `gradient_sweep`."""
        self.run("gradient_sweep", blocks, shared_of_sweep(self.sizes, self.item), over=(self.dtype, *self.sizes))

    def add_totals(self) -> None:
        """Compute the sums over all queries, for the current columns; `of_state` uses them."""
        size = self.of_columns[-1][0].stop - self.of_columns[-1][0].start
        sums = new_sums(self.q, self.batch, self.m, size, self.wide)
        kv, z, c = (self.problem.hold(x) for x in sums)
        self._give(None)
        p = self.problem
        p.set(keys_read=1, causal=0, window=0, backwards=0, total_kv=kv, total_z=z, total_c=c)
        self._states(*segments_of(self.heads, self.n, GRADIENT_ROWS))
        p.set(causal=self.causal, window=self.window, total_kv=0)
        self.totals.append(sums)

    def of_state(self) -> Sums:
        """The gradients of the state that queries have read."""
        if self.state is None:
            raise ValueError("of_state: no state was read; accepted: a backward pass made with state=(kv, z, c)")
        kv, z, c = self.state
        xp = namespace_of(kv)
        weight = xp.exp(self.totals[0][2] + c)  # 0 for a feature that has seen no key, or that no query reads
        of_kv = xp.concat([own[0] for own in self.totals], axis=-1) * xp.matrix_transpose(weight)
        of_z = sum(own[1] for own in self.totals) * weight
        of_c = of_references(of_kv, kv) + of_z * z
        return tuple(summed_to(x, tuple(like.shape)) for x, like in zip((of_kv, of_z, of_c), self.state, strict=True))

    def route(self, rest: Any, before: Any) -> Any:
        """Add the gradient of c, the largest log feature of each feature, to the key that has this log feature.

        Call it after the sweep of keys. The result is the part of the gradient that belongs to the earlier sums: 0 for
        each feature whose gradient went to a key.

        Parameters
        ----------
        rest, before : array, shape (*b, 1, m)
            The gradient of c, and the weight of the earlier sums.
        """
        left, weight = (arrays.empty(self.q, (*self.batch, 1, self.m), self.wide) for _ in range(2))
        left[...], weight[...] = rest, before
        if self.s:
            self.problem.set(of_largest=self.problem.hold(left), before=self.problem.hold(weight))
            self.run("gradient_largest", self.heads, over=(self.dtype,))
        return left

    def measure(self) -> None:
        """In 16-bit dtypes: compute dout.out and the total of every query again, from what it reads.

        The result `out` and weights of the forward pass were rounded to 16 bits, which is not accurate enough.
        """
        if self.dtype == self.wide or not self.normalised or not self.n:
            return
        self.measuring = True
        self.problem.set(measuring=1)
        self.sweep(0, None)
        if self.window or self.only_near:
            self.near(0)
        self.measuring = False
        self.problem.set(measuring=0)
        self.run("gradient_normalise", -(-self.heads * self.n // GRADIENT_THREADS), over=(self.wide,))

    def near(self, keys_read: int) -> None:
        """Add the gradients through the keys that are scored exactly."""
        w = max(self.n, self.s, 1) if self.only_near else self.window  # one block, in which every query sees every key
        tiles = -(-(self.s if keys_read else self.n) // w) * -(-w // GRADIENT_ROWS)
        self.problem.set(keys_read=keys_read, window=w)
        self.run(
            "near_gradients", self.heads * tiles, shared_of_near(self.wider, self.item), over=(self.dtype, self.wider)
        )
        self.problem.set(window=self.window)

    def of_points(self, keys_read: int) -> Any:
        """The gradient of k if `keys_read` is 1, otherwise that of q."""
        x, points = (self.k, self.s) if keys_read else (self.q, self.n)
        target = arrays.empty(x, tuple(x.shape), self.dtype)
        targets = set_target(self.problem, target)
        self.problem.set(keys_read=keys_read)
        shared = shared_of_factors(self.wider, self.item)
        self.run("gradient_points", targets * -(-points // GRADIENT_ROWS), shared, over=(self.dtype, self.wider))
        return target

    def of_values(self) -> Any:
        """The gradient of v."""
        target = arrays.empty(self.v, tuple(self.v.shape), self.dtype)
        for columns, dv in self.of_columns:
            size = columns.stop - columns.start
            sum_members(self.problem, target[..., columns], dv, (size, 1, self.s * size))
        return target


def of_references(gradient: Any, sums: Any) -> Any:
    """The gradient of c through sums (*b, m, e), which are relative to c: (*b, 1, m)."""
    xp = namespace_of(sums)
    return xp.sum(gradient * sums, axis=-1)[..., None, :]


def set_target(problem: Problem, target: Any) -> int:
    """Let kernels write a gradient to `target`, in the shape of its array; the number of heads of that array.

    Each of these heads receives the sum over the heads of the batch that it was broadcast to.
    """
    problem.array("target", target)
    shape = (1,) * (len(problem.batch) - target.ndim + 2) + tuple(target.shape[:-2])
    targets: int = math.prod(shape)
    problem.axes("member", [size if own == 1 else 1 for size, own in zip(problem.batch, shape, strict=True)])
    problem.set(targets=targets)
    return targets


def sum_members(problem: Problem, target: Any, source: int, steps: tuple[int, int, int]) -> None:
    """Write a gradient to `target`, summed over the heads that its array was broadcast to.

    Parameters
    ----------
    source : int
        The address of the gradients of all heads.
    steps : tuple of int
        The strides of these gradients, in items, along rows, columns and heads.
    """
    targets = set_target(problem, target)
    rows, columns = target.shape[-2:]
    problem.set(
        **{"from": source}, num_rows=rows, num_columns=columns, row_step=steps[0], column_step=steps[1],
        head_step=steps[2],
    )  # fmt: skip
    blocks = -(-targets * rows * columns // GRADIENT_THREADS)
    run(expression("sum_members", arrays.name_of(target)), target, blocks, GRADIENT_THREADS, problem.values)


class MapSums:
    """The sums over points of each head from which the gradients of a map follow.

    `finished` returns them as `favorsharp.features.map_gradients` takes them, and `rows_and_weights` returns the
    gradients of two arrays of the map.
    """

    def __init__(self, backward: Backward) -> None:
        self.b = backward
        self.partial: list[Any] = [None, None]
        self.segments = [0, 0]

    def of_features(self, keys: int, segments: int, *, zero: bool = False) -> int:
        """The address to which a sweep writes the sums of each segment; `zero` fills it if no sweep will run."""
        b = self.b
        if self.partial[keys] is None:  # sweeps for later columns of the values add to the same array
            self.segments[keys] = segments
            self.partial[keys] = arrays.empty(b.q, (b.heads, b.slices, segments, b.slice, b.width + 1), b.wide)
            if zero:
                self.partial[keys][...] = 0
        return b.problem.hold(self.partial[keys])

    def finished(self) -> dict[str, Any]:
        """All sums, (*b, ., .), by the names that `map_gradients` gives them."""
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
            shared = b.item * 2 * GRADIENT_ROWS * (width + 4)
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
        b.run("sum_segments", -(-outer * inner // GRADIENT_THREADS), over=(b.wide,))
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
            b.run("gradient_map", -(-numbers // GRADIENT_THREADS), over=(b.wide,))
            found.append(arrays.cast(target, arrays.name_of(like)))
        return found[0], found[1]
