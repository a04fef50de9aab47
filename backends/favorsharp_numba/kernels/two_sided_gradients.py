"""The backward kernel of bidirectional attention with a window in one pass: each side reads the other one's sums once.

`attention_gradients.py` has the kernel for shorter windows, which goes through the blocks in both orders, and what both
kernels do. Here the sums of blocks are kept and joined (`block_sums.py`).
"""

from collections import namedtuple

from favorsharp_numba.kernels.arguments import TILE
from favorsharp_numba.kernels.attention_gradients import (
    Arrays,
    head_of,
    load_readers,
    load_taken,
    read_tile,
    sweep_space,
    tile_of,
    walk_of,
)
from favorsharp_numba.kernels.block_sums import block_space, join_far, keep_running, kept_at, set_sums, sums_size
from favorsharp_numba.kernels.sums import take_keys
from favorsharp_numba.kernels.tiles import log_keys
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.products import NOTHING
from favorsharp_numba.vectors.rows import fill

TwoSidedSweepSpace = namedtuple("TwoSidedSweepSpace", "sweep blocks end")


@inlined
def two_sided_sweep_space(s, place):
    """The parts of the workspace of `two_sided_sweep`: a `SweepSpace`, whose sums are those that are read, and a
    `BlockSpace`.
    """
    sweep = sweep_space(s, place)
    blocks = block_space(s, sweep.end)
    return TwoSidedSweepSpace(sweep, blocks, blocks.end)


@kernel(two_sided_sweep_space)
def two_sided_sweep(
    one, s, p, keys_read, reader, reader_values, taken, taken_values, out, mask, low, high, scratch
):  # fmt: skip
    """As `sweep`, with the far blocks before and after each block. `kept_sums` items lie behind the workspace."""
    w = two_sided_sweep_space(s, scratch)
    a = Arrays(reader, reader_values, taken, taken_values, out, mask)
    walk = walk_of(p, keys_read, 1)
    fill(one, w.sweep.ones, max(s.m_pad, max(s.e_pad, TILE)), one)
    fill(one, w.blocks.taking.ones, max(s.m_pad, s.e_pad), one)
    fill(one, w.sweep.zeros, TILE, one - one)
    for f in range(low, high):
        head = head_of(s, p, walk, f)
        kept, groups = w.end, w.end + walk.blocks * sums_size(s)
        for block in range(walk.blocks):
            sum_block(one, s, p, walk, head, a, block, w)
            keep_running(one, s, head.theirs, block, kept, groups, w.blocks)
        for step in range(walk.blocks):
            block = walk.blocks - 1 - step
            join_far(one, s, head.theirs, block, walk.blocks, kept, groups, w.sweep.sums, w.blocks)
            first, last = block * walk.block, min(walk.readers, (block + 1) * walk.block)
            for start in range(first, last, TILE):
                tile = tile_of(one, walk, start, min(TILE, last - start))
                load_readers(one, s, p, walk, head, a, tile, w.sweep)
                read_tile(one, s, p, walk, head, a, tile, w.sweep)


@outlined
def sum_block(one, s, p, walk, head, a, block, w):
    """Compute the sums of a block of the side that is read. Their low parts are not kept."""
    sums, side, features, rows = kept_at(s, w.end, block, w.blocks.lows), head.theirs, w.sweep.features, w.sweep.taken
    first, last = block * walk.block, min(walk.taken, (block + 1) * walk.block)
    for start in range(first, last, TILE):
        count = min(TILE, last - start)
        load_taken(one, s, p, walk, head, a, start, count, w.sweep)
        log_keys(one, s, side, rows.points, count, rows.factors, features, s.feature_step, NOTHING)
        if start == first:
            set_sums(one, s, side, features, rows.rows, s.e_pad, count, sums, w.blocks.taking, NOTHING)
            fill(one, sums.lows, s.m * s.e_pad + s.m_pad if last - first > TILE else 0, one - one)
        else:
            take_keys(
                one, s, side, features, s.feature_step, rows.rows, s.e_pad, count, sums, 0, w.blocks.taking, NOTHING
            )  # fmt: skip
