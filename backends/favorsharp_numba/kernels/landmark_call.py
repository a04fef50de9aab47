"""The kernel of `landmark_keys`: all keys of a head become landmarks in one task, from the moments to the mean values.

The moments of a head and its metric are in float64, whatever the dtype of the kernel, as in `landmark_stream`.
"""

from collections import namedtuple
from typing import NamedTuple

import numpy as np

from favorsharp_numba.kernels.arguments import NO_MASK, ONE, Mask
from favorsharp_numba.kernels.landmark_metric import metric_space, pack_metric, solve_metric
from favorsharp_numba.kernels.landmark_seeds import LISTS, draw_head, seed_space
from favorsharp_numba.kernels.landmark_stream import points_from, wide_place
from favorsharp_numba.kernels.landmarks import (
    ROOT,
    Landmarks,
    gather_range,
    landmark_space,
    settle,
    sums_at,
    sums_size,
)
from favorsharp_numba.kernels.point_moments import (
    MomentSizes,
    add_range,
    merge_moments,
    moment_space,
    sums_length,
)
from favorsharp_numba.kernels.tiles import store_points
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.arrays import FLOAT64, load_rows
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.items import get, integer_at, panel, put
from favorsharp_numba.vectors.products import product
from favorsharp_numba.vectors.rows import combine, fill


class Call(NamedTuple):
    """The sizes of a call: those with which landmarks are chosen, and those with which they are condensed.

    A head of keys has `group` heads of `queries` queries, which have its mask if `masked`. `n_pad` is the number of
    keys, rounded up to whole vectors, `d_wide` is d in whole vectors of float64, and `wide` the number of items in 8
    bytes.
    """

    choosing: Landmarks
    condensing: Landmarks
    steps: int
    group: int
    queries: int
    masked: int
    n_pad: int
    d_wide: int
    wide: int


CallSpace = namedtuple(
    "CallSpace", "side points used logs ones means masses sums unit totals added metric moments lists parts end"
)


@inlined
def moment_sizes(s):
    """The sizes of moments."""
    return MomentSizes(0, s.choosing.d, s.d_wide, 1)


@inlined
def call_space(s, side):
    """The parts of the workspace of `compress_call`. Those from `unit` to `lists` are in float64."""
    t, length = s.choosing, sums_length(moment_sizes(s))
    points = side + t.total
    used = points + t.m * t.d_pad
    logs = used + t.m_pad
    ones = logs + s.n_pad
    means = ones + t.m_pad
    masses = means + t.m * s.condensing.width
    sums = masses + t.m_pad
    unit = sums + max(sums_size(t), sums_size(s.condensing))
    totals = unit + s.wide * 2 * s.d_wide
    added = totals + s.wide * 2 * length
    metric = added + s.wide * length
    moments = metric + s.wide * metric_space(t.d, s.d_wide, 0).end
    lists = moments + s.wide * moment_space(moment_sizes(s), 0).end
    parts = lists + s.wide * LISTS * s.n_pad
    end = max(seed_space(t, parts).end, landmark_space(t, parts).end, landmark_space(s.condensing, parts).end)
    return CallSpace(
        side, points, used, logs, ones, means, masses, sums, unit, totals, added, metric, moments, lists, parts, end
    )  # fmt: skip


@kernel(call_space)
def compress_call(
    one, s, x, q, k, weight, v, mask, nothing, noise, new_keys, new_weight, new_values, low, high, scratch
):  # fmt: skip
    """The landmarks of heads low .. high: their keys, not scaled, their log weights and their mean values.

    `nothing` is the address of an integer 0, and `noise` the place of float64 numbers, as `draw` takes them.
    """
    w, t = call_space(s, scratch), s.choosing
    begin_call(one, s, x, w)
    for head in range(low, high):
        solve_metric_of(one, s, x, q, k, mask, head, nothing, w)
        choose(one, s, x, k, weight, head, noise, w)
        sums = sums_at(s.condensing, w.sums, 0)
        space = landmark_space(s.condensing, w.parts)
        fill(one, w.means, t.m * s.condensing.width, one - one)  # a landmark without keys has values of 0
        gather_range(
            one, s.condensing, w.side, w.points, w.used, k, weight, v, head, 0, t.n, sums, w.logs, False, space
        )  # fmt: skip
        settle(one, s.condensing, sums, w.means, w.masses)
        share = one / get(one, w.side + ROOT)
        for c in range(t.m):
            row = w.points + c * t.d_pad
            combine(one, t.d_pad, one - one, share, row, share, w.side + t.center, row)
        store_points(one, new_keys, head, 0, t.m, t.d, t.d_pad, w.ones, w.points)
        store_points(one, new_weight, head, 0, t.m, 1, 1, w.ones, w.masses)
        store_points(one, new_values, head, 0, t.m, s.condensing.e, s.condensing.width, w.ones, w.means)


