"""Runs every architecture of transformers that a small config builds, with our attention and with transformers' own.

For each one, a tiny model with random weights computes its outputs with eager attention and with `method="exact"`. They
are equal, or the model is refused by an error that says what is accepted. Anything else is wrong. Run as a program, it
writes the page docs/guide/architectures.md.
"""

import contextlib
import dataclasses
import gc
import inspect
import re
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

import favorsharp as fs
from favorsharp.transformers import StateCache, check, register

VOCABULARY, LENGTH = 99, 12
MOST_PARAMETERS = 16_000_000
SECONDS = 30
"""The most CPU time that one architecture may take; one that takes longer is not reached."""

SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "src_vocab_size", "tgt_vocab_size"), VOCABULARY),
    **dict.fromkeys(("vocab_size_per_layer_input",), VOCABULARY),
    **dict.fromkeys(("hidden_size_per_layer_input",), 8),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(
        ("hidden_dim", "decoder_hidden_size", "encoder_hidden_size", "input_embedding_size", "emb_dim"), 32
    ),
    **dict.fromkeys(("lru_width", "conv_dim_size", "output_hidden_size", "out_hidden_size", "projection_dim"), 32),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "encoder_attention_heads"), 4
    ),
    **dict.fromkeys(("decoder_attention_heads", "decoder_num_attention_heads", "encoder_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_head_kv", "num_kv_heads"), 4),
    **dict.fromkeys(("decoder_num_key_value_heads", "encoder_num_key_value_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "global_head_dim", "attention_head_dim"), 8),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "d_inner"), 64
    ),
    **dict.fromkeys(
        ("ffn_hidden_size", "dim_feedforward", "decoder_intermediate_size", "mlp_dim", "hidden_mlp_dim"), 64
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "decoder_num_hidden_layers", "depth"), 2),
    **dict.fromkeys(("encoder_num_hidden_layers", "num_block_layers"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_source_positions"), 128),
    **dict.fromkeys(("max_target_positions", "max_sequence_length", "max_2d_position_embeddings"), 128),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("sliding_window",), 5),
    **dict.fromkeys(("local_attention",), 10),
    **dict.fromkeys(("rotary_dim",), 4),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
    **dict.fromkeys(("mamba_d_ssm",), 64),
    **dict.fromkeys(("prediction_length",), 4),
    **dict.fromkeys(("image_size",), 16),
    **dict.fromkeys(("patch_size",), 4),
    **dict.fromkeys(("eos_token_id", "sep_token_id", "decoder_start_token_id"), 2),
    **dict.fromkeys(("bos_token_id", "cls_token_id"), 1),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "hidden_dropout_prob"), 0.0),
}
"""Values of config fields by name, wherever the config has a field of that name."""

SAME = {"rtol": 2e-3, "atol": 2e-3}


class Outcome(NamedTuple):
    """The result for an architecture, "served", "refused", "outside", "not reached" or "wrong", and the reason."""

    kind: str
    why: str


def architectures() -> list[str]:
    """The model types of transformers that have a base model or a causal language model."""
    return sorted(set(MODEL_MAPPING_NAMES) | set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "mamba2": {"num_heads": 8},
    "mpt": {"attn_pdrop": 0},
    "zaya": {"num_experts_per_tok": 1},
}
"""Values of config fields for one architecture."""


def prepare() -> None:
    """Register the names that `outcome` uses."""
    register("exact", method="exact")
    register("features", method="posrf", num_features=8, rng=0)


def outcome(model_type: str) -> Outcome:
    """Run one architecture."""
    try:
        with _time_limit(), warnings.catch_warnings(), torch.no_grad(), fs.use("reference"):
            warnings.simplefilter("ignore")
            return _run(model_type)
    except TimeoutError:
        return Outcome("not reached", f"takes more than {SECONDS} s")
    finally:
        gc.collect()


