"""The command `favorsharp info`: the installed libraries, the backends and the processor."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

import favorsharp as fs
from favorsharp.dispatch import VARIABLE, backends

PACKAGES = (
    "numpy",
    "array-api-compat",
    "torch",
    "jax",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "numba",
    "scipy",
    "array-api-strict",
    "dask",
)
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def info() -> None:
    """Print versions, libraries, backends with the reason each is or is not usable, threads and CPU features."""
    console = Console()
    table = Table("what", "value", title=f"favorsharp {fs.__version__}", title_justify="left")
    table.add_row("Python", f"{platform.python_version()} ({platform.python_implementation()})")
    table.add_row("system", f"{platform.system()} {platform.machine()}")
    table.add_section()
    for package in PACKAGES:
        table.add_row(package, _version(package))
    table.add_section()
    table.add_row("backend reference", "usable: array API functions, any library")
    for name, backend in backends().items():
        table.add_row(f"backend {name}", f"not usable: {reason}" if (reason := backend.why_not()) else "usable")
    table.add_row(VARIABLE, os.environ.get(VARIABLE) or "not set")
    table.add_section()
    table.add_row("logical processors", str(os.cpu_count()))
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        table.add_row(variable, os.environ.get(variable) or "not set")
    table.add_row("CPU", _processor())
    table.add_row("CPU features", _features())
    console.print(table)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpuinfo() -> dict[str, str]:
    """The entries of the first processor in /proc/cpuinfo; empty if there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _processor() -> str:
    return _cpuinfo().get("model name") or platform.processor() or "unknown"


def _features() -> str:
    entries = _cpuinfo()
    flags = (entries.get("flags") or entries.get("Features") or "").split()
    return ", ".join(flag for flag in FLAGS if flag in flags) or "unknown"
