"""The kernel of attention with a window, bidirectional or causal: near keys are scored exactly, far ones by features.

`window_rule.py` says which keys are near. Positions are cut into tiles of keys and of queries: a tile consists of
several whole blocks of the window, or of a piece of a long block.
"""

from collections import namedtuple
from typing import NamedTuple

import numpy as np

from favorsharp_numba.kernels.arguments import ALPHA, NO_MASK, TILE, ZERO, key_side, place_of, query_side
from favorsharp_numba.kernels.near_scores import (
    add_near,
    near_keys,
    near_queries,
    raise_references,
    score_near,
    weigh_near,
)
from favorsharp_numba.kernels.sums import (
    empty_sums,
    has_seen,
    keep_stats,
    lows_size,
    read_sums,
    sums_with_lows,
    take_keys,
    take_space,
    weigh,
)
from favorsharp_numba.kernels.tiles import (
    ahead_of,
    is_finite,
    load_keys,
    load_points,
    log_keys,
    log_queries,
    rest_of_tile,
    store_points,
    turn_queries,
    usable_values,
    values_at,
)
from favorsharp_numba.kernels.window_rule import (
    behind_near,
    far_after,
    far_before,
    first_near,
    first_reader,
    last_reader,
)
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import max_block, scale_block
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.items import get, integer_at, lanes, put
from favorsharp_numba.vectors.rows import add_rows, copy, fill, invert, take_tops

SLOTS = 4
"""The number of query heads that are worked on together, and of tiles of keys that the workspace holds."""

# The workspace -------------------------------------------------------------------------------------------------------

StoreSpace = namedtuple("StoreSpace", "points factors norms finite end")


@inlined
def store_space(s, points):
    """The parts of what is kept of a tile of keys; the item at `finite` is 1 if all its values are finite, else 0."""
    factors = points + TILE * s.d_pad
    norms = factors + 2 * TILE
    finite = norms + TILE
    end = finite + TILE
    return StoreSpace(points, factors, norms, finite, end)


SlotSpace = namedtuple("SlotSpace", "columns weights factors norms total reference numerator end")


@inlined
def slot_space(s, columns):
    """The parts of what is kept of a tile of queries of one head: a column for each, and rows of numerators."""
    weights = columns + TILE * s.d
    factors = weights + TILE * s.m
    norms = factors + 2 * TILE
    total = norms + 2 * TILE
    reference = total + TILE
    numerator = reference + TILE
    end = numerator + TILE * s.e_pad
    return SlotSpace(columns, weights, factors, norms, total, reference, numerator, end)


NearSpace = namedtuple("NearSpace", "scores largest safe end")


@inlined
def near_space(s, scores):
    """The parts of the workspace of `read_near`: scores of two tiles of keys, and two lines of a tile of queries."""
    largest = scores + 2 * TILE * TILE
    safe = largest + TILE
    end = safe + 2 * TILE
    return NearSpace(scores, largest, safe, end)


MergeSpace = namedtuple("MergeSpace", "old top scale old_scale end")


@inlined
def merge_space(s, old):
    """The parts of the workspace of `merge_kept`."""
    top = old + TILE
    scale = top + TILE
    old_scale = scale + TILE
    end = old_scale + TILE
    return MergeSpace(old, top, scale, old_scale, end)


WindowSpace = namedtuple(
    "WindowSpace", "points dense features safe kept stores loaded slots taking near merge lows end"
)


