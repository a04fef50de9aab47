"""Architectures that go through the interface: exact, with padding, causal, compiled, in half precision, and
trained."""

import pytest
import torch
from tiny import CAUSAL, MODELS, inputs, llama, output

import favorsharp as fs
from favorsharp.transformers import calibrate, register


@pytest.fixture(autouse=True)
def _registered():
    register("exact", method="exact")
    register("favorsharp", num_features=32, rng=0)
    register("windowed", num_features=32, rng=0, window=4)


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def made(name, implementation="favorsharp"):
    """A model, which is calibrated if that is necessary."""
    model = MODELS[name]()
    model.set_attn_implementation(implementation)
    if name in CAUSAL:
        calibrate(model, [inputs(name, seed=seed) for seed in (1, 2)])
    return model


def padded(name, side="right"):
    """A batch of three rows with 12, 9 and 5 tokens, and each row without its padding."""
    key = "decoder_input_ids" if name == "whisper" else "input_ids"
    mask_key = "decoder_attention_mask" if name == "whisper" else "attention_mask"
    batch = inputs(name)
    lengths = (12, 9, 5)
    mask = torch.arange(12)[None] < torch.tensor(lengths)[:, None]
    mask = mask if side == "right" else mask.flip(-1)
    rows = []
    for i, length in enumerate(lengths):
        row = {k: v[i : i + 1] for k, v in batch.items()}
        row[key] = row[key][:, :length] if side == "right" else row[key][:, 12 - length :]
        rows.append(row)
    return batch | {mask_key: mask.long()}, rows, lengths


def test_exact_equals_eager(name):
    model, batch = MODELS[name](), inputs(name)
    model.set_attn_implementation("eager")
    eager = output(model, **batch)
    model.set_attn_implementation("exact")
    assert (output(model, **batch) - eager).abs().max() < 1e-6  # eager softmax is in float32 in some


@pytest.mark.parametrize("side", ["right", "left"])
def test_exact_equals_eager_on_a_padded_batch(name, side):
    if name == "vit":
        pytest.skip("images have no padding")
    model = MODELS[name]().float()  # in float64 some eager attentions are NaN for a row that sees nothing
    batch, _, lengths = padded(name, side)
    batch = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
    model.set_attn_implementation("eager")
    eager = output(model, **batch)
    model.set_attn_implementation("exact")
    exact = output(model, **batch)
    for i, length in enumerate(lengths):  # results at padding do not matter
        rows = slice(0, length) if side == "right" else slice(12 - length, 12)
        assert (exact[i, rows] - eager[i, rows]).abs().max() < 1e-6


@pytest.mark.parametrize("implementation", ["favorsharp", "windowed"])
def test_a_padded_batch_equals_its_rows_alone(name, implementation):
    if name == "vit":
        pytest.skip("images have no padding")
    model = made(name, implementation)
    batch, rows, lengths = padded(name)
    together = output(model, **batch)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        torch.testing.assert_close(together[i, :length], output(model, **row)[0], rtol=1e-9, atol=1e-9)


def test_what_padding_holds_does_not_matter(name):
    if name == "vit":
        pytest.skip("images have no padding")
    model = made(name)
    batch, _, lengths = padded(name)
    key = "decoder_input_ids" if name == "whisper" else "input_ids"
    other = batch | {key: torch.where(torch.arange(12)[None] < torch.tensor(lengths)[:, None], batch[key], 4)}
    before, after = output(model, **batch), output(model, **other)
    for i, length in enumerate(lengths):
        assert torch.equal(before[i, :length], after[i, :length])


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("implementation", ["favorsharp", "windowed"])
def test_the_future_does_not_matter(name, implementation):
    model, batch = made(name, implementation), inputs(name)
    key = "decoder_input_ids" if name == "whisper" else "input_ids"
    changed = batch[key].clone()
    changed[:, 7] = (changed[:, 7] + 5) % 40 + 3
    before, after = output(model, **batch), output(model, **(batch | {key: changed}))
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.slow
def test_the_error_falls_with_the_number_of_features(name):
    model, batch = MODELS[name](), inputs(name)
    exact = output(model, **batch)
    errors = []
    for m in (8, 256):
        found = []
        for seed in range(3):
            register("favorsharp", num_features=m, rng=seed)
            model.set_attn_implementation("favorsharp")
            if name in CAUSAL:
                calibrate(model, [inputs(name, seed=1)])
            found.append(((output(model, **batch) - exact) ** 2).mean())
        errors.append(sum(found))
    assert errors[1] < errors[0] / 5  # 1 / 32 in expectation


