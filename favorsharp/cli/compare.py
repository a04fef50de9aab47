"""The command `favorsharp compare`: measures settings on the user's queries, keys and values."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import favorsharp as fs
from favorsharp.cli.files import check_writable, read_attention
from favorsharp.cli.picture import draw
from favorsharp.diagnostics import Comparison, load_sample, recommend
from favorsharp.diagnostics import compare as measure
from favorsharp.diagnostics.comparison import ALONE, COMPARED
from favorsharp.methods import LANDMARKS, POSITIVE, POSITIVE_FROM_POINTS

METHODS = ",".join(COMPARED)
NAMES = (*POSITIVE, *POSITIVE_FROM_POINTS, LANDMARKS)
DEFAULT_WINDOWS = "0,16"
DEFAULT_LENGTHS = "512,8192"
WORTH = 3
"""How many times as fast as exact attention a setting has to be to get into the summary."""
SHARPEST = ("optimal", LANDMARKS)
"""The methods that are measured on long sequences."""


def compare(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="q, k, v of shape (heads..., points, size): .npz, .safetensors, or a folder of q.npy, k.npy, v.npy. "
            "Default: heads of a sentence encoder.",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[str, typer.Option(help="Names, separated by commas.")] = METHODS,
    features: Annotated[str, typer.Option(help="Numbers of features, or of landmarks.")] = "32,128,512",
    window: Annotated[str, typer.Option(help="Block lengths of exactly scored keys; 0 for none.")] = DEFAULT_WINDOWS,
    draws: Annotated[str, typer.Option(help="iid, orthogonal, simplex, sobol, antithetic.")] = "orthogonal",
    seeds: Annotated[int, typer.Option(help="Draws that errors are averaged over.", min=1)] = 3,
    heads: Annotated[str | None, typer.Option(help="Entries of the leading axes, such as 0,3,5.")] = None,
    lengths: Annotated[
        str,
        typer.Option(
            help="Without a file: the first 512 tokens are real, and more are drawn from these. Longer than 512: two "
            "heads, optimal features and landmarks only, without windows."
        ),
    ] = DEFAULT_LENGTHS,
    causal: Annotated[bool, typer.Option("--causal", help="Fit to the first half, measure on the second.")] = False,
    target: Annotated[float, typer.Option(help="The relative error you need.")] = 0.3,
    array: Annotated[str, typer.Option(help="numpy, torch or cupy.")] = "numpy",
    dtype: Annotated[
        str, typer.Option(help="float32, float64, or float16 and bfloat16 if the library has them.")
    ] = "float32",
    backend: Annotated[str | None, typer.Option(help="Run by this implementation, or fail.")] = None,
    output: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.")] = Path("favorsharp-compare.png"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers here.")] = None,
) -> None:
    """Measure error, time and memory of the methods, and recommend a setting."""
    options = _options(methods, features, window, draws, causal, target) | {"seeds": seeds, "is_causal": causal}
    subjects = _samples(lengths, options) if file is None else [_own(file, window, options)]
    for subject in subjects:
        subject.points = tuple(_select(x, heads) for x in subject.points)
        _check_lengths(subject, causal)
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--output must end in .png, .svg or .pdf, got {output}")
    check_writable(output, json_file)
    to, console = _library(array, dtype), Console()
    with fs.use(backend) if backend else nullcontext():
        for subject in subjects:
            arrays = [_converted(name, x, to, dtype) for name, x in zip("qkv", subject.points, strict=True)]
            subject.rows = [row for run in subject.runs for row in _measure(arrays, console, **run)]
            _print_results(console, subject, f"{array} {dtype}", target)
    for note in _notes([row for subject in subjects for row in subject.rows], causal):
        console.print(note)
    draw([(subject.title, subject.rows) for subject in subjects], output)
    console.print(f"Picture: {output}", soft_wrap=True)
    if json_file is not None:
        _write_numbers(subjects, json_file)
        console.print(f"Numbers: {json_file}", soft_wrap=True)
    for line in _summary(subjects[-1]):
        console.print(line, style="bold", soft_wrap=True)


@dataclass
class _Subject:
    """Queries, keys and values, what to measure on them, and the results."""

    title: str
    points: tuple[Any, ...]
    runs: list[dict[str, Any]]
    rows: list[Comparison] = field(default_factory=list)


def _samples(lengths: str, options: dict[str, Any]) -> list[_Subject]:
    """The sample for each length. Drawn tokens are measured with fewer settings, since these take longer."""
    recorded = load_sample()
    subjects = []
    for length in _numbers("--lengths", lengths, 1):
        title, points, runs = f"six heads of a sentence encoder, {length:,} tokens", load_sample(length), [options]
        if length > recorded[0].shape[-2]:
            title = f"two heads of a sentence encoder, {length:,} tokens drawn like real ones"
            points = tuple(x[:2] for x in points)
            sharpest = [name for name in options["methods"] if name in SHARPEST]
            few = options | {"methods": sharpest or options["methods"], "windows": [0], "seeds": 1}
            alone = options | {"methods": (), "seeds": 1}
            runs = [alone, few] if any(options["windows"]) else [few]
        subjects.append(_Subject(title, points, runs))
    return subjects


def _own(file: Path, window: str, options: dict[str, Any]) -> _Subject:
    """The contents of the user's file."""
    q, k, v, scale = read_attention(file)
    options = options | {"scale": scale}
    if q.shape[-2] != k.shape[-2] and window == DEFAULT_WINDOWS:
        options["windows"] = [0]  # the user did not ask for a window
    return _Subject(f"{file.name}: {q.shape[-2]} queries, {k.shape[-2]} keys", (q, k, v), [options])


