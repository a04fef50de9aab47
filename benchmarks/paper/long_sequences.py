"""Causal attention over 4,096, 16,384 and 65,536 tokens: `python -m benchmarks.paper.long_sequences`.

The heads are those of the shipped sample, with tokens drawn from the real ones, and, if there is a checkpoint of
`benchmarks.paper.language_model`, heads of that model. Errors are measured on some queries of the second half, so that
exact attention is needed for these alone. Needs `pip install -e '.[test]'`.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import favorsharp as fs
from benchmarks.paper import language_model
from benchmarks.paper.page import DOCS, name_ends, picture, stamp, table, write
from favorsharp.diagnostics import load_sample, relative_error

LENGTHS = (4096, 16384, 65536)
SETTINGS = (("landmarks", 32), ("landmarks", 128), ("optimal", 128), ("optimal", 512))
WINDOW = 16
QUERIES = 256


@dataclass(frozen=True)
class Source:
    """Heads: queries, keys and values (heads, length, d), and queries and keys that maps are fitted to."""

    name: str
    points: tuple[Any, ...]
    calibration: tuple[Any, Any]


@dataclass(frozen=True)
class Row:
    """The error and the seconds of one way to attend; the seconds are None where nothing was timed."""

    source: str
    length: int
    method: str
    number: int
    error: float | None
    seconds: float | None


def sample(length: int) -> Source:
    """Three heads of the shipped sample. Maps are fitted to the 512 real tokens."""
    q, k, v = (x[::2].astype(np.float32) for x in load_sample(length))
    return Source("sentence encoder", (q, k, v), (q[:, :512], k[:, :512]))


def decoder(checkpoint: Path, length: int) -> Source:
    """A head of each layer of the language model, on held-out text.

    The model was trained on contexts of 1,024 bytes, so it reads the text in pieces of this length. Their queries and
    keys are then turned to their positions in the whole text.
    """
    model, _ = language_model.load(checkpoint)
    context = language_model.CONTEXT
    text = language_model.text(language_model.HELD_OUT)[:length].astype(np.int64)
    sample = language_model.pieces(language_model.text(language_model.READ), 8)[:, :-1]
    q, k, v = one_head_a_layer(model, torch.from_numpy(text).reshape(-1, context))
    positions = torch.arange(length) // context * context  # those within a piece are in the points already
    whole = (language_model.rotated(q, positions), language_model.rotated(k, positions), v)
    fitted = one_head_a_layer(model, sample)[:2]
    return Source("language model", tuple(x.numpy() for x in whole), tuple(x.numpy() for x in fitted))


def one_head_a_layer(model: Any, pieces: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of head i of layer i (layers, pieces * context, d)."""
    found: dict[int, list[tuple[torch.Tensor, ...]]] = {}
    for piece in pieces.split(8):
        heads = language_model.Heads()
        model(piece, heads)
        for layer, kept in heads.kept.items():
            found.setdefault(layer, []).append(tuple(x[:, layer].flatten(0, 1) for x in kept))
    layers = [tuple(torch.cat(parts) for parts in zip(*found[layer], strict=True)) for layer in sorted(found)]
    return tuple(torch.stack(parts) for parts in zip(*layers, strict=True))


