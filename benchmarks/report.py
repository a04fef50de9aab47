"""Run the benchmarks, and write the page and the picture: `python -m benchmarks.report`."""

import datetime
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks import (
    attention,
    causal_attention,
    decode_step,
    exponential_features,
    kernel_matvec,
    measure,
    startup,
)

SCRIPTS = {
    "exponential_features": exponential_features,
    "attention": attention,
    "causal_attention": causal_attention,
    "decode_step": decode_step,
    "kernel_matvec": kernel_matvec,
    "startup": startup,
}
ROOT = Path(__file__).parents[1]


def peak() -> float:
    """GFLOP/s of a square float32 product: the speed of the machine at this moment."""
    a = torch.randn(2048, 2048)
    best = min(_seconds(lambda: a @ a) for _ in range(7))
    return 2 * 2048**3 / best / 1e9


def _seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


NOTES = """\
## Where a goal is missed, and why

The goals were set on an Intel Xeon with AVX-512 and AMX, against what was fastest there; those of causal attention
against chunked torch, which has rows of its own beside the fastest rival, a scan under jax.jit. The share of the bound
says what a faster kernel could gain. Peers and memory vary between runs: in one twenty minutes before this one jax.jit
made features with m = 64 in 11 milliseconds, ours took 6.9 and, with out=, 5.0. What is known of each miss on the
processor named above:

- *Causal with a window*: a window w takes 1.5 w (d + e) multiply-adds a query where causal attention takes 32 (m + e)
  for the pairs in a tile: 0.92, 1.00, 1.16 of all in all for w = 16, 32, 64 at m = 128, so that at w = 64 arithmetic
  alone forbids the goal. At 16 and 32 the rest are sums that take and are read by few points at a time: between runs 3
  to 7 % in all. At m = 256 a window costs nothing, or 3 % at w = 64.
- *Training, m = 64*: a disturbance, as three rounds were too few for the median to leave it out; there are five now.
  In the run before, and in two of these rows alone after it, this took 71 to 110 milliseconds: 5.6 to 9.0 times less
  than chunked torch.
- *Decode*: at B = 1 the kernel takes 3 microseconds of 14 to 16, four new arrays 3, the new state 1; a quarter of
  torch.compile's 33 would leave little more than 1 for Python to see that this call is like the one before, which
  takes 6. At B = 64 the states, 8 MiB read and 8 MiB written, as no call writes to a state that it was given, take two
  threads 140 to 190 microseconds, waking the second one included; torch.compile takes no longer than two copies of the
  states.

Not measured: AMX tiles (this processor has none), bfloat16 peers, ARM.
"""
"""Written by hand: what is known of each missed goal. Check it again with every new table."""


def page(found: list[measure.Table], memory: dict[str, float], flops: float, fma: float) -> str:
    """The Markdown page."""
    lines = [
        "# CPU benchmarks",
        "",
        f"Measured {datetime.date.today().isoformat()}: "
        + ", ".join(f"{name} {value}" for name, value in measure.machine().items())
        + f". In the same run a 2048 x 2048 float32 product ran at {flops:.0f} GFLOP/s, and multiply-adds from the "
        + f"fastest cache at {fma:.0f}, which nothing can exceed.",
        "",
        "Interleaved medians in one process, float32, eight heads of 64, after a check against float64 where the sizes",
        "allow it. Read ratios: times on a shared machine vary. Plain and causal peers take no maxima, and so overflow",
        "on larger inputs; ours always take them. performer-pytorch draws projections of its own: its results cannot",
        "be checked. Rows with out= write to an array that is there, where other libraries make a new one.",
        "`python -m benchmarks.report` writes this page.",
        "",
        "The last column is what the matrix products of the work come to, in per cent of that bound.",
        "",
        "| work | ours, ms | best other, ms | ratio | goal | of the bound |",
        "|---|---|---|---|---|---|",
    ]
    for table in found:
        if table.best is not None and table.work.split(":")[0] != "start-up":
            ours, (name, best) = next(iter(table.seconds.values())), table.best
            goal = f"{table.goal:.1f}{'' if table.ratio >= table.goal else ' (missed)'}" if table.goal else ""
            share = "" if table.gflops is None else f"{100 * table.gflops / fma:.0f} %"
            cells = table.work, f"{1e3 * ours:.2f}", f"{name} {1e3 * best:.2f}", f"{table.ratio:.2f}", goal, share
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *NOTES.splitlines(), "", "## Every peer", ""]
    for table in found:
        lines += [f"**{table.work}**", "", "| | ms |", "|---|---|"]
        lines += [f"| {name} | {1e3 * seconds:.2f} |" for name, seconds in table.seconds.items()]
        lines += [f"| {name} | left out: {why.splitlines()[0]} |" for name, why in table.left_out.items()]
        lines.append("")
    lines += ["## Memory beyond inputs and output", "", "| | MiB |", "|---|---|"]
    lines += [f"| {name} | {size:.1f} |" for name, size in memory.items()]
    return "\n".join(lines) + "\n"


def picture(found: list[measure.Table], path: Path) -> None:
    """Ratios to the best alternative, beside the goals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [table for table in found if table.goal and table.ratio]
    figure, axes = pyplot.subplots(figsize=(8, 0.35 * len(shown) + 1.2))
    places = np.arange(len(shown))
    axes.barh(places, [table.ratio for table in shown], color="#4477aa", label="reached")
    axes.plot([table.goal for table in shown], places, "k|", markersize=12, label="goal")
    axes.set_yticks(places, [table.work for table in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("times the best alternative")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(SCRIPTS)}; all by default.")] = None,
    quick: Annotated[bool, typer.Option(help="Tiny sizes: whether it runs, not how fast.")] = False,
    output: Annotated[Path, typer.Option(help="The page.")] = ROOT / "docs" / "benchmarks.md",
) -> None:
    """Run the benchmarks and write the page and the picture."""
    found = []
    flops, fma = peak(), measure.peak_fma(0.1 if quick else 2.0)
    with torch.no_grad():
        for name in names or SCRIPTS:
            if name not in SCRIPTS:
                raise typer.BadParameter(f"{name!r} is unknown; known: {', '.join(SCRIPTS)}")
            with torch.set_grad_enabled(name == "causal_attention"):
                for table in SCRIPTS[name].tables(quick=quick):
                    found.append(table)
                    typer.echo(f"{table.work}: ratio {table.ratio or 0:.2f}, goal {table.goal}  {table.left_out or ''}")
    memory = startup.scratch(quick=quick)
    output.write_text(page(found, memory, max(flops, peak()), max(fma, measure.peak_fma(0.1 if quick else 2.0))))
    picture(found, output.parent / "_static" / "benchmarks.png" if not quick else output.with_suffix(".png"))
    typer.echo(f"Page: {output}")


if __name__ == "__main__":
    typer.run(main)