def _run(model_type: str) -> Outcome:
    found = _reached(model_type)
    if isinstance(found, Outcome):
        return found
    model, batches, eager = found
    try:
        model.set_attn_implementation("exact")
        exact = [_numbers(model, batch) for batch in batches]
        names = check(model).names("exact")
    except (ValueError, TypeError, NotImplementedError) as error:
        kind = "outside" if "would never use" in str(error) else "refused"
        return Outcome(kind if "accepted" in str(error) else "wrong", _line(error))
    except TimeoutError:
        raise
    except Exception as error:
        return Outcome("wrong", _line(error))
    for batch, a, b in zip(batches, eager, exact, strict=True):
        if not _same(a, b) and not _same(_by_sdpa(model, batch), b):
            error = max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True) if x.numel())
            return Outcome("wrong", f"differs from eager by {error:.2g} with {_describe(batch)}")
    if not names:
        return Outcome("outside", "no layer of the model tried uses the interface")
    return _generated(model_type, model)


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(torch.allclose(x, y, **SAME, equal_nan=True) for x, y in zip(a, b, strict=True))


def _by_sdpa(model: Any, batch: dict[str, Any]) -> list[Any]:
    """The results by torch's attention, if the model has it: eager gives other numbers to a query that sees no key."""
    name = model.config._attn_implementation
    try:
        model.set_attn_implementation("sdpa")
        return _numbers(model, batch)
    except ValueError:
        return []
    finally:
        model.set_attn_implementation(name)


def _reached(model_type: str) -> Any:
    """The first small model that runs with eager attention, its inputs and its results; or why there is none.

    A model that would never use a registered name is refused without numbers, so it need not run.
    """
    first = None
    for changes, kind in product(VARIANTS, _classes_of(model_type)):
        try:
            config = _config(model_type, changes)
            with torch.device("meta"):
                twin = kind(config)
            if (why := _outside(twin)) is not None:
                return Outcome("outside", why)
            size = sum(p.numel() for p in twin.parameters())
            if size > MOST_PARAMETERS:
                raise OverflowError(f"the smallest model tried has {size / 1e6:.0f} million parameters")
            model = _built(kind, config)
        except TimeoutError:
            raise
        except Exception as error:
            first = first or error
            continue
        for base in _inputs(model, config):
            try:
                batches = list(_padded(base, model))
                return model, batches, [_numbers(model, batch) for batch in batches]
            except TimeoutError:
                raise
            except Exception as error:
                first = first or error
    return Outcome("not reached", _line(first))


