"""Patterns that models compose: windows of two lengths, unions in which a part has no effect, and joined masks."""

import pytest
import torch
from tiny import llama
from transformers import masking_utils
from transformers.models.t5gemma2 import modeling_t5gemma2 as t5gemma2

from favorsharp.exact import softmax_attention
from favorsharp.transformers import register
from favorsharp.transformers.attention import attend
from favorsharp.transformers.masks import compact_mask, read_mask
from favorsharp.transformers.registrations import REGISTERED

CAUSAL, BIDIRECTIONAL = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
WINDOW = masking_utils.sliding_window_causal_mask_function(3)


@pytest.fixture(autouse=True)
def _registered():
    register("exact", method="exact")
    register("landmarks", method="landmarks", num_features=32, rng=0)  # as many as there are keys
    register("posrf", method="posrf", num_features=16, rng=0)


def mask_of(pattern, padding=None, n=12):
    return compact_mask(2, n, 12, q_offset=12 - n, mask_function=pattern, attention_mask=padding, use_vmap=True)


def points(n, s, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, h, m, 8, generator=generator, dtype=torch.float64) for h, m in ((4, n), (2, s), (2, s)))


@pytest.mark.parametrize(("size", "before", "behind"), [(4, 1, 2), (5, 2, 2), (30, 14, 15)])
def test_a_window_may_reach_further_to_one_side(size, before, behind):
    overlay = t5gemma2.sliding_window_mask_function(size, is_causal=False)
    mask = mask_of(masking_utils.and_masks(BIDIRECTIONAL, overlay))
    seen = read_mask(mask, 12, 12, is_causal=False)
    assert (seen.is_causal, seen.reach) == (False, (before, behind))
    q, k, v = points(12, 12)
    positions = torch.arange(12)
    band = overlay(0, 0, positions[:, None], positions[None])
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=band, enable_gqa=True)
    found, _ = attend(REGISTERED["posrf"], llama().model.layers[0].self_attn, q, k, v, mask)
    torch.testing.assert_close(found.transpose(1, 2), want)


@pytest.mark.parametrize("pattern", [CAUSAL, WINDOW], ids=["causal", "window"])
def test_blocks_of_images_change_nothing_where_there_is_no_image(pattern):
    images = torch.full((2, 12), -1)
    alone, joined = (
        read_mask(mask_of(p), 12, 12, is_causal=True)
        for p in (pattern, masking_utils.or_masks(pattern, masking_utils.blockwise_overlay(images)))
    )
    assert joined == alone
    images[1, 4:7] = 0
    mask = mask_of(masking_utils.or_masks(pattern, masking_utils.blockwise_overlay(images)))
    with pytest.raises(ValueError, match="another attention pattern"):
        read_mask(mask, 12, 12, is_causal=True)


@pytest.mark.parametrize("method", ["exact", "landmarks", "posrf"])
@pytest.mark.parametrize("n", [12, 5, 1])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("pattern", [CAUSAL, WINDOW], ids=["causal", "window"])
def test_a_decoder_may_join_its_keys_with_those_of_the_encoder(pattern, is_padded, n, method):
    """As T5Gemma 2 does: its own keys first, which are causal, and then keys that every query sees."""
    own, other = (torch.ones(2, size, dtype=torch.bool) for size in (12, 9))
    if is_padded:
        own[1, :5] = other[1, 7:] = False
    masks = mask_of(pattern, own, n), compact_mask(2, n, 9, mask_function=BIDIRECTIONAL, attention_mask=other)
    q, k, v = points(n, 21)
    positions = torch.arange(12)
    visible = positions <= torch.arange(12 - n, 12)[:, None]
    visible &= positions > torch.arange(12 - n, 12)[:, None] - (3 if pattern is WINDOW else 12)
    visible = torch.cat([visible & own[:, None], other[:, None].expand(-1, n, -1)], dim=-1)
    layer = llama().model.layers[0].self_attn
    found, _ = attend(REGISTERED[method], layer, q, k, v, torch.cat(masks, dim=-1))
    if method == "posrf" and pattern is CAUSAL:  # an estimate, which must depend on visible keys only
        hidden = ~visible[:, -1]
        k, v = (torch.where(hidden[:, None, :, None], x + 1.0, x) for x in (k, v))
        torch.testing.assert_close(attend(REGISTERED[method], layer, q, k, v, torch.cat(masks, dim=-1))[0], found)
        v = torch.where(torch.arange(21)[:, None] >= 12, v + 1.0, v)
        assert (attend(REGISTERED[method], layer, q, k, v, torch.cat(masks, dim=-1))[0] - found).abs().min() > 1e-3
        return
    rows = [
        softmax_attention(q[:, :, i : i + 1], k, v, enable_gqa=True, key_mask=visible[:, None, i]) for i in range(n)
    ]
    torch.testing.assert_close(found.transpose(1, 2), torch.cat(rows, dim=2))


def test_masks_are_joined_in_this_way_only():
    causal, whole = mask_of(CAUSAL), mask_of(BIDIRECTIONAL)
    joined = torch.cat([causal, whole], dim=-1)
    assert read_mask(joined.clone()[:1], 12, 24, is_causal=False).others == 12
    for masks, dim in (((whole, causal), -1), ((causal, causal), -1), ((causal, whole), 0), ((joined, whole), -1)):
        with pytest.raises(ValueError, match=r"computes with its attention mask itself \(cat\)"):
            torch.cat(masks, dim=dim)
