"""Run the benchmarks, and write docs/benchmarks.md and its picture: `python -m benchmarks.report`."""

import datetime
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import attention, estimators, features, measure, models, startup

SCRIPTS = {"attention": attention, "features": features, "models": models, "estimators": estimators}
TITLES = {
    "attention": "Attention of NumPy arrays and tensors",
    "features": "Features and sums of kernels",
    "models": "In models",
    "estimators": "Estimators",
}
ROOT = Path(__file__).parents[1]
QUIET = 0.03
"""The part of the processors' time that others may take in a run that counts as undisturbed."""

Found = list[tuple[str, measure.Table]]
"""Every row with the script that it is from."""

WHY = {
    "fit": "two decompositions of 64 x 64 matrices a head take about as long for any number of tokens.",
    "attention through landmarks": "a causal call of 1,024 tokens compresses its keys seven times, which takes half of "
    "its time. On one thread it takes a tenth less with twice the room, or without any Lloyd step, and exact attention "
    "takes no longer.",
    "attention through features, fit": "most of the time is the fit, whose decompositions do not depend on the length.",
    "features with window 16, causal": "near keys are scored in blocks that the processor's vectors do not fill.",
    "features with window": "arithmetic says 1.75 times as long for a window of 64 in both directions; sums of blocks "
    "are written and read besides.",
    "linear_attention with a given map": "matrix products take all of the time: with a map of FAVOR+, on one thread, "
    "it takes as long as its four products alone take in OpenBLAS, in tiles that stay in the cache; the quadratic form "
    "of this map adds a tenth.",
    "a token, features": "a token takes some 11 microseconds of Python beside its arithmetic; and each head has a map "
    "of its own, of which a token reads 64 KiB, where FAVOR+ reads the same 32 KiB for all heads.",
    "a token, landmarks": "keys are compressed once in 128 tokens, and this is shared among the tokens here.",
    "a token of a Llama": "most of it is the layer's Python, which is the same for any number of earlier tokens.",
    "causal, forward and backward": "the goal was set by an earlier run; the ratio differs by a fifth between runs.",
    "kernel_matvec": "with 8 columns a feature takes 9 multiply-adds and an exponential of 12 instructions, so that "
    "about 43 per cent of the bound is the most to expect.",
    "BERT-like": "at 512 tokens exact attention is a small part of the layer, and attention through 64 landmarks "
    "takes no less processor time.",
    "query": "where the transform is no rotation, features have a row term that the kernel alone gets as an argument. "
    "It takes 31 per cent as many multiply-adds as the features, because a triangular matrix is multiplied in whole "
    "vectors.",
    "RandomFeatures, optimal: fit of 20000 x 8": "it makes some hundred small calls of NumPy and scikit-learn; "
    "RBFSampler, which reads no data, takes a third of the time.",
    "RandomFeatures, optimal: fit": "with 784 columns the product takes 0.6 of the time, and an eigendecomposition a "
    "third.",
    "RandomFeatures, optimal: transform": "checks and conversions of scikit-learn take part of it.",
}
"""Written by hand: what is known of a goal that is missed, by the beginning of a row. Check it with a new table."""

TERMS = """\
- *Calls*: each row is a call as the [guide](guide/index.md) shows it, with all its checks, fits and choices. Points are
  float32 NumPy arrays, eight heads of 64, with 128 features or landmarks, unless the row says otherwise.
- *Times* are medians in milliseconds. Ours and the others take turns in one process, with a pause before each call, so
  that the threads of the one before are asleep. A time is worth little on another machine; compare ratios.
- *Ratio*: the time of the best other software divided by ours, as the median over rounds; in a round each call runs
  once. Above 1, ours takes less time.
- *Of the bound*: the least time that the matrix products and the bytes of the work could take on this machine, divided
  by our time. The bound assumes products at the rate of multiply-adds from the fastest cache, and bytes at the rate of
  a copy; both rates are measured in the same run. It does not include exponentials, decompositions in fits, and Python.
- *Goal*: the least ratio, or share of the bound, that we accept. A goal of 1 means no slower than the best other
  software. Goals of 0.87 and 0.5 mean at most 1.15 times the time that the multiply-adds suggest (a window of 64 in
  both directions needs 1.75 times as many). The goal of 0.7 means the same for `query` with different moments beside
  the kernel alone, which gets the row term as an argument: with a triangular matrix, `query` needs d / 2m = 0.25 times
  as many multiply-adds in addition. A goal of 67 % of the bound means at most 1.5 times the time of the bound. The goal
  of `kernel_matvec` is 37 %: with 8 columns a feature takes 9 multiply-adds and an exponential of 12 instructions, so
  that 43 % is the most to expect, and 37 % is 1.15 times that time. Other goals are from earlier work on these calls.
- *A given map* was fitted and drawn before the call; a *fit* chooses its parameters. `out=` writes to an existing
  array.
- *Exact attention* is torch's `scaled_dot_product_attention`. *FAVOR+* is what other libraries have in place of our
  maps: the formula in NumPy, torch, torch.compile or jax.jit, with as many features. Code that is marked *no maxima*
  overflows on larger inputs than these; ours never does.
- *The kernel alone* is our compiled function on prepared arguments. Only the second table compares with it.
"""


