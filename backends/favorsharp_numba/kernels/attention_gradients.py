"""The backward kernel of attention: `sweep`, which computes the gradients through features in both directions.

The tiles of one side (keys with their rows V, or queries with their rows G, see `gradient_rows.py`) are taken into
sums, and the other side reads these sums. Its log features get the gradient weight * (sums.value); if the readers are
keys, what they read is the gradient of v. Features are computed again and never stored
(docs/design/one-sweep-backwards.md). `window_gradients.py` has the gradients through keys that are scored exactly.
"""

from collections import namedtuple
from typing import Any, NamedTuple

import numpy as np

from favorsharp_numba.kernels.arguments import ALPHA, GROUP, NO_MASK, ROWS, TILE, ZERO, is_hidden
from favorsharp_numba.kernels.causal_attention import SMALL_RISE
from favorsharp_numba.kernels.gradient_rows import load_gradients, load_values
from favorsharp_numba.kernels.point_gradients import add_point_gradients, point_space
from favorsharp_numba.kernels.sums import Sums, add_keys, raise_top, rescale
from favorsharp_numba.kernels.tiles import (
    ahead_of,
    load_points,
    log_factors,
    log_keys,
    log_queries,
    rest_of_tile,
    transpose,
    zero_or_nan,
)
from favorsharp_numba.kernels.window_rule import far_after, far_before
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import exp_block, fill_before, max_block, multiply_block
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.items import get, integer_at, lanes, panel, put
from favorsharp_numba.vectors.products import NOTHING, product, product_add
from favorsharp_numba.vectors.rows import add_rows, fill

LARGEST_WEIGHT = 60
"""Log 2 of the weight that a pair of a query and a later key may have before a causal tile is cut."""

# The workspace -------------------------------------------------------------------------------------------------------

SideSpace = namedtuple("SideSpace", "points factors rows end")


@inlined
def side_space(s, points):
    """The parts of a loaded tile of either side: points, log factors, and rows V or G."""
    factors = points + TILE * s.d_pad
    rows = factors + 2 * TILE
    end = rows + TILE * s.e_pad
    return SideSpace(points, factors, rows, end)


SweepSpace = namedtuple(
    "SweepSpace",
    "taken reader dense room features new_top safe_top scales ignored ones sums row_columns columns weights slopes "
    "pairs products of_points zeros end",
)


@inlined
def sweep_space(s, place):
    """The parts of the workspace of `sweep`.

    `taken` and `reader` are `SideSpace`s, `of_points` is a `PointSpace`, and `sums` are `Sums`, of which those of
    features alone are `ignored`. `row_columns` and `columns` are the rows and the points of the readers as columns.
    """
    taken = side_space(s, place)
    reader = side_space(s, taken.end)
    dense = reader.end
    room = dense + TILE * s.d_pad
    features = room + TILE * s.e_pad
    new_top = features + TILE * s.feature_step
    safe_top = new_top + s.m_pad
    scales = safe_top + s.m_pad
    ignored = scales + s.m_pad
    ones = ignored + max(s.m_pad, TILE)
    top = ones + max(s.m_pad, max(s.e_pad, TILE))
    kv = top + s.m_pad
    lows = kv + s.m * s.e_pad
    row_columns = lows + s.m * s.e_pad
    columns = row_columns + s.e * TILE
    weights = columns + s.d * TILE
    slopes = weights + s.m * TILE
    pairs = slopes + s.m * TILE
    products = pairs + TILE * TILE
    of_points = point_space(s, products + TILE * TILE)
    zeros = of_points.end
    end = zeros + TILE
    return SweepSpace(
        taken, reader, dense, room, features, new_top, safe_top, scales, ignored, ones,
        Sums(kv, ignored, top, lows, ignored), row_columns, columns, weights, slopes, pairs, products, of_points, zeros,
        end,
    )  # fmt: skip


# How a sweep proceeds ------------------------------------------------------------------------------------------------


class Arrays(NamedTuple):
    """The points of both sides, and with them values for keys or gradients of results for queries; results and mask."""

    reader: Any
    reader_values: Any
    taken: Any
    taken_values: Any
    out: Any
    mask: Any


class Walk(NamedTuple):
    """How a sweep proceeds through `blocks` blocks of `block` positions, in descending order if `backwards`.

    `keys_read`: keys read the sums of queries, or else queries those of keys. `pairwise`: causal attention without a
    window, where each tile of readers also reads the tile of the same positions, pair by pair.
    """

    keys_read: int
    backwards: int
    pairwise: bool
    readers: int
    taken: int
    block: int
    blocks: int


