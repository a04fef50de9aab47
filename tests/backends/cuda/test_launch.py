"""The errors of a launch: an installation that cannot compile, an old card, arrays on another device.

It also tests threads that launch one kernel at the same time.
"""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from favorsharp_cuda.host import launch
from favorsharp_cuda.host.problem import Problem
from favorsharp_cuda.host.source import INSTANTIATIONS

pytestmark = pytest.mark.own_backend
cupy = pytest.importorskip("cupy")


@pytest.mark.parametrize(
    "message",
    [  # CuPy 14's, without libnvrtc and without the headers of the runtime
        'Failure finding "libnvrtc.so": No such file: libnvrtc.so*',
        "Failed to find CUDA headers. Please install CUDA toolkit headers (e.g., pip install cupy-cuda12x[ctk])",
    ],
)
@pytest.mark.parametrize(("major", "package"), [(12, "nvidia-cuda-nvrtc-cu12"), (13, "nvidia-cuda-nvrtc==13")])
def test_a_missing_toolkit_is_answered_by_what_to_install(monkeypatch, message, major, package):
    def refuses(**options):
        raise RuntimeError(message)

    monkeypatch.setattr(launch, "module_class", refuses)
    monkeypatch.setattr(cupy.cuda.runtime, "runtimeGetVersion", lambda: major * 1000)
    with pytest.raises(launch.CannotCompile, match=f"pip install '{package}.*{message[:20]}"):
        launch._compile(INSTANTIATIONS[0], 0)


def test_an_nvrtc_that_does_not_know_the_card_is_to_be_replaced(monkeypatch):
    def refuses(**options):
        raise RuntimeError("nvrtc: error: invalid value for --gpu-architecture (-arch)")

    monkeypatch.setattr(launch, "module_class", refuses)
    with pytest.raises(launch.CannotCompile, match="NVRTC is older than the card: pip install -U 'nvidia-cuda-nvrtc"):
        launch._compile(INSTANTIATIONS[0], 0)


def test_other_errors_of_a_compiler_are_not_explained_away(monkeypatch):
    def refuses(**options):
        raise RuntimeError("plain.cu(3): error: expected a ';'")

    monkeypatch.setattr(launch, "module_class", refuses)
    with pytest.raises(RuntimeError, match="expected a ';'") as caught:
        launch._compile(INSTANTIATIONS[0], 0)
    assert caught.type is RuntimeError


@pytest.mark.parametrize(("capability", "served"), [("75", False), ("80", True), ("90", True), ("120", True)])
def test_an_old_card_is_refused(monkeypatch, capability, served):
    fake = SimpleNamespace(cuda=SimpleNamespace(Device=lambda number: SimpleNamespace(compute_capability=capability)))
    if served:
        launch._check_card(fake, 1)
    else:
        with pytest.raises(launch.CannotCompile, match=r"8\.0 or newer, device 1 has 7\.5.*pip install"):
            launch._check_card(fake, 1)


class Elsewhere:
    """Stands for a CuPy array on the second GPU."""

    device = SimpleNamespace(id=1)


def test_cupy_arrays_of_another_device_are_refused_before_a_launch(monkeypatch):
    """A kernel on the current device would read memory of the other device, which ends the process."""
    monkeypatch.setattr(launch, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_compile", lambda *given: pytest.fail("nothing is compiled"))
    with pytest.raises(ValueError, match=r"on device 1, the current device is 0.*cupy\.cuda\.Device\(1\)"):
        launch.run(INSTANTIATIONS[0], Elsewhere(), 1, 32, None)


class Module:
    """Stands for a module that takes a while to compile; its kernel records the shared memory that is set and used."""

    shared_limit = 100_000
    made, set_to, launched = 0, (), ()

    def __init__(self, **given):
        Module.made += 1
        time.sleep(0.05)

    def get_function(self, name):
        return Kernel()


class Kernel:
    most = launch.ALWAYS_SHARED

    def __setattr__(self, name, value):
        assert name == "max_dynamic_shared_size_bytes"
        Module.set_to += (value,)
        object.__setattr__(self, "most", value)

    def __call__(self, grid, block, args, *, shared_mem):
        assert shared_mem <= self.most
        Module.launched += (shared_mem,)


def test_threads_compile_a_kernel_once_and_none_takes_memory_from_another(monkeypatch):
    """A launch sets no attribute of the kernel, because another thread could set a smaller value before the launch."""
    monkeypatch.setattr(launch, "module_class", Module)
    monkeypatch.setattr(launch, "_kernels", {})
    for name in ("made", "set_to", "launched"):
        monkeypatch.setattr(Module, name, getattr(Module, name))
    sizes = (100_000, 0, 60_000, 50_000)
    like, begin = np.zeros(1), threading.Barrier(len(sizes))

    def work(shared):
        begin.wait()
        launch.run(INSTANTIATIONS[0], like, 1, 32, None, shared)

    threads = [threading.Thread(target=work, args=(shared,)) for shared in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(Module.launched) == sorted(sizes)
    assert (Module.made, Module.set_to) == (1, (100_000,))
    with pytest.raises(ValueError, match="needs 100001 bytes .* device 0 has 100000"):
        launch.run(INSTANTIATIONS[0], like, 1, 32, None, 100_001)


def test_a_copy_of_a_problem_is_its_own():
    """The fields that are set once for a map are copied for each launch, so a launch does not affect later ones."""
    first = Problem((2, 1, 3))
    first.set(m=5)
    second, x = first.copy(), np.zeros((2, 1, 3, 4, 7), np.float32)[..., :6]
    second.array("q", x)
    second.set(m=6)
    assert (first.values["m"][0], second.values["m"][0]) == (5, 6)
    assert first.values["q"]["start"] == 0
    entry = second.values["q"][0]
    assert (entry["start"], entry["row"], entry["column"]) == (x.ctypes.data, 7, 1)
    assert entry["axis"][-2:].tolist() == [84, 28]
    assert second.values["shape"][0].tolist() == [1] * 6 + [2, 3]
    assert len(first.held) == 0
    assert len(second.held) == 1
