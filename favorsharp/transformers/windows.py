"""Attention of layers with a sliding window: each query sees few keys, so it is exact, in time linear in the length."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from favorsharp.transformers.masks import Visible

Tensor = Any


@dataclass(frozen=True, eq=False)
class NearKeys:
    """The last keys and values of a stream, which are all that the window of a later query can contain.

    Attributes
    ----------
    keys, values : tensor, shape (B, Hkv, r, d) and (B, Hkv, r, e)
    mask : tensor of bool, shape (B, r)
        True where a key is visible.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor


def near_attention(query: Tensor, key: Tensor, value: Tensor, seen: Visible, scaling: float | None) -> Tensor:
    """Softmax attention to the keys within `seen.reach`; queries are at the last positions of the keys.

    Queries are cut into blocks as long as the reach, which share the keys that any of them sees. (B, H, n, d), with
    keys and values of (B, Hkv, s, .) -> (B, H, n, e). Keys of another sequence come first; every block has all of them.
    """
    n, s, o, (before, behind) = query.shape[-2], key.shape[-2], seen.others, seen.reach or (0, 0)
    if n == 0 or s == 0:
        return query.new_zeros((*query.shape[:-1], value.shape[-1]))
    block = min(n, max(16, before))
    count = -(-n // block)
    width = block + before + behind
    padding = (before, count * block - n + behind)  # positions before the first key and after the last
    first = s - o - n
    visible = torch.ones((1, s), dtype=torch.bool, device=key.device) if seen.key_mask is None else seen.key_mask[:, 0]
    near = functional.pad(visible[:, o:], padding)[:, first:].unfold(-1, width, block)
    offset = torch.arange(width, device=key.device) - torch.arange(block, device=key.device)[:, None] - before
    mask = near[:, :, None, :] & (offset >= -before) & (offset <= behind)
    mask = torch.cat([visible[:, None, None, :o].expand(-1, count, block, -1), mask], dim=-1)
    keys, values = (
        torch.cat(
            [
                x[..., :o, :].repeat_interleave(count, dim=0),
                _blocks(functional.pad(x[..., o:, :], (0, 0, *padding))[..., first:, :], width, block),
            ],
            dim=-2,
        )
        for x in (key, value)
    )
    queries = _blocks(functional.pad(query, (0, 0, 0, count * block - n)), block, block)
    mask = mask.expand(key.shape[0], -1, -1, -1).reshape(-1, 1, block, o + width)
    out = functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    out = torch.where(mask.any(-1, keepdim=True), out, 0.0)
    out = out.unflatten(0, (query.shape[0], count)).movedim(1, 2).flatten(2, 3)
    return out[..., :n, :]


def near_step(
    state: NearKeys | None, query: Tensor, key: Tensor, value: Tensor, seen: Visible, scaling: float | None
) -> tuple[Tensor, NearKeys]:
    """`near_attention` for the next block of a stream, and the keys that later blocks can see."""
    mask = torch.ones_like(key[:, 0, :, 0], dtype=torch.bool) if seen.key_mask is None else seen.key_mask[:, 0]
    mask = mask.expand(key.shape[0], -1)
    if state is not None:
        key, value = torch.cat([state.keys, key], dim=-2), torch.cat([state.values, value], dim=-2)
        mask = torch.cat([state.mask, mask], dim=-1)
    out = near_attention(query, key, value, Visible(mask[:, None], True, seen.reach), scaling)
    kept = max(0, key.shape[-2] - (seen.reach or (0, 0))[0])
    return out, NearKeys(key[..., kept:, :].clone(), value[..., kept:, :].clone(), mask[:, kept:].clone())


def _blocks(x: Tensor, width: int, step: int) -> Tensor:
    """Overlapping blocks of an array, (B, H, s, d) -> (B blocks, H, width, d)."""
    return x.unfold(-2, width, step).movedim(2, 1).flatten(0, 1).mT