def _check_lengths(subject: _Subject, causal: bool) -> None:
    n, s = (x.shape[-2] for x in subject.points[:2])
    if any(any(run["windows"]) for run in subject.runs) and n != s:
        raise ValueError(f"--window needs as many queries as keys, got {n} and {s}: use --window 0")
    if causal and (n != s or n < 4):
        raise ValueError("--causal needs as many queries as keys, and at least 4")


def _options(methods: str, features: str, window: str, draws: str, causal: bool, target: float) -> dict[str, Any]:
    """The settings to try, checked."""
    from favorsharp.draws import DRAWS

    names, ways = _words(methods), _words(draws)
    if not names:
        raise ValueError(f"--methods is empty, got {methods!r}; accepted: {', '.join(NAMES)}")
    if not ways:
        raise ValueError(f"--draws is empty, got {draws!r}; accepted: {', '.join(DRAWS)}")
    for name in names:
        if name not in NAMES:
            raise ValueError(f"--methods: {name!r} is unknown or signed; accepted: {', '.join(NAMES)}")
    for name in ways:
        if name not in DRAWS:
            raise ValueError(f"--draws: {name!r} is unknown; accepted: {', '.join(DRAWS)}")
    if not (math.isfinite(target) and target > 0):
        raise ValueError(f"--target must be a positive number, got {target}")
    return {
        "methods": names,
        "num_features": _numbers("--features", features, 1),
        "windows": _numbers("--window", window, 0),
        "draws": ways,
    }


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _numbers(name: str, text: str, least: int) -> list[int]:
    words = _words(text)
    if not words or not all(word.isdecimal() and int(word) >= least for word in words):
        raise ValueError(f"{name} takes integers of {least} or more, separated by commas, got {text!r}")
    return [int(word) for word in words]


def _select(x: Any, heads: str | None) -> Any:
    if heads is None:
        return x
    chosen = _numbers("--heads", heads, 0)
    if x.ndim < 3 or max(chosen) >= x.shape[0]:
        has = f"the leading index has {x.shape[0]} entries" if x.ndim > 2 else "the arrays have no leading index"
        raise ValueError(f"--heads: {has}, got {heads}")
    return x[chosen]


def _library(array: str, dtype: str) -> Callable[[Any], Any]:
    """A function that converts NumPy arrays to the library and dtype."""
    from favorsharp.testing import make_array

    if array not in ("numpy", "torch", "cupy"):
        raise ValueError(f"--array: {array!r} is unknown; accepted: numpy, torch, cupy")
    if dtype not in ("float16", "bfloat16", "float32", "float64"):
        raise ValueError(f"--dtype: {dtype!r} is unknown; accepted: float16, bfloat16, float32, float64")
    make = make_array(array, dtype)
    if make is None:
        raise ValueError(
            f"--array {array} --dtype {dtype} is not available here: the library is not installed, or lacks the device "
            "or the dtype"
        )
    return make


def _converted(name: str, x: Any, to: Callable[[Any], Any], dtype: str) -> Any:
    """Convert the array to the library and dtype of the options; refuse numbers that are too large for the dtype."""
    limit = {"float16": 65504.0}.get(dtype, 1e15)  # squares of larger numbers overflow in float32
    largest = float(abs(x.astype(float)).max())
    if largest > limit:
        raise ValueError(f"{name} holds numbers up to {largest:.3g}; accepted in {dtype}: up to {limit:g}")
    return to(x)


def _measure(arrays: list[Any], console: Console, **options: Any) -> list[Comparison]:
    drawn = sum(len(options["draws"]) if name in POSITIVE else 1 for name in options["methods"])
    total = drawn * len(options["num_features"]) * len(options["windows"])
    total += len({window for window in options["windows"] if window})
    rows = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=total)
        for row in measure(*arrays, **options):
            rows.append(row)
            progress.advance(task)
    return rows


