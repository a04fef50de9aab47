"""The ops of states: `update` adds keys, `read` lets queries read the sums, and `decode_step` does both for a token.

`dispatch` calls these functions; `torch.operators` calls them too. `update` and `read` run the tensor-core kernels
(`tiles`) or the plain ones; `decode_step` has a kernel of its own.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from favorsharp.backend import State, broadcast_shapes, namespace_of, num_leaving, with_recent
from favorsharp_cuda.host import arrays, plain, tile_sizes, tiles
from favorsharp_cuda.host.problem import key_batch_of, lows_of, sums_of
from favorsharp_cuda.host.token_plan import TokenPlan, plan_of

FEW = 16
"""Calls with fewer points use the plain kernels: a single token would fill only one row of a tile of 64."""


def update(state: State, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None) -> State:
    """As `favorsharp.ops.state.update`."""
    if state.window == 0:
        return _absorbed(state, k, v, key_mask, feature_map)
    k, v, mask = with_recent(state, k, v, key_mask)
    return _with_recent(state, k, v, mask, num_leaving(k.shape[-2], state.window), feature_map)


def read(state: State, q: Any, feature_map: Any) -> Any:
    """As `favorsharp.ops.state.read`."""
    return _read(state, q, feature_map)


def read_with_stats(state: State, q: Any, feature_map: Any) -> tuple[Any, Any]:
    """The result of a read, and for a backward pass 1 / total and the reference of every query, (*b, n, 2)."""
    keys = key_batch_of(feature_map, state.recent_k, state.recent_v, state.recent_mask, state)
    batch = broadcast_shapes(tuple(q.shape[:-2]), keys)
    stats = arrays.empty(q, (*batch, q.shape[-2], 2), arrays.name_of(state.kv))
    return _read(state, q, feature_map, stats=stats), stats


def _read(state: State, q: Any, feature_map: Any, *, stats: Any = None) -> Any:
    dtype, wide = arrays.name_of(q), arrays.name_of(state.kv)
    q = fitting(q, wide)
    recent = None
    if state.recent_k.shape[-2]:
        working = arrays.name_of(q)
        recent = (arrays.cast(state.recent_k, working), arrays.cast(state.recent_v, working), state.recent_mask)
    keys = key_batch_of(feature_map, state.recent_k, state.recent_v, state.recent_mask, state)
    batch = broadcast_shapes(tuple(q.shape[:-2]), keys)
    out = arrays.empty(q, (*batch, q.shape[-2], state.kv.shape[-1]), arrays.name_of(q))
    sums = sums_of(state)
    if recent is None and q.shape[-2] >= FEW and tile_sizes.fit(q, out.shape[-1]):
        tiles.read(out, q, feature_map, sums, keys, stats=stats)
    else:
        plain.read(out, q, feature_map, sums, recent, stats=stats)
    return arrays.cast(out, dtype)


def decode_step(q: Any, k: Any, v: Any, state: State, feature_map: Any, *, key_mask: Any = None) -> tuple[Any, State]:
    """As `favorsharp.ops.state.decode_step`.

    One launch does all, unless the token does not fit into shared memory (`plain.decode`) or dtypes are mixed.
    """
    given = (q, k, v, feature_map, key_mask)
    decoded = _decoded(*given, state)
    leaving = entering(state, 1) if state.window else 0
    if decoded is None and leaving:  # too many keys enter for one launch: add them to the sums first
        state = _with_recent(state, state.recent_k, state.recent_v, state.recent_mask, leaving, feature_map)
        decoded = _decoded(*given, state)
    if decoded is not None:
        return decoded
    state = update(state, k, v, feature_map, key_mask=key_mask)
    return read(state, q, feature_map), state


def decode_step_plan(q: Any, k: Any, v: Any, state: State, feature_map: Any) -> TokenPlan | None:
    """A function of the same arguments as `decode_step`, for tokens with the layouts of this one, or None."""
    return plan_of(q, k, v, state, decode_step)


def entering(state: State, new: Any) -> Any:
    """How many keys enter the sums when `new` keys arrive; without a window these are all of the new ones."""
    return num_leaving(state.recent_k.shape[-2] + new, state.window) if state.window else new


def _with_recent(state: State, k: Any, v: Any, mask: Any, leaving: int, feature_map: Any) -> State:
    """The state with these keys as recent keys, except for the first `leaving`, which enter the sums."""
    if leaving:
        state = _absorbed(state, k[..., :leaving, :], v[..., :leaving, :], mask[..., :leaving], feature_map)
    return replace(state, **recent_of(k[..., leaving:, :], v[..., leaving:, :], mask[..., leaving:]))


def _decoded(q: Any, k: Any, v: Any, feature_map: Any, key_mask: Any, state: State) -> tuple[Any, State] | None:
    """The result and the state of `decode_step` from a single launch; None if a single launch cannot do it."""
    wide, sums = arrays.name_of(state.kv), sums_of(state)
    if state.window == 0:
        token, recent = (fitting(q, wide), fitting(k, wide), fitting(v, wide)), None
    else:
        token, recent = (q, k, v), (state.recent_k, state.recent_v, state.recent_mask)
        if not _alike(token if state.recent_k.shape[-2] == 0 else (*token, *recent[:2]), wide):
            return None
    decoded = plain.decode(*token, feature_map, key_mask, sums, lows_of(state), entering(state, 1), recent)
    if decoded is None:
        return None
    out, ((kv, z, c), (kv_low, z_low)), kept = decoded
    after = replace(state, kv=kv, z=z, c=c, kv_low=kv_low, z_low=z_low)
    if kept is not None:
        after = replace(after, recent_k=kept[0], recent_v=kept[1], recent_mask=kept[2])
    return arrays.cast(out, arrays.name_of(q)), after


def _alike(points: Iterable[Any], wide: str) -> bool:
    """Whether all arrays have the same dtype, and kernels compute in dtype `wide` for it."""
    names = {arrays.name_of(x) for x in points}
    return len(names) == 1 and arrays.WIDER[names.pop()] == wide


def fitting(x: Any, wide: str) -> Any:
    """The array itself if kernels compute in dtype `wide` for it, otherwise the array in that dtype."""
    return x if arrays.WIDER[arrays.name_of(x)] == wide else arrays.cast(x, wide)


def recent_of(k: Any, v: Any, mask: Any) -> dict[str, Any]:
    """The recent keys, values and mask of a state, as its fields, broadcast to the same leading axes."""
    xp = namespace_of(k)
    batch = broadcast_shapes(tuple(k.shape[:-2]), tuple(v.shape[:-2]), tuple(mask.shape[:-1]))
    return {
        "recent_k": xp.broadcast_to(k, (*batch, *k.shape[-2:])),
        "recent_v": xp.broadcast_to(v, (*batch, *v.shape[-2:])),
        "recent_mask": xp.broadcast_to(mask, (*batch, mask.shape[-1])),
    }


def _absorbed(state: State, k: Any, v: Any, key_mask: Any, feature_map: Any) -> State:
    wide = arrays.name_of(state.kv)
    k, v, sums = fitting(k, wide), fitting(v, wide), sums_of(state)
    served = k.shape[-2] >= FEW and tile_sizes.fit(k, v.shape[-1])
    (kv, z, c), (kv_low, z_low) = (tiles if served else plain).absorb(k, v, feature_map, key_mask, sums, lows_of(state))
    return replace(state, kv=kv, z=z, c=c, kv_low=kv_low, z_low=z_low)
