"""Generation with a StateCache equals the causal forward pass, token by token, in constant memory."""

import numpy as np
import pytest
import torch
from tiny import MODELS, inputs, output
from transformers import DynamicCache, EncoderDecoderCache, FalconH1Config, Qwen3NextConfig, cache_utils

import favorsharp as fs
from favorsharp.transformers import StateCache, calibrate, register
from favorsharp.transformers.cache import StateLayer
from favorsharp.transformers.windows import NearKeys

NAMES = ("favorsharp", "windowed")


@pytest.fixture(autouse=True)
def _registered():
    register("favorsharp", num_features=16, rng=0)
    register("windowed", num_features=16, rng=0, window=3)
    register("posrf", method="posrf", num_features=16, rng=0)


def made(name, implementation):
    model = MODELS[name]()
    model.set_attn_implementation(implementation)
    calibrate(model, [inputs(name, seed=1)])
    return model


def left_padded(ids, lengths):
    """The batch with rows of these lengths, padded on the left, and its mask."""
    mask = torch.arange(ids.shape[1])[None] >= ids.shape[1] - torch.tensor(lengths)[:, None]
    return torch.where(mask, ids, 0), mask.long()


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("cache", [StateCache, DynamicCache])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_each_step_is_the_forward_at_its_position(name, cache, implementation):
    model = made(name, implementation)
    prompt = inputs(name)["input_ids"]
    found = model.generate(
        prompt,
        cache=cache(),
        max_new_tokens=9,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        eos_token_id=None,
    )
    whole = output(model, input_ids=found.sequences, use_cache=False)
    for step, logits in enumerate(found.logits):
        torch.testing.assert_close(logits, whole[:, prompt.shape[1] + step - 1].to(logits.dtype), rtol=1e-5, atol=1e-6)
        assert torch.equal(found.sequences[:, prompt.shape[1] + step], logits.argmax(-1))


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_left_padded_batch_generates_as_its_forward(name, implementation):
    model = made(name, implementation)
    ids, mask = left_padded(inputs(name)["input_ids"], (12, 9, 6))
    found = model.generate(
        ids,
        attention_mask=mask,
        cache=StateCache(),
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        eos_token_id=None,
    )
    longer = torch.cat([mask, torch.ones(3, 6, dtype=torch.long)], dim=1)
    positions = (longer.cumsum(-1) - 1).clamp(min=0)
    whole = output(model, input_ids=found.sequences, attention_mask=longer, position_ids=positions, use_cache=False)
    for step, logits in enumerate(found.logits):
        torch.testing.assert_close(logits, whole[:, 12 + step - 1].to(logits.dtype), rtol=1e-5, atol=1e-6)
    # the rows alone have the same tokens; with a window, the padding consists of whole blocks, so that blocks do not
    # shift
    for i, length in enumerate((12, 9, 6)):
        alone = model.generate(
            ids[i : i + 1, 12 - length :], cache=StateCache(), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        assert torch.equal(alone[0, -6:], found.sequences[i, -6:])


@pytest.mark.parametrize("implementation", NAMES)
def test_whisper_generates_from_two_caches_of_states(implementation):
    model = made("whisper", implementation)
    features = inputs("whisper")["input_features"]
    start = torch.full((3, 1), 3)
    cache = EncoderDecoderCache(StateCache(), StateCache())
    ids, steps = start, []
    encoded = model.model.encoder(features)
    for _ in range(8):
        out = model(encoder_outputs=encoded, decoder_input_ids=ids[:, -1:], cache=cache, use_cache=True)
        steps.append(out.logits[:, -1])
        ids = torch.cat([ids, out.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    whole = model(encoder_outputs=encoded, decoder_input_ids=ids[:, :-1], use_cache=False).logits
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, rtol=1e-6, atol=1e-8)
    assert all(layer.keys.shape[-2] == 0 for layer in cache.cross_attention_cache.layers)


def test_whisper_s_own_generate_takes_them():
    model = made("whisper", "favorsharp")
    features = inputs("whisper")["input_features"]
    options = {"max_new_tokens": 6, "do_sample": False}
    with_states = model.generate(features, cache=EncoderDecoderCache(StateCache(), StateCache()), **options)
    assert torch.equal(with_states, model.generate(features, **options))


@pytest.mark.slow
def test_sampling_draws_from_the_same_distribution():
    model = made("llama", "favorsharp")
    prompt = inputs("llama")["input_ids"]
    drawn = []
    for cache in (StateCache(), DynamicCache()):
        torch.manual_seed(3)
        drawn.append(model.generate(prompt, cache=cache, max_new_tokens=10, do_sample=True, eos_token_id=None))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0][:, 12:], model.generate(prompt, max_new_tokens=10, eos_token_id=None)[:, 12:])


