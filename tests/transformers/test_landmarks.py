"""Landmarks in models: exact if there is one for each key, causal, and with states of fixed size for generation."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import CAUSAL, MODELS, inputs, output
from transformers import (
    AttentionInterface,
    DynamicCache,
    EncoderDecoderCache,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertModel,
)

import favorsharp as fs
from favorsharp.transformers import StateCache, calibrate, load_maps, register

NAMES = ("few", "windowed")
"""Of registrations with fewer landmarks than keys; both compress their states within 12 tokens."""


@pytest.fixture(autouse=True)
def _registered():
    register("few", method="landmarks", num_features=4, rng=0)
    register("windowed", method="landmarks", num_features=3, rng=7, window=3)
    register("many", method="landmarks", num_features=20)


def made(name, implementation):
    model = MODELS[name]()
    model.set_attn_implementation(implementation)
    return model


def padded(name, side, n=40, lengths=(14, 9, 5)):
    """A batch of rows with these lengths, padded to n, and the rows alone."""
    ids = inputs("bert", n=n)["input_ids"]
    mask = torch.arange(n)[None] < torch.tensor(lengths)[:, None]
    mask = mask if side == "right" else mask.flip(-1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = {"input_ids": torch.where(mask, ids, 0), "attention_mask": mask.long(), "position_ids": positions}
    return batch, [ids[i : i + 1][:, mask[i]] for i in range(3)]


@pytest.mark.parametrize("name", MODELS)
def test_as_many_landmarks_as_keys_give_eager_attention(name):
    batch = inputs(name)
    eager = output(made(name, "eager"), **batch)
    assert (output(made(name, "many"), **batch) - eager).abs().max() < 1e-6  # eager softmax is in float32 in some
    assert (output(made(name, "few"), **batch) - eager).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_as_many_landmarks_as_visible_keys_are_enough(name, side):
    """There are 40 keys, and 20 landmarks for at most 14 visible ones."""
    batch, rows = padded(name, side)
    model = made(name, "many")
    together = output(model, **batch)
    model.set_attn_implementation("eager")
    for i, row in enumerate(rows):
        alone = output(model, input_ids=row)[0]
        assert (together[i, batch["attention_mask"][i].bool()] - alone).abs().max() < 1e-6


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_padded_batch_equals_its_rows_alone(name, implementation):
    batch, rows = padded(name, "right", n=14)
    model = made(name, implementation)
    together = output(model, **batch)
    for i, row in enumerate(rows):
        torch.testing.assert_close(together[i, : row.shape[1]], output(model, input_ids=row)[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("name", CAUSAL)
def test_the_future_does_not_matter(name, implementation):
    """Whisper's decoder reads the sound through landmarks that do not depend on its own tokens."""
    model, batch = made(name, implementation), inputs(name)
    key = "decoder_input_ids" if name == "whisper" else "input_ids"
    changed = batch[key].clone()
    changed[:, 7:] = (changed[:, 7:] + 5) % 40 + 3
    before, after = output(model, **batch), output(model, **(batch | {key: changed}))
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_a_layer_computes_what_the_library_does():
    q, k, v = torch.randn(3, 2, 4, 30, 8, generator=torch.Generator().manual_seed(0))
    attend = AttentionInterface()["windowed"]
    for causal in (False, True):
        layer = SimpleNamespace(is_causal=causal)
        got, _ = attend(layer, q, k[:, :2], v[:, :2], None, scaling=0.5)
        want = fs.linear_attention(
            q, k[:, :2], v[:, :2], fs.landmarks(3, scale=0.5, rng=7), is_causal=causal, window=3, enable_gqa=True
        )
        torch.testing.assert_close(got, want.transpose(1, 2), rtol=0, atol=0)


