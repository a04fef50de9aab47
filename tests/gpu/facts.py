"""Records the machine, its versions, and whether the backend is found. None of our kernels runs here."""

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from records import record, short

PACKAGES = (
    *("favorsharp", "numpy", "torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "array-api-compat", "numba", "scipy"),
    *("jax", "ml-dtypes", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "typer"),
    *("nvidia-cuda-nvrtc", "nvidia-cuda-runtime"),
)
TOOLS = ("nvcc", "ncu", "compute-sanitizer", "g++")
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.sm,power.limit,persistence_mode"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _card() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    line = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    return dict(zip(QUERY.split(","), (x.strip() for x in line.split(",")), strict=True))


def _torch() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    names = ("name", "multi_processor_count", "total_memory", "L2_cache_size", "major", "minor")
    return {"cuda": torch.version.cuda} | {name: getattr(properties, name, None) for name in names}


def _cupy() -> dict[str, Any]:
    import cupy

    attributes = cupy.cuda.Device(0).attributes
    names = ("MaxSharedMemoryPerBlockOptin", "MaxSharedMemoryPerMultiprocessor", "MultiProcessorCount")
    runtime = cupy.cuda.runtime
    versions = {"runtime": runtime.runtimeGetVersion(), "driver": runtime.driverGetVersion()}
    return versions | {name: attributes.get(name) for name in names}


def _nvrtc() -> Any:
    from cupy_backends.cuda.libs import nvrtc

    return nvrtc.getVersion()


def _backends() -> dict[str, str]:
    from favorsharp import dispatch

    return {name: backend.why_not() or "usable" for name, backend in dispatch.backends().items()}


def _chosen() -> dict[str, Any]:
    import torch

    import favorsharp as fs

    q = torch.zeros(2, 64, 32, device="cuda")
    return {op: fs.explain(op, like=q).chosen for op in ("attention", "causal_attention", "attention_vjp")}


QUESTIONS: dict[str, Callable[[], Any]] = {
    "python": lambda: sys.version.split()[0],
    "versions": lambda: {name: found for name in PACKAGES if (found := _version(name))},
    "tools": lambda: {tool: shutil.which(tool) is not None for tool in TOOLS},
    "card": _card,
    "torch sees": _torch,
    "CuPy sees": _cupy,
    "NVRTC": _nvrtc,
    "backends": _backends,
    "chosen for CUDA tensors": _chosen,
}


def main() -> None:
    """Record every fact, or the reason why it is not known."""
    for name, answer in QUESTIONS.items():
        try:
            record("fact", name=name, value=answer())
        except Exception as error:
            record("fact", name=name, value=None, said=short(error))


if __name__ == "__main__":
    main()
