"""`check` tells before any input which layers are approximated.

A model without such a layer warns at its first call.
"""

import pickle

import pytest
import torch
import transformers as hf
from tiny import bert, inputs, llama, whisper

from favorsharp.transformers import calibrate, check, register

SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def _registered():
    register("favorsharp", num_features=16, rng=0)
    register("landmarks", method="landmarks", num_features=8)
    register("exact", method="exact")


def test_layers_are_listed_with_what_they_need():
    model = llama()
    assert check(model).names("unchanged") == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    for name, attention, why in (
        ("landmarks", "approximated", "8 landmarks"),
        ("exact", "exact", "softmax attention"),
        ("favorsharp", "approximated", "optimal with 16 features, calibrate it first"),
    ):
        model.set_attn_implementation(name)
        assert [layer[2:] for layer in check(model).layers] == [(attention, why)] * 2
    calibrate(model, [inputs("llama")])
    assert {layer.why for layer in check(model).layers} == {"optimal with 16 features, calibrated"}
    assert "2 of 2 attention layers are approximated\n  2 x model.layers.*.self_attn" in repr(check(model))


def test_only_layers_that_see_no_future_need_no_calibration():
    model = whisper()
    model.set_attn_implementation("favorsharp")
    free = {layer.name for layer in check(model).layers if "calibrate" not in layer.why}
    assert free == {"model.encoder.layers.0.self_attn", "model.encoder.layers.1.self_attn"}


def test_a_frozen_method_needs_calibration_everywhere():
    register("frozen", num_features=16, rng=0, calibration="frozen")
    model = bert()
    for name, needed in (("favorsharp", False), ("frozen", True)):
        model.set_attn_implementation(name)
        assert {"calibrate it first" in layer.why for layer in check(model).layers} == {needed}


def test_a_compiled_model_is_checked_as_the_model_itself():
    model = llama()
    model.set_attn_implementation("landmarks")
    assert check(torch.compile(model)) == check(model)


def test_layers_outside_the_interface_and_parts_by_another_name_are_unchanged():
    vision = hf.ViTConfig(**(SMALL | {"vocab_size": None}), image_size=8, patch_size=4)
    text = hf.RoFormerConfig(**SMALL, is_decoder=True, add_cross_attention=True)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    model = hf.VisionEncoderDecoderModel._from_config(config, attn_implementation="landmarks")
    found = check(model)
    assert found.names("approximated") == ("encoder.layers.0.attention", "encoder.layers.1.attention")
    assert {layer.why for layer in found.layers if layer.attention == "unchanged"} == {
        "it does not go through transformers' attention interface"
    }
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=SMALL, vision_config=SMALL | {"image_size": 8, "patch_size": 4}))
    clip.set_attn_implementation({"vision_config": "landmarks"})
    assert {layer.name.split("_")[0] for layer in check(clip).layers if layer.attention == "approximated"} == {"vision"}


class OwnLayer(torch.nn.Linear):
    """A layer whose source does not show whether a helper looks up its attention."""


class Own(hf.PreTrainedModel):
    """A caller's own model, whose layers compute attention themselves."""

    config_class = hf.LlamaConfig
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        self.layer = OwnLayer(4, 4)
        self.post_init()

    def forward(self, x):
        return self.layer(x)


def test_a_model_that_approximates_nothing_warns_once():
    model = Own(hf.LlamaConfig(**SMALL, attn_implementation="landmarks"))
    with pytest.warns(
        UserWarning, match="no attention layer of Own was approximated by attn_implementation='landmarks'"
    ):
        model(torch.ones(2, 4))
    model(torch.ones(2, 4))


def test_a_model_of_sliding_windows_alone_warns_once():
    """Its layers are exact with every method; with "exact" that is what was asked for."""
    config = hf.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8)
    model, batch = hf.MistralModel(config), inputs("llama")
    model.set_attn_implementation("exact")
    model(**batch)
    model.set_attn_implementation("landmarks")
    copied = pickle.loads(pickle.dumps(model))
    with pytest.warns(UserWarning, match="no attention layer of MistralModel was approximated"):
        model(**batch)
    model(**batch)
    copied(**batch)
    gemma = hf.Gemma3TextModel(
        hf.Gemma3TextConfig(
            **SMALL,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    )
    gemma.set_attn_implementation("landmarks")
    gemma(**batch)