def times(ratio: float) -> str:
    """A ratio of times in words."""
    return f"{ratio:.1f} times as fast as"


def milliseconds(seconds: float) -> str:
    """Three digits, or whole milliseconds."""
    return f"{1e3 * seconds:.3g}" if seconds < 0.9995 else f"{1e3 * seconds:,.0f}"


def named(found: Found) -> dict[str, measure.Table]:
    """The rows by what they time."""
    return {table.work: table for _, table in found}


def sentences(found: Found, bounds: measure.Bounds) -> list[str]:
    """Sentences that sum up the table; a sentence whose rows are missing is left out."""
    rows, said = named(found), []
    both = [[rows.get(f"attention through landmarks{kind}, n={n}") for kind in ("", ", causal")] for n in (4096, 1024)]
    if all(table for pair in both for table in pair):
        (marks, causal), (early, early_causal) = both
        said += [
            f"At 4,096 tokens, one call of attention through 128 landmarks takes {1e3 * marks.ours:.0f} ms and is "
            f"{times(marks.ratio)} exact attention; causal attention is {times(causal.ratio)} it.",
            f"At 1,024 tokens these ratios are {early.ratio:.1f} and {early_causal.ratio:.1f}; shorter sequences "
            "save less, or nothing.",
        ]
    if given := rows.get("linear_attention with a given map, n=4096"):
        said.append(
            f"With a map of 128 features that is given, 4,096 tokens take {1e3 * given.ours:.0f} ms, at "
            f"{100 * given.share(bounds):.0f} per cent of the bound, and are {times(given.ratio)} the best other way "
            f"to compute FAVOR+ or exact attention ({given.best[0]})."
        )
    short, long = (rows.get(f"a token of a Llama-like model, 4 layers, after {n}") for n in (512, 8192))
    if short and long:
        said.append(
            f"In a Llama-like model a state of fixed size makes a token {times(short.ratio)} a cache of all keys after "
            f"512 tokens, and {times(long.ratio)} it after 8,192."
        )
    goals = [table for _, table in found if table.goal or table.part]
    missed = sum(table.missed(bounds) for table in goals)
    said.append(
        f"Of {len(goals)} goals {missed} are missed in this run; [what is known of the reasons](#missed-goals)."
    )
    return said


def about(part: float | None) -> str:
    """A sentence about other work on the machine during the run."""
    if part is None:
        return "Whether other work ran on the machine is not known."
    if part <= QUIET:
        return f"Other work took {100 * part:.1f} per cent of the processors' time during the run."
    return (
        f"**Disturbed: other work took {100 * part:.0f} per cent of the processors' time during this run.** The times "
        "are too long, and ratios may be wrong; run it again on a quiet machine."
    )


def cells(table: measure.Table, bounds: measure.Bounds) -> list[str]:
    """A row of the table."""
    ratio, share = table.ratio, table.share(bounds)
    goals = [f"{table.goal:.2g}"] if table.goal else []
    goal = " and ".join([*goals, *([f"{100 * table.part:.0f} % of the bound"] if table.part else [])])
    other = f"{table.best[0]} {milliseconds(table.best[1])}" if table.best else ""
    return [
        table.work, milliseconds(table.ours), other, "" if ratio is None else f"{ratio:.2f}",
        "" if share is None else f"{100 * share:.0f} %", goal + (" (missed)" if table.missed(bounds) else ""),
    ]  # fmt: skip


def tables_of(found: Found, bounds: measure.Bounds) -> Iterator[str]:
    """The two tables: beside other software, and beside calls of ours."""
    for title, own, other in (("Beside other software", False, "best other, ms"), ("Beside our own calls", True, "ms")):
        yield from (f"## {title}", "")
        header = ["call", "ours, ms", other if not own else "beside it, ms", "ratio", "of the bound", "goal"]
        yield from ("| " + " | ".join(header) + " |", "|" + " --- |" * len(header))
        for script, heading in TITLES.items():
            rows = [table for name, table in found if name == script and table.own == own]
            if rows:
                yield f"| **{heading}** |" + " |" * (len(header) - 1)
            yield from ("| " + " | ".join(cells(table, bounds)) + " |" for table in rows)
        yield ""


def reasons(found: Found, bounds: measure.Bounds) -> Iterator[str]:
    """Each missed goal, with the known reasons."""
    for _, table in found:
        if table.missed(bounds):
            known = next((why for start, why in WHY.items() if table.work.startswith(start)), "no reason is known.")
            yield f"- *{table.work}*: {known}"


