"""What the four reports share: where tables and pictures go, the stamp above a table, and how a picture looks."""

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
"""Tables go to paper/_NAME.md there, which the written page NAME.md includes; pictures to _static/paper-NAME.png."""

COLOURS = {
    "posrf": "#bbbbbb", "hyperbolic": "#999999", "oprf": "#4477aa", "trig": "#ccbb44", "poisson": "#ddaa99",
    "geometric": "#886655", "saderf": "#66ccee", "aderf": "#228833", "sderf": "#aa3377", "optimal": "#cc3311",
    "relu": "#dddddd", "elu": "#cccccc",
}  # fmt: skip
FITTED = ("saderf", "aderf", "sderf")
"""FAVOR#."""


def stamp(seconds: float) -> str:
    """When, on what and with which versions."""
    kept = ("processor", "python", "favorsharp", "numpy", "numba")
    found = ", ".join(f"{name} {value}" for name, value in machine().items() if name in kept)
    return f"Run {datetime.date.today().isoformat()} in {seconds / 60:.0f} min: {found}."


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table, and an empty one."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return [*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows), ""]


def emphasised(cells: Sequence[float], form: str, *, least: bool = True) -> list[str]:
    """Numbers as text, the best in bold; None and NaN are a dash."""
    known = [cell for cell in cells if cell is not None and cell == cell]
    best = (min if least else max)(known, default=None)
    texts = []
    for cell in cells:
        text = "-" if cell is None or cell != cell else format(cell, form)
        texts.append(f"**{text}**" if cell == best and known else text)
    return texts


def write(name: str, lines: Iterable[str], folder: Path) -> None:
    """Leave the tables of a page."""
    (folder / "paper").mkdir(parents=True, exist_ok=True)
    (folder / "paper" / f"_{name}.md").write_text("\n".join(lines).rstrip() + "\n")


@contextmanager
def picture(name: str, folder: Path, **options: Any) -> Iterator[Any]:
    """A figure's axes; what is drawn on them is saved."""
    plain = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlelocation": "left"}
    with plt.rc_context(plain):
        figure, axes = plt.subplots(layout="constrained", **options)
        yield axes
        (folder / "_static").mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "_static" / f"paper-{name}.png", dpi=130)
        plt.close(figure)


def powers(ax: Any, label: str, ticks: Sequence[float]) -> None:
    """A logarithmic axis of x whose ticks are plain numbers."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xlabel(label)
