"""The kernel of `landmark_stream`: a head's whole stream, with its compressions, in one task.

The moments of a head and its metric are in float64, whatever the dtype of the kernel; float64 parts of the workspace
are given by the places of items of that dtype.
"""

from collections import namedtuple
from typing import NamedTuple

import numpy as np

from favorsharp_numba.kernels.arguments import NO_MASK, ONE, Mask, Points, Sizes, is_hidden
from favorsharp_numba.kernels.landmark_compression import compress_keys, compression_space
from favorsharp_numba.kernels.landmark_metric import metric_space, pack_metric, solve_metric
from favorsharp_numba.kernels.landmarks import ROOT
from favorsharp_numba.kernels.point_moments import (
    MomentSizes,
    add_shifted,
    merge_moments,
    moment_space,
    shift_by_tile,
    sums_length,
)
from favorsharp_numba.kernels.tiles import is_finite, load_points, rest_of_tile, store_points
from favorsharp_numba.kernels.weighted_attention import first_visible, load_weighted, read_range, weighted_space
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.arrays import FLOAT32, FLOAT64
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.items import get, integer_at, item_size, lanes, put
from favorsharp_numba.vectors.rows import combine, copy, fill

SEGMENT = 4
"""The integers of a segment in a plan: its first key, the one behind its last key, whether the keys held before it are
compressed, and which noise is taken for that. A plan is the integer 0 and then its segments."""


class Stream(NamedTuple):
    """The sizes of a call. A head has `group` heads of queries, and holds `first` keys before the call.

    `held` is the largest number of keys that are held at once. `keep` of those held stay exact in a compression. Sizes
    that end in _pad are rounded up to whole vectors, `d_wide` is d in whole vectors of float64, and `wide` is the
    number of items in 8 bytes. The packed constants of a metric are those of `Landmarks` without
    `matrix`. Those for reading have `read_total` items, with zeros from `read_zeros` on.
    """

    d: int
    d_pad: int
    d_wide: int
    m: int
    m_pad: int
    e: int
    e_pad: int
    wide: int
    group: int
    first: int
    held: int
    held_pad: int
    slots: int
    keep: int
    steps: int
    center: int
    direction: int
    lift: int
    zeros: int
    total: int
    read_zeros: int
    read_total: int


class Values(NamedTuple):
    """Numbers of a call: the scale of the kernel, tilt and ridge of the metric, and the `grain` of `compress_keys`."""

    scale: float
    tilt: float
    ridge: float
    grain: float


@inlined
def reading(s, held, held_pad):
    """The sizes with which queries read keys that are held."""
    zeros = s.read_zeros
    return Sizes(
        s.d, s.d_pad, held, held_pad, s.e, s.e_pad, held_pad, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros,
        zeros, zeros, 0, 0, s.read_total,
    )  # fmt: skip


@inlined
def moment_sizes(s):
    """The sizes of moments."""
    return MomentSizes(0, s.d, s.d_wide, 1)


StreamSpace = namedtuple("StreamSpace", "side rows weight values ones unit added metric moments compression reads end")


@inlined
def stream_space(s, side):
    """The parts of the workspace of `stream`. The parts from `unit` to `moments` are in float64."""
    rows = side + s.total
    weight = rows + s.held * s.d_pad
    values = weight + s.held_pad
    ones = values + s.held * s.e_pad
    unit = ones + s.held_pad
    added = unit + s.wide * 2 * s.d_wide
    metric = added + s.wide * sums_length(moment_sizes(s))
    moments = metric + s.wide * metric_space(s.d, s.d_wide, 0).end
    compression = moments + s.wide * moment_space(moment_sizes(s), 0).end
    reads = compression_space(s, compression).end
    end = weighted_space(reading(s, s.held, s.held_pad), reads).end
    return StreamSpace(side, rows, weight, values, ones, unit, added, metric, moments, compression, reads, end)


@inlined
def wide_place(one, place):
    """The place of float64 items at a place."""
    return place * item_size(one) // 8


@inlined
def points_from(points, number, start, nothing):
    """The points of one entry of a batch, from a position on, as entry 0; `nothing` is the address of a 0."""
    base = points.base + integer_at(points.offsets + 8 * number) + start * points.row
    return Points(points.kind, base, nothing, points.row, points.column, points.item)


@inlined
def points_of(one, rows, pad, nothing):
    """Rows of the workspace as points."""
    item = item_size(one)
    return Points(FLOAT32 if item == 4 else FLOAT64, rows * item, nothing, pad * item, item, item)


@kernel(stream_space)
def stream(
    one, s, x, side, plan, count, noise, q, k, v, mask, keys, weight, values, moments, out, new_keys, new_weight,
    new_values, low, high, scratch,
):  # fmt: skip
    """The streams of heads low .. high: `count` segments of a plan at the address `plan`.

    `moments` is the place of the moments of each head, queries before keys. `side` is the place of the constants for
    reading, and `noise` that of float64 numbers for each compression, as `draw` takes them.
    """
    w = stream_space(s, scratch)
    length, number = sums_length(moment_sizes(s)), s.d + 2 * s.slots
    begin(one, s, x, w)
    for head in range(low, high):
        held, totals = s.first, moments + 2 * length * head
        load_held(one, s, keys, values, head, 0, 0, held, w)
        zeros = w.side + s.zeros
        load_points(one, weight, NO_MASK, head, 0, held, 1, 1, w.side + ONE, zeros, w.weight)
        for i in range(count):
            line = plan + 8 * (1 + SEGMENT * i)
            start, stop = integer_at(line), integer_at(line + 8)
            if integer_at(line + 16) != 0:
                held = compress(one, s, x, plan, held, noise + number * integer_at(line + 24), totals, w)
            load_held(one, s, k, v, head, start, held, stop - start, w)
            for t in range(start, stop):
                weight_of = -np.inf * one if is_hidden(mask, head, t) else one - one
                put(one, w.weight + held + t - start, weight_of)
            add_moments(one, s, q, k, mask, head, start, stop, plan, totals, w)
            read(one, s, side, q, out, head, start, stop, held, plan, w)
            held += stop - start
        store_points(one, new_keys, head, 0, held, s.d, s.d_pad, w.ones, w.rows)
        store_points(one, new_weight, head, 0, held, 1, 1, w.ones, w.weight)
        store_points(one, new_values, head, 0, held, s.e, s.e_pad, w.ones, w.values)


