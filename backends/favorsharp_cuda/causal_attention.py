"""Causal attention: runs the tensor-core kernels (`tiles`) if they fit the call, otherwise the plain ones.

`dispatch` calls `causal_attention` and `causal_attention_packed` for CuPy arrays; `torch_ops` calls `causal_attention`
for tensors. `causal_attention_with_stats` is the forward pass of differentiated calls, in `vjp`, `torch_ops` and
`torch.operators`.
"""

from dataclasses import replace
from typing import Any

from favorsharp.backend import State, broadcast_shapes, namespace_of, num_leaving, with_recent
from favorsharp_cuda.host import arrays, plain, tile_sizes, tiles
from favorsharp_cuda.host.packed import packed
from favorsharp_cuda.host.problem import key_batch_of, lows_of, sums_of
from favorsharp_cuda.state import fitting, recent_of


def causal_attention(
    q: Any, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None, window: int = 0, state: State | None = None,
    out: Any = None,
) -> tuple[Any, State]:  # fmt: skip
    """As `favorsharp.ops.causal_attention.causal_attention`; the result is in `out` if a kernel can write to it."""
    return _attend(q, k, v, feature_map, key_mask, window, state, out=out)


def causal_attention_with_stats(
    q: Any, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None, window: int = 0, state: State | None = None
) -> tuple[Any, Any, State]:
    """Causal attention, 1 / total and the reference of every query for a backward pass, (*b, n, 2), and the state.

    There may be more keys than queries. The first keys are then the recent keys of a state, which precede all queries.
    """
    batch = broadcast_shapes(tuple(q.shape[:-2]), key_batch_of(feature_map, k, v, key_mask, state))
    stats = arrays.empty(q, (*batch, q.shape[-2], 2), arrays.WIDER[arrays.name_of(q)])
    out, state = _attend(q, k, v, feature_map, key_mask, window, state, stats=stats)
    return out, stats, state


causal_attention_packed = packed(causal_attention)


def _attend(
    q: Any, k: Any, v: Any, feature_map: Any, key_mask: Any, window: int, state: State | None, *, stats: Any = None,
    out: Any = None,
) -> tuple[Any, State]:  # fmt: skip
    dtype = arrays.name_of(q)
    wide = arrays.WIDER[dtype] if state is None else arrays.name_of(state.kv)
    inputs = [q, k, v, key_mask]  # `out` must not overlap these: kernels read them, and the returned state may too
    if state is not None:
        inputs += [state.kv, state.z, state.c, state.recent_k, state.recent_v, state.recent_mask]
        if state.recent_k.shape[-2]:
            k, v, key_mask = with_recent(state, k, v, key_mask)
    length = k.shape[-2]
    limit = num_leaving(length, window) if window else length
    key_batch = key_batch_of(feature_map, k, v, key_mask, state)
    batch = broadcast_shapes(tuple(q.shape[:-2]), key_batch)
    queries, keys, values = (fitting(x, wide) for x in (q, k, v))
    given, low = (None, (None, None)) if state is None else (sums_of(state), lows_of(state))
    out = arrays.target(out, inputs, (*batch, q.shape[-2], v.shape[-1]), arrays.name_of(queries))
    numbers = {"window": window, "first_query": length - q.shape[-2], "limit": limit}
    if tile_sizes.fit(queries, v.shape[-1], walks=True):
        sums, new_low = tiles.causal(
            out, queries, keys, values, feature_map, key_mask, given, low, key_batch=key_batch, stats=stats, **numbers
        )  # fmt: skip
    else:
        sums, new_low = plain.causal(
            out, queries, keys, values, feature_map, key_mask, given, low, stats=stats, **numbers
        )  # fmt: skip
    kv, z, c, kv_low, z_low = _of_key_heads((*sums, *new_low), batch, key_batch)
    after: dict[str, Any] = {"kv": kv, "z": z, "c": c, "kv_low": kv_low, "z_low": z_low}
    if window:
        if key_mask is None:
            xp = namespace_of(k)
            key_mask = xp.ones_like(k[..., 0], dtype=xp.bool)
        after |= recent_of(k[..., limit:, :], v[..., limit:, :], key_mask[..., limit:])
    elif state is None:
        after |= _nothing(k, v, key_batch)
    if state is None:
        return arrays.cast(out, dtype), State(window=window, fingerprint=None, **after)
    return arrays.cast(out, dtype), replace(state, **after)


def _nothing(k: Any, v: Any, batch: tuple[int, ...]) -> dict[str, Any]:
    """The fields of a state that has no recent keys."""
    return {
        "recent_k": arrays.empty(k, (*batch, 0, k.shape[-1]), arrays.name_of(k)),
        "recent_v": arrays.empty(v, (*batch, 0, v.shape[-1]), arrays.name_of(v)),
        "recent_mask": arrays.empty(k, (*batch, 0), "bool"),
    }


def _of_key_heads(sums: tuple[Any, ...], batch: tuple[int, ...], keys: tuple[int, ...]) -> tuple[Any, ...]:
    """Select, from the sums of all heads of `batch`, one entry for each head of `keys`."""
    if batch == keys:
        return sums
    chosen = _one_along(batch, keys)
    return tuple(None if x is None else x[chosen] for x in sums)


def _one_along(batch: tuple[int, ...], keys: tuple[int, ...]) -> tuple[Any, ...]:
    """The index that picks, from the sums of all heads of `batch`, one entry for each head of `keys`."""
    missing = len(batch) - len(keys)
    inner = (slice(None) if size == own else slice(0, 1) for size, own in zip(batch[missing:], keys, strict=True))
    return (*(0 for _ in range(missing)), *inner, slice(None), slice(None))
