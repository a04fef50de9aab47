"""Models outside the attention interface, keywords, and layers that change keys between cache and attention.

Each is served exactly, or refused by an error that names the layer; no hidden key is attended to.
"""

import copy

import pytest
import torch
import transformers as hf
from tiny import bert, inputs, llama, output

from favorsharp.transformers import StateCache, calibrate, register
from favorsharp.transformers.attention import attend
from favorsharp.transformers.masks import CompactMask, compact_mask, read_mask
from favorsharp.transformers.registrations import REGISTERED

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
IDS = inputs("llama", batch=2, n=10)["input_ids"]
MASK = torch.arange(10)[None] < torch.tensor([10, 7])[:, None]


@pytest.fixture(autouse=True)
def _registered():
    register("exact", method="exact")
    register("favorsharp", method="posrf", num_features=16, rng=0)


def made(name, implementation, **options):
    """A small model of transformers, given the name of its class."""
    family = name.removesuffix("ForCausalLM").removesuffix("Model")
    config = getattr(hf, f"{family}Config")(**(SMALL | options))
    torch.manual_seed(0)
    model = getattr(hf, name)._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(3.0)
    return model


# Models that never call the registered attention ----------------------------------------------------------------------

BLOOM = {"n_layer": 2, "n_head": 4}
MPT = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
OUTSIDE = {
    "BloomForCausalLM": BLOOM,
    "MptForCausalLM": MPT,
    "GPTNeoXJapaneseModel": {},
    "RoFormerModel": {},
    "MPNetModel": {},
    "MegatronBertModel": {},
    "RemBertModel": {"input_embedding_size": 32},
    "IBertModel": {},
    "DebertaModel": {},
    "FalconModel": {},
    "MambaModel": {},
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_model_that_never_asks_is_refused_when_it_is_made(name):
    with pytest.raises(ValueError, match=rf"{name} would never use attn_implementation='favorsharp'.*accepted"):
        made(name, "favorsharp", **OUTSIDE[name])
    model = made(name, "eager", **OUTSIDE[name])
    with pytest.raises(ValueError, match=rf"{name} would never use"):
        model.set_attn_implementation("favorsharp")
    model.set_attn_implementation("eager")
    output(model, input_ids=IDS)


SERVED = {
    "BertModel": {},
    "LlamaForCausalLM": {},
    "Qwen2MoeModel": {"num_key_value_heads": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
}


@pytest.mark.parametrize("name", SERVED)
def test_a_model_of_the_interface_equals_eager(name):
    """Qwen2Moe also asks for a sliding mask that no layer of it uses."""
    batch = {"input_ids": IDS, "attention_mask": MASK.long()}
    eager, exact = (
        output(made(name, implementation, **SERVED[name]), **batch) for implementation in ("eager", "exact")
    )
    torch.testing.assert_close(exact[MASK], eager[MASK], rtol=1e-5, atol=1e-5)


def test_a_part_that_is_served_is_enough():
    """A composite model may have parts outside the interface: here RoFormer reads what ViT has seen."""
    vision = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=4
    )
    text = hf.RoFormerConfig(**SMALL, is_decoder=True, add_cross_attention=True)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    model = hf.VisionEncoderDecoderModel._from_config(config, attn_implementation="exact")
    assert model.encoder.config._attn_implementation == "exact"


class OwnLayer(torch.nn.Module):
    """A layer of a caller's own, which reads the mask itself."""

    def __init__(self, use):
        super().__init__()
        self.use = use

    def forward(self, x, mask):
        return self.use(x @ x.mT, mask)


class OwnModel(hf.PreTrainedModel):
    """A caller's own model, which asks transformers for its mask."""

    config_class = hf.LlamaConfig
    _supports_attention_backend = True

    def __init__(self, config, use):
        super().__init__(config)
        self.layer = OwnLayer(use)
        self.post_init()

    def forward(self, inputs_embeds, attention_mask=None):
        mask = hf.masking_utils.create_causal_mask(
            self.config, inputs_embeds, attention_mask, None, position_ids=torch.arange(10)[None]
        )
        return self.layer(inputs_embeds, mask)


USES = {
    "add": lambda scores, mask: scores[:, None] + mask,
    "subtract from": lambda scores, mask: 1 - mask,
    "compare": lambda scores, mask: mask != 0,
    "masked_fill": lambda scores, mask: scores[:, None].masked_fill(mask, 0.0),
    "cast": lambda scores, mask: mask.to(scores.dtype),
    "bool": lambda scores, mask: scores[:, None].where(mask.bool(), 0.0),
    "index": lambda scores, mask: scores[mask[:, 0, 0] > 0],
    "change": lambda scores, mask: mask.fill_(0),
    "join": lambda scores, mask: torch.cat([mask, mask], dim=-1),
    "attend": lambda scores, mask: torch.nn.functional.scaled_dot_product_attention(scores, scores, scores, mask[:, 0]),
    "some queries": lambda scores, mask: mask[:, :, :5],
    "some queries ...": lambda scores, mask: mask[..., :5, :],
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("padding", [None, MASK])
def test_whoever_computes_with_a_mask_is_refused_and_named(use, padding):
    model = OwnModel(hf.LlamaConfig(**SMALL, attn_implementation="exact"), USES[use])
    with pytest.raises(ValueError, match=r"OwnLayer computes with its attention mask itself.*accepted"):
        model(torch.ones(2, 10, 32), padding)


MOVES = {
    "to": lambda mask: mask.to("cpu", torch.int8),
    "slice": lambda mask: mask[:, :, :, :10],
    "slice ...": lambda mask: mask[..., :10],
    "rows": lambda mask: mask[torch.tensor([0, 1])],
    "contiguous": lambda mask: mask.contiguous(),
    "clone": lambda mask: mask.clone().detach(),
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize("move", MOVES)
def test_a_mask_may_be_moved(move):
    for padding in (None, MASK):
        mask = compact_mask(2, 10, 10, attention_mask=padding)
        moved = MOVES[move](mask)
        assert isinstance(moved, CompactMask)
        assert "CompactMask" in repr(moved)
        seen = read_mask(moved, 10, 10, is_causal=True)
        assert seen.is_causal
        found = torch.ones(2, 1, 10, dtype=torch.bool) if seen.key_mask is None else seen.key_mask.expand(2, 1, 10)
        assert torch.equal(found, torch.ones_like(found) if padding is None else padding[:, None])


def test_padding_that_repeats_one_number_is_padding():
    row = torch.tensor([[True], [False]]).expand(2, 10)
    for n in (1, 10):
        seen = read_mask(compact_mask(2, n, n, attention_mask=row[:, :n]), n, n, is_causal=True)
        assert torch.equal(seen.key_mask, row[:, None, :n])
        assert read_mask(compact_mask(2, n, n), n, n, is_causal=True).key_mask is None  # a step of one token uses this


def test_doge_adds_a_bias_of_its_own_and_siglip2_reads_a_boolean_mask():
    model = made("DogeModel", "exact")
    for mask in (None, MASK.long()):
        with pytest.raises(ValueError, match="DogeAttention computes with its attention mask itself"):
            model(IDS, attention_mask=mask)
    config = hf.Siglip2VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_patches=16, patch_size=4
    )
    torch.manual_seed(0)
    model = hf.Siglip2VisionModel._from_config(config, attn_implementation="eager").eval()
    for padded in (0, 4):
        patches = (torch.arange(16)[None] < torch.tensor([16, 16 - padded])[:, None]).long()
        batch = {
            "pixel_values": torch.randn(2, 16, 48),
            "pixel_attention_mask": patches,
            "spatial_shapes": torch.tensor([[4, 4]] * 2),
        }
        model.set_attn_implementation("eager")
        eager = model(**batch).pooler_output
        model.set_attn_implementation("exact")
        torch.testing.assert_close(model(**batch).pooler_output, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("use", ["add", "masked_fill", "attend", "bool"])
def test_compiled_strangers_are_refused_too(use):
    """The mask has a further axis, so that scores do not broadcast with it."""
    torch._dynamo.reset()
    config = hf.LlamaConfig(**SMALL, attn_implementation="exact")
    for fullgraph in (True, False):
        model = torch.compile(OwnModel(config, USES[use]), backend="eager", fullgraph=fullgraph)
        with pytest.raises(RuntimeError):
            model(torch.ones(2, 10, 32), MASK)


@pytest.mark.slow
def test_masks_pass_the_end_of_a_graph_and_exports():
    def run(x, padding):
        mask = compact_mask(2, 10, 10, attention_mask=padding)
        torch._dynamo.graph_break()
        seen = read_mask(mask[..., :10].to(x.device), 10, 10, is_causal=True)
        return torch.where(seen.key_mask, x, 0.0) if seen.is_causal else x

    torch._dynamo.reset()
    x = torch.ones(2, 1, 10)
    for backend in ("eager", "aot_eager"):
        torch.testing.assert_close(torch.compile(run, backend=backend)(x, MASK), torch.where(MASK[:, None], x, 0.0))
    model = bert()
    model.set_attn_implementation("favorsharp")
    batch = {"input_ids": IDS, "attention_mask": MASK.long()}
    exported = torch.export.export(model, (), batch).module()
    torch.testing.assert_close(output(exported, **batch), output(model, **batch))


# Keywords -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keyword",
    [
        {"indices": torch.zeros(2, 10, 3)},
        {"s_aux": torch.zeros(4)},
        {"position_bias": torch.zeros(1, 4, 10, 10)},
        {"cu_seq_lens_q": torch.tensor([0, 10])},
        {"seq_idx": torch.zeros(2, 10)},
        {"softcap": 30.0},
        {"output_attentions": True},
        {"anything": 0},
    ],
    ids=lambda keyword: next(iter(keyword)),
)
def test_keywords_are_served_or_refused(keyword):
    module = llama().model.layers[0].self_attn
    q, k = torch.ones(2, 4, 10, 8), torch.ones(2, 2, 10, 8)
    (name,) = keyword
    with pytest.raises(
        ValueError, match=rf"LlamaAttention \(layer 0\).*|{name} is not served.*LlamaAttention"
    ) as found:
        attend(REGISTERED["exact"], module, q, k, k, None, **keyword)
    assert "accepted" in str(found.value)
    assert name.replace("_", " ") in str(found.value).replace("_", " ")
    nothing = {name: None, "position_ids": torch.arange(10), "output_attentions": False, "use_cache": True}
    attend(REGISTERED["exact"], module, q, k, k, None, **nothing)


def test_a_sliding_window_is_served_by_its_mask_or_without_any():
    module = llama().model.layers[0].self_attn
    q = torch.randn(2, 4, 10, 8)
    attend(REGISTERED["exact"], module, q, q, q, compact_mask(2, 10, 10), sliding_window=10)
    with pytest.raises(ValueError, match="sliding window of 9, and 10 keys"):
        attend(REGISTERED["exact"], module, q, q, q, compact_mask(2, 10, 10), sliding_window=9)
    windowed = compact_mask(2, 10, 10, mask_function=hf.masking_utils.sliding_window_causal_mask_function(9))
    for mask in (None, windowed):
        found = attend(REGISTERED["exact"], module, q, q, q, mask, sliding_window=9)[0]
        whole = attend(REGISTERED["exact"], module, q, q, q, None)[0]
        torch.testing.assert_close(found[:, :9], whole[:, :9])
        assert not torch.allclose(found[:, 9], whole[:, 9])


def test_unknown_keywords_of_masks_and_caches_are_refused():
    compact_mask(2, 10, 10, local_size=4, dtype=torch.float32, use_vmap=False, anything=None)
    with pytest.raises(ValueError, match="anything.*accepted"):
        compact_mask(2, 10, 10, anything=1)
    key = torch.ones(1, 2, 3, 4)
    StateCache().update(key, key, 0, kwargs={"position_ids": None})
    with pytest.raises(ValueError, match="anything.*accepted"):
        StateCache().update(key, key, 0, anything=1)


# Between cache and attention ------------------------------------------------------------------------------------------


def steps(model, cache):
    """The logits of a prompt, a token and a block, from a cache."""
    ones = torch.ones_like(IDS)
    with torch.no_grad():
        return torch.cat(
            [model(IDS[:, a:b], attention_mask=ones[:, :b], cache=cache).logits for a, b in ((0, 5), (5, 6), (6, 10))],
            dim=1,
        )


BETWEEN = {
    "JetMoeForCausalLM": {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4},
    "DeepseekV3ForCausalLM": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "moe_intermediate_size": 32,
    },
}


@pytest.mark.parametrize("name", BETWEEN)
def test_a_layer_may_make_its_keys_of_what_its_cache_gave(name):
    """JetMoe repeats its keys; latent attention computes keys and values from fewer numbers."""
    model = made(name, "favorsharp", **BETWEEN[name])
    calibrate(model, [IDS])
    whole = output(model, input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False)
    for cache in (hf.DynamicCache(), StateCache(), StateCache(config=model.config)):
        torch.testing.assert_close(steps(model, cache), whole, rtol=1e-4, atol=1e-4)


def test_a_layer_that_attends_twice_is_refused():
    model = made("DiffLlamaForCausalLM", "favorsharp", num_key_value_heads=2)
    calibrate(model, [IDS])
    with pytest.raises(
        ValueError, match=r"DiffLlama\w* \(layer 0\) attends again.*accepted for such a layer: a DynamicCache"
    ):
        steps(model, StateCache())
    steps(model, hf.DynamicCache())  # the error leaves no state behind


HYBRIDS = {
    "Lfm2ForCausalLM": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "Qwen3NextForCausalLM": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_model_with_other_memory_needs_a_cache_of_its_config(name):
    model = made(name, "favorsharp", **HYBRIDS[name])
    with pytest.raises(ValueError, match=r"another memory.*accepted: StateCache\(config=model.config\)"):
        steps(model, StateCache())
    whole = output(model, input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False)
    cache = StateCache(config=model.config)
    torch.testing.assert_close(steps(model, cache), whole, rtol=1e-4, atol=1e-4)
    assert cache.num_bytes > 0
    cache.reset()
    torch.testing.assert_close(steps(model, cache), whole, rtol=1e-4, atol=1e-4)


def test_a_model_that_looks_for_keys_in_its_cache_is_refused():
    module = Between(None)
    module.config.cross_attention_layers = [1]
    module.what = lambda module, cache, x: cache.update(x, x, 0)
    with pytest.raises(ValueError, match=r"Between belongs to a model.*in one cache.*accepted"):
        module(StateCache(), torch.ones(1, 2, 4, 8))


class Between(torch.nn.Module):
    """A layer that changes the keys of its cache in its forward pass."""

    is_causal = True

    def __init__(self, what):
        super().__init__()
        self.what, self.config = what, hf.LlamaConfig(**SMALL, attn_implementation="favorsharp")

    def forward(self, cache, x):
        return self.what(self, cache, x)


def call(module, q, k, v):
    return attend(REGISTERED["favorsharp"], module, q, k, v, None)[0]


def twice(module, cache, x):
    keys, values = cache.update(x, x.clone(), 0)
    return call(module, x, keys, values) + call(module, x, keys, values)


def twice_of_its_own(module, cache, x):
    keys, values = cache.update(x, x.clone(), 0)
    first = call(module, x, keys * 2, values)
    return first + call(module, x, keys * 2, values)


def half(module, cache, x):
    keys, values = cache.update(x, x.clone(), 0)
    return call(module, x, keys[..., :2, :], values[..., :2, :])


def update_twice(module, cache, x):
    keys, values = cache.update(x, x.clone(), 0)
    cache.update(x.clone(), values, 0)
    return call(module, x, keys, values)


def shared(module, cache, x):
    keys, values = cache.update(x, x.clone(), 0)
    return call(module, x, keys, values) + call(Between(None), x, keys, values)


KINDS = {
    twice: "attends again to keys",
    twice_of_its_own: "attends again to keys",
    half: "changes its keys",
    update_twice: "calls update twice",
    shared: "attends again to keys",
}


@pytest.mark.parametrize("what", KINDS, ids=lambda what: what.__name__)
def test_keys_are_counted_once_or_refused(what):
    x = torch.ones(1, 2, 4, 8)
    with pytest.raises(ValueError, match=rf"Between.*{KINDS[what]}.*accepted"):
        Between(what)(StateCache(), x)
    call(Between(None), *torch.ones(3, 1, 2, 4, 8))  # without a cache: nothing is left behind


def test_a_cache_that_an_error_left_half_filled_says_so():
    model = made("LlamaForCausalLM", "favorsharp")
    register("favorsharp", num_features=16, rng=0)
    cache = StateCache()
    for message in ("calibrate", "after a call that raised an error.*accepted: reset"):
        with pytest.raises(ValueError, match=message):
            steps(model, cache)
    calibrate(model, [IDS])  # contains nothing of that cache
    cache.reset()
    steps(model, cache)


class MakesItsCaches(torch.nn.Module):
    """As T5Gemma 2 does in `generate`: it makes another cache of the class that it was given."""

    def forward(self, cache):
        return type(cache)(config=None, offloading=False)


def test_a_model_that_makes_its_caches_itself_is_named():
    with pytest.raises(ValueError, match=r"MakesItsCaches makes a StateCache with offloading; accepted.*DynamicCache"):
        MakesItsCaches()(StateCache())
