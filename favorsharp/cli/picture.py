"""The picture of `favorsharp compare`: error against time, with a panel for each set of queries and keys."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from favorsharp.diagnostics import Comparison
from favorsharp.diagnostics.comparison import ALONE
from favorsharp.methods import LANDMARKS, POSITIVE_FROM_POINTS

Panel = tuple[str, Sequence[Comparison]]
"""The title, and the rows that are drawn below it."""

OTHERS = "#c4c4c4"
"""The colour of methods that are not named in the picture."""

COLOURS = {"optimal": "#c1272d", LANDMARKS: "#0b4f9e", ALONE: "#666666"}
WINDOWED = ("optimal", LANDMARKS, ALONE)
"""The methods that are drawn with every window; the others are drawn with the narrowest one."""
SMALL: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9}
ROUNDING = 1e-4
"""The error of exact attention; what is no further from it, such as landmarks of all keys, is not drawn."""
COLOURS |= dict.fromkeys(POSITIVE_FROM_POINTS, "#7b3294")
NAMES = {"optimal": "features (optimal)", LANDMARKS: "landmarks (biased)"}
NAMES |= {name: f"{name} (biased)" for name in POSITIVE_FROM_POINTS}


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Draw a line through the numbers of features or landmarks of each method and window."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Annotation

    plain = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11, "axes.titlelocation": "left"}
    with plt.rc_context(plain):
        size = (6.0 * max(len(panels), 1) + 0.5, 4.6)
        figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axis, (title, rows) in zip(axes[0], panels, strict=True):
            _panel(axis, title, rows)
        for text in figure.findobj(Annotation):
            text.set_path_effects([withStroke(linewidth=3, foreground="white")])
        axes[0][0].set_ylabel("relative error of attention")
        axes[0][0].set_ylim(0, 1.1 * max(row.measured for _, rows in panels for row in rows))
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _panel(axis: Any, title: str, rows: Sequence[Comparison]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    groups: dict[tuple[str, str, int], list[Comparison]] = {}
    for row in rows:
        if row.measured > ROUNDING:
            groups.setdefault((str(row.method), row.draw, row.window), []).append(row)
    narrowest = min((window for method, _, window in groups if method != ALONE), default=0)
    for (method, _, window), group in groups.items():
        if method in WINDOWED or window == narrowest:
            _line(axis, method, window, group, is_first=window == narrowest)
    grey = [row for row in rows if row.method not in COLOURS and row.window == narrowest]
    if grey:
        last = max(grey, key=lambda row: row.num_features)
        axis.annotate("other features", (1e3 * last.seconds, last.measured), xytext=(-8, 8), color="#888888", **SMALL)
    exact = 1e3 * rows[0].exact_seconds
    axis.axvline(exact, color="black", linewidth=1)
    axis.annotate(
        "exact attention", (exact, 0.98), xycoords=("data", "axes fraction"), xytext=(-4, 0),
        textcoords="offset points", rotation=90, ha="right", va="top", fontsize=9,
    )  # fmt: skip
    axis.set_xscale("log")
    axis.margins(x=0.2)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel("milliseconds")
    axis.set_title(title, fontsize=10)


def _line(axis: Any, method: str, window: int, group: list[Comparison], *, is_first: bool) -> None:
    """Draw the line of a method, and write its name or its window, and its numbers of features, beside it."""
    times, errors = [1e3 * row.seconds for row in group], [row.measured for row in group]
    colour, named = COLOURS.get(method, OTHERS), method in COLOURS
    axis.plot(
        times, errors, color=colour, linestyle="-" if is_first else "--", linewidth=2 if named else 1,
        marker="s" if method == ALONE else "o", markersize=5 if named else 3, zorder=3 if named else 2,
    )  # fmt: skip
    if not named:
        return
    if method == ALONE:
        text = f"window {window} alone"
        axis.annotate(text, (times[0], errors[0]), xytext=(-4, 8), color=colour, weight="bold", **SMALL)
        return
    for time, error, row in zip(times, errors, group, strict=True):
        axis.annotate(f"{row.num_features}", (time, error), xytext=(5, 2), color=colour, **SMALL)
    if is_first:
        text = NAMES[method] + (f", window {window}" if window else "")
        axis.annotate(text, (times[0], errors[0]), xytext=(-4, 13), color=colour, weight="bold", **SMALL)
    else:
        axis.annotate(f"with window {window}", (times[-1], errors[-1]), xytext=(-20, -14), color=colour, **SMALL)
