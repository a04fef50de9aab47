"""Masks are decoded or refused: no hidden key is seen, and no other pattern is taken for a supported one."""

import pytest
import torch
from tiny import MODELS, bert, gpt2, inputs, llama, output
from transformers import masking_utils

from favorsharp.transformers import StateCache, calibrate, register
from favorsharp.transformers.attention import attend
from favorsharp.transformers.masks import CompactMask, compact_mask, read_mask
from favorsharp.transformers.registrations import REGISTERED


@pytest.fixture(autouse=True)
def _registered():
    register("exact", method="exact")
    register("favorsharp", num_features=16, rng=0)
    register("posrf", method="posrf", num_features=16, rng=0)


PADDING = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()


def dense(pattern, dtype):
    """A pattern as callers pass it: boolean, or added to the scores."""
    return pattern if dtype is torch.bool else torch.where(pattern, 0.0, torch.finfo(dtype).min).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16], ids=str)
def test_dense_masks_are_decoded(dtype):
    keys = PADDING[:, None, None, :]
    for pattern, is_causal in ((keys.expand(2, 1, 6, 6), False), (keys & CAUSAL, True)):
        seen = read_mask(dense(pattern, dtype), 6, 6, is_causal=is_causal)
        assert seen.is_causal is is_causal
        assert torch.equal(seen.key_mask, PADDING[:, None])
    nothing_hidden = read_mask(dense(CAUSAL[None, None], dtype), 6, 6, is_causal=True)
    assert nothing_hidden.key_mask is None
    assert nothing_hidden.is_causal
    after_a_prefix = read_mask(dense((keys & CAUSAL)[:, :, 2:], dtype), 4, 6, is_causal=True)
    assert after_a_prefix.is_causal
    assert torch.equal(after_a_prefix.key_mask, PADDING[:, None])


def prefix():
    pattern = CAUSAL.clone()
    pattern[:3, :3] = True
    return pattern


OTHERS = {
    "sliding window": CAUSAL & CAUSAL.T.roll(2, 0).triu(-2),
    "blocks": torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool(),
    "prefix": prefix(),
    "one hole": CAUSAL & (torch.arange(36).view(6, 6) != 31),
    "the future": CAUSAL.T,
}


@pytest.mark.parametrize("pattern", OTHERS)
@pytest.mark.parametrize("implementation", ["exact", "posrf"])
def test_other_patterns_are_refused(pattern, implementation):
    mask = OTHERS[pattern][None, None].expand(2, 1, 6, 6)
    for model in (bert(), gpt2()):
        model.set_attn_implementation(implementation)
        with pytest.raises(ValueError, match="another pattern.*accepted: key padding, causal, or both"):
            model(input_ids=inputs("bert", batch=2, n=6)["input_ids"], attention_mask=mask)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.full((1, 1, 6, 6), 0.5), ValueError, "adds a bias"),
        (torch.stack([CAUSAL, CAUSAL.T])[None], ValueError, "differs between heads"),
        (torch.ones(1, 1, 6, 6, dtype=torch.int64), TypeError, "int64"),
        (torch.ones(2, 6, dtype=torch.bool), ValueError, r"shape \(2, 6\)"),
        (torch.ones(1, 1, 5, 6, dtype=torch.bool), ValueError, "n=6, s=6"),
        ("causal", TypeError, "str"),
        (torch.ones(1, 1, 1, 6, dtype=torch.int8), TypeError, "int8"),
        (torch.ones(1, 1, 1, 6, dtype=torch.int32).as_subclass(CompactMask), ValueError, "its length was lost"),
        (torch.ones(1, 1, 1, 5, dtype=torch.bool).as_subclass(CompactMask), ValueError, "5 keys, and its layer has 6"),
    ],
)
def test_what_is_no_mask_is_refused(mask, error, message):
    with pytest.raises(error, match=message):
        read_mask(mask, 6, 6, is_causal=False)


def test_no_mask_before_a_prefix_is_refused():
    with pytest.raises(ValueError, match="which keys precede"):
        read_mask(None, 2, 6, is_causal=True)


def test_the_mask_decides_whether_attention_is_causal():
    """Some decoders do not mark their layers as causal, and some encoders do; eager attention only adds the mask."""
    mask = torch.ones(1, 1, 1, 6, dtype=torch.int8).as_subclass(CompactMask)
    assert read_mask(mask, 6, 6, is_causal=False).is_causal
    assert not read_mask(torch.ones(1, 1, 1, 6, dtype=torch.bool), 6, 6, is_causal=True).is_causal
    posrf = REGISTERED["posrf"]
    layer = llama().model.layers[0].self_attn
    layer.is_causal, layer.is_decoder = False, True
    q, k, v = torch.randn(3, 1, 4, 6, 8, dtype=torch.float64)
    seen = attend(posrf, layer, q, k, v, mask)[0]
    later = torch.cat([k[:, :, :5], k[:, :, 5:] + 9.0], dim=2)
    torch.testing.assert_close(attend(posrf, layer, q, later, v, mask)[0][:, :5], seen[:, :5])