class Yardstick:
    """Exact attention of some queries of the second half, and errors relative to it."""

    def __init__(self, points: tuple[Any, ...]) -> None:
        self.points, length = points, points[1].shape[-2]
        self.chosen = np.sort(np.random.default_rng(0).choice(np.arange(length // 2, length), QUERIES, replace=False))
        self.exact = self.attended(length, 0)

    def attended(self, keys: int, first: int) -> Any:
        """The attention of the chosen queries to so many recent keys, some of which are the first keys."""
        q, k, v = self.points
        outs = []
        for i in self.chosen:
            start = max(first, i + 1 - keys + first)
            seen = np.r_[0:first, start : i + 1] if start > first else slice(0, i + 1)
            outs.append(fs.softmax_attention(q[:, i : i + 1], k[:, seen], v[:, seen]))
        return np.concatenate(outs, axis=1)

    def error(self, out: Any) -> float:
        """The mean over heads of the relative error of the chosen rows (heads, QUERIES, d)."""
        return float(relative_error(out, self.exact).mean())

    def seconds(self) -> float:
        """The time of exact causal attention of all queries, from that of 1,024 of them with torch on all keys."""
        q, k, v = (torch.from_numpy(x) for x in self.points)
        part = q[:, -1024:]
        taken = timed(lambda: torch.nn.functional.scaled_dot_product_attention(part, k, v), 3)
        return taken * q.shape[-2] / 1024 / 2


def timed(call: Callable[[], Any], times: int) -> float:
    """The smallest of several times of a call, after a call that may compile."""
    call()
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return min(found)


def measured(source: Source, settings: Any) -> Iterator[Row]:
    """Every way to attend, on one source."""
    length, yardstick = source.points[1].shape[-2], Yardstick(source.points)
    yield Row(source.name, length, "exact", length, None, yardstick.seconds())
    for method, m in settings:
        if method == "landmarks":
            chosen, keys = fs.landmarks(m), 2 * m + 2 * WINDOW
            yield Row(source.name, length, "recent keys", keys, yardstick.error(yardstick.attended(keys, 0)), None)
            four = yardstick.error(yardstick.attended(keys, 4))
            yield Row(source.name, length, "recent keys and the first four", keys, four, None)
        else:
            chosen = fs.feature_map(fs.fit(*source.calibration), m, rng=0)
        outs: list[Any] = []

        def call(chosen: Any = chosen, outs: list[Any] = outs) -> None:
            outs[:] = [fs.linear_attention(*source.points, chosen, is_causal=True, window=WINDOW)]

        seconds = timed(call, 2 if length < 50_000 else 1)
        yield Row(source.name, length, method, m, yardstick.error(outs[0][:, yardstick.chosen]), seconds)


def lines_of(rows: list[Row], lengths: Any, seconds: float) -> list[str]:
    """A table for each source: errors and times by length."""
    lines = [stamp(seconds), ""]
    for source in dict.fromkeys(row.source for row in rows):
        known = {(row.method, row.number, row.length): row for row in rows if row.source == source}
        names = dict.fromkeys((method, 0 if method == "exact" else number) for method, number, _ in known)
        cells = []
        for method, number in names:
            found = [known[method, number or n, n] for n in lengths]
            errors = ["" if row.error is None else f"{row.error:.3f}" for row in found]
            times = ["" if row.seconds is None else f"{1e3 * row.seconds:,.0f}" for row in found]
            cells.append([f"`{method}`" if method == "optimal" else method, number or "all", *errors, *times])
        header = [*(f"error, {n:,}" for n in lengths), *(f"ms, {n:,}" for n in lengths)]
        lines += [f"**{source[0].upper()}{source[1:]}**", "", *table(["attention", "m, or keys", *header], cells)]
    return lines


def draw(rows: list[Row], output: Path) -> None:
    """Draw the error against the length, a panel for each source."""
    colours = {"landmarks": "#0b4f9e", "optimal": "#c1272d", "recent keys and the first four": "#888888"}
    sources = list(dict.fromkeys(row.source for row in rows))
    width = 4.2 * len(sources)
    with picture(
        "long-sequences", output, ncols=len(sources), figsize=(width, 3.6), sharey=True, squeeze=False
    ) as axes:
        for axis, source in zip(axes[0], sources, strict=True):
            drawn: set[str] = set()
            ends: list[tuple[float, str, str]] = []
            lines = dict.fromkeys((row.method, row.number) for row in rows if row.source == source)
            for method, number in lines:
                if method not in colours:
                    continue
                found = [row for row in rows if (row.source, row.method, row.number) == (source, method, number)]
                x, y = [row.length for row in found], [row.error for row in found]
                label = None if method in drawn else method
                drawn.add(method)
                axis.plot(x, y, color=colours[method], marker="o", label=label)
                ends.append((y[-1], str(number), colours[method]))
            axis.set_xscale("log", base=2)
            axis.set_xticks(LENGTHS, [f"{n:,}" for n in LENGTHS])
            axis.set_xlabel("tokens")
            axis.set_title(source)
            name_ends(axis, LENGTHS[-1], ends)
        axes[0][0].set_ylim(bottom=0)
        axes[0][0].set_ylabel("relative error of attention")
        axes[0][0].legend(frameon=False, loc="upper left")


def run(output: Path, checkpoint: Path | None, lengths: Any, settings: Any) -> list[Row]:
    """Measure, and write the tables and the picture."""
    begin = time.perf_counter()
    rows = []
    for length in lengths:
        sources = [sample(length)]
        if checkpoint is not None and checkpoint.exists():
            sources.append(decoder(checkpoint, length))
        for source in sources:
            for row in measured(source, settings):
                rows.append(row)
                typer.echo(f"{row.source}, {row.length}: {row.method} {row.number}: {row.error} in {row.seconds} s")
    rows.sort(key=lambda row: (row.source != "sentence encoder", row.length))
    write("long-sequences", lines_of(rows, lengths, time.perf_counter() - begin), output)
    draw(rows, output)
    return rows


def main(
    output: Annotated[Path, typer.Option(help="The folder of the documentation.")] = DOCS,
    checkpoint: Annotated[Path, typer.Option(help="The language model, if there is one.")] = Path("language-model.pt"),
    quick: Annotated[bool, typer.Option(help="The least length and few settings: whether it runs.")] = False,
) -> None:
    """Write the tables and the picture."""
    settings = (("landmarks", 32), ("optimal", 16), ("optimal", 32)) if quick else SETTINGS
    run(output, checkpoint, LENGTHS[:1] if quick else LENGTHS, settings)


if __name__ == "__main__":
    typer.run(main)