@outlined
def begin_call(one, s, x, w):
    """The parts of the workspace that are the same for all heads."""
    fill(one, w.side, s.choosing.total, one - one)
    put(one, w.side + ROOT, one * np.sqrt(x.scale))
    put(one, w.side + ONE, one)
    fill(1.0, wide_place(one, w.unit), 2 * s.d_wide, 0.0)
    put(1.0, wide_place(one, w.unit), 1.0)
    fill(one, w.ones, s.choosing.m_pad, one)


@outlined
def solve_metric_of(one, s, x, q, k, mask, head, nothing, w):
    """Write the metric for the queries and keys of a head to the packed constants."""
    t, totals = moment_sizes(s), wide_place(one, w.totals)
    length, own = sums_length(t), mask
    fill(1.0, totals, 2 * length, 0.0)
    if mask.offsets != 0:
        own = Mask(mask.base + integer_at(mask.offsets + 8 * head), nothing, mask.step)
    for g in range(s.group):
        seen = own if s.masked else NO_MASK
        add_moments_of(one, s, points_from(q, head * s.group + g, 0, nothing), seen, s.queries, totals, w)
    add_moments_of(one, s, points_from(k, head, 0, nothing), own, s.choosing.n, totals + length, w)
    metric = metric_space(t.d, s.d_wide, wide_place(one, w.metric))
    solve_metric(1.0, t.d, s.d_wide, totals, totals + length, x.scale, x.tilt, x.ridge, metric)
    pack_metric(one, s.choosing, s.d_wide, metric, w.side)
    pack_square(one, s, metric, w)


@outlined
def add_moments_of(one, s, points, mask, count, totals, w):
    """Add the moments of the first entry of points to those at the place `totals`."""
    t, unit, added = moment_sizes(s), wide_place(one, w.unit), wide_place(one, w.added)
    space = moment_space(t, wide_place(one, w.moments))
    fill(1.0, added, sums_length(t), 0.0)
    add_range(1.0, t, points, mask, 0, 0, count, unit, added, space)
    merge_moments(1.0, t, totals, added, space)


@inlined
def pack_square(one, s, metric, w):
    """Write L L^T to the packed constants; `solve_metric` leaves L^T in `inner`."""
    t, pad, wide, width = s.choosing, s.d_wide, panel(1.0), panel(one)
    product(1.0, t.d, pad, t.d, metric.lift, pad, 1, metric.inner, wide, pad, metric.work, pad)
    for j in range(0, t.d, width):
        n, place = min(width, t.d - j), w.side + t.matrix + j * t.d
        load_rows(one, FLOAT64, 8 * (metric.work + j), 8 * pad, t.d, n, width, w.side + ONE, w.side + t.zeros, place)


@outlined
def choose(one, s, x, k, weight, head, noise, w):
    """The landmarks of a head: seeds, then Lloyd steps."""
    t = s.choosing
    lists, seeds = wide_place(one, w.lists), seed_space(t, w.parts)
    draw_head(one, t, k, weight, w.side, head, noise, lists, one * x.grain, w.points, w.used, seeds)
    sums, space = sums_at(t, w.sums, 0), landmark_space(t, w.parts)
    for step in range(s.steps):
        gather_range(
            one, t, w.side, w.points, w.used, k, weight, k, head, 0, t.n, sums, w.logs, step > 0, space
        )  # fmt: skip
        settle(one, t, sums, w.points, w.masses)
