"""Tiles of near keys: a tile of queries scores them exactly, and adds their values to what it has read by features."""

from typing import NamedTuple

from favorsharp_numba.kernels.arguments import TILE, place_of
from favorsharp_numba.kernels.near_scores import add_near, near_keys, raise_references, score_near, weigh_near
from favorsharp_numba.kernels.tiles import is_finite, load_keys, rest_of_tile, values_at
from favorsharp_numba.kernels.window_rule import behind_near, first_near, first_reader, last_reader
from favorsharp_numba.kernels.window_tiles import (
    SLOTS,
    bounds,
    loaded_at,
    near_space,
    slot_at,
    slot_space,
    store_at,
    store_space,
    tile_bounds,
)
from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.items import get, lanes, put
from favorsharp_numba.vectors.rows import copy


class Near(NamedTuple):
    """The keys of one or two tiles, positions start .. stop, the second tile from `middle` on.

    `first` and `second` are the places of the data of the tiles; `values` and `other_values` those of their values.
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
