"""Fixtures of the tests of favorsharp_cuda, which run the CUDA kernels on a CPU through the shim."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "host"))  # host_module.py, sanitized.py
sys.path.insert(0, str(HERE))

import on_host  # noqa: E402  builds are shared
from host_module import HostModule, compiler  # noqa: E402
from problems import attention_problem, key_mask  # noqa: E402

import favorsharp as fs  # noqa: E402
from favorsharp import dispatch  # noqa: E402

if compiler() is None:
    if os.environ.get("CI") == "true":
        raise RuntimeError("the kernels are proven through g++, which this CI does not have")
    if not os.environ.get("FAVORSHARP_GPU"):  # tests on a GPU need NVRTC only
        collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def used_on_host() -> Iterator[None]:
    """Send the calls of the test to the backend and the shim, and check that nothing was written beside its arrays."""
    with on_host.installed() as name, fs.use(name):
        yield
    on_host.check_guards()


@pytest.fixture
def torch_on_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the backend take torch's CPU tensors as if they were on a GPU; the shim runs its kernels."""
    import torch

    import favorsharp_cuda
    from favorsharp_cuda.host import launch

    def forget() -> None:
        dispatch.rediscover()
        launch.forget()
        torch._dynamo.reset()

    kernels = [replace(kernel, devices=kernel.devices | {"cpu"}) for kernel in favorsharp_cuda.BACKEND.kernels]
    monkeypatch.setattr(favorsharp_cuda, "BACKEND", replace(favorsharp_cuda.BACKEND, kernels=tuple(kernels)))
    monkeypatch.setattr(launch, "module_class", HostModule)
    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.fixture
def problem() -> tuple[Any, ...]:
    """Queries, keys, values, a mask and a map, as tensors of torch."""
    import torch

    q, k, v = (torch.asarray(x) for x in attention_problem(0, (2,), n=12, d=3, e=2))
    mask = torch.asarray(key_mask(1, (2, 12), "holes"))
    return q, k, v, mask, fs.feature_map(fs.fit(q, k), 5, rng=0)


def pytest_report_header() -> str | None:
    return None if compiler() else "CUDA kernels: not tested, there is no g++"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip what needs a GPU where CuPy finds none."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)
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
