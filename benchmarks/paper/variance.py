"""Log-variance of every method on synthetic data and on real heads: `python -m benchmarks.paper.variance`.

All numbers are excess: the mean over pairs of log E[(f1 f2)^2], minus 2 log K, in nats. If the excess is lower by 10,
the variance is lower by a factor of e^10.
"""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import track

import favorsharp as fs
from benchmarks.paper.page import COLOURS, DOCS, FITTED, emphasised, picture, powers, stamp, table, write
from favorsharp.diagnostics import load_sample

METHODS = ("trig", "poisson", "geometric", "posrf", "oprf", *FITTED, "optimal")
SETTINGS = {
    "alike": "queries and keys N(0, s² I)",
    "axes": "standard deviations s exp(t z) for queries, s exp(-t z) for keys, z normal for each axis",
    "turned": "the same, turned by one random rotation",
    "shifted": "N(s t r, s² I) and N(s t r', s² I), with r and r' random signs",
}
SCALES = 2.0 ** np.arange(-2, 2.01, 0.5)
LARGEST = 16.0
PAIRS = 128
"""Number of queries and of keys in averages over pairs, where no closed form is known."""


def data(setting: str, size: int, t: float, *, points: int = 1024, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys for s = 1, shape (points, size); the scale of the kernel stands for other values of s."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, points, size))
    if setting in ("axes", "turned"):
        spread = np.exp(t * rng.standard_normal(size))
        q, k = q * spread, k / spread
    if setting == "turned":
        turn = np.linalg.qr(rng.standard_normal((size, size)))[0]
        q, k = q @ turn, k @ turn
    if setting == "shifted":
        signs = rng.choice([-1.0, 1.0], size=(2, 1, size))
        q, k = q + t * signs[0], k + t * signs[1]
    return q, k


def excess(q: np.ndarray, k: np.ndarray, method: str, scale: float) -> float:
    """The mean excess over heads."""
    parameters = fs.fit(q, k, method=method, scale=scale)
    if method not in ("trig", "geometric"):
        return float(np.mean(fs.excess(parameters, q, k)))
    q, k = q[..., :PAIRS, :], k[..., :PAIRS, :]
    logits = scale * q @ np.swapaxes(k, -1, -2)
    return float(np.mean(fs.log_second_moment(parameters, q, k) - 2 * logits))


def scale_of(s: float, size: int) -> float:
    """The scale of the kernel that stands for s times larger queries and keys, including attention's 1 / sqrt d."""
    return s * s / size**0.5


def reached(q: np.ndarray, k: np.ndarray, better: tuple[str, ...], than: tuple[str, ...]) -> float | None:
    """The least s, to 1 %, above which the excess of the best of `better` is 10 lower; None if it exceeds LARGEST."""

    def enough(s: float) -> bool:
        scale = scale_of(s, q.shape[-1])
        return min(excess(q, k, m, scale) for m in than) - min(excess(q, k, m, scale) for m in better) >= 10

    low, high = 2.0**-5, LARGEST
    if not enough(high):
        return None
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def curves(size: int, t: float) -> dict[str, dict[str, list[float]]]:
    found = {}
    for setting in track(SETTINGS, "curves"):
        q, k = data(setting, size, t)
        found[setting] = {m: [excess(q, k, m, scale_of(s, size)) for s in SCALES] for m in METHODS}
    return found


def gains(size: int, spreads: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    """The reduction of the excess of `oprf` by FAVOR# and by `optimal`, (spreads, scales), on rotated data."""
    found = {"FAVOR#": np.zeros((len(spreads), len(scales))), "optimal": np.zeros((len(spreads), len(scales)))}
    for i, t in enumerate(track(spreads, "map of gains")):
        q, k = data("turned", size, t)
        for j, s in enumerate(scales):
            scale = scale_of(s, size)
            before = excess(q, k, "oprf", scale)
            found["FAVOR#"][i, j] = before - min(excess(q, k, m, scale) for m in FITTED)
            found["optimal"][i, j] = before - excess(q, k, "optimal", scale)
    return found


def main(
    output: Annotated[Path, typer.Option(help="The folder of the documentation.")] = DOCS,
    quick: Annotated[bool, typer.Option(help="Small sizes: whether it runs.")] = False,
) -> None:
    """Write the tables and the picture."""
    start = time.perf_counter()
    size, t = (4, 1.0) if quick else (64, 0.5)
    found = curves(size, t)
    lines = [f"**Excess at d = {size}, t = {t}**", ""]
    shown = [0.5, 1.0, 2.0]
    rows = [
        [setting, s, *emphasised([found[setting][m][SCALES.tolist().index(s)] for m in METHODS], ".1f")]
        for setting in SETTINGS
        for s in shown
    ]
    lines += table(["data", "s", *(f"`{m}`" for m in METHODS)], rows)

    pairs = {
        "FAVOR# to `posrf`": (FITTED, ("posrf",)),
        "FAVOR# to `oprf`": (FITTED, ("oprf",)),
        "FAVOR# to the best before it": (FITTED, ("trig", "poisson", "posrf", "oprf")),
        "`optimal` to `oprf`": (("optimal",), ("oprf",)),
        "`optimal` to the best FAVOR#": (("optimal",), FITTED),
    }
    rows = []
    cases = [(setting, d) for setting in SETTINGS for d in ((4,) if quick else (16, 64, 128))]
    for setting, d in track(cases, "where ten is reached"):
        q, k = data(setting, d, t)
        least = [reached(q, k, better, than) for better, than in pairs.values()]
        rows.append([setting, d, *("-" if s is None else f"{s:.2f}" for s in least)])
    lines += [f"**The least s from which on the variance is e¹⁰ times lower (t = {t}; -: not up to {LARGEST:g})**", ""]
    lines += table(["data", "d", *pairs], rows)

    q, k = (x.astype(np.float64) for x in load_sample()[:2])
    scale = q.shape[-1] ** -0.5
    heads = {m: [excess(q[h], k[h], m, scale) for h in range(len(q))] for m in METHODS}
    lines += ["**Excess on six heads of a sentence encoder, 512 tokens, d = 32**", ""]
    rows = [[h, *emphasised([heads[m][h] for m in METHODS], ".1f")] for h in range(len(q))]
    rows.append(["mean", *emphasised([float(np.mean(heads[m])) for m in METHODS], ".1f")])
    lines += table(["head", *(f"`{m}`" for m in METHODS)], rows)

    spreads, scales = (
        (np.linspace(0, 1, 3), SCALES[::4]) if quick else (np.linspace(0, 1, 11), 2.0 ** np.arange(-2, 3.01, 0.5))
    )
    gained = gains(size, spreads, scales)
    _draw(found, heads, gained, spreads, scales, output)
    write("variance", [stamp(time.perf_counter() - start), "", *lines], output)


def _draw(found, heads, gained, spreads, scales, output) -> None:
    with picture("variance", output, nrows=2, ncols=4, figsize=(12, 6)) as axes:
        for ax, (setting, curve) in zip(axes[0], found.items(), strict=True):
            for method, values in curve.items():
                above = np.subtract(values, curve["optimal"])
                ax.plot(SCALES, above, color=COLOURS[method], label=method, lw=2 if method == "optimal" else 1.2)
            ax.axhline(10, color="black", lw=0.8, ls=":")
            ax.set_title(setting)
            ax.set_yscale("symlog", linthresh=1)
            ax.set_ylim(-2, 300)
            ax.set_yticks([-1, 0, 1, 10, 100], ["-1", "0", "1", "10", "100"])
            powers(ax, "s", SCALES[::2])
        axes[0, 0].set_ylabel("excess above that of optimal (nats)")
        axes[0, 0].legend(frameon=False, fontsize=7)
        wide = axes[1, 0]
        width = 0.85 / len(heads)
        for i, (method, values) in enumerate(heads.items()):
            wide.bar(np.arange(len(values)) + (i - 4) * width, values, width, color=COLOURS[method])
        wide.set(title="six real heads", xlabel="head", ylabel="excess (nats)")
        for ax, (name, gain) in zip(axes[1, 1:3], gained.items(), strict=True):
            shades = ax.pcolormesh(scales, spreads, gain, cmap="Blues", vmin=0, vmax=40, shading="nearest")
            ax.contour(scales, spreads, gain, levels=[10], colors="#cc3311")
            ax.set(title=f"turned: oprf less {name}", ylabel="t")
            powers(ax, "s", scales[::2])
        axes[1, 3].axis("off")
        axes[1, 3].figure.colorbar(shades, ax=axes[1, 3], location="left", label="nats; red line: 10")


if __name__ == "__main__":
    typer.run(main)
