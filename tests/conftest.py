"""The array libraries that every law is tested on, and the implementations that run in a test.

A test runs the references, also in processes that it starts, so that it compiles nothing. Two marks change that:
`compiled` leaves the choice to favorsharp, and tests with `own_backend` choose backends themselves. In files with the
mark `compiled`, tests of another dtype have `compiled(False)`, or all kernels would be compiled once more for it.
`pytest --backend any` leaves the choice to favorsharp in all tests, as `make test-kernels` does.

`pytest --backend loopback` wraps each test in `favorsharp.use("loopback")`. That backend is found through a real entry
point, runs the references and counts its calls (tests/loopback). `make test-loopback` reruns the tests of attention,
streams and regression that way, and the run fails if the backend never ran.
"""

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

# The test workers have more threads than there are cores. A thread that spins while it waits takes the core of the
# thread that it waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")  # 2^16 cycles

import numpy as np
import pytest

import favorsharp as fs

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))  # oracle.py and problems.py
sys.path.insert(0, str(TESTS / "loopback"))


@dataclass(frozen=True)
class Library:
    """An array library and device to test on, with conversions from NumPy and back."""

    name: str
    namespace: ModuleType
    to: Callable[[np.ndarray], Any]
    back: Callable[[Any], np.ndarray]

    def __repr__(self) -> str:
        return self.name

    def __call__(self, host: Any, dtype: str | None = None) -> Any:
        host = np.asarray(host)
        if dtype is None and host.dtype.kind == "f":
            host = host.astype(np.float64)
        return self.to(host if dtype is None else host.astype(dtype))

    def is_like(self, x: Any, reference: Any) -> bool:
        """Whether x is of the library, device and dtype of a reference array."""
        same = type(x) is type(reference) and x.dtype == reference.dtype
        return same and str(getattr(x, "device", None)) == str(getattr(reference, "device", None))


def _numpy() -> Library:
    return Library("numpy", np, np.array, np.asarray)


def _readonly() -> Library:
    def to(host: np.ndarray) -> np.ndarray:
        spread = np.zeros((*host.shape[:-1], 2 * host.shape[-1]), host.dtype) if host.ndim else host.copy()
        if host.ndim:
            spread[..., ::2] = host
            spread = spread[..., ::2]  # the values are also strided
        spread.flags.writeable = False
        return spread

    return Library("numpy-readonly-strided", np, to, np.asarray)


def _torch() -> Library:
    torch = pytest.importorskip("torch")
    return Library("torch", torch, lambda host: torch.asarray(host.copy()), lambda x: x.detach().numpy())


def _strict() -> Library:
    strict = pytest.importorskip("array_api_strict")
    return Library("strict", strict, strict.asarray, np.asarray)


def _strict_device() -> Library:
    strict = pytest.importorskip("array_api_strict")
    device, cpu = strict.Device("device1"), strict.Device("CPU_DEVICE")
    return Library(
        "strict-device1",
        strict,
        lambda host: strict.asarray(host, device=device),
        lambda x: np.asarray(x.to_device(cpu)),
    )


def _jax() -> Library:
    # compilation takes most of the time of these tests, and optimisation does not help small arrays
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    return Library("jax", jax.numpy, jax.numpy.asarray, np.asarray)


MAKERS = {
    "numpy": _numpy,
    "numpy-readonly-strided": _readonly,
    "torch": _torch,
    "strict": _strict,
    "strict-static": _strict,
    "strict-device1": _strict_device,
    "jax": _jax,
}


def _cupy() -> Library:
    cupy = pytest.importorskip("cupy")
    return Library("cupy", cupy, cupy.asarray, lambda x: x.get())


def _torch_cuda() -> Library:
    torch = pytest.importorskip("torch")
    return Library(
        "torch-cuda", torch, lambda x: torch.asarray(x.copy(), device="cuda"), lambda x: x.detach().cpu().numpy()
    )


if os.environ.get("FAVORSHARP_GPU"):  # set by `make gpu-check`
    MAKERS |= {"cupy": _cupy, "torch-cuda": _torch_cuda}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.jax) if name == "jax" else name for name in MAKERS])
def xp(request: pytest.FixtureRequest) -> Any:
    """Each array library in turn; "strict-static" refuses what depends on values: boolean indexing, unknown shapes."""
    library = MAKERS[request.param]()
    if request.param == "strict-static":
        strict = sys.modules["array_api_strict"]
        with strict.ArrayAPIStrictFlags(boolean_indexing=False, data_dependent_shapes=False):
            yield library
    else:
        yield library


@pytest.fixture(params=["numpy-readonly-strided", "torch", "strict-device1"])
def few_xp(request: pytest.FixtureRequest) -> Library:
    """A few eager libraries, for tests with many cases, each of which JAX would compile."""
    return MAKERS[request.param]()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240607)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", default=None, help="run every test under favorsharp.use(NAME); any: whichever runs")


def pytest_configure() -> None:
    """Collect garbage less often: Numba makes so many objects that it would take a tenth of the compilation time."""
    gc.set_threshold(100_000, 50, 100)


def _is_compiled(item: pytest.Item) -> bool:
    mark = item.get_closest_marker("compiled")
    return mark is not None and mark.args != (False,)


def _may_compile(item: pytest.Item) -> bool:
    return _is_compiled(item) or item.get_closest_marker("own_backend") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that compile kernels first, so that one of two workers of `--dist worksteal` gets all of them."""
    items.sort(key=lambda item: not _may_compile(item))


@pytest.fixture(autouse=True)
def _under_backend(request: pytest.FixtureRequest) -> Any:
    name = request.config.getoption("--backend")
    if name is None:
        name = "any" if _is_compiled(request.node) or os.environ.get("FAVORSHARP_GPU") else "reference"
    if name == "any" or request.node.get_closest_marker("own_backend"):
        yield
        return
    with fs.use(name), pytest.MonkeyPatch.context() as environment:
        if name == "reference":
            environment.setenv("FAVORSHARP_BACKEND", name)  # for processes that the test starts
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add up the counts of the workers of pytest-xdist."""
    import favorsharp_loopback

    favorsharp_loopback.calls.update(getattr(node, "workeroutput", {}).get("loopback", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run with `--backend loopback` in which that backend never ran."""
    if session.config.getoption("--backend") != "loopback":
        return
    import favorsharp_loopback

    calls = dict(favorsharp_loopback.calls)
    if hasattr(session.config, "workerinput"):
        session.config.workeroutput["loopback"] = calls
        return
    print(f"\nloopback ran: {calls}")
    if not calls and session.testscollected:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