class Head(NamedTuple):
    """A query head: the packed constants of the readers and of the others, the stats, and the number of the head."""

    number: int
    mine: int
    theirs: int
    stats: int


class Tile(NamedTuple):
    """A tile of readers, rounded up to n columns, and the positions coming .. behind of the next tile."""

    start: int
    length: int
    n: int
    coming: int
    behind: int


@inlined
def walk_of(p, keys_read, backwards):
    """How the sweep proceeds."""
    readers = p.num_keys if keys_read else p.num_queries
    taken = p.num_queries if keys_read else p.num_keys
    block = p.window if p.window > 0 else TILE
    if not p.causal and p.window == 0:
        block = max(taken, max(readers, 1))
    blocks = (max(readers, taken) + block - 1) // block
    return Walk(keys_read, backwards, p.causal and p.window == 0, readers, taken, block, blocks)


@inlined
def head_of(s, p, walk, f):
    """The query head of a number."""
    of_map = integer_at(p.map_of + 8 * f) * s.total
    queries, keys = p.query_side + of_map, p.key_side + of_map
    stats = p.stats + 2 * f * p.num_queries
    return Head(f, keys if walk.keys_read else queries, queries if walk.keys_read else keys, stats)


@inlined
def tile_of(one, walk, start, count):
    """The tile of `count` readers from a position on."""
    coming = max(0, start - TILE) if walk.backwards else start + count
    behind = start if walk.backwards else min(walk.readers, coming + TILE)
    return Tile(start, count, rest_of_tile(count, lanes(one)), coming, behind)


# The kernel ----------------------------------------------------------------------------------------------------------


