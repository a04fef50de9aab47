"""The command `favorsharp compare`: measures settings on the user's queries, keys and values."""

import itertools
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import favorsharp as fs
from favorsharp.cli.files import check_writable, read_attention
from favorsharp.diagnostics import ALONE, COMPARED, Comparison, load_sample, recommend
from favorsharp.diagnostics import compare as measure
from favorsharp.methods import LANDMARKS, POSITIVE, POSITIVE_FROM_POINTS

METHODS = ",".join(COMPARED)
NAMES = (*POSITIVE, *POSITIVE_FROM_POINTS, LANDMARKS)
DEFAULT_WINDOWS = "0,16"


def compare(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="q, k, v of shape (heads..., points, size): .npz, .safetensors, or a folder of q.npy, k.npy, v.npy. "
            "Default: six heads of a sentence encoder, 512 tokens.",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[str, typer.Option(help="Names, separated by commas.")] = METHODS,
    features: Annotated[str, typer.Option(help="Numbers of features, or of landmarks.")] = "32,128,512",
    window: Annotated[str, typer.Option(help="Block lengths of exactly scored keys; 0 for none.")] = DEFAULT_WINDOWS,
    draws: Annotated[str, typer.Option(help="iid, orthogonal, simplex, sobol, antithetic.")] = "orthogonal",
    seeds: Annotated[int, typer.Option(help="Draws that errors are averaged over.", min=1)] = 3,
    heads: Annotated[str | None, typer.Option(help="Which of the leading index, such as 0,3,5.")] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Fit to the first half, measure on the second.")] = False,
    target: Annotated[float, typer.Option(help="The relative error you need.")] = 0.3,
    array: Annotated[str, typer.Option(help="numpy, torch or cupy.")] = "numpy",
    dtype: Annotated[
        str, typer.Option(help="float32, float64, or float16 and bfloat16 where there are any.")
    ] = "float32",
    backend: Annotated[str | None, typer.Option(help="Run by this implementation, or fail.")] = None,
    output: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.")] = Path("favorsharp-compare.png"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers here.")] = None,
) -> None:
    """Measure error, time and memory of the methods, and recommend a setting."""
    console = Console()
    options = _options(methods, features, window, draws, causal, target)
    q, k, v, scale = (*load_sample(), None) if file is None else read_attention(file)
    q, k, v = (_select(x, heads) for x in (q, k, v))
    if q.shape[-2] != k.shape[-2] and window == DEFAULT_WINDOWS:
        options["windows"] = [0]  # the user did not ask for a window
    if any(options["windows"]) and q.shape[-2] != k.shape[-2]:
        raise ValueError(f"--window needs as many queries as keys, got {q.shape[-2]} and {k.shape[-2]}: use --window 0")
    if causal and (q.shape[-2] != k.shape[-2] or q.shape[-2] < 4):
        raise ValueError("--causal needs as many queries as keys, and at least 4")
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--output must end in .png, .svg or .pdf, got {output}")
    check_writable(output, json_file)
    to = _library(array, dtype)
    arrays = [_converted(name, x, to, dtype) for name, x in zip("qkv", (q, k, v), strict=True)]
    with fs.use(backend) if backend else nullcontext():
        rows = _measure(arrays, console, seeds=seeds, scale=scale, is_causal=causal, **options)
    _draw(rows, output, target, f"{file.name if file else 'sentence encoder'}, {k.shape[-2]} keys")
    name = file.name if file else "the shipped sample (six heads of a sentence encoder)"
    console.print(_table(rows, f"{name}: {q.shape[-2]} queries, {k.shape[-2]} keys, d={q.shape[-1]}, {array} {dtype}"))
    if causal:
        console.print(
            "Causal: maps fitted to the first half of the sequence, errors of the queries of the second half."
        )
    for note in _notes(rows):
        console.print(note)
    console.print(f"Exact attention takes {_milliseconds(rows[0].exact_seconds)} ms.")
    console.print(_advice(rows, target), style="bold")
    console.print(f"Picture: {output}", soft_wrap=True)
    if json_file is not None:
        json_file.write_text(json.dumps([row.as_dict() for row in rows], indent=1) + "\n")
        console.print(f"Numbers: {json_file}", soft_wrap=True)