@pytest.mark.parametrize("implementation", NAMES)
def test_beam_search_reorders_the_states(implementation):
    model = made("gpt2", implementation)
    prompt = inputs("gpt2")["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "eos_token_id": None}
    assert torch.equal(
        model.generate(prompt, cache=StateCache(), **options), model.generate(prompt, cache=DynamicCache(), **options)
    )


@pytest.mark.parametrize("implementation", NAMES)
def test_memory_does_not_grow(implementation):
    model = made("llama", implementation)
    sizes = []
    for length in (9, 33, 63):
        cache = StateCache()
        model(input_ids=torch.randint(3, 50, (2, length)), cache=cache)
        sizes.append(cache.num_bytes)
        assert cache.get_seq_length() == length
        assert all(layer.keys is None for layer in cache.layers)
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("implementation", NAMES)
def test_a_prompt_may_come_in_pieces(implementation):
    model = made("llama", implementation)
    ids = inputs("llama")["input_ids"]
    whole = output(model, input_ids=ids, use_cache=False)
    cache = StateCache()
    parts = [model(input_ids=piece, cache=cache).logits for piece in ids.split([5, 1, 4, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-6)


def test_a_cache_keeps_the_very_state_of_a_step():
    """The state carries what a step has derived from it, which makes the next step fast. Views are copied once."""
    layer = StateLayer()
    key = torch.randn(1, 2, 9, 4)
    fm = fs.feature_map(fs.fit(key, key), 8, rng=0)
    for window in (0, 2):
        state = fs.init_state(fm, 4, like=key, window=window)
        _, state = fs.linear_attention(key, key, key, fm, is_causal=True, window=window, state=state, return_state=True)
        layer.take(state)
        assert (layer.state is state) is (window == 0)
        again = layer.state
        layer.take(again)
        assert layer.state is again
        assert layer.state.recent_k.untyped_storage().nbytes() == layer.state.recent_k.numel() * 4


def test_memory_that_arrays_share_counts_once():
    cache = StateCache()
    whole = torch.zeros(1, 2, 6, 8)
    cache.layers.append(StateLayer())
    cache.layers[0].state = NearKeys(whole[..., :4], whole[..., 4:], torch.ones(1, 6, dtype=torch.bool))
    assert cache.num_bytes == whole.numel() * 4 + 6
    numbers = np.zeros((1, 2, 6, 8), np.float32)  # here a part begins at the beginning of its storage
    cache.layers[0].state = NearKeys(*map(torch.from_numpy, (numbers, numbers[:, 1:])), torch.ones(1, 6, dtype=bool))
    assert cache.num_bytes == numbers.nbytes + 6


def test_a_cache_can_be_emptied_and_not_cropped():
    model = made("llama", "favorsharp")
    ids = inputs("llama")["input_ids"]
    cache = StateCache()
    first = model(input_ids=ids, cache=cache).logits
    with pytest.raises(NotImplementedError, match="cannot forget"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(input_ids=ids, cache=cache).logits, first)


@pytest.mark.parametrize(
    ("change", "argument", "order"),
    [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
        ("batch_select_indices", torch.tensor([1]), [1]),
    ],
)
@pytest.mark.parametrize("beside_keys", [True, False])
def test_a_layer_with_a_recurrence_changes_its_rows_and_forgets_it(change, argument, order, beside_keys):
    kind, kinds = (FalconH1Config, {}) if beside_keys else (Qwen3NextConfig, {"layer_types": ["linear_attention"]})
    config = kind(num_hidden_layers=1, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, **kinds)
    cache, rows = StateCache(config=config), torch.randn(3, 4, 2)
    cache.update_recurrent_state(rows.clone(), 0)
    if beside_keys:
        cache.layers[0].state = NearKeys(rows[:, None], rows[:, None], torch.ones(3, 4, dtype=torch.bool))
    getattr(cache, change)(argument)
    assert torch.equal(cache.layers[0].recurrent_states[0], rows[order])
    assert not beside_keys or torch.equal(cache.layers[0].state.keys, rows[order, None])
    cache.reset()
    assert not beside_keys or cache.layers[0].state is None
    assert not cache.layers[0].recurrent_states[0].any()


def test_a_cache_for_a_config_needs_no_recurrent_layers_of_transformers(monkeypatch):
    """Transformers 5.4 has none."""
    for name in ("LinearAttentionLayer", "DummyLayer"):
        monkeypatch.delattr(cache_utils, name)
    assert [type(layer) for layer in StateCache(config=MODELS["llama"]().config).layers] == [StateLayer] * 2


def test_another_attention_cannot_read_a_cache_of_states():
    model = made("llama", "favorsharp")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="not favorsharp's.*'sdpa'"):
        model.generate(inputs("llama")["input_ids"], cache=StateCache(), max_new_tokens=3)


def test_a_static_cache_is_refused():
    model = made("llama", "favorsharp")
    with pytest.raises(ValueError, match="static cache"):
        model.generate(inputs("llama")["input_ids"], cache_implementation="static", max_new_tokens=3)


@pytest.mark.parametrize("implementation", [*NAMES, "posrf"])
def test_rows_of_the_batch_are_repeated_and_chosen(implementation):
    """The padding among the keys of a window moves with its row; a map that is not calibrated serves any rows."""
    model = MODELS["llama"]() if implementation == "posrf" else made("llama", implementation)
    model.set_attn_implementation(implementation)
    ids, mask = left_padded(inputs("llama")["input_ids"], (12, 9, 2))
    later = inputs("llama", n=2, seed=3)["input_ids"]
    rows = torch.tensor([2, 0])

    def after(change, chosen):
        cache = StateCache()
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), cache=cache, use_cache=True)
        change(cache)
        longer = torch.cat([mask[chosen], torch.ones(len(chosen), 2, dtype=torch.long)], dim=1)
        positions = (longer.cumsum(-1) - 1).clamp(min=0)
        found = model(
            later[:1].expand(len(chosen), -1),
            attention_mask=longer,
            position_ids=positions[:, -2:],
            cache=cache,
            use_cache=True,
        ).logits
        whole = torch.cat([ids[chosen], later[:1].expand(len(chosen), -1)], dim=1)
        want = model(whole, attention_mask=longer, position_ids=positions, use_cache=False).logits[:, -2:]
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-8)

    after(lambda cache: cache.batch_select_indices(rows), rows)
    after(lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2]))
    after(lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])), torch.tensor([1, 2, 0]))
