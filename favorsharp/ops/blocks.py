"""Attention block by block: far blocks through features, neighbouring blocks exactly (docs: theory, the window).

Positions are cut into blocks of w. A query scores its own block and the neighbouring blocks exactly. It reads every
other block through features, from states that never held the near keys, so that nothing is ever subtracted. Without a
window the same code serves causal attention: blocks have one position and there is no exact part, so that a query reads
all keys up to its own. `attention`, `causal_attention` and `favorsharp.distributed` use this module.

Inside a tile, a causal prefix is split by halves: the second half of the tile reads the first half as a whole, and so
on down to single blocks. So every group of queries reads groups of keys that it may see in full. The stabiliser of each
query is then attained by a visible key, and a key that is hidden from a query does not affect its row.
"""

from collections.abc import Callable

from favorsharp._arrays import broadcast_shapes, cast, namespace_of, on_device_of
from favorsharp._nonfinite import hide, masked
from favorsharp._typing import Array, PositiveMap
from favorsharp.ops.partials import Partial, exact_partial, merge, pair_partial
from favorsharp.ops.state import State, absorb, absorb_features, log_features, read_partial
from favorsharp.ops.tiles import tile_length, tiles_of
from favorsharp.ops.window_rule import RECENT_BLOCKS, near_blocks

Rows = tuple[int, int, Partial]
"""First position, position after the last, and the partial sums of the queries between them."""

_LONGEST_TILE = 128
"""Number of positions in a causal tile: longer tiles do more work pair by pair, shorter ones take more steps."""


