"""Bidirectional and causal attention over several processes: the function that `favorsharp.distributed` exports."""

from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist

from favorsharp._arrays import broadcast_shapes, cast, compute_dtype, dtype_name, library_of
from favorsharp._autodiff import needs_gradient
from favorsharp._heads import merge_heads
from favorsharp._typing import Array
from favorsharp.calls import checked
from favorsharp.distributed.collectives import Exchange, Sum, Tied, on_every_rank
from favorsharp.distributed.dtensors import is_dtensor, over_dtensors
from favorsharp.distributed.landmarks import landmark_attention
from favorsharp.distributed.shards import (
    Routes,
    Shard,
    agreed,
    finite,
    packed_keys,
    packed_states,
    taken_in,
    unpacked_keys,
)
from favorsharp.features import FeatureMap
from favorsharp.landmarks import Landmarks
from favorsharp.ops.attention import windowed_rows
from favorsharp.ops.blocks import join_rows, rows_between
from favorsharp.ops.causal_attention import causal_attention
from favorsharp.ops.partials import finish as finished
from favorsharp.ops.state import State, read, with_sums


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    /,
    feature_map: FeatureMap | Landmarks,
    *,
    is_causal: bool = False,
    window: int = 0,
    key_mask: Array | None = None,
    enable_gqa: bool = False,
    group: Any = None,
) -> Array:
    """`favorsharp.linear_attention` of a sequence that is sharded over the ranks of a process group.

    Every rank calls it with its own shard and gets the outputs of its own queries. In training, every rank must also
    call `backward` on a loss that depends on its result, even if that result is empty. The gradients are those of the
    sum of all ranks' losses. The gradients of a map's arrays are shares: their sum over the ranks is the whole
    gradient.

    Parameters
    ----------
    q : tensor or DTensor, shape (*b, n, d)
        The rank's queries; n may differ between ranks and may be 0.
    k : tensor or DTensor, shape (*b, s, d)
    v : tensor or DTensor, shape (*b, s, e)
    feature_map : FeatureMap or Landmarks
        A map with positive features, and with the same numbers on every rank; or landmarks, for bidirectional calls
        without a window. Each rank then compresses its own keys, and what the ranks send each other is compressed
        again. So the result is not that of one process, but its error is about as large. It is exact if there are no
        more keys than landmarks.
    is_causal : bool
        A query sees all keys of earlier ranks, and the keys of its own rank up to its own position. Needs n == s on
        every rank.
    window : int
        Length of the blocks of exactly scored keys, counted from the start of the whole sequence; 0 for none. The
        length of each shard must be a multiple of it, except for the last shard that holds any positions. Needs
        n == s.
    key_mask : tensor of bool, shape (*b, s), optional
        True where a key of the shard is visible. With DTensors, a DTensor or the whole mask on every rank.
    enable_gqa : bool
        q has g times the heads of k and v; query head h reads key head h // g.
    group : ProcessGroup, optional
        None means the default group. It must be None with DTensors: the mesh dimension that shards the sequence gives
        the group.

    Returns
    -------
    tensor or DTensor, shape (*b, n, e)
        In the dtype that q, k and v promote to; zeros for a query that may see no key of any rank.

    Raises
    ------
    TypeError, ValueError
        On every rank, if an argument of any rank is not as described, or if the ranks' maps or options differ.

    Notes
    -----
    The ranks send each other states of m (e + 2) numbers a head, and the options on which they must agree. With a
    window they also send one block of keys and values to each neighbour. They never send whole shards of keys.

    Examples
    --------
    A group of one process; with more processes, each passes its own part of q, k and v.

    >>> import torch, torch.distributed as dist
    >>> import favorsharp as fs
    >>> from favorsharp.distributed import linear_attention
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> q, k, v = torch.randn(3, 2, 16, 4)
    >>> feature_map = fs.feature_map(fs.fit(q, k), 32, rng=0)
    >>> out = linear_attention(q, k, v, feature_map, is_causal=True)
    >>> torch.allclose(out, fs.linear_attention(q, k, v, feature_map, is_causal=True), atol=1e-5)
    True
    >>> dist.destroy_process_group()
    """
    options: dict[str, Any] = {"is_causal": is_causal, "window": window, "enable_gqa": enable_gqa}
    if torch.compiler.is_compiling():  # graphs cannot hold collectives that autograd records
        return torch.compiler.disable(linear_attention)(q, k, v, feature_map, key_mask=key_mask, group=group, **options)
    if is_dtensor(q, k, v):
        return over_dtensors(linear_attention, q, k, v, feature_map, key_mask=key_mask, group=group, **options)
    if isinstance(feature_map, Landmarks):
        return landmark_attention(q, k, v, feature_map, key_mask=key_mask, group=group, **options)
    shard, told = on_every_rank(
        group, lambda: _prepared(q, k, v, feature_map, key_mask=key_mask, **options), lambda made: made.told
    )
    lengths = agreed(told)
    if shard.is_causal or shard.window:
        out, exchanged = _in_order(shard, lengths, group)
    else:
        out, exchanged = _as_a_whole(shard, group)
    out = Tied.apply(cast(out, shard.dtype), exchanged)
    return merge_heads(shard.group, out)