def _options(methods: str, features: str, window: str, draws: str, causal: bool, target: float) -> dict[str, Any]:
    """The settings to try, checked."""
    from favorsharp.draws import DRAWS

    names, ways = _words(methods), _words(draws)
    if not names:
        raise ValueError(f"--methods names none, got {methods!r}; accepted: {', '.join(NAMES)}")
    if not ways:
        raise ValueError(f"--draws names none, got {draws!r}; accepted: {', '.join(DRAWS)}")
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
            f"--array {array} --dtype {dtype} is not to be had here: not installed, no device, or no such dtype"
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


def _notes(rows: list[Comparison]) -> list[str]:
    """What the marks in the table mean, if there are any."""
    notes = []
    if any(row.biased for row in rows):
        notes.append("*: biased: the mean over draws is not exact attention, so errors do not average out.")
    if any(row.adds_nothing for row in rows):
        notes.append("!: adds nothing to its window: the window alone has no larger error.")
    return notes


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


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


def _setting(row: Comparison) -> str:
    window = f", window {row.window}" if row.window else ""
    if row.method == ALONE:
        return f"a window of {row.window} alone"
    if row.method == LANDMARKS:
        return f"{row.num_features} landmarks{window}"
    return f"{row.method} with {row.num_features}{f' {row.draw}' if row.draw != 'none' else ''} features{window}"


_PALETTE = ("#9a9a9a", "#5e5e5e", "#56b4e9", "#0072b2", "#009e73", "#c1272d", "#e69f00", "#cc79a7", "#b09030")
COLOURS = dict(zip(POSITIVE, itertools.cycle(_PALETTE), strict=False))
COLOURS |= dict(zip((*POSITIVE_FROM_POINTS, LANDMARKS, ALONE), ("#7b3294", "#000000", "#bbbbbb"), strict=True))


def _draw(rows: list[Comparison], path: Path, target: float, subject: str) -> None:
    """Plot the error against features and against time, with one line for each method; other windows are dashed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator, ScalarFormatter

    plain = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.titlelocation": "left"}
    with plt.rc_context(plain):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), sharey=True, layout="constrained")
        windows = sorted({row.window for row in rows})
        styles = ["-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1, 1, 1))]
        groups: dict[tuple[str, str, int], list[Comparison]] = {}
        for row in rows:
            groups.setdefault((row.method, row.draw, row.window), []).append(row)
        for (method, _, window), group in groups.items():
            look = {
                "color": COLOURS[method],
                "linestyle": styles[windows.index(window) % len(styles)],
                "linewidth": 2.4 if method == "optimal" else 1.3,
                "marker": "o",
                "markersize": 4.5 if method == "optimal" else 3,
                "zorder": 3 if method == "optimal" else 2,
            }
            errors = [row.measured for row in group]
            if method == ALONE:
                left.axhline(errors[0], **look | {"marker": None})
            else:
                left.plot([row.num_features for row in group], errors, **look)
            right.plot([1e3 * row.seconds for row in group], errors, **look)
        for axis in (left, right):
            axis.set_xscale("log")
            axis.grid(axis="y", color="#e8e8e8", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.axhline(target, color="#444444", linewidth=0.8, linestyle=":")
        counts = sorted({row.num_features for row in rows if row.num_features})
        left.xaxis.set_major_locator(FixedLocator(counts))
        left.xaxis.set_major_formatter(ScalarFormatter())
        left.xaxis.set_minor_locator(NullLocator())
        right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        right.xaxis.set_minor_formatter(NullFormatter())
        figure.suptitle(subject, x=0.01, ha="left", fontsize=10, color="#444444")
        right.axvline(1e3 * rows[0].exact_seconds, color="#444444", linewidth=0.8)
        right.annotate(
            "exact attention",
            (1e3 * rows[0].exact_seconds, 0),
            xycoords=("data", "axes fraction"),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8,
            color="#444444",
        )
        left.annotate(f"target {target:g}", (0, target), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
        left.set(xlabel="features", ylabel="relative error of attention", title="Error against features or landmarks")
        left.set_ylim(bottom=0)
        right.set(xlabel="milliseconds", title="Error against time")
        methods = {row.method: f"{row.method} (biased)" if row.biased else row.method for row in rows}
        handles = [Line2D([], [], color=COLOURS[name], linewidth=2, label=label) for name, label in methods.items()]
        if len(windows) > 1 or windows[0]:
            handles += [
                Line2D(
                    [],
                    [],
                    color="#444444",
                    linestyle=styles[i % len(styles)],
                    label=f"window {w}" if w else "no window",
                )
                for i, w in enumerate(windows)
            ]
        figure.legend(handles=handles, loc="outside right upper", frameon=False)
        figure.savefig(path, dpi=160)
        plt.close(figure)
