"""A causal language model whose attention is replaced after training: `python -m benchmarks.paper.language_model`.

A small model of bytes is trained on the text of installed packages, with exact attention and one thread, unless its
checkpoint exists. Then it reads held-out packages with the attention of all layers replaced by each method. Nothing is
trained for a method. Needs `pip install -e '.[test]'`.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn
from torch.nn.functional import cross_entropy, pad, relu, rms_norm, scaled_dot_product_attention

import favorsharp as fs
from benchmarks.paper.page import DOCS, picture, powers, stamp, table, write
from favorsharp.diagnostics import relative_error

READ = ("numpy", "scipy", "sklearn", "pandas", "matplotlib", "torch")
"""The packages whose files the model is trained on."""
HELD_OUT = ("networkx", "dask")
ENDS = (".py", ".pyi", ".md", ".rst", ".txt")
LARGEST = 200_000
"""Bytes; larger files are mostly tables."""
CONTEXT = 1024
STAGES = ((0.5, 256, 16), (0.7, 512, 8), (1.0, CONTEXT, 4))
"""Up to which share of the time, with which context, in which number of sequences a step."""

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention of a layer: its number, queries, keys, values (n, heads, length, d); scores are divided by sqrt(d)."""


def text(packages: tuple[str, ...]) -> np.ndarray:
    """The bytes of all text files of the installed packages, in the order of their names."""
    pieces = []
    for package in packages:
        found = find_spec(package)
        if found is None or found.origin is None:
            raise typer.BadParameter(f"needs the package {package}: pip install -e '.[test]'")
        files = sorted(
            f for f in Path(found.origin).parent.rglob("*") if f.suffix in ENDS and f.stat().st_size < 200_000
        )
        pieces += [f.read_bytes() + b"\n\n" for f in files]
    return np.frombuffer(b"".join(pieces), dtype=np.uint8)


