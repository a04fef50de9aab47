"""The sums over keys that queries read, and what is done with them. All attention kernels call these functions.

For every feature, kv holds the sum of feature times value over the keys, and z the sum of the features. Both are
relative to 2**top, where top is the largest log feature so far (to base 2), so that no feature is larger than 1. When a
top rises, the sums are divided by the rise. Sums have *low parts*: what rounding took off them so far
(docs/design/low-parts.md).
"""

from collections import namedtuple
from typing import NamedTuple

import numpy as np

from favorsharp_numba.kernels.arguments import TILE, ZERO
from favorsharp_numba.kernels.tiles import (
    ahead_of,
    load_keys,
    log_keys,
    rest_of_tile,
    transpose,
    usable_values,
    values_at,
)
from favorsharp_numba.vectors.blocks import exp_block, max_block, scale_block
from favorsharp_numba.vectors.compiling import inlined
from favorsharp_numba.vectors.items import get, lanes, panel, put
from favorsharp_numba.vectors.products import product_add_ahead, product_ahead, product_take
from favorsharp_numba.vectors.rows import fill, scale_rows, take_row
from favorsharp_numba.vectors.tops import compare_tops, take_tops

PART = 8
"""The number of tiles of keys that are added up by themselves before the sums take them with their low parts, which
cost as much as the sums."""


class Sums(NamedTuple):
    """The places of the sums of a key head: kv, z (m_pad) and top (m_pad), and the low parts of kv and of z.

    kv is (m, e_pad), or transposed (e, m_pad).
    """

    kv: int
    z: int
    top: int
    lows: int
    z_lows: int


@inlined
def sums_at(s, p, number, lows):
    """The sums with a number, and their low parts at the place `lows`."""
    kv = p.sums + number * p.sums_size
    z = kv + p.kv_size
    return Sums(kv, z, z + s.m_pad, lows, lows + p.kv_size)


@inlined
def sums_with_lows(one, s, p, number, room):
    """The sums with a number, and their low parts: those of a state, or zeros in `room` (`lows_size` items)."""
    lows = room
    if p.lows != 0:
        lows = p.lows + number * (p.kv_size + s.m_pad)
    else:
        fill(one, lows, p.kv_size + s.m_pad, one - one)
    return sums_at(s, p, number, lows)


@inlined
def lows_size(s):
    """The number of items of kv and z, or of their low parts, whether kv is transposed or not."""
    return max(s.m * s.e_pad, s.e * s.m_pad) + s.m_pad


@inlined
def empty_sums(one, s, p, sums):
    """Make the sums those of no keys."""
    fill(one, sums.kv, p.kv_size, one - one)
    fill(one, sums.z, s.m_pad, one - one)
    fill(one, sums.lows, p.kv_size, one - one)
    fill(one, sums.z_lows, s.m_pad, one - one)
    fill(one, sums.top, s.m_pad, -np.inf * one)


@inlined
def has_seen(one, s, top):
    """Whether the sums of this top contain any key."""
    largest = -np.inf
    for j in range(s.m):
        largest = max(largest, get(one, top + j))
    return largest > -np.inf


# Rising tops ---------------------------------------------------------------------------------------------------------


@inlined
def raise_top(one, s, side, features, step, count, top, new_top, safe):
    """new_top = the largest log feature of the sums and of a tile; safe = the same with 0 for -inf.

    Return the largest rise: positive if any top rises, even from -inf.
    """
    max_block(one, features, step, count, s.m_pad, side + ZERO, 0, top, new_top)
    return compare_tops(one, s.m_pad, top, new_top, safe)


@inlined
def rescale(one, s, sums, new_top, transposed, factors, ones):
    """Divide the sums by the rise of the top, and take the new top. `factors` receives what the sums were multiplied
    by.
    """
    take_tops(one, s.m_pad, sums.top, new_top, factors)
    scale_sums(one, s, sums.kv, sums.z, transposed, factors, ones)
    scale_sums(one, s, sums.lows, sums.z_lows, transposed, factors, ones)


