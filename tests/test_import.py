"""Importing the package is cheap and brings no array library."""

import subprocess
import sys

LIBRARIES = (
    "numpy",
    "torch",
    "jax",
    "cupy",
    "numba",
    "scipy",
    "dask",
    "array_api_strict",
    "matplotlib",
    "typer",
    "rich",
)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_no_array_library_is_loaded():
    loaded = run(f"import sys, favorsharp; print([m for m in {LIBRARIES} if m in sys.modules])")
    assert loaded == "[]"


def test_no_backend_is_loaded():
    assert run("import sys, favorsharp; print([m for m in sys.modules if m.startswith('favorsharp_')])") == "[]"


def test_import_takes_less_than_80_ms():
    """Of processor time beyond the interpreter's own, the best of several: the machine may be busy."""
    code = "import time; a = time.process_time(); import favorsharp; print(time.process_time() - a)"
    assert min(float(run(code)) for _ in range(7)) < 0.08


def test_every_public_name_is_there():
    import favorsharp

    assert all(hasattr(favorsharp, name) for name in favorsharp.__all__)
    assert callable(favorsharp.moments)
    assert callable(favorsharp.linear_attention)