def exact(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Exact causal attention."""
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The rotary embedding of points (*b, length, d) at positions (length)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10_000.0 ** -(torch.arange(half) / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Layer(nn.Module):
    """Attention and a perceptron, each added to a stream that is normalised before them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        for last in (self.out, self.down):
            nn.init.zeros_(last.weight)

    def forward(self, x: torch.Tensor, number: int, attend: Attend) -> torch.Tensor:
        """(n, length, width) to the same."""
        qkv = self.qkv(rms_norm(x, x.shape[-1:])).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        positions = torch.arange(x.shape[1])
        attended = attend(number, rotated(q, positions), rotated(k, positions), v)
        x = x + self.out(attended.transpose(1, 2).flatten(-2).to(x.dtype))
        return x + self.down(relu(self.up(rms_norm(x, x.shape[-1:]))).square())


class LanguageModel(nn.Module):
    """A decoder of bytes, in the style of Llama. A byte enters with the pair and the triple that it ends (hashed)."""

    def __init__(self, layers: int = 4, width: int = 256, heads: int = 4, hashes: int = 8192) -> None:
        super().__init__()
        self.hashes = hashes
        self.bytes = nn.Embedding(256, width)
        self.pairs = nn.Embedding(hashes, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.normal_(self.bytes.weight, std=0.5)
        nn.init.normal_(self.pairs.weight, std=0.1)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: torch.Tensor, attend: Attend = exact) -> torch.Tensor:
        """Logits of the next byte (n, length, 256) of bytes (n, length)."""
        one, two = (pad(x, (shift, 0))[:, : x.shape[1]] for shift in (1, 2))
        pair = (x + 256 * one) * 2654435761 % 2**32 % self.hashes
        triple = (x + 256 * one + 65536 * two) * 2246822519 % 2**32 % self.hashes
        y = self.bytes(x) + self.pairs(pair) + self.pairs(triple)
        for number, layer in enumerate(self.layers):
            y = layer(y, number, attend)
        return self.head(rms_norm(y, y.shape[-1:]))


def batches(source: np.ndarray, rng: np.random.Generator, context: int, size: int) -> torch.Tensor:
    """Random pieces of a text (size, context + 1)."""
    starts = rng.integers(len(source) - context - 1, size=size)
    return torch.from_numpy(source[starts[:, None] + np.arange(context + 1)].astype(np.int64))


def optimisers(model: LanguageModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, Adam for embeddings and the head."""
    embeddings = {"params": [model.bytes.weight, model.pairs.weight], "lr": 0.02}
    head = {"params": [model.head.weight], "lr": 0.004}
    return [
        torch.optim.Muon(model.layers.parameters(), lr=0.02, weight_decay=0.01),
        torch.optim.AdamW([embeddings, head], betas=(0.9, 0.95), weight_decay=0.0),
    ]


def factor(done: float) -> float:
    """The factor of the learning rates: a warm-up, a plateau, and a linear decay over the last 40 per cent."""
    return min(1.0, done / 0.02, (1 - done) / 0.4 + 0.01)


def train(minutes: float, checkpoint: Path) -> None:
    """Train for a time with one thread, and write the checkpoint every minute and at the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    source, model = text(READ), LanguageModel()
    chosen = optimisers(model)
    firsts = [[group["lr"] for group in optimiser.param_groups] for optimiser in chosen]
    begin = saved = time.perf_counter()
    seen, step, mean = 0, 0, math.log(256)
    while (done := (time.perf_counter() - begin) / (60 * minutes)) < 1:
        context, size = next((context, size) for until, context, size in STAGES if done < until)
        x = batches(source, rng, context, size)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x[:, :-1])
        loss = cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        for optimiser, rates in zip(chosen, firsts, strict=True):
            for group, first in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = first * factor(done)
            optimiser.step()
            optimiser.zero_grad()
        seen, step, mean = seen + context * size, step + 1, 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0:
            typer.echo(
                f"{done:.3f} of the time: step {step}, {seen / 1e6:.2f} MB, {mean / math.log(2):.3f} bits a byte"
            )
        if time.perf_counter() - saved > 60:
            saved = time.perf_counter()
            save(model, checkpoint, seen, (saved - begin) / 60)
    save(model, checkpoint, seen, minutes)
    torch.set_num_threads(threads)


def load(checkpoint: Path) -> tuple[LanguageModel, dict[str, Any]]:
    """The model of a checkpoint, and what is known of its training."""
    kept = torch.load(checkpoint)
    model = LanguageModel()
    model.load_state_dict(kept.pop("state"))
    return model.eval().requires_grad_(False), kept


def save(model: LanguageModel, checkpoint: Path, seen: int, minutes: float) -> None:
    """Write the weights and what they are made of; the file is whole at any time."""
    new = checkpoint.with_suffix(".new")
    torch.save({"state": model.state_dict(), "bytes": seen, "minutes": minutes}, new)
    new.replace(checkpoint)


@dataclass(frozen=True)
class Setting:
    """A way to attend, of one family, and how many numbers of past tokens a head holds to do so."""

    family: str
    number: int
    window: int
    held: int
    attend: Attend


@dataclass(frozen=True)
class Row:
    """Bits for each byte: of all bytes, and of those in the second half of a context; errors of layers' attention."""

    setting: Setting
    bits: float
    late: float
    errors: tuple[float, ...]
    alone: float | None

    @property
    def adds_nothing(self) -> bool:
        """Whether the window without the rest of the method predicts as well, in the second half."""
        return self.alone is not None and self.late >= self.alone


def seen(allowed: torch.Tensor, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Exact attention to the keys that a mask (length, length) allows."""
    return scaled_dot_product_attention(q, k, v, allowed)


def near(window: int) -> torch.Tensor:
    """A mask: earlier keys in the query's own block of positions and in the block before."""
    i, j = torch.arange(CONTEXT)[:, None], torch.arange(CONTEXT)
    return (j <= i) & (i // window - j // window <= 1)


def recent(keys: int, first: int) -> torch.Tensor:
    """A mask: the first keys of a text, and so many recent ones that a query sees at most this number of keys."""
    i, j = torch.arange(CONTEXT)[:, None], torch.arange(CONTEXT)
    return (j <= i) & ((i - j < keys - first) | (j < first))


def through(chosen: Callable[[int], Any], window: int) -> Attend:
    """Attention through the landmarks or the feature map that is chosen for a layer."""
    return lambda layer, q, k, v: fs.linear_attention(q, k, v, chosen(layer), is_causal=True, window=window)


def settings(maps: Callable[[int], list[Any]], d: int, counts: Iterable[int], window: int = 16) -> Iterator[Setting]:
    """Every way to attend; `maps` makes a feature map for each layer. Keys and values have d numbers each."""
    yield Setting("exact", CONTEXT, 0, 2 * CONTEXT * d, exact)
    yield Setting("window alone", 2 * window, window, 4 * window * d, partial(seen, near(window)))
    for m in counts:
        keys = 2 * m + 2 * window
        marks = fs.landmarks(m)
        yield Setting("landmarks", m, window, keys * (2 * d + 1), through(lambda _, marks=marks: marks, window))
        yield Setting("recent keys", keys, 0, 2 * keys * d, partial(seen, recent(keys, 0)))
        yield Setting("recent keys and the first four", keys, 0, 2 * keys * d, partial(seen, recent(keys, 4)))
    for m in (2 * m for m in counts):
        yield Setting("optimal", m, window, m * (d + 1) + 4 * window * d, through(maps(m).__getitem__, window))


class Heads:
    """Exact attention that keeps the queries, keys and values of each layer."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[torch.Tensor, ...]] = {}

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.kept[layer] = (q, k, v)
        return exact(layer, q, k, v)


def feature_maps(model: LanguageModel, sample: torch.Tensor, m: int) -> list[Any]:
    """A map of `optimal` for each layer, fitted to every head on a sample of the text that the model was trained on."""
    heads = Heads()
    model(sample, heads)
    return [fs.feature_map(fs.fit(q, k, axis=(0, -2)), m, rng=0) for q, k, _ in heads.kept.values()]


def bits(model: LanguageModel, x: torch.Tensor, attend: Attend) -> torch.Tensor:
    """Bits of each byte (n, CONTEXT) of texts (n, CONTEXT + 1), given the bytes before it."""
    found = []
    for piece in x.split(8):
        logits = model(piece[:, :-1], attend)
        found.append(cross_entropy(logits.transpose(1, 2), piece[:, 1:], reduction="none") / math.log(2))
    return torch.cat(found)


def measured(model: LanguageModel, x: torch.Tensor, chosen: Iterable[Setting]) -> Iterator[Row]:
    """Every setting, on the same texts; the errors of layers are measured on the exact model's queries and keys."""
    heads = Heads()
    model(x[:8, :-1], heads)
    alone = {}
    for setting in chosen:
        found = bits(model, x, setting.attend)
        late = float(found[:, CONTEXT // 2 :].mean())
        if setting.family == "window alone":
            alone[setting.window] = late
        errors = (relative_error(setting.attend(i, *kept), exact(i, *kept)).mean() for i, kept in heads.kept.items())
        before = alone.get(setting.window) if setting.family in ("landmarks", "optimal") else None
        yield Row(setting, float(found.mean()), late, tuple(float(error) for error in errors), before)


def pieces(source: np.ndarray, number: int) -> torch.Tensor:
    """Pieces of a text at equal distances (number, CONTEXT + 1)."""
    starts = np.linspace(0, len(source) - CONTEXT - 1, number).astype(int)
    return torch.from_numpy(source[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int64))


def lines_of(rows: list[Row], kept: dict[str, Any], texts: int, seconds: float) -> list[str]:
    """The table, with what the model was trained on above it."""
    size = sum(p.numel() for p in LanguageModel().parameters()) / 1e6
    about = (
        f"{size:.1f} million parameters, trained on {kept['bytes'] / 1e6:.1f} MB of text for {kept['minutes']:.1f} "
        f"minutes; measured on {texts} texts of {CONTEXT} bytes."
    )
    header = ["attention", "m, or keys", "window", "numbers held", "bits a byte", "above exact"]
    header += ["second half", "above exact", "error of a layer"]
    cells = [row_of(row, rows[0]) for row in rows]
    marks = ["!: adds nothing to its window: the window alone predicts the second half no worse.", ""]
    nothing = any(row.adds_nothing for row in rows)
    return [stamp(seconds), "", about, "", *table(header, cells), *(marks if nothing else [])]


def row_of(row: Row, best: Row) -> list[str]:
    """The cells of a row of the table."""
    chosen = row.setting
    name = f"`{chosen.family}`" if chosen.family == "optimal" else chosen.family
    more, late = (f"{x:+.3f}" for x in (row.bits - best.bits, row.late - best.late))
    late += "!" if row.adds_nothing else ""
    cells = [name, str(chosen.number), str(chosen.window or "-"), f"{chosen.held:,}"]
    return [*cells, f"{row.bits:.3f}", more, f"{row.late:.3f}", late, f"{np.mean(row.errors):.3f}"]


def draw(rows: list[Row], output: Path) -> None:
    """Draw the bits above those of exact attention against what a head holds of the past."""
    colours = {"landmarks": "#0b4f9e", "optimal": "#c1272d", "recent keys": "#999999", "window alone": "#666666"}
    exact_row, *others = rows
    with picture("language-model", output, figsize=(6.4, 4.0)) as axis:
        for family in dict.fromkeys(row.setting.family for row in others):
            found = [row for row in others if row.setting.family == family]
            held, above = [row.setting.held for row in found], [row.late - exact_row.late for row in found]
            colour = colours.get(family, "#444444")
            axis.plot(held, above, color=colour, marker="o", linestyle=":" if "four" in family else "-", label=family)
            for row, x, y in zip(found, held, above, strict=True):
                axis.annotate(
                    f"{row.setting.number}", (x, y), (3, 4), textcoords="offset points", color=colour, fontsize=8
                )
        label = f"numbers that a head holds of past tokens (exact attention: up to {exact_row.setting.held:,})"
        powers(axis, label, (4096, 8192, 16_384, 32_768))
        axis.set_ylabel("bits a byte above exact attention,\nsecond half of the context")
        axis.set_ylim(bottom=min(0.0, 1.1 * min(row.late - exact_row.late for row in others)))
        axis.legend(frameon=False)


def run(output: Path, checkpoint: Path, *, minutes: float, texts: int, counts: Iterable[int]) -> list[Row]:
    """Train if there is no checkpoint, measure, and write the table and the picture."""
    if not checkpoint.exists():
        train(minutes, checkpoint)
    begin = time.perf_counter()
    model, kept = load(checkpoint)
    sample, held_out = pieces(text(READ), 16)[:, :-1], pieces(text(HELD_OUT), texts)
    width = model.head.in_features // model.layers[0].heads
    rows = []
    for row in measured(model, held_out, settings(partial(feature_maps, model, sample), width, counts)):
        rows.append(row)
        typer.echo(
            f"{row.setting.family}, {row.setting.number}: {row.bits:.3f} bits a byte, {row.late:.3f} in the second half"
        )
    write("language-model", lines_of(rows, kept, texts, time.perf_counter() - begin), output)
    draw(rows, output)
    return rows


def main(
    output: Annotated[Path, typer.Option(help="The folder of the documentation.")] = DOCS,
    checkpoint: Annotated[Path, typer.Option(help="Where the model is, or is to be.")] = Path("language-model.pt"),
    minutes: Annotated[float, typer.Option(help="How long to train, if there is no model.")] = 44.5,
    texts: Annotated[int, typer.Option(help="How many texts to read.")] = 24,
    quick: Annotated[bool, typer.Option(help="Two steps and two texts: whether it runs.")] = False,
) -> None:
    """Write the table and the picture."""
    if quick:
        minutes, texts = 0.02, 2
    run(output, checkpoint, minutes=minutes, texts=texts, counts=(16, 32) if quick else (32, 64, 128))


if __name__ == "__main__":
    typer.run(main)
