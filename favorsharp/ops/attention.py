"""Bidirectional linear attention: every query reads every key. `linear_attention` calls this op."""

from favorsharp._arrays import broadcast_shapes, cast, compute_dtype, namespace_of, result_dtype
from favorsharp._typing import Array, PositiveMap
from favorsharp.dispatch import Op
from favorsharp.ops.blocks import Rows, far_step, near_partial, tile_of
from favorsharp.ops.partials import finish, merge
from favorsharp.ops.state import State, absorb, empty_state, log_features, read_partial
from favorsharp.ops.tiles import tiles_of


@Op
def attention(
    q: Array, k: Array, v: Array, feature_map: PositiveMap, *, key_mask: Array | None = None, window: int = 0
) -> Array:
    """Attention of queries to all visible keys, through the features of a map.

    Parameters
    ----------
    q : array, shape (*b, n, d)
    k : array, shape (*b, s, d)
    v : array, shape (*b, s, e)
    feature_map : PositiveFeatureMap
        In the dtype to compute in.
    key_mask : array of bool, shape (*b, s), optional
        True where a key is visible.
    window : int
        Block length of exactly scored keys; 0 for none. A window needs n == s.

    Returns
    -------
    array, shape (*b, n, e)
        In the dtype that q, k and v promote to; zeros where no key is visible. Sums are in float32 at least. The
        workspace is O(tile m); with a window it also holds the numerators of the first pass, O(n e), during the second.
    """
    xp = namespace_of(q, k, v)
    dtype, out_dtype = compute_dtype(xp, q, k, v), result_dtype(xp, q, k, v)
    batch = broadcast_shapes(
        k.shape[:-2], v.shape[:-2], feature_map.batch_shape, () if key_mask is None else key_mask.shape[:-1]
    )
    full_batch = broadcast_shapes(q.shape[:-2], batch)
    state = empty_state(feature_map, batch, k.shape[-1], v.shape[-1], window, cast(k[..., :0, :], dtype))
    if window > 0 and k.shape[-2] > 0:
        parts = windowed_rows(state, state, q, k, v, key_mask, feature_map)
        outs = [cast(finish(part), out_dtype) for _, _, part in parts]
    else:
        state = absorb(state, k, v, key_mask, feature_map)
        tiles = (cast(q[..., a:b, :], dtype) for a, b in tiles_of(q.shape[-2], state.num_features, full_batch))
        read = (read_partial(state, log_features(feature_map, "query", tile)) for tile in tiles)
        outs = [cast(finish(part), out_dtype) for part in read]
    outs = [xp.broadcast_to(out, (*full_batch, *out.shape[-2:])) for out in outs]
    return outs[0] if len(outs) == 1 else xp.concat(outs, axis=-2)


def windowed_rows(
    before: State, after: State, q: Array, k: Array, v: Array, key_mask: Array | None, feature_map: PositiveMap
) -> list[Rows]:
    """Attention with a window: near blocks exactly, the blocks before them in one pass, those after them in another.

    `before` and `after` are states of keys outside of k, two blocks or more away from every query whose output is used.
    """
    xp = namespace_of(q, k, v)
    n = q.shape[-2]
    mask = xp.ones_like(k[..., 0], dtype=xp.bool) if key_mask is None else key_mask
    tile = tile_of(before.window, n, before, q)
    starts = range(0, n, tile)
    passed: list[Rows] = []
    for start in starts:
        rows, before = far_step(before, q, k, v, mask, feature_map, start=start, tile=tile, limit=n)
        for a, b, part in rows:
            near = near_partial(q, k, v, mask, feature_map, (a, b), before, causal=False)
            passed.append((a, b, merge(part, near)))
    done: list[Rows] = []
    for start in reversed(starts):
        rows, after = far_step(after, q, k, v, mask, feature_map, start=start, tile=tile, limit=n, reverse=True)
        for a, b, part in reversed(rows):
            done.append((a, b, merge(passed.pop()[2], part)))
    return done[::-1]
