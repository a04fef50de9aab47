"""Models of every architecture that is served, small enough for a test, with weights that make attention uneven."""

import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

VOCABULARY = 50


def bert(**options):
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
        **options,
    )
    return _sharp(BertModel, config)


def gpt2():
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _sharp(GPT2LMHeadModel, config)


def llama(**options):
    """Grouped heads: four query heads read two key heads."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return _sharp(LlamaForCausalLM, config)


def vit():
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    return _sharp(ViTModel, config)


def whisper():
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=32,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    model = _sharp(WhisperForConditionalGeneration, config)
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    return model


MODELS = {"bert": bert, "gpt2": gpt2, "llama": llama, "vit": vit, "whisper": whisper}
CAUSAL = ("gpt2", "llama", "whisper")


def inputs(name, batch=3, n=12, seed=0):
    """A batch for the model of that name, without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, n), generator=generator)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator, dtype=torch.float64)}
    if name == "whisper":
        return {
            "input_features": torch.randn(batch, 8, 40, generator=generator, dtype=torch.float64),
            "decoder_input_ids": ids,
        }
    return {"input_ids": ids}


def output(model, **batch):
    """The model's output: logits, or hidden states."""
    found = model(**batch)
    return found.logits if "logits" in found else found.last_hidden_state


def _sharp(kind, config):
    """A model in float64 and evaluation mode, with scores as large as those of a trained model."""
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(6.0)
    return model.double().eval()