def _print_results(console: Console, subject: _Subject, arrays: str, target: float) -> None:
    """Print the table of a subject, the time of exact attention, and the setting for the target."""
    console.print(_table(subject.rows, f"{subject.title}, d={subject.points[0].shape[-1]}, {arrays}"))
    console.print(f"Exact attention takes {_milliseconds(subject.rows[0].exact_seconds)} ms.")
    console.print(_advice(subject.rows, target))


def _write_numbers(subjects: list[_Subject], file: Path) -> None:
    found = [row.as_dict() | {"keys": s.points[1].shape[-2]} for s in subjects for row in s.rows]
    file.write_text(json.dumps(found, indent=1) + "\n")


def _table(rows: list[Comparison], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    several_draws = len({row.draw for row in rows} - {"none"}) > 1
    headings = ["method", *(["draw"] if several_draws else []), "features", "window", "excess", "predicted", "measured"]
    for heading in [*headings, "ms", "MiB"]:
        name = heading == "method"
        table.add_column(heading, justify="left" if name or heading == "draw" else "right", no_wrap=name)
        table.columns[-1].min_width = 13 if name else None
    previous = rows[0].method
    for row in rows:
        if row.method != previous:
            table.add_section()
            previous = row.method
        table.add_row(
            _label(row),
            *([row.draw] if several_draws else []),
            str(row.num_features or "-"),
            str(row.window or "-"),
            _number(row.excess, ".2f"),
            _number(row.predicted, ".2f"),
            f"{row.measured:.3f}" + ("!" if row.adds_nothing else ""),
            _milliseconds(row.seconds),
            "-" if row.memory is None else f"{row.memory / 2**20:.1f}",
            style="bold" if row.method == "optimal" else None,
        )
    return table


def _label(row: Comparison) -> str:
    return f"{row.method}*" if row.biased else row.method


def _notes(rows: list[Comparison], causal: bool) -> list[str]:
    """How causal errors were measured, and what the marks in the tables mean, as far as there are any."""
    notes = []
    if causal:
        notes.append("Causal: maps fitted to the first half of the sequence, errors of the queries of the second half.")
    if any(row.biased for row in rows):
        notes.append("*: biased: the mean over draws is not exact attention, so errors do not average out.")
    if any(row.adds_nothing for row in rows):
        notes.append("!: adds nothing to its window: the window alone has no larger error.")
    return notes


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def _advice(rows: list[Comparison], target: float) -> str:
    """The setting to use for the target, or a note that no measured setting reaches it."""
    best = recommend(rows, target)
    if best is None:
        closest = min(rows, key=lambda row: row.measured)
        return (
            f"No setting reaches an error of {target:g}: closest is {_setting(closest)}, {closest.measured:.3f}. "
            "Use more features, a wider window, or exact attention."
        )
    text = f"For an error of {target:g}: {_setting(best)} ({best.measured:.3f} in {_milliseconds(best.seconds)} ms)."
    if best.exact_seconds <= best.seconds:
        text += (
            f" At this length exact attention takes {_milliseconds(best.exact_seconds)} ms and is the better choice; "
            "this setting pays on longer sequences."
        )
    return text


def _summary(subject: _Subject) -> list[str]:
    """The time of exact attention; for landmarks and `optimal`, the setting with the least error that saves time."""
    exact = subject.rows[0].exact_seconds
    lines = [
        f"Exact attention over {subject.points[1].shape[-2]:,} tokens takes {_milliseconds(exact)} ms, and twice the "
        "tokens would take four times as long. By the approximations below they would take twice as long."
    ]
    for method, law in (
        (LANDMARKS, "Landmarks are weighted keys that each call chooses; they are biased."),
        ("optimal", "These random features are unbiased, and one map of them serves many calls."),
    ):
        rows = [row for row in subject.rows if row.method == method]
        faster = [row for row in rows if WORTH * row.seconds <= exact]
        if faster:
            best = min(faster, key=lambda row: row.measured)
            gain, off = exact / best.seconds, 100 * best.measured
            text = f"{_milliseconds(best.seconds)} ms, {gain:.0f} times as fast, and {off:.0f} % off the exact result"
            lines.append(f"{_setting(best)}: {text}. {law}")
        elif rows:
            lines.append(f"{method}: no setting is {WORTH} times as fast as exact attention at this length.")
    return lines


def _setting(row: Comparison) -> str:
    window = f", window {row.window}" if row.window else ""
    if row.method == ALONE:
        return f"a window of {row.window} alone"
    if row.method == LANDMARKS:
        return f"{row.num_features} landmarks{window}"
    return f"{row.method} with {row.num_features}{f' {row.draw}' if row.draw != 'none' else ''} features{window}"
