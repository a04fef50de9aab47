"""The kernel of bidirectional attention with a window of at least half a tile: every query reads the far keys once.

`windowed_attention.py` has the kernel for shorter windows and for causal attention, and what both kernels do. There,
queries read the far keys before them and those after them in two passes. Here the sums of each block of keys are
computed once and kept, and the sums before a block and those after it are merged before its queries read them
(docs/design/sums-of-blocks-kept.md). Nothing is subtracted.
"""

from collections import namedtuple
from typing import Any

import numpy as np

from favorsharp_numba.kernels.arguments import TILE, ZERO
from favorsharp_numba.kernels.sums import (
    Sums,
    empty_sums,
    lows_size,
    raise_top,
    scale_sums,
    take_keys,
)
from favorsharp_numba.kernels.tiles import ahead_of, load_keys, log_keys, usable_values, values_at
from favorsharp_numba.kernels.window_rule import far_after, far_before
from favorsharp_numba.kernels.windowed_attention import (
    SLOTS,
    Tile,
    Values,
    cut_of,
    head_of,
    load_slot,
    read_far,
    read_near_tiles,
    slot_at,
    store_slot,
    tile_bounds,
    window_space,
)
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import exp_block, max_block, scale_block
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.items import integer_at, panel
from favorsharp_numba.vectors.products import product_ahead
from favorsharp_numba.vectors.rows import add_rows, compare_tops, copy, fill, take_row, take_tops

GROUP = 8
"""The number of blocks whose sums of the blocks before them are in the workspace at once."""

TwoSidedSpace = namedtuple("TwoSidedSpace", "window running room lows before after end")


@inlined
def two_sided_space(s, place):
    """The parts of the workspace of `two_sided`. `window` is a `WindowSpace`.

    `running` and `after` have the sums of the blocks so far, and their low parts. `room` has sums that are being added,
    and `lows` the low parts of a block. `before` has the sums that each of GROUP blocks reads. Behind the end lie the
    sums of all blocks, and the sums before each group of blocks (`kept_sums`).
    """
    window = window_space(s, place)
    size = sums_size(s)
    running = window.end
    room = running + 2 * size
    lows = room + size
    before = lows + lows_size(s)
    after = before + GROUP * size
    end = after + 2 * size
    return TwoSidedSpace(window, running, room, lows, before, after, end)


@inlined
def sums_size(s):
    """The number of items of kv, z and top, without low parts."""
    return s.m * s.e_pad + 2 * s.m_pad


