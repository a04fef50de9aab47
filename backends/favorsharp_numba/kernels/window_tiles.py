"""Tiles of keys and of queries with a window: how positions are cut into them, and where they lie in the workspace.

A tile consists of several whole blocks of the window, or of a piece of a long block.
"""

from collections import namedtuple
from typing import NamedTuple

from favorsharp_numba.kernels.arguments import TILE, key_side, query_side
from favorsharp_numba.kernels.sums import lows_size, take_space
from favorsharp_numba.kernels.tiles import rest_of_tile
from favorsharp_numba.kernels.window_rule import far_after, far_before
from favorsharp_numba.vectors.compiling import inlined
from favorsharp_numba.vectors.items import integer_at, lanes

SLOTS = 4
"""The number of query heads that are worked on together, and of tiles of keys that the workspace holds."""

# The workspace -------------------------------------------------------------------------------------------------------

StoreSpace = namedtuple("StoreSpace", "points factors norms finite end")


@inlined
def store_space(s, points):
    """The parts of the data of a tile of keys; the item at `finite` is 1 if all its values are finite, else 0."""
    factors = points + TILE * s.d_pad
    norms = factors + 2 * TILE
    finite = norms + TILE
    end = finite + TILE
    return StoreSpace(points, factors, norms, finite, end)


SlotSpace = namedtuple("SlotSpace", "columns weights factors norms total reference numerator end")


@inlined
def slot_space(s, columns):
    """The parts of the data of a tile of queries of one head: a column for each query, and rows of numerators."""
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
    """The data of a tile of keys."""
    first = w.stores
    shift = tile % SLOTS * (first.end - first.points)
    return StoreSpace(
        first.points + shift, first.factors + shift, first.norms + shift, first.finite + shift, first.end + shift
    )


@inlined
def slot_at(w, number):
    """The data of a tile of queries, of one of the heads that are processed together."""
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
    """A key head: its number, the packed constants of its keys and queries, and where the list has its query heads."""

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