def _outside(model: Any) -> str | None:
    """The error by which a model says that none of its layers uses a registered name; None if it accepts the name."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("exact")
    except ValueError as error:
        return _line(error) if "would never use" in str(error) else None
    model.set_attn_implementation(before)
    return None


def _generated(model_type: str, model: Any) -> Outcome:
    """Check that greedy generation equals eager attention, and with a StateCache the forward pass, or that it is
    refused."""
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or not hasattr(model, "generate"):
        return Outcome("served", "")
    ids = _ids()[:, :6]
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    try:
        model.set_attn_implementation("eager")
        want = torch.stack(model.generate(ids, attention_mask=torch.ones_like(ids), **options).logits)
    except TimeoutError:
        raise
    except Exception:
        return Outcome("served", "its generate is not tried")
    try:
        model.set_attn_implementation("exact")
        got = torch.stack(model.generate(ids, attention_mask=torch.ones_like(ids), **options).logits)
    except ValueError as error:
        return Outcome("served" if "accepted" in str(error) else "wrong", f"generate: {_line(error)}")
    if not torch.allclose(got, want, **SAME, equal_nan=True):
        return Outcome("wrong", f"generation differs from eager by {float((got - want).abs().max()):.2g}")
    return _with_states(model, ids, options)


def _with_states(model: Any, ids: Any, options: dict[str, Any]) -> Outcome:
    model.set_attn_implementation("features")
    try:
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), cache=StateCache(config=model.config), **options
        )
    except (ValueError, NotImplementedError) as error:
        known = "accepted" in str(error) or "not compatible with `cache`" in str(error)  # transformers' own refusal
        return Outcome("served" if known else "wrong", f"StateCache: {_line(error)}")
    except TimeoutError:
        raise
    except Exception as error:
        return Outcome("wrong", f"StateCache: {_line(error)}")
    whole = found.sequences[:, :-1]
    want = model(whole, attention_mask=torch.ones_like(whole), use_cache=False).logits[:, ids.shape[1] - 1 :]
    got = torch.stack(found.logits, dim=1)
    if not torch.allclose(got, want.to(got.dtype), **SAME, equal_nan=True):
        return Outcome("wrong", f"StateCache: differs from the forward pass by {float((got - want).abs().max()):.2g}")
    return Outcome("served", "StateCache too")


# Small models ---------------------------------------------------------------------------------------------------------


VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {
        "head_dim": None,
        "rotary_dim": None,
        "hidden_size": None,
        "intermediate_size": None,
        "max_position_embeddings": None,
    },
    dict.fromkeys(("hidden_size", "d_model", "n_embd"), 256) | {"head_dim": 64, "global_head_dim": 64},
    dict.fromkeys(("hidden_size", "d_model"), 512) | {"head_dim": 128, "qk_rope_head_dim": 64},
    {name: None for name in SMALL if "layer" not in name and "vocab" not in name},
)
"""Changes of the small values, tried in turn until a model runs; None leaves what the config has."""


def _config(model_type: str, changes: dict[str, Any]) -> Any:
    kind = getattr(hf, CONFIG_MAPPING_NAMES[model_type])
    changes = changes | OWN.get(model_type, {})
    table = {name: value for name, value in (SMALL | changes).items() if value is not None}
    return kind(**_small(kind, table))


def _small(kind: Any, table: dict[str, Any]) -> dict[str, Any]:
    """Values for the fields of a config class, and of its parts."""
    names = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    names |= set(inspect.signature(kind.__init__).parameters)
    renamed = getattr(kind, "attribute_map", None) or {}
    default = kind()
    values = {name: table[name] for name in names if name in table}
    values |= {own: table[name] for name, own in renamed.items() if name in table and own in names and own not in table}
    values = {name: value for name, value in values.items() if isinstance(value, list) or not _is_list(default, name)}
    for name in getattr(kind, "sub_configs", None) or ():
        part = getattr(default, name, None)
        if part is not None:
            values[name] = _small(type(part), table) | {"model_type": part.model_type}
    layers = getattr(default, "layer_types", None)
    if layers and "layer_types" in names:  # both kinds of layers, if there are two
        kinds = list(dict.fromkeys(layers))[:2]
        values["layer_types"] = (kinds * 2)[:2]
    return values


def _is_list(config: Any, name: str) -> bool:
    """Whether a field of a config has several values; fields that differ between layers have no value at all."""
    try:
        return isinstance(getattr(config, name, None), list | tuple | dict)
    except Exception:
        return False


def _classes_of(model_type: str) -> list[Any]:
    """The causal language model, if there is one, and the base model."""
    given = [
        names[model_type] for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES) if model_type in names
    ]
    names = dict.fromkeys(x if isinstance(x, str) else x[0] for x in given)
    return [getattr(hf, name) for name in names if hasattr(hf, name)]


def _built(kind: Any, config: Any) -> Any:
    """The model with eager attention, and weights that make attention uneven."""
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation="eager").eval()
    for weight in model.parameters():
        if weight.ndim == 2 and weight.dtype.is_floating_point:
            weight.mul_(3.0)
    return model


def _ids(rows: int = 2) -> Any:
    return torch.randint(5, VOCABULARY - 5, (rows, LENGTH), generator=_seeded(1))


def _inputs(model: Any, config: Any) -> Iterator[dict[str, Any]]:
    """Inputs that a model may take, for two rows or two images."""
    taken = inspect.signature(model.forward).parameters
    text: dict[str, Any] = {"input_ids": _ids()} if "input_ids" in taken else {}
    if "decoder_input_ids" in taken:
        text["decoder_input_ids"] = _ids()[:, :7]
    if "use_cache" in taken:
        text["use_cache"] = False
    signals = [
        signal for name in ("pixel_values", "input_features", "input_values") for signal in _signals(name, config)
    ]
    signals = [signal for signal in signals if set(signal) <= set(taken)]
    if "input_ids" in text and model.main_input_name == "input_ids":
        yield text
    yield from signals
    yield from (text | signal for signal in signals)
    yield text
    if "grid_thw" in taken:
        part = getattr(config, "vision_config", config)
        channels = getattr(part, "in_channels", None) or getattr(part, "num_channels", 3)
        size = channels * getattr(part, "temporal_patch_size", 1) * part.patch_size**2
        name = "hidden_states" if "hidden_states" in taken else "pixel_values"
        yield {name: torch.randn(16, size, generator=_seeded(2)), "grid_thw": torch.tensor([[1, 4, 4]])}


def _padded(base: dict[str, Any], model: Any) -> Iterator[dict[str, Any]]:
    """The inputs without a mask and, if they are text, with padding on the right and on the left, of unequal rows."""
    yield base
    if "input_ids" in base and "attention_mask" in inspect.signature(model.forward).parameters:
        position = torch.arange(LENGTH)[None]
        for visible in (position < torch.tensor([[LENGTH], [7]]), position >= torch.tensor([[0], [5]])):
            yield base | {"attention_mask": visible.long()}


def _signals(name: str, config: Any) -> Iterator[dict[str, Any]]:
    """Images, or sounds."""
    if name == "input_values":
        yield {name: torch.randn(2, 1600, generator=_seeded(2))}
    elif name == "input_features":
        part = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
        part = config if isinstance(part, dict) else part
        bins = getattr(part, "num_mel_bins", None) or getattr(part, "feature_size", None) or 80
        for length in (60, 128, 256):
            for sizes in ((bins, length), (length, bins)):
                yield {name: torch.randn(2, *sizes, generator=_seeded(2))}
    else:
        part = getattr(config, "vision_config", None) or config
        size = getattr(part, "image_size", None) or 32
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(part, "num_channels", None) or 3
        if height * width <= 128**2:  # larger ones make millions of pairs of patches
            yield {name: torch.randn(2, channels, height, width, generator=_seeded(2))}
        yield {name: torch.randn(2, channels, 64, 64, generator=_seeded(2))}


def _seeded(seed: int) -> Any:
    return torch.Generator().manual_seed(seed)


def _numbers(model: Any, batch: dict[str, Any]) -> list[Any]:
    """The floating results of a model, without the positions of padding, which may hold anything."""
    visible = batch.get("attention_mask")
    found = []
    torch.manual_seed(3)  # some models mask their input at random
    for x in model(**batch).to_tuple():
        if isinstance(x, torch.Tensor) and x.dtype.is_floating_point:
            own = visible is not None and x.ndim == 3 and x.shape[:2] == visible.shape
            found.append(x[visible.bool()] if own else x)
    return found


def _describe(batch: dict[str, Any]) -> str:
    mask = batch.get("attention_mask")
    return "no mask" if mask is None else f"padding on the {'right' if mask[1, 0] else 'left'}"


def _line(error: Any) -> str:
    ours = isinstance(error, ValueError) and "accepted" in str(error)
    return re.sub(r"\s+", " ", ("" if ours else f"{type(error).__name__}: ") + str(error))[:300]


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# The page -------------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "architectures.md"

_HEAD = """# Architectures of transformers