@inlined
def window_space(s, points):
    """The parts of the workspace of `windowed`.

    There is room for SLOTS tiles of keys, of values and of queries; `stores` and `slots` are the `StoreSpace` and the
    `SlotSpace` of the first. `kept` lists the numbers of the tiles of keys. `taking` is a `TakeSpace`. `near` and
    `merge` are a `NearSpace` and a `MergeSpace` in the same place, which is also room for a row of totals.
    """
    dense = points + TILE * s.d_pad
    features = dense + TILE * s.d_pad
    safe = features + TILE * s.feature_step
    kept = safe + TILE
    stores = store_space(s, kept + TILE)
    loaded = stores.points + SLOTS * (stores.end - stores.points)
    slots = slot_space(s, loaded + SLOTS * TILE * s.e_pad)
    taking = take_space(s, slots.columns + SLOTS * (slots.end - slots.columns))
    near, merge = near_space(s, taking.end), merge_space(s, taking.end)
    lows = max(taking.end + s.e_pad, max(near.end, merge.end))
    end = lows + lows_size(s)
    return WindowSpace(points, dense, features, safe, kept, stores, loaded, slots, taking, near, merge, lows, end)


@inlined
def store_at(w, tile):
    """What is kept of a tile of keys."""
    first = w.stores
    shift = tile % SLOTS * (first.end - first.points)
    return StoreSpace(
        first.points + shift, first.factors + shift, first.norms + shift, first.finite + shift, first.end + shift
    )


@inlined
def slot_at(w, number):
    """What is kept of a tile of queries of one of the heads that are worked on together."""
    first = w.slots
    shift = number * (first.end - first.columns)
    return SlotSpace(
        first.columns + shift, first.weights + shift, first.factors + shift, first.norms + shift, first.total + shift,
        first.reference + shift, first.numerator + shift, first.end + shift,
    )  # fmt: skip


@inlined
def loaded_at(s, w, tile):
    """Where the values of a tile of keys are loaded to."""
    return w.loaded + tile % SLOTS * TILE * s.e_pad


