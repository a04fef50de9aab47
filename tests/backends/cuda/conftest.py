"""Kernels on a CPU: what the tests of favorsharp_cuda share."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "host"))  # host_module.py, sanitized.py
sys.path.insert(0, str(HERE))

import on_host  # noqa: E402  builds are shared
from host_module import compiler  # noqa: E402

import favorsharp as fs  # noqa: E402

if compiler() is None:
    if os.environ.get("CI") == "true":
        raise RuntimeError("the kernels are proven through g++, which this CI does not have")
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def used_on_host() -> Iterator[None]:
    """Calls inside the test go to the backend, run by the shim; nothing was written beside its arrays."""
    with on_host.installed() as name, fs.use(name):
        yield
    on_host.check_guards()


def pytest_report_header() -> str | None:
    return None if compiler() else "CUDA kernels: not tested, there is no g++"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where CuPy finds none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))


def _has_gpu() -> bool:
    try:
        import cupy
    except ImportError:
        return False
    return bool(cupy.cuda.is_available())