def test_the_shorter_of_two_windows_counts_and_a_moved_mask_keeps_it():
    windows = (masking_utils.sliding_window_overlay(size) for size in (5, 3, 4))
    pattern = masking_utils.and_masks(masking_utils.causal_mask_function, *windows)
    mask = compact_mask(1, 6, 6, mask_function=pattern)
    for moved in (mask, mask.clone(), mask.to("cpu", copy=True), mask[:1]):
        found = read_mask(moved, 6, 6, is_causal=True)
        assert (found.is_causal, found.reach) == (True, (2, 0))


def test_a_bias_of_minus_10000_hides_a_key():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        mask = torch.where(PADDING, 0.0, -10000.0).to(dtype)[:, None, None, :]
        assert torch.equal(read_mask(mask.expand(2, 1, 6, 6), 6, 6, is_causal=False).key_mask, PADDING[:, None])
    with pytest.raises(ValueError, match="adds a bias"):
        read_mask(torch.full((1, 1, 6, 6), -100.0), 6, 6, is_causal=False)


def test_packed_sequences_are_refused():
    model = llama()
    model.set_attn_implementation("posrf")
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]])
    with pytest.raises(ValueError, match="packed sequences"):
        model(input_ids=inputs("llama", batch=1)["input_ids"], position_ids=positions, use_cache=False)


def test_a_mask_must_cover_what_the_cache_has_seen():
    model = llama()
    model.set_attn_implementation("posrf")
    ids, cache = inputs("llama")["input_ids"], StateCache()
    model(input_ids=ids[:, :8], cache=cache)
    with pytest.raises(ValueError, match="attention_mask has 4 positions; accepted: all 12"):
        model(input_ids=ids[:, 8:], attention_mask=torch.ones(3, 4), cache=cache)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_dense_masks_serve_as_the_short_ones_do(name):
    model = MODELS[name]()
    model.set_attn_implementation("posrf")
    batch = inputs(name, batch=2, n=6)
    short = output(model, **batch, attention_mask=PADDING.long(), use_cache=False)
    pattern = PADDING[:, None, None, :] & CAUSAL if name == "llama" else PADDING[:, None, None, :].expand(2, 1, 6, 6)
    for mask in (pattern, torch.where(pattern, 0.0, -torch.inf)):
        torch.testing.assert_close(output(model, **batch, attention_mask=mask, use_cache=False), short)


def test_a_row_of_padding_alone_gives_numbers():
    model = bert()
    model.set_attn_implementation("favorsharp")
    mask = torch.tensor([[1] * 12, [0] * 12, [1] + [0] * 11])
    found = output(model, **inputs("bert"), attention_mask=mask)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[:1], output(model, input_ids=inputs("bert")["input_ids"][:1]))


def test_bert_as_a_decoder_with_cross_attention():
    model = bert(is_decoder=True, add_cross_attention=True)
    generator = torch.Generator().manual_seed(0)
    encoded = torch.randn(3, 12, 32, generator=generator, dtype=torch.float64)  # as long as the decoder's sequence
    batch = inputs("bert") | {
        "encoder_hidden_states": encoded,
        "encoder_attention_mask": torch.arange(12)[None] < torch.tensor([12, 10, 4])[:, None],
        "use_cache": False,
    }
    model.set_attn_implementation("eager")
    eager = output(model, **batch)
    model.set_attn_implementation("exact")
    assert (output(model, **batch) - eager).abs().max() < 1e-6
    register("favorsharp", num_features=16, window=4, rng=0)
    model.set_attn_implementation("favorsharp")
    maps = calibrate(model, [batch])
    assert len(maps) == 4
    before = output(model, **batch)
    hidden = encoded.clone()
    hidden[2, 4:] = 7.0
    torch.testing.assert_close(output(model, **(batch | {"encoder_hidden_states": hidden})), before)
    order = torch.tensor([1, 0, *range(2, 10), 11, 10])  # cross-attention has no neighbours, and no window
    turned = batch | {
        "encoder_hidden_states": encoded[:, order],
        "encoder_attention_mask": batch["encoder_attention_mask"][:, order],
    }
    torch.testing.assert_close(output(model, **turned), before)