@inlined
def scale_sums(one, s, kv, z, transposed, factors, ones):
    """Multiply kv and z by a factor for each feature."""
    scale_block(one, z, s.m_pad, 1, s.m_pad, ones, factors, z, s.m_pad)
    if transposed:
        scale_block(one, kv, s.m_pad, s.e, s.m_pad, ones, factors, kv, s.m_pad)
    else:
        scale_rows(one, kv, s.e_pad, s.m, s.e_pad, factors)


@inlined
def undo_rise(one, s, sums, scales, ones):
    """Undo a `rescale` that multiplied by `scales`. kv is not transposed."""
    for j in range(s.m_pad):
        factor = get(one, scales + j)
        if factor > 0 and factor < 1:
            put(one, sums.top + j, get(one, sums.top + j) + np.log2(factor))
        elif factor == 0:
            put(one, sums.top + j, -np.inf * one)
            factor = one
        put(one, scales + j, one / factor)
    scale_sums(one, s, sums.kv, sums.z, 0, scales, ones)
    scale_sums(one, s, sums.lows, sums.z_lows, 0, scales, ones)


# Sums take keys ------------------------------------------------------------------------------------------------------

TakeSpace = namedtuple("TakeSpace", "new_top safe scales ones end")


@inlined
def take_space(s, new_top):
    """The parts of the workspace of `take_keys`. Its caller fills `ones` with ones."""
    safe = new_top + s.m_pad
    scales = safe + s.m_pad
    ones = scales + s.m_pad
    end = ones + max(s.m_pad, s.e_pad)
    return TakeSpace(new_top, safe, scales, ones, end)


@inlined
def take_keys(one, s, side, features, step, values, v_step, count, sums, transposed, w, ahead):
    """Add keys to the sums. Their log features are replaced by features; `w` is a `TakeSpace`."""
    if raise_top(one, s, side, features, step, count, sums.top, w.new_top, w.safe) > 0:
        rescale(one, s, sums, w.new_top, transposed, w.scales, w.ones)
    new_z = w.scales
    fill(one, new_z, s.m_pad, one - one)
    exp_block(one, features, step, count, s.m_pad, side + ZERO, 0, w.safe, w.ones, 0, new_z)
    take_row(one, s.m_pad, new_z, sums.z, sums.z_lows)
    add_keys(one, s, features, step, values, v_step, count, sums, transposed, ahead)


@inlined
def add_keys(one, s, features, step, values, v_step, count, sums, transposed, ahead):
    """Add features times values, rows `v_step` items apart, to kv.

    The product of the tile is computed by itself, and then kv takes it with its low parts: errors do not grow with the
    number of keys.
    """
    width = panel(one)
    if transposed:
        product_take(
            one, s.e, s.m_pad, count, values, 1, v_step, features, width, step, sums.kv, s.m_pad, sums.lows, ahead
        )  # fmt: skip
    else:
        product_take(
            one, s.m, s.e_pad, count, features, 1, step, values, width, v_step, sums.kv, s.e_pad, sums.lows, ahead
        )  # fmt: skip


AbsorbSpace = namedtuple("AbsorbSpace", "points dense factors loaded features taking part end")


@inlined
def absorb_space(s, points):
    """The parts of the workspace of `absorb`: `taking` is a `TakeSpace`, and `part` has kv and z of some tiles."""
    dense = points + TILE * s.d_pad
    factors = dense + TILE * s.d_pad
    loaded = factors + 2 * TILE
    features = loaded + TILE * s.e_pad
    taking = take_space(s, features + TILE * s.feature_step)
    part = taking.end
    end = part + lows_size(s)
    return AbsorbSpace(points, dense, factors, loaded, features, taking, part, end)


