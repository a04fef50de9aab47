"""The gradients of attention and of kernel products: launches the backward kernels (docs/design/cuda-gradients.md).

`vjp` and `torch.operators` call `attention_backward`; `state_gradients` uses `Backward` for states. The
kernels are in kernels/attention_gradients.cu, gradient_points.cu and near_gradients.cu.
"""

from typing import Any

from favorsharp.backend import broadcast_shapes, namespace_of, summed_to
from favorsharp_cuda.host import arrays
from favorsharp_cuda.host.declarations import GRADIENT_ROWS, GRADIENT_THREADS, GRADIENTS
from favorsharp_cuda.host.gradient_sizes import (
    columns_of,
    segments_of,
    shared_of_factors,
    shared_of_near,
    shared_of_sweep,
    sweep_of,
    wider_of,
)
from favorsharp_cuda.host.gradient_sums import MapSums, set_target, sum_members
from favorsharp_cuda.host.launch import run
from favorsharp_cuda.host.maps import plain_map
from favorsharp_cuda.host.problem import Problem, Sums, key_batch_of, new_sums
from favorsharp_cuda.host.source import expression


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

    def pass_back(self, of_map: bool) -> MapSums | None:
        """Run the kernels that compute the results of `of_points`, `of_values` and `of_state`.

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
        # zeros, because no sweep writes some keys, and sweeps of later parts add to the array
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
            )  # keys read z with the first columns only; queries multiply it by each part of dout.out
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

    def sweep(self, keys_read: int, sums: MapSums | None) -> None:
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
