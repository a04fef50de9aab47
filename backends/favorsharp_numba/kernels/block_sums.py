"""Sums of blocks of points, with a window in both directions: each block reads the sums of all blocks far from it.

The sums of each block are computed once and kept. Those of the blocks before a block and of the blocks after it are
joined before the block reads them (docs/design/sums-of-blocks-kept.md). Nothing is subtracted. The kernels
`two_sided_windows.py` and `two_sided_gradients.py` visit the blocks in descending order.
"""

from collections import namedtuple
from typing import Any

import numpy as np

from favorsharp_numba.kernels.arguments import ZERO
from favorsharp_numba.kernels.sums import Sums, lows_size, raise_top, rescale, take_space
from favorsharp_numba.kernels.window_rule import far_after, far_before
from favorsharp_numba.vectors.blocks import exp_block, max_block, scale_block
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.items import get, panel
from favorsharp_numba.vectors.products import product_ahead
from favorsharp_numba.vectors.rows import add_rows, combine, copy, fill, take_row, take_scaled_row
from favorsharp_numba.vectors.tops import compare_tops, take_tops

GROUP = 8
"""The number of blocks whose sums of the blocks before them are in the workspace at once."""

BlockSpace = namedtuple("BlockSpace", "running lows before after taking end")


@inlined
def block_space(s, running):
    """The parts of the workspace.

    `running` and `after` have the sums of the blocks so far, and their low parts. `lows` has the low parts of a block.
    `before` has the sums that each of GROUP blocks reads of the blocks before it. `taking` is a `TakeSpace`. Behind the
    workspace of the kernel lie the sums of all blocks, and the sums before each group of blocks (`kept_sums`).
    """
    size = sums_size(s)
    lows = running + 2 * size
    before = lows + lows_size(s)
    after = before + GROUP * size
    taking = take_space(s, after + 2 * size)
    return BlockSpace(running, lows, before, after, taking, taking.end)


@inlined
def sums_size(s):
    """The number of items of kv, z and top, without low parts."""
    return s.m * s.e_pad + 2 * s.m_pad


def kept_sums(s: Any, num_points: int, window: int) -> int:
    """The number of items that lie behind the workspace."""
    blocks = -(-num_points // window)
    return int((blocks + blocks // GROUP + 2) * (s.m * s.e_pad + 2 * s.m_pad))


@inlined
def kept_at(s, place, number, lows):
    """The sums with a number behind a place, and their low parts at the place `lows`."""
    kv = place + number * sums_size(s)
    z = kv + s.m * s.e_pad
    return Sums(kv, z, z + s.m_pad, lows, lows + s.m * s.e_pad)


@inlined
def running_at(s, place):
    """The sums at a place, with their low parts behind them."""
    return kept_at(s, place, 0, place + sums_size(s))


@inlined
def clear(one, s, sums):
    """Make sums, and their low parts, those of no points."""
    fill(one, sums.kv, s.m * s.e_pad + s.m_pad, one - one)
    fill(one, sums.top, s.m_pad, -np.inf * one)
    fill(one, sums.lows, s.m * s.e_pad + s.m_pad, one - one)


@inlined
def set_sums(one, s, side, features, values, v_step, count, sums, w, ahead):
    """Make the sums those of a tile of points, with no low parts. Log features are replaced by features.

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
def add_sums(one, s, side, sums, other, w):
    """Add the sums of other points to sums with low parts. `w` is a `TakeSpace`."""
    if raise_top(one, s, side, other.top, s.m_pad, 1, sums.top, w.new_top, w.safe) > 0:
        rescale(one, s, sums, w.new_top, 0, w.scales, w.ones)
    share_of(one, s, other, sums, w.scales, w.new_top)
    for i in range(s.m):
        row = i * s.e_pad
        take_scaled_row(one, s.e_pad, other.kv + row, get(one, w.scales + i), sums.kv + row, sums.lows + row)
    scale_block(one, other.z, s.m_pad, 1, s.m_pad, w.ones, w.scales, w.safe, s.m_pad)
    take_row(one, s.m_pad, w.safe, sums.z, sums.z_lows)


@outlined
def join_sums(one, s, side, first, second, target, w):
    """Make `target` the sums of two sets of points, without low parts. `w` is a `TakeSpace`."""
    max_block(one, second.top, 0, 1, s.m_pad, side + ZERO, 0, first.top, target.top)
    share_of(one, s, first, target, w.scales, w.new_top)
    share_of(one, s, second, target, w.safe, w.new_top)
    for i in range(s.m):
        row, share, other = i * s.e_pad, get(one, w.scales + i), get(one, w.safe + i)
        combine(one, s.e_pad, one - one, share, first.kv + row, other, second.kv + row, target.kv + row)
    scale_block(one, first.z, s.m_pad, 1, s.m_pad, w.ones, w.scales, target.z, s.m_pad)
    scale_block(one, second.z, s.m_pad, 1, s.m_pad, w.ones, w.safe, w.new_top, s.m_pad)
    add_rows(one, target.z, s.m_pad, w.new_top, 0, 1, one)


@inlined
def share_of(one, s, sums, whole, factors, room):
    """The factors that make sums relative to the tops of `whole`, which are not smaller than theirs."""
    copy(one, sums.top, s.m_pad, room)
    take_tops(one, s.m_pad, room, whole.top, factors)


@outlined
def keep_running(one, s, side, block, kept, groups, w):
    """Add the sums of a block to the running sums, and keep these if a group of blocks begins behind its neighbours.

    Blocks are taken in ascending order. `kept` is the place of the sums of all blocks, and `groups` that of the sums
    before each group.
    """
    running = running_at(s, w.running)
    if block == 0:
        clear(one, s, running)
        copy(one, running.kv, sums_size(s), groups)
    add_sums(one, s, side, running, kept_at(s, kept, block, w.lows), w.taking)
    reader = far_after(block)  # the first block that is far from this one
    if reader % GROUP == 0:
        copy(one, running.kv, sums_size(s), kept_at(s, groups, reader // GROUP, w.lows).kv)


@inlined
def join_far(one, s, side, block, blocks, kept, groups, target, w):
    """Make `target` the sums that a block reads: those of all blocks that are far from it.

    Blocks come in descending order. `kept` and `groups` are as in `keep_running`.
    """
    after = running_at(s, w.after)
    if block == blocks - 1:
        clear(one, s, after)
    if block == blocks - 1 or block % GROUP == GROUP - 1:
        sum_before(one, s, side, block // GROUP * GROUP, block, kept, groups, w)
    if far_after(block) < blocks:
        add_sums(one, s, side, after, kept_at(s, kept, far_after(block), w.lows), w.taking)
    join_sums(one, s, side, kept_at(s, w.before, block % GROUP, w.lows), after, target, w.taking)


@outlined
def sum_before(one, s, side, first, last, kept, groups, w):
    """The sums that each of the blocks first .. last (included) of a group reads of the blocks before it."""
    size, lows = sums_size(s), w.lows
    copy(one, kept_at(s, groups, first // GROUP, lows).kv, size, w.before)
    for block in range(first + 1, last + 1):
        previous, own = kept_at(s, w.before, block - first - 1, lows), kept_at(s, w.before, block - first, lows)
        if far_before(block) >= 0:
            join_sums(one, s, side, previous, kept_at(s, kept, far_before(block), lows), own, w.taking)
        else:
            copy(one, previous.kv, size, own.kv)
