"""Everything that only a GPU can show: `make gpu-check`. Every step runs, and the last line says which failed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CUDA_TESTS = "tests/backends/cuda"
MATRIX = ("tests/ops", "tests/test_linear_attention.py", "tests/test_streaming.py", "tests/test_regression.py")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")  # of compute-sanitizer


def why_not() -> str | None:
    """Why there is nothing to check here."""
    try:
        import cupy

        if not cupy.cuda.is_available():
            return "gpu-check needs an NVIDIA GPU with its driver, and CuPy finds none here."
    except ImportError:
        return "gpu-check needs an NVIDIA GPU and CuPy: pip install 'favorsharp[cuda13]'."
    return None


def steps() -> list[tuple[str, list[str]]]:
    """What is run, in order."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    found = [
        ("lane layouts and conversions", [*pytest, f"{CUDA_TESTS}/test_primitives.py"]),
        ("kernels and gradients against float64, at every shape class", [*pytest, CUDA_TESTS, "-m", "gpu"]),
        ("the test matrix on CuPy arrays and CUDA tensors", [*pytest, *MATRIX, "-k", "cupy or torch-cuda"]),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        for tool in TOOLS:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
            found.append((f"compute-sanitizer {tool}", [*command, *pytest, CUDA_TESTS, "-m", "gpu and not slow"]))
    else:
        print("compute-sanitizer is not on the path: left out")
    found.append(("benchmark", [sys.executable, "-m", "benchmarks.gpu"]))
    return found


def main() -> int:
    """Run the steps; the number of those that failed."""
    reason = why_not()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    failed = []
    for name, command in steps():
        print(f"== {name}: {' '.join(command)}", flush=True)
        if subprocess.run(command, cwd=ROOT, env={**os.environ, "FAVORSHARP_GPU": "1"}).returncode:
            failed.append(name)
    print(f"== failed: {', '.join(failed)}" if failed else "== all passed")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