def _prepared(
    q: Array,
    k: Array,
    v: Array,
    feature_map: FeatureMap,
    *,
    key_mask: Array | None,
    is_causal: bool,
    window: int,
    enable_gqa: bool,
) -> Shard:
    """Check and prepare the arguments of this rank; `told` holds what the ranks compare."""
    call = checked(q, k, v, feature_map, is_causal=is_causal, window=window, key_mask=key_mask, enable_gqa=enable_gqa)
    if library_of(q) != "torch":
        raise TypeError(f"q, k and v must be torch tensors, got arrays of {library_of(q)}")
    told = {
        "length": k.shape[-2],
        "is_causal": call.is_causal,
        "window": call.window,
        "query heads to a key head": call.group,
        "leading axes of the keys": call.key_batch,
        "d, the size of a key": k.shape[-1],
        "e, the size of a value": v.shape[-1],
        "dtype": dtype_name(call.dtype),
        "whether gradients are recorded": any(needs_gradient(x) for x in (q, k, v, *feature_map.arrays)),
        "feature_map": feature_map.fingerprint,
    }
    empty = call.empty_state(0, cast(call.k[..., :0, :], compute_dtype(call.xp, q, k, v)))
    return Shard(**{field.name: getattr(call, field.name) for field in fields(call)}, empty=empty, told=told)


def _as_a_whole(shard: Shard, group: Any) -> tuple[Array, Array]:
    """Bidirectional attention without a window: the states of the ranks are summed, and every query reads the sum."""
    state = shard.state_of(0, shard.k.shape[-2])
    # the output does not depend on the reference of the sums, so the reference needs no gradient
    top = state.c.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    sums = torch.cat([state.kv, state.z.mT], -1) * torch.exp(state.c - finite(top)).mT
    total = Sum.apply(group, sums, *shard.inputs)
    state = with_sums(state, total[..., :-1], total[..., -1:].mT, top)
    return read(state, shard.q, shard.feature_map), total


def _in_order(shard: Shard, lengths: list[int], group: Any) -> tuple[Array, Array]:
    """Causal or windowed attention: a query reads states of earlier (and later) ranks and the neighbours' blocks."""
    rank, ranks = dist.get_rank(group), range(len(lengths))
    routes = Routes(lengths, shard.window, shard.is_causal)
    sources = [source for source in ranks if routes.part(source, rank) is not None]
    parts = [routes.part(rank, to) for to in ranks]
    blocks = [routes.block(rank, to) for to in ranks]
    coming = [stop - start for start, stop in (routes.block(source, rank) for source in ranks)]
    counts = (
        ([int(part is not None) for part in parts], [int(source in sources) for source in ranks]),
        ([stop - start for start, stop in blocks], coming),
    )
    sent = packed_states(shard, parts), torch.cat([packed_keys(shard, *block) for block in blocks])
    states, keys = Exchange.apply(group, counts, *sent, *shard.inputs)
    earlier, left = sum(source < rank for source in sources), sum(coming[:rank])
    prefix, suffix = (taken_in(shard.empty, rows) for rows in (states[:earlier], states[earlier:]))
    near = [unpacked_keys(shard, rows) for rows in (keys[:left], keys[left:])]
    if not shard.is_causal:
        return _between(shard, prefix, suffix, *near), states
    recent = dict(zip(("recent_k", "recent_v", "recent_mask"), near[0], strict=True)) if shard.window else {}
    state = replace(prefix, window=shard.window, **recent)
    options: dict[str, Any] = {"key_mask": shard.key_mask, "window": shard.window, "state": state}
    return causal_attention(shard.q, shard.k, shard.v, shard.feature_map, **options)[0], states


_Block = tuple[Array, Array, Array]


def _between(shard: Shard, prefix: State, suffix: State, left: _Block, right: _Block) -> Array:
    """Bidirectional attention with a window, in a shard with neighbours on both sides."""
    n, before = shard.q.shape[-2], left[0].shape[-2]
    full = broadcast_shapes(shard.q.shape[:-2], prefix.kv.shape[:-2])
    if n == 0:
        return shard.q.new_zeros((*full, 0, shard.v.shape[-1]))
    mask = torch.ones_like(shard.k[..., 0], dtype=torch.bool) if shard.key_mask is None else shard.key_mask
    k, v, visible = (
        torch.cat([a, x.expand((*a.shape[:-2], *x.shape[-2:])), b], -2)
        for a, x, b in (
            (left[0], shard.k, right[0]),
            (left[1], shard.v, right[1]),
            (left[2][..., None], mask[..., None], right[2][..., None]),
        )
    )
    # the queries at the neighbours' keys are on other ranks; rows of zeros take their place, and are cut off again
    queries = rows_between(shard.q, -before, n + right[0].shape[-2])
    prefix, suffix = (replace(state, window=shard.window) for state in (prefix, suffix))
    parts = windowed_rows(prefix, suffix, queries, k, v, visible[..., 0], shard.feature_map)
    out = finished(join_rows([part for _, _, part in parts]))[..., before : before + n, :]
    return out.expand((*full, *out.shape[-2:]))