@outlined
def begin(one, s, x, w):
    """The parts of the workspace that are the same for all heads."""
    fill(one, w.side, s.total, one - one)
    put(one, w.side + ROOT, one * np.sqrt(x.scale))
    put(one, w.side + ONE, one)
    fill(1.0, wide_place(one, w.unit), 2 * s.d_wide, 0.0)
    put(1.0, wide_place(one, w.unit), 1.0)
    fill(one, w.ones, s.held_pad, one)


@inlined
def load_held(one, s, keys, values, head, start, held, count, w):
    """Load keys and values behind those that are held."""
    factor, zeros = w.side + ONE, w.side + s.zeros
    load_points(one, keys, NO_MASK, head, start, count, s.d, s.d_pad, factor, zeros, w.rows + held * s.d_pad)
    load_points(one, values, NO_MASK, head, start, count, s.e, s.e_pad, factor, zeros, w.values + held * s.e_pad)


@outlined
def compress(one, s, x, nothing, held, noise, moments, w):
    """Replace the keys that are held, except for the last `keep`, by m landmarks; return how many are held then."""
    n, metric = held - s.keep, metric_space(s.d, s.d_wide, wide_place(one, w.metric))
    keys = moments + sums_length(moment_sizes(s))
    solve_metric(1.0, s.d, s.d_wide, moments, keys, x.scale, x.tilt, x.ridge, metric)
    pack_metric(one, s, s.d_wide, metric, w.side)
    space, points = compression_space(s, w.compression), points_of(one, w.rows, s.d_pad, nothing)
    lists = wide_place(one, space.lists)
    compress_keys(one, s, n, one * x.grain, noise, lists, w.side, points, w.rows, w.weight, w.values, space)
    replace_keys(one, s, n, space, w)
    return s.m + s.keep


@inlined
def replace_keys(one, s, n, found, w):
    """The landmarks take the places of the first n keys; the others move up to them."""
    share = one / get(one, w.side + ROOT)
    for c in range(s.m):
        row, line = found.landmarks + c * 2 * s.d_pad, w.rows + c * s.d_pad
        combine(one, s.d_pad, one - one, share, row, share, w.side + s.center, line)
    copy(one, found.weights, s.m, w.weight)
    copy(one, found.means, s.m * s.e_pad, w.values)
    for t in range(s.keep):
        source, target = n + t, s.m + t
        copy(one, w.rows + source * s.d_pad, s.d_pad, w.rows + target * s.d_pad)
        copy(one, w.values + source * s.e_pad, s.e_pad, w.values + target * s.e_pad)
        put(one, w.weight + target, get(one, w.weight + source))


@outlined
def add_moments(one, s, q, k, mask, head, start, stop, nothing, totals, w):
    """Add queries and keys start .. stop of a head to its moments."""
    t, unit, added = moment_sizes(s), wide_place(one, w.unit), wide_place(one, w.added)
    space, length = moment_space(t, wide_place(one, w.moments)), sums_length(t)
    seen = mask
    if mask.offsets != 0:
        seen = Mask(mask.base + integer_at(mask.offsets + 8 * head), nothing, mask.step)
    for g in range(s.group + 1 if stop > start else 0):
        of_keys = g == s.group
        points = points_from(k, head, 0, nothing) if of_keys else points_from(q, head * s.group + g, 0, nothing)
        own = totals + length if of_keys else totals
        fill(1.0, added, length, 0.0)
        if get(1.0, own) > 0:
            copy(1.0, own + t.d_pad, t.d_pad, space.shift)
        else:
            shift_by_tile(1.0, t, points, seen, 0, start, stop, unit, space)
        add_shifted(1.0, t, points, seen, 0, start, stop, unit, added, space)
        merge_moments(1.0, t, own, added, space)


@outlined
def read(one, s, side, q, out, head, start, stop, before, nothing, w):
    """Queries start .. stop of a head read the keys that are held, of which `before` come before theirs."""
    held = before + stop - start
    t = reading(s, held, rest_of_tile(held, lanes(one)))
    space, keys = weighted_space(t, w.reads), points_of(one, w.rows, s.d_pad, nothing)
    weight, values = points_of(one, w.weight, 1, nothing), points_of(one, w.values, s.e_pad, nothing)
    load_weighted(one, t, side, keys, weight, values, 0, space)
    visible = first_visible(one, t, space)
    finite = is_finite(one, side, space.values, t.e_pad, held, t.e_pad, space.numerator)
    for g in range(s.group):
        queries = points_from(q, head * s.group + g, start, nothing)
        target = points_from(out, head * s.group + g, start, nothing)
        read_range(one, t, side, queries, 0, 0, stop - start, before, visible, finite, target, space)