def test_a_layer_is_the_library_s_own_attention():
    """A layer with grouped heads and a scaling equals fs.linear_attention with the calibrated map."""
    model = made("llama")
    seen = []
    attention = model.model.layers[1].self_attn
    hook = attention.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    projected = {}
    for part in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, part).register_forward_hook(
            lambda module, args, out, part=part: projected.__setitem__(part, out)
        )
    rotate = model.model.rotary_emb
    output(model, **inputs("llama"))
    hook.remove()
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, v = (projected[p].view(3, 12, -1, 8).transpose(1, 2) for p in ("q_proj", "k_proj", "v_proj"))
    q, k = apply_rotary_pos_emb(q, k, *rotate(v, torch.arange(12)[None]))
    fm = attention.favorsharp.by_name["favorsharp"]
    assert fm.batch_shape == (2,)
    expected = fs.linear_attention(q, k, v, fm, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(seen[0], expected.transpose(1, 2).reshape(3, 12, 32))


def test_gradients_reach_every_weight(name):
    model, batch = made(name), inputs(name)
    model.train()
    output(model, **batch).square().mean().backward()
    trained = {k: w.grad for k, w in model.named_parameters() if w.grad is not None}
    attention = [g for k, g in trained.items() if any(part in k for part in ("attn", "attention"))]
    assert len(attention) >= 8
    assert all(torch.isfinite(g).all() for g in trained.values())
    assert sum(bool(g.any()) for g in attention) > 0.9 * len(attention) - 1


def test_a_gradient_is_the_slope_of_the_output():
    model, batch = made("gpt2"), inputs("gpt2", batch=1, n=6)
    weight = model.transformer.h[0].attn.c_attn.weight

    def loss():
        return output(model, **batch).square().mean()

    loss().backward()
    direction = torch.randn_like(weight)
    slope = (weight.grad * direction).sum()
    step = 1e-6
    with torch.no_grad():
        weight.add_(step * direction)
        above = loss()
        weight.sub_(2 * step * direction)
        below = loss()
    torch.testing.assert_close(slope, (above - below) / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(name, dtype):
    model, batch = made(name), inputs(name)
    wide = output(model, **batch)
    narrow = output(model.to(dtype), **{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()})
    assert narrow.dtype == dtype
    tolerance = {torch.bfloat16: 0.2, torch.float16: 0.05}[dtype]
    assert (narrow.double() - wide).norm() < tolerance * wide.norm()


@pytest.mark.slow
def test_autocast(name):
    model, batch = made(name).float(), inputs(name)
    batch = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
    wide = output(model, **batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = output(model, **batch)
    assert (narrow.float() - wide).norm() < 0.2 * wide.norm()


def test_one_seed_gives_one_model(name):
    batch = inputs(name)
    first, second = (output(made(name), **batch) for _ in range(2))
    assert torch.equal(first, second)


def test_registrations_stand_side_by_side():
    register("other", method="sderf", num_features=16, rng=1)
    model, batch = made("llama"), inputs("llama")
    before = output(model, **batch)
    model.set_attn_implementation("other")
    with pytest.raises(ValueError, match="'other'.*has no feature map"):
        output(model, **batch)
    calibrate(model, [inputs("llama", seed=1)])
    assert not torch.allclose(output(model, **batch), before)
    model.set_attn_implementation("favorsharp")
    assert torch.equal(output(model, **batch), before)
    model.set_attn_implementation("eager")
    assert not torch.allclose(output(model, **batch), before)


def test_llama_used_in_both_directions():
    """If its config makes a decoder bidirectional, it is served as a bidirectional model, without calibration."""
    model = llama()
    model.config.is_causal = False
    model.set_attn_implementation("eager")
    eager = output(model, **inputs("llama"), use_cache=False)
    model.set_attn_implementation("exact")
    torch.testing.assert_close(output(model, **inputs("llama"), use_cache=False), eager, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "frozen"), [("bert", False), ("bert", True), ("vit", False), ("llama", True)])
def test_compiles_whole(name, frozen):
    """There is one graph, forward and backward, with padding; also if maps are fitted to the input inside the graph."""
    model, batch = made(name), inputs(name)
    if frozen:
        calibrate(model, [inputs(name, seed=1)])
    if name != "vit":
        batch = padded(name)[0]
    options = {"use_cache": False} if name == "llama" else {}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = output(compiled, **batch, **options)
    torch.testing.assert_close(found, output(model, **batch, **options))
    found.square().mean().backward()
    assert all(torch.isfinite(w.grad).all() for w in model.parameters() if w.grad is not None)