@inlined
def absorb(one, s, side, k, v, mask, b, start, stop, sums, transposed, w):
    """Add the keys start .. stop to the sums. `w` is an `AbsorbSpace`."""
    taking = w.taking
    size = sums.z - sums.kv
    part, part_z, step = w.part, w.part + size, s.feature_step
    fill(one, taking.ones, max(s.m_pad, s.e_pad), one)
    fill(one, part_z, s.m_pad, one - one)
    usable = usable_values(one, s, v, mask, transposed)
    v_step = v.row // v.item if usable else s.e_pad
    width, held = panel(one), 0
    for first in range(start, stop, TILE):
        count = min(TILE, stop - first)
        if load_keys(one, s, side, k, mask, b, first, count, w.points, w.dense, w.factors):
            values = values_at(one, s, side, v, mask, b, first, count, usable, w.loaded)
            after = min(stop, first + count + TILE)
            next_values = ahead_of(v, b, first + count, after, s.e)
            log_keys(one, s, side, w.points, count, w.factors, w.features, step, next_values)
            next_keys = ahead_of(k, b, first + count, after, s.d)
            if raise_top(one, s, side, w.features, step, count, sums.top, taking.new_top, taking.safe) > 0:
                rescale(one, s, sums, taking.new_top, transposed, taking.scales, taking.ones)
                if held > 0:
                    scale_sums(one, s, part, part_z, transposed, taking.scales, taking.ones)
            exp_block(one, w.features, step, count, s.m_pad, side + ZERO, 0, taking.safe, taking.ones, 0, part_z)
            if held == 0:
                fill(one, part, size, one - one)
            if transposed:
                product_add_ahead(
                    one, s.e, s.m_pad, count, values, 1, v_step, w.features, width, step, part, s.m_pad, next_keys
                )  # fmt: skip
            else:
                product_add_ahead(
                    one, s.m, s.e_pad, count, w.features, 1, step, values, width, v_step, part, s.e_pad, next_keys
                )  # fmt: skip
            held += 1
            if held == PART:
                take_part(one, s, size, part, sums)
                held = 0
    if held > 0:
        take_part(one, s, size, part, sums)


@inlined
def take_part(one, s, size, part, sums):
    """Add the kv and z of some tiles to the sums, and set that z to zero."""
    take_row(one, size, part, sums.kv, sums.lows)
    take_row(one, s.m_pad, part + size, sums.z, sums.z_lows)
    fill(one, part + size, s.m_pad, one - one)


# Queries read sums ---------------------------------------------------------------------------------------------------


@inlined
def weigh(one, s, side, features, count, top, z, reference, safe, total):
    """Turn the log features of queries into weights relative to 2**reference; total = their sum over the keys of z.

    `safe` receives the references with 0 for -inf.
    """
    n = rest_of_tile(count, lanes(one))
    fill(one, reference, n, -np.inf * one)
    fill(one, total, n, one - one)
    max_block(one, features, TILE, s.m, n, top, 1, reference, reference)
    compare_tops(one, n, reference, reference, safe)
    exp_block(one, features, TILE, s.m, n, top, 1, safe, z, 1, total)


@inlined
def read_sums(one, s, weights, count, kv, transposed, numerator, room, ahead):
    """numerator (tile, e_pad) = weights times kv. `room` has e tiles if kv is transposed; it is not used otherwise."""
    width = panel(one)
    if transposed:
        n = rest_of_tile(count, lanes(one))
        product_ahead(one, s.e, n, s.m, kv, s.m_pad, 1, weights, width, TILE, room, TILE, ahead)
        transpose(one, room, TILE, s.e, count, numerator, s.e_pad, s.e_pad)
    else:
        product_ahead(one, count, s.e_pad, s.m, weights, 1, TILE, kv, width, s.e_pad, numerator, s.e_pad, ahead)


@inlined
def keep_stats(one, p, head, start, count, inverse, reference):
    """Store 1 / total and the reference of a tile of queries for the backward pass, if `stats` has a place for them."""
    if p.stats:
        line = p.stats + 2 * (head * p.num_queries + start)
        for t in range(count):
            top = get(one, reference + t)
            put(one, line + 2 * t, get(one, inverse + t))
            put(one, line + 2 * t + 1, top if top != -np.inf else one - one)
