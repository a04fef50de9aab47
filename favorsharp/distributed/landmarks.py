"""Attention through landmarks over several processes: each rank compresses its own keys, and the results are joined.

All ranks use the moments of all queries and keys, so they have the same metric. Each rank sends its landmarks, or its
keys if it has no more than m, to all ranks. Every rank compresses what it receives again to m landmarks, which are the
same on all ranks. No rank sends more than m (d + e + 2) numbers a head to another.
"""

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist

from favorsharp._arrays import cast, dtype_name, library_of, result_dtype
from favorsharp._autodiff import needs_gradient
from favorsharp._checks import check_attention
from favorsharp._heads import merge_heads, split_heads
from favorsharp._typing import Array
from favorsharp.distributed.collectives import Exchange, Tied, on_every_rank
from favorsharp.distributed.shards import agreed
from favorsharp.landmarks import Landmarks, LandmarkState
from favorsharp.landmarks.attention import read_state
from favorsharp.landmarks.state import extended, moments_of, no_keys, reduced
from favorsharp.moments import Moments, combine

_SIDES = ("count_x", "mean_x", "covariance_x", "count_y", "mean_y", "covariance_y")


@dataclass(frozen=True, eq=False)
class _Call:
    """The checked call of a rank: queries with a group axis, if heads are grouped."""

    q: Array
    k: Array
    v: Array
    key_mask: Array | None
    group: int
    empty: LandmarkState
    dtype: Any
    told: dict[str, Any]


def landmark_attention(
    q: Array,
    k: Array,
    v: Array,
    settings: Landmarks,
    *,
    is_causal: bool,
    window: int,
    key_mask: Array | None,
    enable_gqa: bool,
    group: Any,
) -> Array:
    """`favorsharp.distributed.linear_attention` with landmarks."""
    options: dict[str, Any] = {"is_causal": is_causal, "window": window, "key_mask": key_mask, "enable_gqa": enable_gqa}
    call, told = on_every_rank(group, lambda: _prepared(q, k, v, settings, **options), lambda made: made.told)
    agreed(told)
    grouped = call.group > 1
    seen = _of_all_ranks(moments_of(call.q, call.k, call.key_mask, grouped=grouped), group)
    state = reduced(replace(extended(call.empty, None, call.k, call.v, call.key_mask), moments=seen))
    sent, ranks = _packed(state), len(told)
    coming = [min(one["length"], settings.num_landmarks) for one in told]
    (rows,) = Exchange.apply(group, (([sent.shape[0]] * ranks, coming),), torch.cat([sent] * ranks), q, k, v)
    out = read_state(reduced(_unpacked(rows, state)), call.q, grouped=grouped)
    return merge_heads(call.group, Tied.apply(cast(out, call.dtype), rows))


def _prepared(
    q: Array,
    k: Array,
    v: Array,
    settings: Landmarks,
    *,
    is_causal: bool,
    window: int,
    key_mask: Array | None,
    enable_gqa: bool,
) -> _Call:
    """Check and prepare the arguments of this rank; `told` holds what the ranks compare."""
    if is_causal or window:
        raise ValueError(
            f"landmarks over several ranks take no is_causal and no window, got is_causal={is_causal}, "
            f"window={window}; accepted: a feature map for these, or False and 0"
        )
    xp, heads = check_attention(q, k, v, is_causal=False, key_mask=key_mask, enable_gqa=enable_gqa)
    if library_of(q) != "torch":
        raise TypeError(f"q, k and v must be torch tensors, got arrays of {library_of(q)}")
    empty = no_keys(settings, q, k, v, key_mask, 0)
    told = {
        "length": k.shape[-2],
        "window": 0,
        "query heads to a key head": heads,
        "leading axes of the queries": tuple(q.shape[:-2]),
        "leading axes of the keys": empty.batch_shape,
        "d, the size of a key": k.shape[-1],
        "e, the size of a value": v.shape[-1],
        "dtype": dtype_name(result_dtype(xp, q, k, v)),
        "whether gradients are recorded": any(needs_gradient(x) for x in (q, k, v)),
        "feature_map": settings,
    }
    return _Call(split_heads(heads, q), k, v, key_mask, heads, empty, result_dtype(xp, q, k, v), told)


def _of_all_ranks(own: Moments, group: Any) -> Moments:
    """The moments of the queries and keys of all ranks."""
    parts = [getattr(own, name) for name in _SIDES]
    flat = torch.cat([x.reshape(-1) for x in parts])
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, flat, group=group)
    sizes = [x.numel() for x in parts]
    moments = []
    for one in found:
        arrays = zip(_SIDES, torch.split(one, sizes), parts, strict=True)
        moments.append(replace(own, **{name: x.reshape(like.shape) for name, x, like in arrays}))
    return reduce(combine, moments)


def _packed(state: LandmarkState) -> Array:
    """Keys, values, log weights and a flag for those that count, with the point axis first: (r, *b, d + e + 2)."""
    seen = state.log_weight != -torch.inf
    weight = torch.where(seen, state.log_weight, 0.0)
    parts = (state.keys, state.values, weight[..., None], cast(seen, weight.dtype)[..., None])
    rows = [x.expand((*state.batch_shape, *x.shape[-2:])) for x in parts]
    return torch.cat(rows, -1).movedim(-2, 0)


def _unpacked(rows: Array, like: LandmarkState) -> LandmarkState:
    """The state of packed rows, with the moments of `like`."""
    rows, d = rows.movedim(0, -2), like.keys.shape[-1]
    weight = torch.where(rows[..., -1] > 0.5, rows[..., -2], -torch.inf)
    return replace(like, keys=rows[..., :d], values=rows[..., d:-2], log_weight=weight)
