"""Time what the guide tells users to write: `python -m benchmarks.public_calls` writes docs/calls.md.

Every row is a whole public call, with its checks, fits and choices. Beside it stands a call that bounds it or competes
with it. The two take turns in one process.
"""

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import favorsharp as fs
from benchmarks import measure, peers

H, D, M = 8, 64, 128
ROOT = Path(__file__).parents[1]


def points(n: int) -> list[Any]:
    """Queries, keys and values of eight heads of 64, float32."""
    return list(np.random.default_rng(0).standard_normal((3, H, n, D)).astype(np.float32))


def against(work: str, ours: Callable[[], Any], name: str, other: Callable[[], Any], goal: float | None) -> Any:
    """One row: our call, another one, and the goal for the time of the other over ours."""
    return measure.compare(work, {"favorsharp": ours, name: other}, goal=goal, rounds=9, budget=8.0)


def fits(*, quick: bool) -> Iterator[measure.Table]:
    """Fits, beside attention with a given map of the same points."""
    for n, goal in ((64, None),) if quick else ((512, None), (2048, 1.0), (8192, 2.0)):
        q, k, v = points(n)
        fm = fs.feature_map(fs.fit(q, k), M, rng=0)
        alone = lambda q=q, k=k, v=v, fm=fm: fs.linear_attention(q, k, v, fm)  # noqa: E731
        yield against(f"fit, n={n}", lambda q=q, k=k: fs.fit(q, k), f"linear_attention, m={M}", alone, goal)


def features(*, quick: bool) -> Iterator[measure.Table]:
    """Features of points through a map, beside the op on arguments that are ready."""
    x = np.random.default_rng(0).standard_normal((512 if quick else 131_072, D)).astype(np.float32)
    for name, y in (("equal moments", x), ("different moments", 2 * x[:, ::-1] + x)):
        fm = fs.feature_map(fs.fit(x, y), M, rng=0)
        out = fm.query(x)
        u, row = (np.ascontiguousarray(a) for a in fm.query_terms(x))
        rows, column = (np.ascontiguousarray(a, dtype=np.float32) for a in (fm.rows, fm.column))
        op = fs.ops.exponential_features.exponential_features
        ready = lambda u=u, rows=rows, row=row, column=column, op=op: op(u, rows, row, column)  # noqa: E731
        work = f"query, {len(x)} points, {name}"
        yield against(work, lambda fm=fm: fm.query(x), "the op on prepared points", ready, 0.87)
        written = lambda fm=fm, out=out: fm.query(x, out=out)  # noqa: E731
        yield against(f"{work}, out=", written, "the op on prepared points", ready, 0.87)


def whole_calls(*, quick: bool) -> Iterator[measure.Table]:
    """Attention in one call, beside torch's exact attention."""
    for n in (128,) if quick else (1024, 4096):
        q, k, v = points(n)
        tensors = [torch.from_numpy(x)[None] for x in (q, k, v)]
        for causal in (False, True):
            exact = lambda t=tensors, c=causal: peers.exact(*t, is_causal=c)  # noqa: E731
            kind = "causal" if causal else "bidirectional"
            marks = lambda q=q, k=k, v=v, c=causal: fs.attention(  # noqa: E731
                q, k, v, method="landmarks", num_features=M, is_causal=c
            )
            yield against(f"attention, landmarks, {kind}, n={n}", marks, "exact attention (torch)", exact, 1.0)
        once = lambda q=q, k=k, v=v: fs.attention(q, k, v, num_features=M, rng=0)  # noqa: E731
        exact = lambda t=tensors: peers.exact(*t)  # noqa: E731
        yield against(f"attention, features with their fit, n={n}", once, "exact attention (torch)", exact, 1.0)


def beside_features(*, quick: bool) -> Iterator[measure.Table]:
    """Windows in both directions, landmarks and tokens, beside features with a given map."""
    n = 128 if quick else 4096
    q, k, v = points(n)
    fm, lm = fs.feature_map(fs.fit(q, k), M, rng=0), fs.landmarks(M)
    for options, name in (({}, "bidirectional"), ({"is_causal": True}, "causal")):
        alone = lambda o=options: fs.linear_attention(q, k, v, fm, **o)  # noqa: E731
        marks = lambda o=options: fs.linear_attention(q, k, v, lm, **o)  # noqa: E731
        goal = 0.4 if name == "bidirectional" else 0.25
        yield against(f"landmarks, {name}, n={n}", marks, "features with a given map", alone, goal)
    window = lambda: fs.linear_attention(q, k, v, fm, window=64)  # noqa: E731
    yield against(
        f"features, window 64 in both directions, n={n}", window, "without a window",
        lambda: fs.linear_attention(q, k, v, fm), 0.5,
    )  # fmt: skip
    count = 8 if quick else 2 * M + 4
    runs = [tokens(q, k, v, x, n // 2, count) for x in (lm, fm)]
    yield against(f"{count} tokens, landmarks", runs[0], "features", runs[1], 0.33)


def tokens(q: Any, k: Any, v: Any, x: Any, start: int, count: int) -> Callable[[], Any]:
    """Decode some tokens after a prompt, one by one."""
    prompt = (a[:, :start] for a in (q, k, v))
    _, first = fs.linear_attention(*prompt, x, is_causal=True, return_state=True)

    def run() -> Any:
        state = first
        for i in range(start, start + count):
            out, state = fs.decode_step(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1], state, x)
        return out

    return run


def tables(*, quick: bool = False) -> Iterator[measure.Table]:
    """Every row."""
    for part in (fits, features, whole_calls, beside_features):
        yield from part(quick=quick)


def page(found: list[measure.Table]) -> str:
    """The Markdown page."""
    stamp = ", ".join(f"{name} {value}" for name, value in measure.machine().items())
    lines = [
        "# What public calls cost",
        "",
        f"Measured {datetime.date.today().isoformat()}: {stamp}.",
        f"NumPy arrays in float32, eight heads of 64, {M} features or landmarks; medians of calls that take turns",
        "in one process. A ratio above 1 means that our call takes less time than the one beside it.",
        "`python -m benchmarks.public_calls` writes this page; [benchmarks](benchmarks.md) has the kernels beside",
        "other implementations.",
        "",
        "| call | ms | beside it | ms | ratio | goal |",
        "|---|---|---|---|---|---|",
    ]
    for table in found:
        (_, ours), (name, other) = table.seconds.items()
        goal = "" if table.goal is None else f"{table.goal:g}{'' if table.ratio >= table.goal else ' (missed)'}"
        lines.append(f"| {table.work} | {1e3 * ours:.2f} | {name} | {1e3 * other:.2f} | {table.ratio:.2f} | {goal} |")
    return "\n".join(lines) + "\n"


def main(
    quick: Annotated[bool, typer.Option(help="Tiny sizes: whether it runs, not how fast.")] = False,
    output: Annotated[Path, typer.Option(help="The page.")] = ROOT / "docs" / "calls.md",
) -> None:
    """Time the calls and write the page."""
    with torch.no_grad():
        output.write_text(page(list(tables(quick=quick))))
    typer.echo(f"Page: {output}")


if __name__ == "__main__":
    typer.run(main)