def kept_sums(s: Any, num_keys: int, window: int) -> int:
    """The number of items that `two_sided` needs behind its workspace."""
    blocks = -(-num_keys // window)
    return int((blocks + blocks // GROUP + 2) * (s.m * s.e_pad + 2 * s.m_pad))


@inlined
def kept_at(s, place, lows):
    """The sums at a place, and their low parts at the place `lows`."""
    z = place + s.m * s.e_pad
    return Sums(place, z, z + s.m_pad, lows, lows + s.m * s.e_pad)


@kernel(two_sided_space)
def two_sided(one, s, p, q, k, v, mask, out, low, high, scratch):
    """Bidirectional attention with a window of at least half a tile, for key heads low .. high."""
    w = two_sided_space(s, scratch)
    fill(one, w.window.taking.ones, max(s.m_pad, s.e_pad), one)
    usable = usable_values(one, s, v, mask, False)
    values = Values(usable, v.row // v.item if usable else s.e_pad)
    size = sums_size(s)
    for number in range(low, high):
        head, cut = head_of(s, p, number), cut_of(one, p, False)
        groups = w.end + cut.blocks * size
        sum_blocks(one, s, p, cut, head, k, v, mask, values, groups, w)
        fill(one, w.window.kept, SLOTS, -one)
        after = kept_at(s, w.after, w.after + size)
        empty_sums(one, s, p, after)
        for step in range(cut.blocks):
            block = cut.blocks - 1 - step
            if step == 0 or block % GROUP == GROUP - 1:
                sum_before(one, s, p, head, block // GROUP * GROUP, block, groups, w)
            if far_after(block) < cut.blocks:
                other = kept_at(s, w.end + far_after(block) * size, w.room)
                add_sums(one, s, head.keys, after, other, True, w.room, w.window.taking)
            far = kept_at(s, w.before + block % GROUP * size, w.room)
            add_sums(one, s, head.keys, far, after, False, w.room, w.window.taking)
            read_block(one, s, p, cut, head, far, block, q, k, v, mask, values, out, w.window)


@outlined
def sum_blocks(one, s, p, cut, head, k, v, mask, values, groups, w):
    """Compute the sums of each block of keys, and those of the blocks before each group."""
    running, size = kept_at(s, w.running, w.running + sums_size(s)), sums_size(s)
    empty_sums(one, s, p, running)
    copy(one, running.kv, size, groups)
    for block in range(cut.blocks):
        own = kept_at(s, w.end + block * size, w.lows)  # the low parts of a block are not kept
        first = block * cut.pieces
        for tile in range(first, min(cut.tiles, first + cut.pieces)):
            take_tile(one, s, p, cut, head, own, tile, tile == first, k, v, mask, values, w.window)
        add_sums(one, s, head.keys, running, own, True, w.room, w.window.taking)
        if (block + 2) % GROUP == 0:
            copy(one, running.kv, size, groups + (block + 2) // GROUP * size)


@inlined
def take_tile(one, s, p, cut, head, sums, tile, is_first, k, v, mask, values, w):
    """Add a tile of keys to sums; the first one makes them. `w` is a `WindowSpace`."""
    start, stop = tile_bounds(p, cut, tile)
    count, factors = stop - start, w.stores.factors
    if load_keys(one, s, head.keys, k, mask, head.number, start, count, w.points, w.dense, factors):
        rows = values_at(one, s, head.keys, v, mask, head.number, start, count, values.usable, w.loaded)
        after = min(p.num_keys, stop + TILE)
        next_keys, next_values = ahead_of(k, head.number, stop, after, s.d), ahead_of(v, head.number, stop, after, s.e)
        log_keys(one, s, head.keys, w.points, count, factors, w.features, s.feature_step, next_keys)
        if is_first:
            set_sums(one, s, head.keys, w.features, rows, values.step, count, sums, w.taking, next_values)
            fill(one, sums.lows, lows_size(s) if cut.pieces > 1 else 0, one - one)
        else:
            take_keys(
                one, s, head.keys, w.features, s.feature_step, rows, values.step, count, sums, 0, w.taking, next_values
            )  # fmt: skip
    elif is_first:
        empty_sums(one, s, p, sums)


@inlined
def set_sums(one, s, side, features, values, v_step, count, sums, w, ahead):
    """Make the sums those of a tile of keys, but for their low parts. Log features are replaced by features.

    `w` is a `TakeSpace`.
    """
    fill(one, sums.top, s.m_pad, -np.inf * one)
    max_block(one, features, s.feature_step, count, s.m_pad, side + ZERO, 0, sums.top, sums.top)
    compare_tops(one, s.m_pad, sums.top, sums.top, w.safe)
    fill(one, sums.z, s.m_pad, one - one)
    exp_block(one, features, s.feature_step, count, s.m_pad, side + ZERO, 0, w.safe, w.ones, 0, sums.z)
    product_ahead(
        one, s.m, s.e_pad, count, features, 1, s.feature_step, values, panel(one), v_step, sums.kv, s.e_pad, ahead
    )  # fmt: skip


@outlined
def add_sums(one, s, side, sums, other, low_parts, room, w):
    """Add the sums of other keys to sums, which have low parts or have none. `w` is a `TakeSpace`."""
    if raise_top(one, s, side, other.top, s.m_pad, 1, sums.top, w.new_top, w.safe) > 0:
        take_tops(one, s.m_pad, sums.top, w.new_top, w.scales)
        scale_sums(one, s, sums.kv, sums.z, 0, w.scales, w.ones)
        if low_parts:
            scale_sums(one, s, sums.lows, sums.z_lows, 0, w.scales, w.ones)
    room_z = room + (sums.z - sums.kv)
    tops = room_z + s.m_pad
    copy(one, other.top, s.m_pad, tops)
    take_tops(one, s.m_pad, tops, sums.top, w.scales)
    scale_block(one, other.kv, s.e_pad, s.m, s.e_pad, w.scales, w.ones, room, s.e_pad)
    scale_block(one, other.z, s.m_pad, 1, s.m_pad, w.ones, w.scales, room_z, s.m_pad)
    if low_parts:
        take_row(one, tops - room, room, sums.kv, sums.lows)
    else:
        add_rows(one, sums.kv, tops - room, room, 0, 1, one)


@outlined
def sum_before(one, s, p, head, first, last, groups, w):
    """Compute the sums that each of the blocks first .. last (included) of a group reads of the blocks before it."""
    size = sums_size(s)
    copy(one, groups + first // GROUP * size, size, w.before)
    for block in range(first + 1, last + 1):
        own = kept_at(s, w.before + (block - first) * size, w.room)
        copy(one, own.kv - size, size, own.kv)
        if far_before(block) >= 0:
            other = kept_at(s, w.end + far_before(block) * size, w.room)
            add_sums(one, s, head.keys, own, other, False, w.room, w.window.taking)


@inlined
def read_block(one, s, p, cut, head, sums, block, q, k, v, mask, values, out, w):
    """The queries of a block read the sums of their far keys, and their near keys. `w` is a `WindowSpace`."""
    far = far_before(block) >= 0 or far_after(block) < cut.blocks
    for number in range(block * cut.pieces, min(cut.tiles, (block + 1) * cut.pieces)):
        first, last = tile_bounds(p, cut, number)
        tile = Tile(first, last, block, 1, False, far, True, first)
        for chunk in range(head.members, head.members_end, SLOTS):
            heads = min(SLOTS, head.members_end - chunk)
            for i in range(heads):
                f, slot = integer_at(p.members + 8 * (chunk + i)), slot_at(w, i)
                load_slot(one, s, p, cut, head, tile, q, k, f, slot, w)
                read_far(one, s, p, cut, head, sums, tile, 0, first, last, out, f, 0, slot, w)
            read_near_tiles(one, s, p, cut, head, tile, number, k, v, mask, values, heads, w)
            for i in range(heads):
                f = integer_at(p.members + 8 * (chunk + i))
                store_slot(one, s, p, cut, tile, out, f, slot_at(w, i))