def generated(model, prompt, cache, tokens=9, **options):
    return model.generate(
        prompt,
        cache=cache,
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        eos_token_id=None,
        **options,
    )


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_each_step_is_the_forward_at_its_position(name, implementation):
    model = made(name, implementation)
    prompt = inputs(name)["input_ids"]
    found = generated(model, prompt, StateCache())
    whole = output(model, input_ids=found.sequences, use_cache=False)
    for step, logits in enumerate(found.logits):
        torch.testing.assert_close(logits, whole[:, 11 + step].to(logits.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", NAMES)
def test_a_left_padded_batch_generates_as_its_forward(implementation):
    model = made("llama", implementation)
    batch, _ = padded("llama", "left", n=12, lengths=(12, 9, 2))
    found = generated(model, batch["input_ids"], StateCache(), 6, attention_mask=batch["attention_mask"])
    longer = torch.cat([batch["attention_mask"], torch.ones(3, 6, dtype=torch.long)], dim=1)
    positions = (longer.cumsum(-1) - 1).clamp(min=0)
    whole = output(model, input_ids=found.sequences, attention_mask=longer, position_ids=positions, use_cache=False)
    for step, logits in enumerate(found.logits):
        torch.testing.assert_close(logits, whole[:, 11 + step].to(logits.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", NAMES)
def test_a_prompt_may_come_in_pieces(implementation):
    model = made("llama", implementation)
    ids = inputs("llama", n=24)["input_ids"]
    whole = output(model, input_ids=ids, use_cache=False)
    cache = StateCache()
    parts = [model(input_ids=piece, cache=cache).logits for piece in ids.split([9, 1, 10, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-6, atol=1e-6)


def test_whisper_generates_from_two_caches_of_states():
    model = made("whisper", "few")
    encoded = model.model.encoder(inputs("whisper")["input_features"])
    cache = EncoderDecoderCache(StateCache(), StateCache())
    ids = inputs("whisper")["decoder_input_ids"]
    steps = [
        model(encoder_outputs=encoded, decoder_input_ids=ids[:, i : i + 1], cache=cache, use_cache=True).logits
        for i in range(ids.shape[1])
    ]
    whole = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-5, atol=1e-6)
    assert all(layer.keys.shape[-2] == 0 for layer in cache.cross_attention_cache.layers)


@pytest.mark.parametrize("implementation", NAMES)
def test_beam_search_reorders_the_states(implementation):
    """The scores of the beams equal those of the forward pass on the same tokens."""
    model = made("gpt2", implementation)
    found = generated(model, inputs("gpt2")["input_ids"], StateCache(), num_beams=3, output_scores=True)
    logs = output(model, input_ids=found.sequences, use_cache=False).log_softmax(-1)[:, 11:-1]
    chosen = logs.gather(-1, found.sequences[:, 12:, None])[..., 0].mean(dim=-1)
    torch.testing.assert_close(found.sequences_scores, chosen.to(found.sequences_scores.dtype), rtol=1e-5, atol=1e-5)


def test_rows_of_the_batch_are_repeated_and_chosen():
    """The moments move with their rows, so a later compression is the same."""
    model = made("llama", "windowed")
    ids, later = inputs("llama")["input_ids"], inputs("llama", n=8, seed=3)["input_ids"]

    def after(change, rows):
        cache = StateCache()
        model(ids, cache=cache)
        change(cache)
        found = model(later[rows], cache=cache).logits
        whole = output(model, input_ids=torch.cat([ids[rows], later[rows]], dim=1), use_cache=False)
        torch.testing.assert_close(found, whole[:, 12:], rtol=1e-6, atol=1e-6)

    rows = torch.tensor([2, 0])
    after(lambda cache: cache.batch_select_indices(rows), rows)
    after(lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2]))
    after(lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])), torch.tensor([1, 2, 0]))


@pytest.mark.parametrize("cache", [StateCache, DynamicCache])
def test_generation_with_as_many_landmarks_as_keys_is_exact(cache):
    model = made("llama", "many").float()  # in float64 eager attention is NaN for a row that sees nothing
    batch, _ = padded("llama", "left", n=12, lengths=(12, 9, 2))
    prompt, mask = batch["input_ids"], batch["attention_mask"]
    found = generated(model, prompt, cache(), attention_mask=mask)
    model.set_attn_implementation("eager")
    exact = generated(model, prompt, DynamicCache(), attention_mask=mask)
    for logits, want in zip(found.logits, exact.logits, strict=True):
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)


def test_a_growing_cache_generates():
    """Such a cache does not keep earlier queries, so landmarks are chosen by the keys alone."""
    model = made("llama", "few")
    prompt = inputs("llama")["input_ids"]
    found = generated(model, prompt, DynamicCache())
    again = model(found.sequences, use_cache=False).logits
    torch.testing.assert_close(found.logits[0], again[:, 11].to(found.logits[0].dtype), rtol=1e-5, atol=1e-5)
    assert all(bool(torch.isfinite(logits).all()) for logits in found.logits)


@pytest.mark.parametrize("implementation", NAMES)
def test_memory_is_bounded(implementation):
    model = made("llama", implementation)
    window = 3 if implementation == "windowed" else 0
    most = 2 * (3 if window else 4) + 2 * window
    for length in (5, 33, 64):
        cache = StateCache()
        model(input_ids=torch.randint(3, 50, (2, length)), cache=cache)
        assert cache.get_seq_length() == length
        assert all(layer.keys is None and layer.state.held <= most for layer in cache.layers)
        d, heads, layers = 8, 2, 2
        moments = 2 * d * d + 2 * d + 2
        assert cache.num_bytes <= 8 * layers * 2 * heads * (most * (2 * d + 1) + moments)