# How positions are cut -----------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """How the positions of a head are cut into `blocks` and `tiles`.

    A tile consists of `held` whole blocks, whose queries are in columns `pad` apart; or a long block consists of
    `pieces` tiles.
    """

    held: int
    pieces: int
    pad: int
    blocks: int
    tiles: int


class Values(NamedTuple):
    """Whether the kernel reads values in place, and how many items they are apart."""

    usable: bool
    step: int


class Head(NamedTuple):
    """A key head: its number, the packed constants of its keys and queries, and where its query heads are listed."""

    number: int
    keys: int
    queries: int
    members: int
    members_end: int


class Tile(NamedTuple):
    """A tile of queries: its positions, its first block and the number of its blocks.

    `after`: the pass over the blocks after each block, in descending order, that follows the pass over those before.
    `far`: whether the tile has any keys to read by features. `final`: whether its results are complete in this pass.
    `next_query`: the first query of the tile that comes next.
    """

    first: int
    last: int
    block: int
    parts: int
    after: bool
    far: bool
    final: bool
    next_query: int


class Near(NamedTuple):
    """The keys of one or two tiles, positions start .. stop, the second tile from `middle` on.

    `first` and `second` are the places of what is kept of the tiles; `values` and `other_values` those of their values.
    `finite`: all values are finite.
    """

    start: int
    middle: int
    stop: int
    first: int
    second: int
    values: int
    other_values: int
    v_step: int
    finite: bool


@inlined
def cut_of(one, p, few_heads):
    """Tiles hold several blocks if blocks are short and all query heads of a key head fit into the workspace."""
    pad = rest_of_tile(p.window, lanes(one))
    held = max(1, TILE // pad) if few_heads else 1
    pieces = 1 if held > 1 else (p.window + TILE - 1) // TILE
    whole = p.num_keys // (held * p.window)
    tiles = whole * pieces + (p.num_keys - whole * held * p.window + TILE - 1) // TILE
    return Cut(held, pieces, pad, (p.num_keys + p.window - 1) // p.window, tiles)


@inlined
def tile_bounds(p, cut, tile):
    """Where the positions of a tile begin and end."""
    start = tile // cut.pieces * cut.held * p.window
    stop = min(p.num_keys, start + cut.held * p.window)
    start += tile % cut.pieces * TILE
    return start, min(stop, start + TILE)


@inlined
def bounds(p, first, last, part):
    """Where the queries of a block of a tile begin and end."""
    start = first + part * p.window
    return max(start, p.first_query), min(last, start + p.window)


@inlined
def head_of(s, p, number):
    """The key head of a number."""
    line = p.member_starts + 8 * number
    return Head(number, key_side(s, p, number), query_side(s, p, number), integer_at(line), integer_at(line + 8))


@inlined
def tile_of(p, cut, step, seen):
    """The tile of queries of a step: all tiles in ascending order, and then all in descending order.

    `seen`: whether the sums held keys before the first position.
    """
    after = step >= cut.tiles
    number = 2 * cut.tiles - 1 - step if after else step
    first, last = tile_bounds(p, cut, number)
    block = number // cut.pieces * cut.held
    parts = min(cut.held, cut.blocks - block)
    far = far_after(block) < cut.blocks if after else seen or far_before(block + parts - 1) >= 0
    next_query = (2 * first - last if after else last) - p.first_query
    return number, Tile(first, last, block, parts, after, far, p.causal or after, next_query)


# The kernel ----------------------------------------------------------------------------------------------------------


@kernel(window_space)
def windowed(one, s, p, q, k, v, mask, out, work, low, high, scratch):
    """Attention with a window, for key heads low .. high.

    Positions count from the first key; the queries are those of the positions from first_query on. A tile of queries
    reads the sums of the far keys before it. If attention is not causal, what the queries have read is kept in `work`
    (e_pad + 2 items a query), and a second pass, in descending order, adds the far keys after each tile. In the last
    pass the near keys are added.
    """
    w = window_space(s, scratch)
    fill(one, w.taking.ones, max(s.m_pad, s.e_pad), one)
    usable = usable_values(one, s, v, mask, False)
    values = Values(usable, v.row // v.item if usable else s.e_pad)
    for number in range(low, high):
        head, sums = head_of(s, p, number), sums_with_lows(one, s, p, number, w.lows)
        cut = cut_of(one, p, head.members_end - head.members <= SLOTS)
        seen = has_seen(one, s, sums.top)
        entered, logged = -1, -1  # the block that the sums took last, and the tile whose features are in the workspace
        fill(one, w.kept, SLOTS, -one)
        for step in range(cut.tiles if p.causal else 2 * cut.tiles):
            if step == cut.tiles:
                empty_sums(one, s, p, sums)
                entered, logged = -1, -1
            tile_number, tile = tile_of(p, cut, step, seen)
            for chunk in range(head.members, head.members_end, SLOTS):
                heads = min(SLOTS, head.members_end - chunk)
                for i in range(heads):
                    f = integer_at(p.members + 8 * (chunk + i))
                    load_slot(one, s, p, cut, head, tile, q, k, f, slot_at(w, i), w)
                for i in range(tile.parts):
                    part = tile.parts - 1 - i if tile.after else i
                    block = tile.block + part
                    entering = far_after(block) if tile.after else far_before(block)
                    if 0 <= entering < cut.blocks and entering != entered:
                        entered = entering
                        logged = enter_block(
                            one, s, p, cut, head, sums, tile, part, entering, logged, q, k, v, mask, values, w
                        )  # fmt: skip
                    begin, end = bounds(p, tile.first, tile.last, part)
                    for j in range(heads if begin < end else 0):
                        f = integer_at(p.members + 8 * (chunk + j))
                        read_far(one, s, p, cut, head, sums, tile, part, begin, end, out, f, work, slot_at(w, j), w)
                if tile.final:
                    read_near_tiles(one, s, p, cut, head, tile, tile_number, k, v, mask, values, heads, w)
                    for i in range(heads):
                        f = integer_at(p.members + 8 * (chunk + i))
                        store_slot(one, s, p, cut, tile, out, f, slot_at(w, i))


@inlined
def load_slot(one, s, p, cut, head, tile, q, k, f, slot, w):
    """Load a tile of queries of one head, and their log features if they read any far keys."""
    for part in range(tile.parts):
        begin, end = bounds(p, tile.first, tile.last, part)
        if begin < end:
            load_points(
                one, q, NO_MASK, f, begin - p.first_query, end - begin, s.d, s.d_pad, head.queries + ALPHA,
                head.queries + s.center, w.points + part * cut.pad * s.d_pad,
            )  # fmt: skip
    count = (tile.parts - 1) * (cut.pad - p.window) + tile.last - tile.first
    turn_queries(one, s, head.queries, count, tile.far, w.points, w.dense, slot.factors, slot.columns)
    if tile.far:
        next_keys = ahead_of(k, head.number, tile.first, tile.last, s.d)
        log_queries(one, s, head.queries, slot.columns, count, slot.factors, slot.weights, next_keys)
    else:  # the factors are 0, or NaN for a query that is not finite
        n = rest_of_tile(count, lanes(one))
        fill(one, slot.reference, n, -np.inf * one)
        copy(one, slot.factors, n, slot.total)
        fill(one, slot.numerator, count * s.e_pad, one - one)
    near_queries(one, s, head.queries, head.keys, slot.columns, count, slot.factors, slot.norms)


@inlined
def enter_block(one, s, p, cut, head, sums, tile, part, entering, logged, q, k, v, mask, values, w):
    """The sums take the keys of a block. Return the tile whose features are now in the workspace."""
    source = entering // cut.held * cut.pieces
    for own in range(source, min(cut.tiles, source + cut.pieces)):
        start, stop = tile_bounds(p, cut, own)
        begin, end = max(start, entering * p.window), min(stop, (entering + 1) * p.window)
        store, loaded = store_at(w, own), loaded_at(s, w, own)
        keep_keys(
            one, s, head.keys, k, v, mask, head.number, own, start, stop, store.points, w.dense, loaded, w.kept,
            values.usable, values.step, w.near.scores,
        )  # fmt: skip
        if own != logged:
            logged = own
            f = integer_at(p.members + 8 * head.members)
            next_queries = ahead_of(q, f, tile.next_query, tile.next_query + tile.last - tile.first, s.d)
            log_keys(
                one, s, head.keys, store.points, stop - start, store.factors, w.features, s.feature_step, next_queries
            )  # fmt: skip
        rows = place_of(v, head.number, start) if values.usable else loaded
        coming = tile.first + part * p.window
        next_values = ahead_of(v, head.number, coming, min(tile.last, coming + p.window), s.e)
        take_keys(
            one, s, head.keys, w.features + (begin - start) * s.feature_step, s.feature_step,
            rows + (begin - start) * values.step, values.step, end - begin, sums, 0, w.taking,
            next_values,
        )  # fmt: skip
    return logged


@inlined
def read_far(one, s, p, cut, head, sums, tile, part, begin, end, out, f, work, slot, w):
    """A block of queries, positions begin .. end, reads the sums; what it has read is kept or merged between passes."""
    count, column = end - begin, part * cut.pad
    total, reference = slot.total + column, slot.reference + column
    numerator = slot.numerator + column * s.e_pad
    if tile.far:
        weights = slot.weights + column
        weigh(one, s, head.queries, weights, count, sums.top, sums.z, reference, w.safe, total)
        target = ahead_of(out, f, begin - p.first_query, end - p.first_query, s.e)
        read_sums(one, s, weights, count, sums.kv, 0, numerator, w.near.scores, target)
    line = work + (f * p.num_queries + begin - p.first_query) * (s.e_pad + 2)
    if tile.after:
        ones = w.taking.ones
        merge_kept(one, s, head.queries, count, numerator, total, reference, line, ones, w.merge)
    elif not tile.final:
        copy(one, numerator, count * s.e_pad, line)
        copy(one, total, count, line + count * s.e_pad)
        copy(one, reference, count, line + count * (s.e_pad + 1))


@inlined
def merge_kept(one, s, side, count, numerator, total, reference, line, ones, w):
    """Merge what a block of queries read in the first pass, which is kept at `line`, into what it has read since."""
    n = rest_of_tile(count, lanes(one))
    copy(one, line + count * (s.e_pad + 1), count, w.old)
    max_block(one, w.old, 0, 1, n, side + ZERO, 0, reference, w.top)
    take_tops(one, n, w.old, w.top, w.old_scale)
    take_tops(one, n, reference, w.top, w.scale)
    scale_block(one, line, s.e_pad, count, s.e_pad, w.old_scale, ones, line, s.e_pad)
    scale_block(one, numerator, s.e_pad, count, s.e_pad, w.scale, ones, numerator, s.e_pad)
    add_rows(one, numerator, count * s.e_pad, line, 0, 1, one)
    copy(one, line + count * s.e_pad, count, w.old)
    scale_block(one, w.old, n, 1, n, ones, w.old_scale, w.old, n)
    scale_block(one, total, n, 1, n, ones, w.scale, total, n)
    add_rows(one, total, count, w.old, 0, 1, one)


@outlined
def keep_keys(
    one, s, side, k, v, mask, head, tile, start, stop, points, dense, values, kept, usable, v_step, totals
):  # fmt: skip
    """Load a tile of keys, and its values if they are not read in place, unless the workspace holds it already."""
    if get(one, kept + tile % SLOTS) == tile:
        return
    put(one, kept + tile % SLOTS, tile * one)
    store = store_space(s, points)
    load_keys(one, s, side, k, mask, head, start, stop - start, store.points, dense, store.factors)
    near_keys(one, s, side, stop - start, store.factors, store.norms)
    values = values_at(one, s, side, v, mask, head, start, stop - start, usable, values)
    finite = is_finite(one, side, values, v_step, stop - start, s.e_pad, totals)
    put(one, store.finite, one if finite else one - one)


@inlined
def store_slot(one, s, p, cut, tile, out, f, slot):
    """Divide what a tile of queries of one head has read by the totals, and store it."""
    for part in range(tile.parts):
        begin, end = bounds(p, tile.first, tile.last, part)
        column, count = part * cut.pad, end - begin
        if count > 0:
            begin -= p.first_query
            total = slot.total + column
            invert(one, total, count)
            keep_stats(one, p, f, begin, count, total, slot.reference + column)
            store_points(one, out, f, begin, count, s.e, s.e_pad, total, slot.numerator + column * s.e_pad)


# Near keys -----------------------------------------------------------------------------------------------------------


@inlined
def read_near_tiles(one, s, p, cut, head, tile, number, k, v, mask, values, heads, w):
    """A tile of queries, with its number, reads all keys that are near to its blocks, two tiles of keys at a time."""
    source = max(0, first_near(tile.block)) // cut.held * cut.pieces
    source_end = number + 1
    if not p.causal:
        last_block = min(cut.blocks, behind_near(tile.block + tile.parts - 1)) - 1
        source_end = min(cut.tiles, (last_block // cut.held + 1) * cut.pieces)
    while source < source_end:
        start, middle = tile_bounds(p, cut, source)
        stop, finite = middle, True
        for own in range(source, min(source + 2, source_end)):
            begin, stop = tile_bounds(p, cut, own)
            store = store_at(w, own)
            keep_keys(
                one, s, head.keys, k, v, mask, head.number, own, begin, stop, store.points, w.dense,
                loaded_at(s, w, own), w.kept, values.usable, values.step, w.near.scores,
            )  # fmt: skip
            finite = finite and get(one, store.finite) != 0
        rows, other_rows = loaded_at(s, w, source), loaded_at(s, w, source + 1)
        if values.usable:
            rows, other_rows = place_of(v, head.number, start), place_of(v, head.number, middle)
        near = Near(
            start, middle, stop, store_at(w, source).points, store_at(w, source + 1).points, rows, other_rows,
            values.step, finite,
        )  # fmt: skip
        for j in range(heads):
            read_near(
                one, s, p, cut, near, head.keys, mask, head.number, tile.first, tile.last, tile.block, tile.parts,
                slot_at(w, j).columns, w.near.scores,
            )  # fmt: skip
        source += 2


@outlined
def read_near(one, s, p, cut, near, side, mask, head, first, last, block, parts, slot_place, shared):
    """Add the keys of up to two tiles, exactly scored, to what the queries of a tile have read that see them."""
    slot, w = slot_space(s, slot_place), near_space(s, shared)
    lowest = max(0, p.first_query - first) // p.window  # the blocks before the first query have no queries
    start = max(near.start, first_near(block + lowest) * p.window)
    stop = min(near.stop, last if p.causal else behind_near(block + parts - 1) * p.window)
    if p.first_query >= last or start >= stop:
        return
    begin, end = bounds(p, first, last, parts - 1)
    n = (parts - 1 - lowest) * cut.pad + rest_of_tile(end - begin, lanes(one))
    seen = lowest * cut.pad
    copy(one, slot.reference + seen, n, w.largest + seen)
    position = start
    while position < stop:
        behind, low, width, before = near_block(one, p, cut, near, first, last, block, parts, lowest, position)
        behind = min(behind, stop)
        store, offset = store_space(s, near.first), position - near.start
        if position >= near.middle:
            store, offset = store_space(s, near.second), position - near.middle
        column = low * cut.pad
        score_near(
            one, s, side, slot.columns + column, slot.norms + column, width, store.points + offset * s.d_pad,
            store.norms + offset, behind - position, before, mask, head, position,
            w.scores + (position - start) * TILE + column, w.largest + column,
        )  # fmt: skip
        position = behind
    raise_references(
        one, s, side, n, w.largest + seen, slot.numerator + seen * s.e_pad, slot.total + seen, slot.reference + seen,
        w.safe,
    )  # fmt: skip
    position = start
    while position < stop:
        behind, low, width, before = near_block(one, p, cut, near, first, last, block, parts, lowest, position)
        behind = min(behind, stop)
        column = low * cut.pad
        weigh_near(
            one, side, width, behind - position, before, w.safe + column - seen,
            w.scores + (position - start) * TILE + column, slot.total + column,
        )  # fmt: skip
        position = behind
    for part in range(lowest, parts):
        begin, end = bounds(p, first, last, part)
        low = max(start, first_near(block + part) * p.window)
        high = min(stop, end if p.causal else behind_near(block + part) * p.window)
        weights = w.scores - start * TILE + part * cut.pad
        add_near_values(one, s, p, near, begin, end, low, high, weights, slot.numerator + part * cut.pad * s.e_pad)


@inlined
def near_block(one, p, cut, near, first, last, block, parts, lowest, position):
    """The keys from a position on that are of one block and of one tile.

    Return where they end, the first of the tile's blocks that see them, the number of columns of these blocks, and how
    many queries of the first block come before the first key (none or fewer, if attention is not causal).
    """
    number = position // p.window
    stop = min((number + 1) * p.window, near.middle if position < near.middle else near.stop)
    low = max(lowest, first_reader(number, p.causal) - block)
    high = min(parts - 1, last_reader(number) - block)
    begin, end = bounds(p, first, last, high)
    n = (high - low) * cut.pad + rest_of_tile(end - begin, lanes(one))
    begin, end = bounds(p, first, last, low)
    return stop, low, n, position - begin if p.causal else position - stop


@inlined
def add_near_values(one, s, p, near, begin, end, low, high, weights, numerator):
    """Add the values of the keys low .. high to the numerators of a block of queries, positions begin .. end.

    `weights` is where the row of weights of position 0 would be.
    """
    joined = near.other_values == near.values + (near.middle - near.start) * near.v_step
    split = high if joined else min(max(low, near.middle), high)
    for piece in range(2):
        position, behind = (low, split) if piece == 0 else (split, high)
        if position < behind:
            values = near.values + (position - near.start) * near.v_step
            if position >= near.middle:
                values = near.other_values + (position - near.middle) * near.v_step
            add_near(
                one, s, end - begin, behind - position, position - begin if p.causal else position - behind,
                weights + position * TILE, values, near.v_step, near.finite, numerator,
            )  # fmt: skip