This page is written by `python tests/transformers/architectures.py`, and `make test-architectures` checks it. Each
architecture of transformers {version} is built from a small config with random weights, and `method="exact"` is
compared with eager attention: without a mask, and with padding on the right and on the left of unequal rows. Causal
models also generate greedily, with a `DynamicCache` and with `StateCache(config=model.config)`. A query that sees no
key may differ from eager attention, as it does in torch's attention. Of {total} architectures {served} are served.
{refused} are refused, with the reason. {outside} have no attention that a registered name reaches, and are refused too.
{missing} were not reached, because no small model of them ran; the check leaves these out.
"""


def main(arguments: list[str]) -> None:
    """Run the named architectures and print the results; without names, run all and write the page."""
    hf.logging.set_verbosity_error()
    torch.set_num_threads(1)
    prepare()
    found = {}
    for model_type in arguments or architectures():
        found[model_type] = outcome(model_type)
        print(model_type, *found[model_type], sep=" | ", flush=True)
    if not arguments:
        PAGE.write_text(page(found))


def page(found: dict[str, Outcome]) -> str:
    """The page, in Markdown."""

    def named(kind: str, accepts: Callable[[str], bool] = lambda why: True) -> list[str]:
        return [name for name, (own, why) in found.items() if own == kind and accepts(why)]

    counts = {kind: len(named(kind)) for kind in ("served", "refused", "outside")}
    missing = len(named("not reached"))
    parts = [_HEAD.format(version=hf.__version__, total=len(found), missing=missing, **counts)]
    states = named("served", lambda why: why == "StateCache too")
    fails = named("served", lambda why: why.startswith("StateCache:"))
    rest = [name for name in named("served") if name not in states and name not in fails]
    parts += ["## Served, also with a StateCache", _names(states)]
    parts += ["## Served, and refused with a StateCache", _reasons(found, fails)]
    parts += ["## Served, without generation by a StateCache", _names(rest)]
    parts += ["## Refused", _reasons(found, named("refused"))]
    parts += ["## Outside the attention interface", _names(named("outside"))]
    parts += ["## Not reached", _names(named("not reached"))]
    wrong = named("wrong")
    parts += ["## Wrong", _reasons(found, wrong)] if wrong else []
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def entries(text: str) -> dict[str, tuple[str, str]]:
    """The section and the reason under which a page lists each architecture."""
    found = {}
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        for item in re.split(r"^- ", body, flags=re.MULTILINE):
            why, _, names = " ".join(item.split()).rpartition(": ")
            found |= dict.fromkeys(re.findall(r"`([\w.-]+)`", names), (title, why))
    return found


def _names(names: list[str]) -> str:
    return textwrap.fill(", ".join(f"`{name}`" for name in names), 118, break_on_hyphens=False, break_long_words=False)


def _reasons(found: dict[str, Outcome], names: list[str]) -> str:
    """The architectures by the reason of their refusal, without the names of layers and what is accepted."""
    by_reason: dict[str, list[str]] = {}
    for name in names:
        why = found[name].why.removeprefix("StateCache: ").removeprefix("ValueError: ")
        why = re.sub(r"^\w+( \(layer \d+\))? (?=computes|attends|keeps|belongs|changes)", "a layer ", why)
        why = re.sub(r"^(.*) is not served by .*", r"its attention gets \1", why)
        why = re.sub(r" of shape .* is of", " of", why)
        why = re.sub(r"<class '[\w.]*\.(\w+)'>", r"\1", why)
        why = re.split(r"[;(]|\. |: ", why)[0].strip(" .")
        by_reason.setdefault(why, []).append(name)
    return "\n".join(
        textwrap.fill(
            f"- {why}: {', '.join(f'`{name}`' for name in group)}", 118, subsequent_indent="  ", break_on_hyphens=False
        )
        for why, group in sorted(by_reason.items())
    )


if __name__ == "__main__":
    main(sys.argv[1:])
