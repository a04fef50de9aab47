"""Functions that the reports share: folders of tables and pictures, the stamp above a table, the style of pictures."""

import datetime
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.measure import machine

DOCS = Path(__file__).parents[2] / "docs"
"""Tables go to paper/_NAME.md there, which the page NAME.md includes; pictures go to _static/paper-NAME.png."""

COLOURS = {
    "posrf": "#bbbbbb", "hyperbolic": "#999999", "oprf": "#4477aa", "trig": "#ccbb44", "poisson": "#ddaa99",
    "geometric": "#886655", "saderf": "#66ccee", "aderf": "#228833", "sderf": "#aa3377", "optimal": "#cc3311",
    "relu": "#dddddd", "elu": "#cccccc", "nystrom": "#ee7733", "landmarks": "#332288",
}  # fmt: skip
FITTED = ("saderf", "aderf", "sderf")
"""The methods of FAVOR#."""


def stamp(seconds: float) -> str:
    """A line that says when, on what machine and with which versions the numbers were measured."""
    kept = ("processor", "python", "favorsharp", "numpy", "numba")
    found = ", ".join(f"{name} {value}" for name, value in machine().items() if name in kept)
    return f"Run {datetime.date.today().isoformat()} in {seconds / 60:.0f} min: {found}."


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table, followed by an empty line."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return [*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows), ""]


def emphasised(cells: Sequence[float], form: str, *, least: bool = True) -> list[str]:
    """Numbers as text, with the best in bold; None and NaN become a dash."""
    known = [cell for cell in cells if cell is not None and cell == cell]
    best = (min if least else max)(known, default=None)
    texts = []
    for cell in cells:
        text = "-" if cell is None or cell != cell else format(cell, form)
        texts.append(f"**{text}**" if cell == best and known else text)
    return texts


def write(name: str, lines: Iterable[str], folder: Path) -> None:
    """Write the tables of a page."""
    (folder / "paper").mkdir(parents=True, exist_ok=True)
    (folder / "paper" / f"_{name}.md").write_text("\n".join(lines).rstrip() + "\n")


@contextmanager
def picture(name: str, folder: Path, **options: Any) -> Iterator[Any]:
    """The axes of a figure; the figure is saved at the end of the block."""
    plain = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlelocation": "left"}
    with plt.rc_context(plain):
        figure, axes = plt.subplots(layout="constrained", **options)
        yield axes
        (folder / "_static").mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "_static" / f"paper-{name}.png", dpi=130)
        plt.close(figure)


def powers(ax: Any, label: str, ticks: Sequence[float]) -> None:
    """Give the x axis a logarithmic scale with plain numbers as ticks."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xlabel(label)


def name_ends(ax: Any, x: float, ends: Iterable[tuple[float, str, str]], apart: float = 0.035) -> None:
    """Write the names of lines, each (height, name, colour), beside their ends at x, at least `apart` from another."""
    place = float("-inf")
    for height, name, colour in sorted(ends):
        place = max(height, place + apart)
        ax.annotate(name, (x, place), (7, -3), textcoords="offset points", fontsize=8, color=colour)
    ax.update_datalim([(x, place)])
    ax.autoscale_view()