def page(
    found: Found, rest: measure.Table, memory: dict[str, float], bounds: measure.Bounds, stamp: str, warning: str = ""
) -> str:
    """The Markdown page; a warning comes first."""
    lines = [
        "# CPU benchmarks",
        "",
        *([warning, ""] if warning else []),
        "![How many times as fast as the best other software each call is](_static/benchmarks.png)",
        "",
        *sentences(found, bounds),
        "",
        stamp,
        f"At most {bounds.flops / 1e9:.0f} GFLOP/s and {bounds.moved / 1e9:.0f} GB/s were measured in the same run.",
        "`python -m benchmarks.report` writes this page. [GPUs](guide/gpu.md) have a page of their own.",
        "",
        "## Terms",
        "",
        TERMS,
        *tables_of(found, bounds),
        "## Missed goals",
        "",
        "What is known of the reasons, from undisturbed runs:",
        "",
        *(list(reasons(found, bounds)) or ["None."]),
        "",
        "Not measured: AMX, bfloat16, ARM.",
        "",
        "## All times",
        "",
        "| call | ms |",
        "| --- | --- |",
    ]
    for _, table in found:
        known = [f"{name} {milliseconds(seconds)}" for name, seconds in table.seconds.items()]
        lost = [f"{name} left out ({why.splitlines()[0]})" for name, why in table.left_out.items()]
        lines.append(f"| {table.work} | {'; '.join(known + lost)} |")
    lines += [
        "",
        "## The first call, and memory",
        "",
        f"Of {rest.work}, milliseconds:",
        "",
        "| | ms |",
        "| --- | --- |",
    ]
    lines += [f"| {name} | {1e3 * seconds:.0f} |" for name, seconds in rest.seconds.items()]
    lines += ["", "Memory of a call beyond inputs and output:", "", "| | MiB |", "| --- | --- |"]
    lines += [f"| {name} | {size:.1f} |" for name, size in memory.items()]
    return "\n".join(lines) + "\n"


def picture(found: Found, path: Path) -> None:
    """The picture of ratios to the best other software, narrow and with text above the bars, so that telephones can
    show it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict(zip(TITLES, ("#4477aa", "#228833", "#ccbb44", "#aa3377"), strict=True))
    shown = [(name, table) for name, table in found if table.label and table.ratio]
    with pyplot.rc_context({"font.size": 8.5}):
        figure, axes = pyplot.subplots(figsize=(4.6, 0.42 * len(shown) + 1.0), layout="constrained")
        bars(axes, shown, colours)
        figure.savefig(path, dpi=150)
    pyplot.close(figure)


def bars(axes: Any, shown: Found, colours: dict[str, str]) -> None:
    """A bar for each row, from 1 to its ratio, with its label above it."""
    for place, (name, table) in enumerate(shown):
        axes.barh(place, table.ratio - 1, left=1, height=0.38, color=colours[name])
        text = axes.text(0.0, place - 0.32, table.label, transform=axes.get_yaxis_transform(), va="bottom", zorder=3)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axes.text(max(1.0, table.ratio) * 1.06, place, f"{table.ratio:.1f}", va="center")
    ratios = [table.ratio for _, table in shown]
    axes.axvline(1, color="#333333", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(0.8 * min([0.5, *ratios]), 1.6 * max([2.0, *ratios]))
    axes.set_ylim(len(shown) - 0.5, -0.9)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("times as fast as the best other software\n(left of 1: slower)")


def rows_of(names: Iterable[str], *, quick: bool) -> Iterator[tuple[str, measure.Table]]:
    """The rows of the named scripts, one after the other."""
    for name in names:
        if name not in SCRIPTS:
            raise typer.BadParameter(f"{name!r} is unknown; known: {', '.join(SCRIPTS)}")
        with torch.no_grad():
            for table in SCRIPTS[name].tables(quick=quick):
                typer.echo(f"{table.work}: ratio {table.ratio or 0:.2f}  {table.left_out or ''}")
                yield name, table


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(SCRIPTS)}; all by default.")] = None,
    quick: Annotated[bool, typer.Option(help="Tiny sizes: whether it runs, not how fast.")] = False,
    output: Annotated[Path, typer.Option(help="The page; its picture goes to _static beside it.")] = (
        ROOT / "docs" / "benchmarks.md"
    ),
) -> None:
    """Run the benchmarks and write the page and the picture."""
    begin, others, seconds = time.perf_counter(), measure.OtherWork(), 0.1 if quick else 1.0
    bounds = measure.bounds(seconds)
    found = list(rows_of(names or SCRIPTS, quick=quick))
    bounds |= measure.bounds(seconds)
    disturbance = about(others.part)
    (rest,), memory = startup.tables(), startup.scratch(quick=quick)
    machine = ", ".join(f"{name} {value}" for name, value in measure.machine().items())
    took = (time.perf_counter() - begin) / 60
    stamp = f"Measured {datetime.date.today().isoformat()} in {took:.0f} min: {machine}. "
    warning = disturbance if disturbance.startswith("**") else ""
    stamp += "" if warning else disturbance
    output.write_text(page(found, rest, memory, bounds, stamp.rstrip(), warning))
    (output.parent / "_static").mkdir(exist_ok=True)
    picture(found, output.parent / "_static" / "benchmarks.png")
    typer.echo(f"{disturbance}\nPage: {output}, after {took:.1f} min")


if __name__ == "__main__":
    typer.run(main)
