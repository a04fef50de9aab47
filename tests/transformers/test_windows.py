"""Layers with a sliding window are exact with every method: each query sees few keys, in time linear in the length."""

import pytest
import torch
from tiny import inputs, output
from transformers import MistralConfig, MistralForCausalLM, ModernBertConfig, ModernBertModel

from favorsharp.exact import softmax_attention
from favorsharp.transformers import StateCache, calibrate, check, register
from favorsharp.transformers.masks import Visible
from favorsharp.transformers.windows import near_attention, near_step

pytestmark = pytest.mark.filterwarnings("ignore:no attention layer of .* was approximated:UserWarning")

METHODS = ("exact", "optimal", "landmarks")
SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def _registered():
    for method in METHODS:
        register(method, method=method, num_features=4, rng=0)


def mistral(window):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=window))
    return model.eval()


def visible(n, s, reach, is_causal):
    distance = torch.arange(s)[None] - torch.arange(s - n, s)[:, None]
    return (distance >= -reach) & (distance <= (0 if is_causal else reach))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("n", "s"), [(1, 1), (7, 7), (70, 70), (40, 70), (1, 70), (0, 5), (33, 33)])
def test_near_attention_is_softmax_attention_over_a_band(n, s, is_causal):
    if not is_causal and n != s:
        return
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, m, d, generator=generator, dtype=torch.float64)
        for h, m, d in ((4, n, 5), (2, s, 5), (2, s, 3))
    )
    key_mask = torch.rand(2, 1, s, generator=generator) > 0.3
    for reach in (0, 1, 5, 16, 31, 100):
        band = visible(n, s, reach, is_causal)
        for padding in (None, key_mask):
            seen = band[None, None] if padding is None else band & padding[:, :, None]
            want = torch.stack(
                [
                    softmax_attention(
                        q[:, :, i : i + 1],
                        k,
                        v,
                        enable_gqa=True,
                        scale=0.3,
                        key_mask=seen[..., i, :].expand(2, 1, s),
                    )
                    for i in range(n)
                ]
                or [q.new_zeros(2, 4, 0, 3)],
                dim=2,
            ).reshape(2, 4, n, 3)
            found = near_attention(q, k, v, Visible(padding, is_causal, (reach, 0 if is_causal else reach)), 0.3)
            torch.testing.assert_close(found, want)


def test_a_stream_of_near_keys_is_the_whole():
    q, k, v = torch.randn(3, 2, 4, 20, 5, dtype=torch.float64)
    key_mask = torch.rand(2, 1, 20) > 0.3
    want = near_attention(q, k, v, Visible(key_mask, True, (6, 0)), None)
    state, outs = None, []
    for part in (slice(0, 9), slice(9, 10), slice(10, 13), slice(13, 20)):
        mask = key_mask[..., part]
        out, state = near_step(state, *(x[:, :, part] for x in (q, k, v)), Visible(mask, True, (6, 0)), None)
        outs.append(out)
        assert state.keys.shape[-2] <= 6
        for x in (state.keys, state.values, state.mask):  # not views, which would keep the whole prompt
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
    torch.testing.assert_close(torch.cat(outs, dim=2), want)


@pytest.mark.parametrize("window", [3, 8, 20])
@pytest.mark.parametrize("method", METHODS)
def test_mistral_is_exact_and_streams(method, window):
    model, batch = mistral(window), inputs("llama")
    position = torch.arange(12)[None]
    for mask in (None, position < torch.tensor([12, 7, 5])[:, None], position >= torch.tensor([0, 5, 9])[:, None]):
        given = batch if mask is None else batch | {"attention_mask": mask.long()}
        rows = torch.ones(3, 12, dtype=torch.bool) if mask is None else mask
        model.set_attn_implementation("eager")
        eager = output(model, **given)
        model.set_attn_implementation(method)
        torch.testing.assert_close(output(model, **given)[rows], eager[rows], rtol=1e-4, atol=1e-5)
        cache, steps = StateCache(), []
        for a, b in ((0, 6), (6, 7), (7, 12)):
            part = {"input_ids": batch["input_ids"][:, a:b]}
            if mask is not None:
                part["attention_mask"] = mask[:, :b].long()
            steps.append(model(**part, cache=cache).logits)
        torch.testing.assert_close(torch.cat(steps, dim=1)[rows], eager[rows], rtol=1e-4, atol=1e-5)
        assert all(layer.state.keys.shape[-2] <= window - 1 for layer in cache.layers)


def modernbert():
    torch.manual_seed(0)
    config = ModernBertConfig(**SMALL, local_attention=6, layer_types=["sliding_attention", "full_attention"])
    return ModernBertModel(config).double().eval()


def test_modernbert_has_layers_of_both_kinds():
    model, batch = modernbert(), inputs("bert", n=24)
    model.set_attn_implementation("eager")
    eager = output(model, **batch)
    model.set_attn_implementation("exact")
    torch.testing.assert_close(output(model, **batch), eager, rtol=1e-5, atol=1e-6)
    model.set_attn_implementation("optimal")
    assert {layer.why for layer in check(model).layers} >= {"a sliding window of 4 positions"}
    assert check(model).names("exact") == ("layers.0.attn",)
    assert list(calibrate(model, [batch])) == ["layers.1.attn"]


def test_where_every_layer_has_a_window_there_is_nothing_to_calibrate():
    model = mistral(8)
    model.set_attn_implementation("optimal")
    with pytest.raises(ValueError, match="sliding window, which is exact"):
        calibrate(model, [inputs("llama")])


@pytest.mark.slow
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("make", [lambda: mistral(4), modernbert], ids=["mistral", "modernbert"])
def test_windows_compile(make, is_padded):
    model, batch = make(), inputs("llama")
    rows = torch.arange(12) < torch.tensor([12, 7, 5] if is_padded else [12, 12, 12])[:, None]
    if is_padded or isinstance(model, MistralForCausalLM):  # without a mask, causal models look for packed sequences
        batch["attention_mask"] = rows.long()
    model.set_attn_implementation("optimal")
    want = output(model, **batch)
    torch._dynamo.reset()
    got = output(torch.compile(model, fullgraph=True, backend="aot_eager"), **batch)
    torch.testing.assert_close(got[rows], want[rows])


@pytest.mark.slow
def test_patterns_with_tensors_are_refused_by_compiled_models():
    model, batch = mistral(4), inputs("llama")
    model.set_attn_implementation("optimal")
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="pass attention_mask"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(**batch)  # packed sequences are looked for
