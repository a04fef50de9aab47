"""The kernel of bidirectional attention with a window in one pass: every query reads the far keys once.

`windowed_attention.py` has the kernel for shorter windows and for causal attention, and what both kernels do. There,
queries read the far keys before them and those after them in two passes. Here the sums of blocks are kept and joined
(`block_sums.py`).
"""

from collections import namedtuple

from favorsharp_numba.kernels.arguments import TILE
from favorsharp_numba.kernels.block_sums import block_space, clear, join_far, keep_running, kept_at, set_sums, sums_size
from favorsharp_numba.kernels.near_tiles import read_near_tiles
from favorsharp_numba.kernels.sums import take_keys
from favorsharp_numba.kernels.tiles import ahead_of, load_keys, log_keys, usable_values, values_at
from favorsharp_numba.kernels.window_rule import far_after, far_before
from favorsharp_numba.kernels.window_tiles import (
    SLOTS,
    Tile,
    Values,
    cut_of,
    head_of,
    slot_at,
    tile_bounds,
    window_space,
)
from favorsharp_numba.kernels.windowed_attention import load_slot, read_far, store_slot
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.items import integer_at
from favorsharp_numba.vectors.rows import fill

TwoSidedSpace = namedtuple("TwoSidedSpace", "window blocks far end")


@inlined
def two_sided_space(s, place):
    """The parts of the workspace of `two_sided`: a `WindowSpace`, a `BlockSpace`, and the sums that a block reads."""
    window = window_space(s, place)
    blocks = block_space(s, window.end)
    far = blocks.end
    return TwoSidedSpace(window, blocks, far, far + sums_size(s))


@kernel(two_sided_space)
def two_sided(one, s, p, q, k, v, mask, out, low, high, scratch):
    """Bidirectional attention with a window for key heads low .. high; `kept_sums` items lie behind the workspace."""
    w = two_sided_space(s, scratch)
    fill(one, w.window.taking.ones, max(s.m_pad, s.e_pad), one)
    fill(one, w.blocks.taking.ones, max(s.m_pad, s.e_pad), one)
    usable = usable_values(one, s, v, mask, False)
    values = Values(usable, v.row // v.item if usable else s.e_pad)
    for number in range(low, high):
        head, cut = head_of(s, p, number), cut_of(one, p, False)
        kept, groups = w.end, w.end + cut.blocks * sums_size(s)
        for block in range(cut.blocks):
            sum_block_of_keys(one, s, p, cut, head, block, k, v, mask, values, w)
            keep_running(one, s, head.keys, block, kept, groups, w.blocks)
        fill(one, w.window.kept, SLOTS, -one)
        far = kept_at(s, w.far, 0, w.blocks.lows)
        for step in range(cut.blocks):
            block = cut.blocks - 1 - step
            join_far(one, s, head.keys, block, cut.blocks, kept, groups, far, w.blocks)
            read_block(one, s, p, cut, head, far, block, q, k, v, mask, values, out, w.window)


@outlined
def sum_block_of_keys(one, s, p, cut, head, block, k, v, mask, values, w):
    """Compute the sums of a block of keys. Their low parts are not kept."""
    sums, first = kept_at(s, w.end, block, w.blocks.lows), block * cut.pieces
    for tile in range(first, min(cut.tiles, first + cut.pieces)):
        take_tile(one, s, p, cut, head, sums, tile, tile == first, k, v, mask, values, w.blocks.taking, w.window)


@inlined
def take_tile(one, s, p, cut, head, sums, tile, is_first, k, v, mask, values, taking, w):
    """Add a tile of keys to sums; the first one makes them. `w` is a `WindowSpace`."""
    start, stop = tile_bounds(p, cut, tile)
    count, factors = stop - start, w.stores.factors
    if load_keys(one, s, head.keys, k, mask, head.number, start, count, w.points, w.dense, factors):
        rows = values_at(one, s, head.keys, v, mask, head.number, start, count, values.usable, w.loaded)
        after = min(p.num_keys, stop + TILE)
        next_keys, next_values = ahead_of(k, head.number, stop, after, s.d), ahead_of(v, head.number, stop, after, s.e)
        log_keys(one, s, head.keys, w.points, count, factors, w.features, s.feature_step, next_keys)
        if is_first:
            set_sums(one, s, head.keys, w.features, rows, values.step, count, sums, taking, next_values)
            fill(one, sums.lows, s.m * s.e_pad + s.m_pad if cut.pieces > 1 else 0, one - one)
        else:
            take_keys(
                one, s, head.keys, w.features, s.feature_step, rows, values.step, count, sums, 0, taking, next_values
            )  # fmt: skip
    elif is_first:
        clear(one, s, sums)


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