def tile_of(window: int, length: int, state: State, q: Array) -> int:
    """The number of positions in a tile: a power of two times the block length."""
    batch = broadcast_shapes(q.shape[:-2], state.kv.shape[:-2])
    block = max(window, 1)
    needed = 1 << max(0, -(-length // block) - 1).bit_length()
    fitting = max(1, tile_length(state.num_features, batch, _LONGEST_TILE) // block)
    return block * min(needed, 1 << (fitting.bit_length() - 1))


def far_step(
    state: State,
    q: Array,
    k: Array,
    v: Array,
    key_mask: Array,
    feature_map: PositiveMap,
    *,
    start: int,
    tile: int,
    limit: int,
    reverse: bool = False,
) -> tuple[list[Rows], State]:
    """Let one tile of queries read, through features, the blocks before (or after) those that it scores exactly.

    Parameters
    ----------
    state : State
        The state of the keys that earlier tiles took in; all queries of this tile read them.
    start, tile : int
        The tile's first position and its length.
    limit : int
        Keys at this position and after it are left out.
    reverse : bool
        Read the blocks after the near ones; tiles are then visited from the last to the first.

    Returns
    -------
    list of Rows
    State
        The state after taking in the keys that enter with this tile.
    """
    window = state.window
    shift = RECENT_BLOCKS * window * (-1 if reverse else 1)
    first, last = start - shift, start - shift + tile  # the keys that enter with this tile
    length = q.shape[-2]
    if tile == window:  # one block: all of its queries read the same keys
        low, high = max(first, 0), max(0, min(last, k.shape[-2], limit))
        if low < high:
            state = absorb(state, k[..., low:high, :], v[..., low:high, :], key_mask[..., low:high], feature_map)
        batch = broadcast_shapes(q.shape[:-2], state.kv.shape[:-2])
        parts, width = [], max(state.num_features, len(near_blocks(causal=False)) * window)
        for a, b in tiles_of(min(tile, length - start), width, batch):
            lq = log_features(feature_map, "query", cast(q[..., start + a : start + b, :], state.kv.dtype))
            parts.append((start + a, start + b, read_partial(state, lq)))
        return parts, state
    dtype = state.kv.dtype
    lq = log_features(feature_map, "query", cast(rows_between(q, start, start + tile), dtype))
    part = read_partial(state, lq)
    if last > 0 and first < min(k.shape[-2], limit):
        mask = rows_between(key_mask[..., None], first, last)[..., 0]
        if limit < last:
            mask = mask & (namespace_of(mask).arange(first, last, **on_device_of(mask)) < limit)
        lk = masked(log_features(feature_map, "key", hide(cast(rows_between(k, first, last), dtype), mask)), mask)
        values = hide(cast(rows_between(v, first, last), dtype), mask)
        part = merge(part, _prefix_partial(lq, lk, values, max(window, 1), reverse))
        state = absorb_features(state, lk, values)
    stop = min(start + tile, length)
    return [(start, stop, _first_rows(part, stop - start))], state


def near_partial(
    q: Array,
    k: Array,
    v: Array,
    key_mask: Array,
    feature_map: PositiveMap,
    rows: tuple[int, int],
    state: State,
    *,
    causal: bool,
) -> Partial:
    """Partial sums of queries between two positions over the keys of their own and neighbouring blocks, scored exactly.

    The positions lie in one block, or form whole blocks. The state gives the window and the dtype to compute in.
    """
    xp = namespace_of(q, k, v)
    window, dtype = state.window, state.kv.dtype
    start, stop = rows
    if stop - start <= window and start // window == (stop - 1) // window:
        return _near_of_one_block(q, k, v, key_mask, feature_map, rows, state, causal)
    tile = -(-(stop - start) // window) * window
    shifts = [block * window for block in near_blocks(causal=causal)]
    own = _in_blocks(cast(rows_between(q, start, start + tile), dtype), window)
    keys, values, visible = (
        xp.concat([_in_blocks(rows_between(x, start + s, start + s + tile), window) for s in shifts], axis=-2)
        for x in (k, v, key_mask[..., None])
    )
    keys, values, mask = cast(keys, dtype), cast(values, dtype), visible[..., 0]
    pairs = mask[..., None, :]
    if causal:
        inside = xp.arange(window, **on_device_of(k))
        offsets = xp.arange(shifts[0], window, **on_device_of(k))
        pairs = pairs & (inside[:, None] >= offsets[None, :])
    part = exact_partial(
        feature_map.expanded().log_kernel(own, hide(keys, mask)), pairs, hide(values, mask), mixed=causal
    )
    return _first_rows(_map(part, _out_of_blocks), stop - start)


def _near_of_one_block(
    q: Array,
    k: Array,
    v: Array,
    key_mask: Array,
    feature_map: PositiveMap,
    rows: tuple[int, int],
    state: State,
    causal: bool,
) -> Partial:
    """`near_partial` of rows of one block."""
    window, dtype = state.window, state.kv.dtype
    start, stop = rows
    block = start // window * window
    near = near_blocks(causal=causal)
    low, high = max(block + near.start * window, 0), min(block + near.stop * window, k.shape[-2])
    near_k = hide(cast(k[..., low:high, :], dtype), key_mask[..., low:high])
    logits = feature_map.log_kernel(cast(q[..., start:stop, :], dtype), near_k)
    visible = key_mask[..., None, low:high]
    if causal:
        positions = namespace_of(k).arange(0, high, **on_device_of(k))
        visible = visible & (positions[start:stop, None] >= positions[None, low:high])
    values = hide(cast(v[..., low:high, :], dtype), key_mask[..., low:high])
    return exact_partial(logits, visible, values, mixed=causal)


def rows_between(x: Array, start: int, stop: int) -> Array:
    """x[..., start:stop, :], with zeros (False) in place of positions that x does not have."""
    length = x.shape[-2]
    low, high = min(max(start, 0), length), min(max(stop, 0), length)
    if (low, high) == (start, stop):
        return x[..., low:high, :]
    xp = namespace_of(x)
    front = min(max(-start, 0), stop - start)
    back = stop - start - front - (high - low)
    ends = [xp.zeros((*x.shape[:-2], size, x.shape[-1]), dtype=x.dtype, **on_device_of(x)) for size in (front, back)]
    return xp.concat([ends[0], x[..., low:high, :], ends[1]], axis=-2)


def join_rows(parts: list[Partial]) -> Partial:
    """Join the partial sums of consecutive rows."""
    if len(parts) == 1:
        return parts[0]
    xp = namespace_of(parts[0].num)
    return Partial(*(xp.concat([getattr(p, name) for p in parts], axis=-2) for name in ("num", "den", "ref")))


def _prefix_partial(lq: Array, lk: Array, v: Array, block: int, reverse: bool) -> Partial:
    """Partial sums of each query over the keys of its own and earlier (or later) blocks of the tile."""
    if reverse:
        lq, lk, v = (_flip(x) for x in (lq, lk, v))
    part = _map(pair_partial(*(_in_blocks(x, block) for x in (lq, lk, v))), _out_of_blocks)
    size = block
    while size < lq.shape[-2]:
        later, earlier, values = (_in_blocks(x, size) for x in (lq, lk, v))
        part = merge(
            part,
            _to_second_halves(pair_partial(later[..., 1::2, :, :], earlier[..., ::2, :, :], values[..., ::2, :, :])),
        )
        size *= 2
    return _map(part, _flip) if reverse else part


def _to_second_halves(part: Partial) -> Partial:
    """Extend partial sums of every second block, (*b, r, size, .), to all rows; other blocks have read nothing."""
    xp = namespace_of(part.ref)
    nothing = Partial(xp.zeros_like(part.num), xp.zeros_like(part.den), xp.zeros_like(part.ref) - xp.inf)

    def weave(name: str) -> Array:
        both = xp.concat([getattr(nothing, name), getattr(part, name)], axis=-2)
        return _out_of_blocks(both)

    return Partial(weave("num"), weave("den"), weave("ref"))


def _map(part: Partial, change: Callable[[Array], Array]) -> Partial:
    return Partial(change(part.num), change(part.den), change(part.ref))


def _first_rows(part: Partial, count: int) -> Partial:
    return part if part.ref.shape[-2] == count else _map(part, lambda x: x[..., :count, :])


def _flip(x: Array) -> Array:
    return namespace_of(x).flip(x, axis=-2)


def _in_blocks(x: Array, size: int) -> Array:
    """(*b, t, .) -> (*b, t / size, size, .)."""
    *batch, length, width = x.shape
    return namespace_of(x).reshape(x, (*batch, length // size, size, width))


def _out_of_blocks(x: Array) -> Array:
    """(*b, r, size, .) -> (*b, r size, .)."""
    *batch, count, size, width = x.shape
    return namespace_of(x).reshape(x, (*batch, count * size, width))
