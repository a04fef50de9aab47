"""Bidirectional attention: runs the tensor-core kernels (`tiles`) if they fit the call, otherwise the plain ones.

`dispatch` calls `attention` and `attention_packed` for CuPy arrays; `torch_ops` calls `attention` for tensors.
`attention_with_stats` is the forward pass of differentiated calls, in `vjp` and `torch.operators`.
"""

from typing import Any

from favorsharp.backend import broadcast_shapes
from favorsharp_cuda.host import arrays, plain, tile_sizes, tiles
from favorsharp_cuda.host.packed import packed
from favorsharp_cuda.host.problem import key_batch_of


def attention(
    q: Any, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None, window: int = 0, out: Any = None
) -> Any:
    """As `favorsharp.ops.attention.attention`; the result is in `out` if a kernel can write to it."""
    return _attend(q, k, v, feature_map, key_mask, window, out=out)


def attention_with_stats(
    q: Any, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None, window: int = 0
) -> tuple[Any, Any]:
    """Attention, and the stats for a backward pass: 1 / total and the reference of every query, (*b, n, 2).

    The reference is the number that was subtracted from the query's log weights; the total is the sum of its weights.
    """
    batch = broadcast_shapes(tuple(q.shape[:-2]), key_batch_of(feature_map, k, v, key_mask))
    stats = arrays.empty(q, (*batch, q.shape[-2], 2), arrays.WIDER[arrays.name_of(q)])
    return _attend(q, k, v, feature_map, key_mask, window, stats=stats), stats


attention_packed = packed(attention)


def _attend(q: Any, k: Any, v: Any, feature_map: Any, key_mask: Any, window: int, **places: Any) -> Any:
    walks = bool(window and k.shape[-2])
    if not tile_sizes.fit(q, v.shape[-1], walks=walks):
        return plain.attention(q, k, v, feature_map, key_mask, window, **places)
    if walks:
        return tiles.windowed(q, k, v, feature_map, key_mask, window, **places)
    return tiles.attention(q, k, v, feature_map, key_mask, **places)
