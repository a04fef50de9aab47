"""The command `favorsharp matrix`: which implementation runs each op, and its error relative to float64."""

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import favorsharp as fs
from favorsharp._arrays import device_of
from favorsharp.cli.files import check_writable
from favorsharp.dispatch import OPS, watch
from favorsharp.testing import TOLERANCES, Row, cases, make_array, relative_error, wanted

LIBRARIES = ("numpy", "torch", "jax", "array_api_strict", "cupy")
DTYPES = ("float16", "bfloat16", "float32", "float64")


def matrix(
    markdown: Annotated[Path | None, typer.Option(help="Write the table as a Markdown page.")] = None,
) -> None:
    """Run every op on every library and dtype found here; print what ran, and its largest error against float64."""
    console = Console()
    check_writable(markdown)
    rows = support()
    table = Table("op", "library", "device", "dtype", "implementation", "largest error", title_justify="left")
    previous = rows[0][0].op if rows else ""
    for row, device in rows:
        if row.op != previous:
            table.add_section()
            previous = row.op
        error = "[red]" if row.error > TOLERANCES[row.dtype] else ""
        table.add_row(row.op, row.library, device, row.dtype, row.implementation, f"{error}{row.error:.1e}")
    console.print(table)
    absent = [library for library in LIBRARIES if library not in {row.library for row, _ in rows}]
    if absent:
        console.print(f"Not usable here: {', '.join(absent)}")
    if markdown is not None:
        markdown.write_text(page(rows))
        console.print(f"Page: {markdown}", soft_wrap=True)


def support() -> list[tuple[Row, str]]:
    """A row and the device for each op, library and dtype; a row covers all test cases of the op."""
    rows = []
    for op in sorted(op for op in OPS if not op.endswith("_vjp")):  # their results are functions
        truths = [(case, wanted(op, case)) for case in cases(op)]
        for library in LIBRARIES:
            for dtype in DTYPES:
                make = make_array(library, dtype)
                if make is not None:
                    rows.append(_row(op, library, dtype, make, truths[:2] if library == "jax" else truths))
    return rows


def page(rows: list[tuple[Row, str]]) -> str:
    """The table as a Markdown page; it gives bounds instead of errors, so that it is the same on every machine."""
    lines = [
        "# Support table",
        "",
        "Each row is one op, array library and dtype that was available when the table was generated. It names",
        "the implementation that ran, and gives a bound on its largest error over the op's test cases (for JAX,",
        "the first two), relative to the largest entry of the float64 reference. The cases use dense-exponential",
        "maps and record no gradients; the ops whose result is a function (`*_vjp`) are not in the table.",
        "",
        f"`favorsharp matrix --markdown docs/support.md` generates this page, favorsharp {fs.__version__}; a test",
        "checks that it is current. CuPy arrays and torch tensors on an NVIDIA GPU run the CUDA kernels",
        "([what has run on a GPU](guide/gpu.md)).",
        "",
        "| op | library | device | dtype | implementation | error below |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row, device in rows:
        bound = f"{TOLERANCES[row.dtype]:.0e}" if row.error <= TOLERANCES[row.dtype] else f"**{row.error:.0e}**"
        cells = (row.op, row.library, device, row.dtype, row.implementation, bound)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _row(op: str, library: str, dtype: str, make: Any, truths: list[tuple[Any, Any]]) -> tuple[Row, str]:
    error, ran = 0.0, set()
    for case, truth in truths:
        args, kwargs = case.make(make)
        with watch() as calls, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = OPS[op](*args, **kwargs)
        ran.add(calls[0][1])
        error = max(error, relative_error(got, truth))
    return Row(op, "all", library, dtype, " + ".join(sorted(ran)), error), device_of(make([0.0]))