@kernel(sweep_space)
def sweep(
    one, s, p, keys_read, backwards, reader, reader_values, taken, taken_values, out, mask, low, high, scratch
):  # fmt: skip
    """One side reads the sums of the other, for query heads low .. high, in ascending or descending order of blocks.

    keys_read 1: keys read queries, and their gradients and those of their values are added to dk and dv. keys_read 0:
    queries read keys, and their gradients are added to dq.
    """
    w = sweep_space(s, scratch)
    a = Arrays(reader, reader_values, taken, taken_values, out, mask)
    walk = walk_of(p, keys_read, backwards)
    fill(one, w.ones, max(s.m_pad, max(s.e_pad, TILE)), one)
    fill(one, w.zeros, TILE, one - one)
    for f in range(low, high):
        head = head_of(s, p, walk, f)
        fill(one, w.sums.kv, s.m * s.e_pad, one - one)
        fill(one, w.sums.lows, s.m * s.e_pad, one - one)
        fill(one, w.sums.top, s.m_pad, -np.inf * one)
        for number in range(walk.blocks):
            current = walk.blocks - 1 - number if backwards else number
            if not walk.pairwise:
                take_block(one, s, p, walk, head, a, current, w)
            begin, end = current * walk.block, min(walk.readers, (current + 1) * walk.block)
            done, size = 0, TILE
            while done < end - begin:
                count = min(size, end - begin - done)
                start = end - done - count if backwards else begin + done
                tile = tile_of(one, walk, start, count)
                load_readers(one, s, p, walk, head, a, tile, w)
                if walk.pairwise and not load_pairs(one, s, p, walk, head, a, tile, w):
                    size = max(1, count // 4)
                    continue
                read_tile(one, s, p, walk, head, a, tile, w)
                if walk.pairwise:
                    step, rows = s.feature_step, w.taken.rows
                    next_values = ahead_of(taken_values, f, tile.coming, tile.behind, s.e - 1)
                    add_keys(one, s, w.features, step, rows, s.e_pad, count, w.sums, 0, next_values)
                done += count
                size = TILE if size == TILE or done % TILE == 0 else size


@outlined
def load_side(
    one, s, p, keys, constants, stats, points, values, out, mask, f, start, count, to, rows, factors, dense, room
):  # fmt: skip
    """Load a tile of keys with their rows V, or of queries with their rows G, and their log factors.

    It is not inlined, because `sweep` calls it three times.
    """
    if keys:
        load_points(one, points, mask, f, start, count, s.d, s.d_pad, constants + ALPHA, constants + s.center, to)
        log_factors(one, s, constants, to, count, dense, factors)
        for t in range(count):
            if is_hidden(mask, f, start + t):
                put(one, factors + t, -np.inf * one)
        load_values(one, s, constants, values, mask, f, start, count, rows)
    else:
        load_points(one, points, NO_MASK, f, start, count, s.d, s.d_pad, constants + ALPHA, constants + s.center, to)
        if p.with_factors:
            log_factors(one, s, constants, to, count, dense, factors)
        else:
            zero_or_nan(one, s, constants, to, count, factors)
        for t in range(count):
            put(one, factors + t, get(one, factors + t) - get(one, stats + 2 * (start + t) + 1))
        load_gradients(one, s, constants, values, out, stats, f, start, count, rows, room)


@inlined
def load_taken(one, s, p, walk, head, a, start, count, w):
    """Load a tile of the side that is taken into the sums."""
    load_side(
        one, s, p, 1 - walk.keys_read, head.theirs, head.stats, a.taken, a.taken_values, a.out, a.mask, head.number,
        start, count, w.taken.points, w.taken.rows, w.taken.factors, w.dense, w.room,
    )  # fmt: skip


@inlined
def take_block(one, s, p, walk, head, a, current, w):
    """Add to the sums the block that a block of readers is the first to read: with a window, the nearest far block."""
    entering = current
    if p.window > 0:
        entering = far_after(current) if walk.backwards else far_before(current)
    if 0 <= entering < walk.blocks:
        side, sums, step = w.taken, w.sums, s.feature_step
        stop = min(walk.taken, (entering + 1) * walk.block)
        for start in range(entering * walk.block, stop, TILE):
            count = min(TILE, stop - start)
            load_taken(one, s, p, walk, head, a, start, count, w)
            log_keys(one, s, head.theirs, side.points, count, side.factors, w.features, step, NOTHING)
            if raise_top(one, s, head.theirs, w.features, step, count, w.sums.top, w.new_top, w.safe_top) > 0:
                rescale(one, s, sums, w.new_top, 0, w.scales, w.ones)
            exp_block(
                one, w.features, step, count, s.m_pad, head.theirs + ZERO, 0, w.safe_top, w.ones, 0, w.ignored
            )  # fmt: skip
            add_keys(one, s, w.features, step, side.rows, s.e_pad, count, sums, 0, NOTHING)


@inlined
def load_readers(one, s, p, walk, head, a, tile, w):
    """Load a tile of readers: points and rows, also as columns, and log features."""
    side = w.reader
    load_side(
        one, s, p, walk.keys_read, head.mine, head.stats, a.reader, a.reader_values, a.out, a.mask, head.number,
        tile.start, tile.length, side.points, side.rows, side.factors, w.dense, w.room,
    )  # fmt: skip
    transpose(one, side.points, s.d_pad, tile.length, s.d, w.columns, TILE, tile.n)
    transpose(one, side.rows, s.e_pad, tile.length, s.e, w.row_columns, TILE, tile.n)
    fill(one, side.factors + tile.length, tile.n - tile.length, one - one)
    next_readers = ahead_of(a.reader, head.number, tile.coming, tile.behind, s.d)
    log_queries(one, s, head.mine, w.columns, tile.length, side.factors, w.weights, next_readers)


@inlined
def load_pairs(one, s, p, walk, head, a, tile, w):
    """Load the other side of a tile of readers, and its features relative to a top that it shares with the sums.

    Return False if the tile must be cut: the top rises by too much, or the weight of a pair that does not count (a key
    after the query) would be too large.
    """
    count, step, side = tile.length, s.feature_step, w.taken
    load_taken(one, s, p, walk, head, a, tile.start, count, w)
    next_taken = ahead_of(a.taken, head.number, tile.coming, tile.behind, s.d)
    log_keys(one, s, head.theirs, side.points, count, side.factors, w.features, step, next_taken)
    rise = raise_top(one, s, head.theirs, w.features, step, count, w.sums.top, w.new_top, w.safe_top)
    if count > 1:
        largest = w.of_points.gradient
        fill(one, largest, tile.n, -np.inf * one)
        max_block(one, w.weights, TILE, s.m, tile.n, w.new_top, 1, largest, largest)
        for t in range(count):
            rise = max(rise, get(one, largest + t) - (LARGEST_WEIGHT - SMALL_RISE))
    exact = count == 1 or not rise > SMALL_RISE
    if exact:
        rescale(one, s, w.sums, w.new_top, 0, w.scales, w.ones)
        exp_block(one, w.features, step, count, s.m_pad, head.theirs + ZERO, 0, w.safe_top, w.ones, 0, w.ignored)
    return exact


# Gradients of a tile of readers --------------------------------------------------------------------------------------


@inlined
def read_tile(one, s, p, walk, head, a, tile, w):
    """A tile of readers reads the sums."""
    exp_block(one, w.weights, TILE, s.m, tile.n, w.sums.top, 1, w.zeros, head.theirs + ZERO, 0, w.ignored)
    read_slopes(one, s, walk, tile, w)
    if walk.keys_read:
        add_value_gradients(one, s, p, walk, head, tile, w)
    add_reader_gradients(one, s, p, walk, head, a, tile, w)


@inlined
def read_slopes(one, s, walk, tile, w):
    """slopes (m, tile) = the sums, and for causal attention the pairs of the tile, times the rows of the readers."""
    width, step, rows = panel(one), s.feature_step, w.taken.rows
    product(one, s.m, tile.n, s.e, w.sums.kv, s.e_pad, 1, w.row_columns, width, TILE, w.slopes, TILE)
    if walk.pairwise:
        product_pairs(one, tile.length, tile.n, s.e, rows, s.e_pad, w.row_columns, w.products, walk.keys_read)
        for t in range(0, tile.n, GROUP):
            part = min(GROUP, tile.n - t)
            low, high = (t, tile.length) if walk.keys_read else (0, min(tile.length, t + part))
            product_add(
                one, s.m, part, max(0, high - low), w.features + low * step, 1, step, w.products + low * TILE + t,
                width, TILE, w.slopes + t, TILE,
            )  # fmt: skip


@inlined
def product_pairs(one, count, n, k, taken, step, columns, pairs, keys_read):
    """pairs[taken, reader] = products over k, or 0 if the key comes after the query."""
    for j in range(0, count, GROUP):
        size = min(GROUP, count - j)
        left, right = (0, min(n, j + GROUP)) if keys_read else (j, n)
        product(
            one, size, right - left, k, taken + j * step, step, 1, columns + left, panel(one), TILE,
            pairs + j * TILE + left, TILE,
        )  # fmt: skip
        if not keys_read:
            fill_before(one, pairs + j * TILE, TILE, size, n, j, one - one)
        for i in range(j, j + size if keys_read else j):
            fill(one, pairs + i * TILE + i + 1, n - i - 1, one - one)


@inlined
def add_value_gradients(one, s, p, walk, head, tile, w):
    """Add to dv what a tile of keys has read: weights times the sums and the pairs of the tile."""
    width, rows = panel(one), w.taken.rows
    gradient = w.of_points.gradient
    size = rest_of_tile(s.e - 1, lanes(one))  # the further value 1 has no gradient
    product(one, tile.length, size, s.m, w.weights, 1, TILE, w.sums.kv, width, s.e_pad, gradient, s.e_pad)
    if walk.pairwise:
        product_pairs(one, tile.length, tile.n, s.m, w.features, s.feature_step, w.weights, w.pairs, walk.keys_read)
        for t in range(0, tile.length, ROWS):
            part = min(ROWS, tile.length - t)
            product_add(
                one, part, size, tile.length - t, w.pairs + t * TILE + t, 1, TILE, rows + t * s.e_pad, width, s.e_pad,
                gradient + t * s.e_pad, s.e_pad,
            )  # fmt: skip
    target = p.dv + (head.number * walk.readers + tile.start) * (s.e - 1)
    add_rows(one, target, s.e - 1, gradient, s.e_pad, tile.length, one)


@inlined
def add_reader_gradients(one, s, p, walk, head, a, tile, w):
    """Add the gradients of a tile of readers to dk or dq, and their share to the sums of the map."""
    side, f = w.reader, head.number
    fill(one, w.zeros, tile.n, one - one)
    multiply_block(one, w.slopes, TILE, s.m, tile.n, w.weights, w.zeros)
    add_point_gradients(
        one, s, head.mine, side.points, w.dense, w.slopes, w.zeros, tile.length, walk.keys_read or p.with_factors,
        w.of_points, (p.dk if walk.keys_read else p.dq) + (f * walk.readers + tile.start) * s.d,
        p.maps + (2 * f + walk.keys_read) * p.maps_size if p.maps else 0,
        ahead_of(a.reader_values, f, tile.coming, tile.behind, s.e - 1),
    )  # fmt: skip
    fill(one, w.zeros, TILE, one - one)
