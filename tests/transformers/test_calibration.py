"""Maps: what a layer may be fitted to, what `calibrate` fits, and where maps are stored."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from tiny import bert, gpt2, inputs, llama, output, vit, whisper

import favorsharp as fs
from favorsharp.transformers import attention as interface
from favorsharp.transformers import calibrate, load_maps, register, save_maps
from favorsharp.transformers.registrations import REGISTERED


@pytest.fixture(autouse=True)
def _registered():
    register("exact", method="exact")
    register("favorsharp", num_features=16, rng=0)


def with_maps(model, name, implementation="favorsharp"):
    model.set_attn_implementation(implementation)
    calibrate(model, [inputs(name, seed=1)])
    return model


def heads_of(layer, hidden):
    """Queries and keys of a BERT layer, (B, H, n, d)."""
    return (getattr(layer, part)(hidden).view(3, 12, 4, 8).transpose(1, 2) for part in ("query", "key"))


def test_a_causal_layer_asks_for_calibration():
    for model, name in ((gpt2(), "gpt2"), (llama(), "llama")):
        model.set_attn_implementation("favorsharp")
        with pytest.raises(ValueError, match=r"layer 0\) has no feature map.*own future.*calibrate"):
            output(model, **inputs(name))
    model = whisper()
    model.set_attn_implementation("favorsharp")
    with pytest.raises(ValueError, match="WhisperAttention"):
        output(model, **inputs("whisper"))


@pytest.mark.parametrize("method", ["posrf", "hyperbolic", "relu", "elu"])
def test_a_method_that_fits_nothing_asks_for_nothing(method):
    register("favorsharp", method=method, num_features=16, rng=0)
    model = llama()
    model.set_attn_implementation("favorsharp")
    assert torch.isfinite(output(model, **inputs("llama"))).all()


def test_frozen_registrations_ask_for_calibration_everywhere():
    register("favorsharp", num_features=16, rng=0, calibration="frozen")
    model = bert()
    model.set_attn_implementation("favorsharp")
    with pytest.raises(ValueError, match="calibration='frozen'"):
        output(model, **inputs("bert"))
    calibrate(model, [inputs("bert")])
    output(model, **inputs("bert"))


def test_an_input_is_fitted_per_row_and_head():
    model = bert()
    model.set_attn_implementation("favorsharp")
    seen = []
    layer = model.encoder.layer[0].attention.self
    layer.register_forward_hook(lambda module, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True)
    output(model, **inputs("bert"))
    args, kwargs, out = seen[0]
    hidden = args[0] if args else kwargs["hidden_states"]
    q, k = heads_of(layer, hidden)
    v = layer.value(hidden).view(3, 12, 4, 8).transpose(1, 2)
    fm = fs.feature_map(fs.fit(q.detach(), k.detach()), 16, draw=REGISTERED["favorsharp"].draw_for(8, q))
    assert fm.batch_shape == (3, 4)
    torch.testing.assert_close(out[0], fs.linear_attention(q, k, v, fm).transpose(1, 2).reshape(3, 12, 32))


def test_calibration_fits_exact_activations_over_all_batches():
    """The map of the second layer is fitted to the queries and keys of the exact model there, without padding."""
    model = bert()
    mask = torch.arange(12)[None] < torch.tensor([12, 7, 3])[:, None]
    batches = [inputs("bert", seed=1), inputs("bert", seed=2) | {"attention_mask": mask.long()}]
    gathered = []
    layer = model.encoder.layer[1].attention.self
    hook = layer.register_forward_hook(
        lambda module, args, kwargs, out: gathered.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    model.set_attn_implementation("eager")
    for batch in batches:
        output(model, **batch)
    hook.remove()
    moments = None
    for hidden, visible in zip(gathered, (None, mask[:, None]), strict=True):
        q, k = heads_of(layer, hidden)
        found = fs.moments(q.detach(), k.detach(), axis=(0, -2), mask_x=visible, mask_y=visible)
        moments = found if moments is None else fs.combine(moments, found)
    expected = fs.fit(moments)
    model.set_attn_implementation("favorsharp")
    fm = calibrate(model, batches)["encoder.layer.1.attention.self"]
    for name in ("a", "g1", "g2", "center_x", "center_y"):
        torch.testing.assert_close(getattr(fm.parameters, name), getattr(expected, name)[0])


def test_every_layer_of_whisper_gets_a_map():
    model = whisper()
    model.set_attn_implementation("favorsharp")
    maps = calibrate(model, [inputs("whisper")])
    parts = {"encoder": "self_attn", "decoder": "self_attn", "decoder ": "encoder_attn"}
    expected = {f"model.{part.strip()}.layers.{i}.{kind}" for part, kind in parts.items() for i in range(2)}
    assert set(maps) == expected
    assert all(fm.parameters.scale == 1.0 for fm in maps.values())  # its queries are scaled before the call


def test_frozen_maps_do_not_look_at_the_input():
    """This holds in a bidirectional model too: a row does not depend on other rows, and a map does not depend on the
    row."""
    model = with_maps(bert(), "bert")
    fm = model.encoder.layer[0].attention.self.favorsharp.by_name["favorsharp"]
    output(model, **inputs("bert", seed=5))
    assert model.encoder.layer[0].attention.self.favorsharp.by_name["favorsharp"] is fm
    assert fm.batch_shape == (4,)


def test_calibration_leaves_the_model_as_it_was():
    model = llama()
    model.set_attn_implementation("favorsharp")
    model.train()
    model.model.layers[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calibrate(model, [inputs("llama")])
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.layers[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(model.state_dict()) == list(before)
    assert all(w.grad is None for w in model.parameters())
    assert interface._collector is None


def test_maps_made_in_inference_mode_can_be_trained_with(tmp_path):
    model = llama()
    model.set_attn_implementation("favorsharp")
    with torch.inference_mode():
        calibrate(model, [inputs("llama")])
        output(model, **inputs("llama"))
        save_maps(model, tmp_path)
    output(model, **inputs("llama")).sum().backward()
    first = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    with torch.inference_mode():
        load_maps(model, tmp_path)
    output(model, **inputs("llama")).sum().backward()
    for gradient, weight in zip(first, model.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    assert model.model.layers[0].self_attn.k_proj.weight.grad.any()


def test_calibration_takes_tensors_and_says_what_is_missing():
    model = llama()
    model.set_attn_implementation("favorsharp")
    calibrate(model, (inputs("llama", seed=i)["input_ids"] for i in range(2)))
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(model, [])
    for one in (inputs("llama"), inputs("llama")["input_ids"]):
        with pytest.raises(TypeError, match=r"accepted: \[batch\]"):
            calibrate(model, one)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="'sdpa'; accepted: .*favorsharp"):
        calibrate(model, [inputs("llama")])
    model.set_attn_implementation("exact")
    with pytest.raises(ValueError, match="nothing to calibrate"):
        calibrate(model, [inputs("llama")])
    assert interface._collector is None


def test_another_registration_under_the_name_asks_for_calibration_again():
    model = with_maps(llama(), "llama")
    register("favorsharp", num_features=32, rng=0)
    with pytest.raises(ValueError, match="16 features.*32: calibrate again"):
        output(model, **inputs("llama"))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_their_maps(duplicate):
    model = with_maps(llama(), "llama")
    twin = duplicate(model)
    assert torch.equal(output(twin, **inputs("llama")), output(model, **inputs("llama")))


def test_maps_stay_when_the_model_s_dtype_changes():
    model = with_maps(llama(), "llama")
    fm = model.model.layers[0].self_attn.favorsharp.by_name["favorsharp"]
    model.half().double()
    now = model.model.layers[0].self_attn.favorsharp.by_name["favorsharp"]
    assert torch.equal(now.parameters.g1, fm.parameters.g1)
    assert "DenseExponentialMap" in repr(model)


def test_maps_go_where_the_model_goes():
    model = with_maps(llama(), "llama").to("meta")
    fm = model.model.layers[0].self_attn.favorsharp.by_name["favorsharp"]
    assert all(x.device.type == "meta" for x in fm.arrays)


@pytest.mark.parametrize(("make", "name"), [(llama, "llama"), (bert, "bert")])
def test_a_saved_model_asks_for_its_maps(make, name, tmp_path):
    model = with_maps(make(), name)
    expected = output(model, **inputs(name))
    model.save_pretrained(tmp_path / "model")
    save_maps(model, tmp_path / "maps")
    again = type(model).from_pretrained(tmp_path / "model", attn_implementation="favorsharp", dtype=torch.float64)
    again.eval()
    with pytest.raises(ValueError, match=r"load_maps"):  # also if a fit to the input would be possible
        output(again, **inputs(name))
    maps = load_maps(again, tmp_path / "maps")
    assert len(maps) == 2
    assert torch.equal(output(again, **inputs(name)), expected)
    fresh = make()
    fresh.load_state_dict(model.state_dict())  # no key of the maps
    with pytest.raises(ValueError, match="no module"):
        load_maps(vit(), tmp_path / "maps")


def test_no_maps_to_save_or_load(tmp_path):
    with pytest.raises(ValueError, match="calibrate it first"):
        save_maps(llama(), tmp_path)
    with pytest.raises(ValueError, match="no maps"):
        load_maps(llama(), tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "sdpa"}, ValueError, "'sdpa' is used by transformers"),
        ({"name": "eager"}, ValueError, "'eager'"),
        ({"name": "flash_favor"}, ValueError, "'flash_favor'"),
        ({"name": "a/b"}, ValueError, "'a/b'"),
        ({"name": ""}, TypeError, "not empty"),
        ({"method": "trig"}, ValueError, "'trig' is unknown; accepted: .*exact"),
        ({"method": "best"}, ValueError, "'best'"),
        ({"num_features": 0}, ValueError, "num_features"),
        ({"window": -1}, ValueError, "window"),
        ({"calibration": "later"}, ValueError, "'later' is unknown; accepted: input, frozen"),
        ({"rng": "seed"}, TypeError, "rng"),
        ({"draw": "best"}, ValueError, "draw"),
    ],
)
def test_arguments_of_register(options, error, message):
    with pytest.raises(error, match=message):
        register(**options)


def test_dropout_warns_once_or_is_refused_and_what_features_lack_is_refused():
    model = bert()
    model.set_attn_implementation("favorsharp")
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.1
    output(model, **inputs("bert"))  # none in evaluation mode
    model.train()
    with pytest.warns(UserWarning, match=r"attention dropout is 0.1.*trains without it") as found:
        first = output(model, **inputs("bert"))
    assert len(found) == 1
    torch.testing.assert_close(output(model, **inputs("bert")), first)
    register("favorsharp", num_features=16, rng=0, dropout="refuse")
    with pytest.raises(ValueError, match=r"attention dropout is 0.1.*accepted: 0"):
        output(model, **inputs("bert"))
    model.eval()
    with pytest.raises(ValueError, match="softcap"):
        output(model, **inputs("bert"), softcap=30.0)


def test_a_caller_s_rows_serve_every_layer():
    rows = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    register("favorsharp", num_features=16, draw=rows)
    model = with_maps(llama(), "llama")
    fm = model.model.layers[1].self_attn.favorsharp.by_name["favorsharp"]
    assert torch.equal(fm.projection, rows)


def test_the_padding_of_a_decoder_is_no_query_of_its_cross_attention():
    """The maps do not depend on the tokens at padding."""
    maps = []
    for filler in (3, 40):
        model = whisper()
        model.set_attn_implementation("favorsharp")
        batch = inputs("whisper")
        mask = torch.arange(12)[None] < torch.tensor([12, 7, 3])[:, None]
        ids = torch.where(mask, batch["decoder_input_ids"], filler)
        maps.append(calibrate(model, [batch | {"decoder_input_ids": ids, "decoder_attention_mask": mask.long()}]))
    assert any("encoder_attn" in name for name in maps[0])
    for name, fm in maps[0].items():
        for field in ("a", "g1", "center_x", "center_y"):
            torch.testing.assert_close(getattr(fm.parameters, field), getattr(maps[1][name].parameters, field))


class CrossFirst(torch.nn.Module):
    """Cross-attention before any self-attention, as in a Perceiver."""

    def __init__(self):
        super().__init__()
        self.cross, self.own = torch.nn.Module(), torch.nn.Module()
        self.cross.is_cross_attention = True
        for layer in (self.cross, self.own):
            layer.is_causal, layer.config = False, SimpleNamespace()

    def forward(self, x, y, mask):
        attend = interface.attend
        attend(REGISTERED["favorsharp"], self.cross, x, y, y, None)
        attend(REGISTERED["favorsharp"], self.own, x, x, x, mask)


def test_the_padding_of_one_batch_is_not_that_of_the_next():
    generator = torch.Generator().manual_seed(0)
    batches = [
        {name: torch.randn(2, 4, n, 8, generator=generator) for name, n in (("x", 6), ("y", 9))} | {"mask": mask}
        for mask in ((torch.arange(6) < 3).expand(2, 1, 1, 6), None)
    ]
    maps = [calibrate(CrossFirst(), order)["cross"].parameters for order in (batches, batches[::-1])]
    torch.testing.assert_close(maps[0].center_x, maps[1].center_x)
    torch.testing.assert_close(maps[0].g1, maps[1].g1)