def test_gradients_are_those_of_eager_attention():
    found = []
    for implementation in ("many", "eager"):
        model = made("gpt2", implementation)
        ids = inputs("gpt2")["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([weight.grad for weight in model.parameters()])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_half_precision_and_copies():
    model = made("bert", "few").to(torch.bfloat16)
    batch = inputs("bert")
    first = output(model, **batch)
    assert first.dtype == torch.bfloat16
    assert torch.equal(output(copy.deepcopy(model), **batch), first)


def test_a_saved_model_needs_no_maps(tmp_path):
    model, batch = made("gpt2", "few"), inputs("gpt2")
    want = output(model, **batch)
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="few", dtype=torch.float64).eval()
    torch.testing.assert_close(output(loaded, **batch), want)
    with pytest.raises(ValueError, match="no maps"):
        load_maps(loaded, tmp_path)


def test_there_is_nothing_to_calibrate():
    model = made("gpt2", "few")
    with pytest.raises(ValueError, match="'few' chooses landmarks anew in each call: there is nothing to calibrate"):
        calibrate(model, [inputs("gpt2")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draw": "iid"}, "takes no draw"),
        ({"draw": torch.ones(4, 8)}, "takes no draw"),
        ({"calibration": "frozen"}, "takes no calibration"),
        ({"num_features": 0}, "num_features"),
        ({"method": "landmark"}, "optimal.*landmarks.*exact|optimal.*exact.*landmarks"),
    ],
)
def test_other_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        register("other", **({"method": "landmarks"} | options))


@pytest.mark.slow
def test_it_compiles():
    model, batch = made("bert", "few"), inputs("bert", batch=1)
    model.encoder.layer = model.encoder.layer[:1]
    got = output(torch.compile(model, fullgraph=True, backend="aot_eager"), **batch)
    torch.testing.assert_close(got, output(model, **batch), rtol=1e-6, atol=1e-6)


def test_a_number_of_landmarks_is_shared_by_the_heads_of_a_layer_or_of_a_model():
    """The model has two layers of two key heads; `room` is the share of a head, or the number that was passed."""
    model, batch = MODELS["llama"](), inputs("llama", n=40)
    for per, number in (("head", 6), ("layer", 12), ("model", 24)):
        register("shared", method="landmarks", num_features=number, per=per, room=3, rng=0)
        model.set_attn_implementation("shared")
        cache = StateCache()
        out = output(model, **batch, cache=cache)
        assert {layer.state.settings.num_landmarks for layer in cache.layers} == {6}
        assert {layer.state.settings.room for layer in cache.layers} == {3}
        assert max(layer.state.held for layer in cache.layers) <= 9
        if per == "head":
            want = out
        torch.testing.assert_close(out, want)
    register("shared", method="landmarks", num_features=3, per="model")
    with pytest.raises(ValueError, match=r"num_features=3 for a whole model.*accepted: 4 or more"):
        output(model, **batch)
    with pytest.raises(ValueError, match="room and per belong to method 'landmarks'"):
        register("shared", per="layer")
    with pytest.raises(ValueError, match="per must be one of|per"):
        register("shared", method="landmarks", per="token")


def modernbert():
    """Rotary positions, which its attention is not told."""
    config = ModernBertConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        layer_types=["full_attention"] * 2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    return ModernBertModel(config).double().eval()


@pytest.mark.parametrize("model", [MODELS["llama"], modernbert], ids=["llama", "modernbert"])
@pytest.mark.parametrize("rows", [slice(0, 3), slice(2, 3)], ids=["rows", "one row"])
def test_padding_on_the_left_without_positions_warns_once(model, rows):
    register("landmarks", method="landmarks", num_features=4)
    model, ids = model(), inputs("llama")["input_ids"][rows]
    model.set_attn_implementation("landmarks")
    mask = torch.arange(12)[None] >= torch.tensor([0, 3, 5])[rows, None]
    given = {"input_ids": ids, "attention_mask": mask.long()}
    output(model, **given, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    output(model, **(given | {"attention_mask": mask.flip(1).long()}))
    with pytest.warns(UserWarning, match="padded on the left.*position_ids") as found:
        output(model, **given)
    output(model, **given)
    assert len(found) == 1


@pytest.mark.parametrize("name", MODELS)
def test_attentions_are_refused_everywhere(name):
    """GPT-2 does not pass `output_attentions` on to its layers."""
    register("landmarks", method="landmarks", num_features=4)
    model = MODELS[name]()
    model.set_attn_implementation("landmarks")
    with pytest.raises(ValueError, match="output_attentions is not served"):
        output(model, **inputs(name), output_attentions=True)
