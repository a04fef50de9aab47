"""The gradients of attention with a window in both directions around landmarks, for a fixed choice of landmarks.

Positions are cut into units of whole blocks. The surroundings of a unit are its blocks and one more on each side. Every
query of a unit reads the keys outside of its surroundings through the same weighted landmarks. Their sums are the sums
of a prefix and of a suffix of the keys, so nothing is subtracted. In the surroundings, pairs are scored one by one,
exactly or with the score of the key's landmark. In the backward pass, a key in a prefix gets gradients from the units
behind it, so these are added up in suffix sums over units; keys in a suffix use prefix sums.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from favorsharp._arrays import namespace_of, on_device_of
from favorsharp._typing import Array
from favorsharp.landmarks.compressions import Compression, log_weights_of, of_owner, row_sums, through_weights
from favorsharp.ops.landmarks import gather
from favorsharp.ops.partials import Partial, finish, merge
from favorsharp.ops.tiles import tiles_of

UNIT = 64
"""The number of positions that a unit of several blocks has at most."""


@dataclass(frozen=True)
class Unit:
    """The positions first .. last of a unit, and low .. high of its surroundings."""

    first: int
    last: int
    low: int
    high: int


def units_of(length: int, window: int) -> list[Unit]:
    """The units of a sequence: as many whole blocks as have up to UNIT positions, or one longer block."""
    step = max(1, UNIT // window) * window
    bounds = [(a, min(length, a + step)) for a in range(0, length, step)]
    return [Unit(a, b, max(0, a - window), min(length, -(-b // window) * window + window)) for a, b in bounds]


def windowed_backwards(q: Array, g: Array, made: Compression, window: int) -> tuple[Array, Array, Array]:
    """The gradients of scaled queries, of scaled keys and of values, given that of the result.

    q (*b, g, n, d) and g (*b, g, n, e); queries are centred if the kernel is Gaussian.
    """
    xp, logs = namespace_of(q), log_weights_of(made)
    logs = xp.where(made.visible[..., None], logs, -xp.inf)
    call = _Call(q, g, made, logs, window)
    units = units_of(q.shape[-2], window)
    sums = call.sums_of_keys(units)
    of_units = [call.read(unit, far) for unit, far in zip(units, sums, strict=True)]
    call.through_sums(units, of_units)
    dy, _ = through_weights(made, call.dlogs, call.dpoints)
    return call.dq, call.dy + dy, call.dv


class _Call:
    """The arrays of a call, and the gradients so far."""

    def __init__(self, q: Array, g: Array, made: Compression, logs: Array, window: int) -> None:
        xp = namespace_of(q)
        self.xp, self.q, self.g, self.made, self.logs, self.window = xp, q, g, made, logs, window
        self.points = made.chosen.points[..., None, :, :]
        self.dq, self.dy, self.dv = xp.zeros_like(q), xp.zeros_like(made.y), xp.zeros_like(made.values)
        self.dlogs, self.dpoints = xp.zeros_like(logs), xp.zeros_like(made.chosen.points)

    def added(self, start: int, stop: int, total: Partial | None) -> Partial:
        """The sums of landmarks, and with them those of the keys start .. stop."""
        m = self.made.chosen.num_features
        slots = self.xp.arange(m, **on_device_of(self.q))
        for a, b in tiles_of(stop - start, m, tuple(self.made.y.shape[:-2])) if stop > start or total is None else ():
            part = slice(start + a, start + b)
            own = self.xp.where(self.made.own[..., part, None] == slots, self.logs[..., part, :], -self.xp.inf)
            total = _gathered(own, self.made.values[..., part, :], total)
        assert total is not None
        return total

    def sums_of_keys(self, units: list[Unit]) -> Iterator[Partial]:
        """The sums of the keys outside of the surroundings of each unit."""
        after, total = [], self.added(0, 0, None)
        behind = units[-1].high
        for unit in reversed(units):
            total, behind = self.added(unit.high, behind, total), unit.high
            after.append(total)
        total, before = self.added(0, 0, None), 0
        for unit in units:
            total, before = self.added(before, unit.low, total), unit.low
            yield merge(total, after.pop())

    def read(self, unit: Unit, far: Partial) -> Partial:
        """The backward pass through the reads of a unit's queries. Return their sums for `through_sums`."""
        xp, around = self.xp, slice(unit.low, unit.high)
        level = xp.where(far.den > 0, far.ref + xp.log(xp.where(far.den > 0, far.den, 1.0)), -xp.inf)
        values = xp.concat([self.made.values[..., around, :], finish(far)], axis=-2)[..., None, :, :]
        batch, width = tuple(self.q.shape[:-2]), values.shape[-2]
        total = None
        for a, b in tiles_of(unit.last - unit.first, width, batch):
            rows = slice(unit.first + a, unit.first + b)
            total = self.read_rows(rows, around, xp.matrix_transpose(level)[..., None, :, :], values, total)
        assert total is not None
        return total

    def read_rows(
        self, rows: slice, around: slice, level: Array, values: Array, total: Partial | None
    ) -> Partial:  # fmt: skip
        """`read` for some of the queries."""
        xp, x, g, size = self.xp, self.q[..., rows, :], self.g[..., rows, :], around.stop - around.start
        y, logs, owner = self.made.y[..., around, :], self.logs[..., around, 0], self.made.own[..., around]
        raw = x @ xp.matrix_transpose(self.points)
        index = xp.broadcast_to(owner[..., None, None, :], (*raw.shape[:-1], size))
        far = xp.take_along_axis(raw, index, axis=-1) + logs[..., None, None, :]
        exact = x @ xp.matrix_transpose(y)[..., None, :, :] + self.made.log_mass[..., None, None, around, 0]
        order = xp.arange(self.q.shape[-2], **on_device_of(x)) // self.window
        near = xp.abs(order[rows, None] - order[None, around]) <= 1
        visible = self.made.visible[..., None, None, around]
        pairs = xp.where(visible, xp.where(near, exact, far), -xp.inf)
        share, top = _softmax(xp.concat([pairs, raw + level], axis=-1))
        slope = share * (g @ xp.matrix_transpose(values))
        inner = row_sums(slope)
        slope = slope - share * inner
        self.take(rows, around, share[..., :size], slope, near, owner)
        logs = xp.where(top == -xp.inf, -xp.inf, raw - xp.where(top == -xp.inf, 0.0, top))
        joined = xp.concat([g, inner], axis=-1)
        logs, joined = (xp.reshape(z, (*z.shape[:-3], -1, z.shape[-1])) for z in (logs, joined))
        return _gathered(logs, joined, total)

    def take(
        self, rows: slice, around: slice, share: Array, slope: Array, near: Array, owner: Array
    ) -> None:  # fmt: skip
        """Add the gradients through the pairs of queries and keys in the surroundings, and through landmarks."""
        xp, x, g, size = self.xp, self.q[..., rows, :], self.g[..., rows, :], around.stop - around.start
        pairs, of_raw = slope[..., :size], slope[..., size:]
        exact, far = xp.where(near, pairs, 0.0), xp.where(near, 0.0, pairs)
        slots = xp.arange(of_raw.shape[-1], **on_device_of(x))
        member = xp.astype(owner[..., None] == slots, x.dtype)
        of_raw = of_raw + far @ member[..., None, :, :]
        y = self.made.y[..., around, :]
        self.dq[..., rows, :] += exact @ y[..., None, :, :] + of_raw @ self.points
        self.dpoints += _over_group(xp.matrix_transpose(of_raw) @ x)
        of_mass = xp.sum(_over_group(exact), axis=-2)[..., None]
        self.dy[..., around, :] += _over_group(xp.matrix_transpose(exact) @ x)
        if self.made.chosen.kernel == "gaussian":
            self.dy[..., around, :] -= of_mass * y
        self.dlogs[..., around, :] += xp.sum(_over_group(far), axis=-2)[..., None]
        self.dv[..., around, :] += _over_group(xp.matrix_transpose(share) @ g)

    def through_sums(self, units: list[Unit], of_units: list[Partial]) -> None:
        """Add the gradients of keys through the landmarks that units read: keys before a unit, and keys behind it."""
        total, starts = None, [0, *(unit.low for unit in units)]
        for (start, stop), own in reversed(list(zip(pairwise(starts), of_units, strict=True))):
            total = own if total is None else merge(total, own)
            self.take_sums(start, stop, total)
        total, stops = None, [*(unit.high for unit in units), units[-1].high]
        for (start, stop), own in zip(pairwise(stops), of_units, strict=True):
            total = own if total is None else merge(total, own)
            self.take_sums(start, stop, total)

    def take_sums(self, start: int, stop: int, total: Partial) -> None:
        """Add the gradients of the keys start .. stop, given the sums of the queries that have read their landmarks."""
        if stop <= start:
            return
        xp, part = self.xp, slice(start, stop)
        owner, values, e = self.made.own[..., part], self.made.values[..., part, :], self.dv.shape[-1]
        weight = xp.exp(self.logs[..., part, :] + of_owner(total.ref, owner))
        of_value = weight * of_owner(total.num, owner)
        self.dv[..., part, :] += of_value[..., :e]
        self.dlogs[..., part, :] += row_sums(of_value[..., :e] * values) - of_value[..., e:]


def _gathered(logs: Array, rows: Array, total: Partial | None) -> Partial:
    """`gather` of rows for each landmark, (*b, s, m) and (*b, s, .); the reference of a sum without rows is -inf."""
    xp = namespace_of(logs)
    if logs.shape[-2] == 0:
        m = logs.shape[-1]
        none = xp.zeros((*logs.shape[:-2], m, 1), dtype=logs.dtype, **on_device_of(logs))
        num = xp.zeros((*logs.shape[:-2], m, rows.shape[-1]), dtype=logs.dtype, **on_device_of(logs))
        return Partial(num, none, none - xp.inf)
    return gather(logs, rows, total)


def _softmax(logits: Array) -> tuple[Array, Array]:
    """The weights of each row, and the logarithm of its sum; zeros and -inf where a row sees nothing."""
    xp = namespace_of(logits)
    top = xp.max(logits, axis=-1, keepdims=True)
    none = top == -xp.inf
    p = xp.exp(logits - xp.where(none, 0.0, top))
    total = row_sums(p)
    safe = xp.where(none, 1.0, total)
    return p / safe, xp.where(none, -xp.inf, top + xp.log(safe))


def _over_group(x: Array) -> Array:
    return namespace_of(x).sum(x, axis=-3)
