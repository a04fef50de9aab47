"""Causal linear attention: a query reads the keys up to its own, and those of a state.

`linear_attention` calls this op.
"""

from dataclasses import replace

from favorsharp._arrays import broadcast_shapes, cast, compute_dtype, namespace_of, on_device_of, result_dtype
from favorsharp._typing import Array, PositiveMap
from favorsharp.dispatch import Op
from favorsharp.ops.blocks import far_step, near_partial, tile_of
from favorsharp.ops.partials import finish, merge
from favorsharp.ops.state import State, empty_state, with_recent
from favorsharp.ops.window_rule import num_leaving


@Op
def causal_attention(
    q: Array,
    k: Array,
    v: Array,
    feature_map: PositiveMap,
    *,
    key_mask: Array | None = None,
    window: int = 0,
    state: State | None = None,
) -> tuple[Array, State]:
    """Attention of query i to the visible keys 0 .. i, through the features of a map; no n by n matrix is formed.

    Parameters
    ----------
    q : array, shape (*b, n, d)
    k : array, shape (*b, n, d)
    v : array, shape (*b, n, e)
    feature_map : PositiveFeatureMap
        In the dtype to compute in.
    key_mask : array of bool, shape (*b, n), optional
        True where a key is visible.
    window : int
        Block length of exactly scored keys; 0 for none.
    state : State, optional
        The state of the keys before the first one; its window must be the one given.

    Returns
    -------
    out : array, shape (*b, n, e)
        In the dtype that q, k and v promote to; zeros where no key is visible. Sums are in float32 at least.
    state : State
        The state of all keys.
    """
    xp = namespace_of(q, k, v)
    dtype, out_dtype = compute_dtype(xp, q, k, v), result_dtype(xp, q, k, v)
    batch = broadcast_shapes(
        k.shape[:-2], v.shape[:-2], feature_map.batch_shape, () if key_mask is None else key_mask.shape[:-1]
    )
    if state is None:
        state = empty_state(feature_map, batch, k.shape[-1], v.shape[-1], window, cast(k[..., :0, :], dtype))
        state = replace(state, recent_k=cast(state.recent_k, k.dtype), recent_v=cast(state.recent_v, k.dtype))
    full_batch = broadcast_shapes(q.shape[:-2], batch, state.kv.shape[:-2])
    before = state.recent_k.shape[-2]
    keys, values, mask = with_recent(state, k, v, key_mask)
    # the queries at keys that the state keeps were processed before; rows of zeros take their place, and are cut off
    # again
    front = xp.zeros((*q.shape[:-2], before, q.shape[-1]), dtype=q.dtype, **on_device_of(q))
    queries = q if before == 0 else xp.concat([front, q], axis=-2)
    length = queries.shape[-2]
    limit = num_leaving(length, window) if window else length
    tile = tile_of(window, length, state, queries)
    outs = []
    for start in range(0, length, tile):
        parts, state = far_step(state, queries, keys, values, mask, feature_map, start=start, tile=tile, limit=limit)
        for a, b, part in parts:
            if window:
                near = near_partial(queries, keys, values, mask, feature_map, (a, b), state, causal=True)
                part = merge(part, near)
            if b > before:
                out = cast(finish(part), out_dtype)[..., max(before - a, 0) :, :]
                outs.append(xp.broadcast_to(out, (*full_batch, *out.shape[-2:])))
    if window:
        state = replace(
            state, recent_k=keys[..., limit:, :], recent_v=values[..., limit:, :], recent_mask=mask[..., limit:]
        )
    if not outs:
        return xp.zeros((*full_batch, 0, v.shape[-1]), dtype=out_dtype, **on_device_of(q)), state
    return outs[0] if len(outs) == 1 else xp.concat(outs, axis=-2), state
