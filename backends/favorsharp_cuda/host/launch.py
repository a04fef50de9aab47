"""Compiles a kernel when it is first needed on a device, and launches it on the caller's device and stream.

Threads may launch at the same time. One of them compiles the kernel, which does not change afterwards.

`plain`, `tiles`, `gradients` and `exponential_features_gradients` call `run`.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

from favorsharp_cuda.host import arrays
from favorsharp_cuda.host.occupancy import MULTIPROCESSORS
from favorsharp_cuda.host.recording import active
from favorsharp_cuda.host.source import INSTANTIATIONS, source

OPTIONS = ("-std=c++17",)

OLDEST = 80
"""The lowest compute capability that the kernels run on, times 10. Below it there is no cp.async and no bfloat16."""

ALWAYS_SHARED = 48 * 1024
"""Bytes of shared memory that a block may use unless an attribute of the kernel allows more. `_kernel` sets the
attribute once to what the device has, so that launches of other threads never find it too small."""

module_class: Any = None
"""The class of modules, called with (code=, options=, name_expressions=). None stands for `cupy.RawModule`; tests set
another class."""

_NOTHING = nullcontext()
_kernels: dict[tuple[int, str], Any] = {}
_compiling = threading.Lock()


class CannotCompile(RuntimeError):
    """The GPU or the installation cannot run the kernels; the message says what to do."""


def run(expression: str, like: Any, grid: int, threads: int, problem: Any, shared: int = 0) -> None:
    """Launch a kernel. Its only argument is a structure, which is passed by value.

    Parameters
    ----------
    expression : str
        One of `INSTANTIATIONS`.
    like : array
        An array of the call, which determines the device and the stream.
    grid, threads : int
        Number of blocks, and of threads in each. Without blocks nothing is launched.
    problem : structured NumPy array, shape (1,)
        The structure.
    shared : int
        Bytes of dynamic shared memory for each block.
    """
    if grid == 0:
        return
    device = arrays.device_number(like)
    of_caller = arrays.is_torch(like) or arrays.is_numpy(like)  # CuPy's arrays have to be on its current device
    if not of_caller and device != (current := current_device()):
        raise ValueError(
            f"arrays are on device {device}, the current device is {current}; accepted: arrays of the current one, "
            f"as inside `with cupy.cuda.Device({device}):`"
        )
    if shared > ALWAYS_SHARED and shared > (room := shared_room(device)):
        raise ValueError(
            f"{expression} needs {shared} bytes of shared memory for a block, and device {device} has {room}; "
            "accepted there: smaller d and e, fewer features, or float32 for float64"
        )
    with on_stream_of(like):
        start(expression, device, grid, threads, problem, shared)
    if active.recording is not None:
        active.recording.launched(expression, grid, threads, problem, shared)


def start(expression: str, device: int, grid: int, threads: int, problem: Any, shared: int) -> None:
    """Launch a kernel on the current device and stream, as `run` does after its checks."""
    _kernel(expression, device)((grid,), (threads,), (problem,), shared_mem=shared)


def shared_room(device: int) -> int:
    """The most bytes of shared memory that a block can use on a device."""
    limit = getattr(module_class, "shared_limit", None)
    return _shared_room(device) if limit is None else int(limit)


@cache
def _shared_room(device: int) -> int:
    import cupy

    return int(cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"])


def multiprocessors(device: int) -> int:
    """How many multiprocessors a device has."""
    return _multiprocessors(device) if module_class is None else MULTIPROCESSORS


@cache
def _multiprocessors(device: int) -> int:
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


def current_device() -> int:
    """CuPy's current device. CuPy allocates and launches on it, whatever device the arrays are on."""
    import cupy

    return int(cupy.cuda.runtime.getDevice())


def forget() -> None:
    """Forget every compiled kernel. Tests call this after they have changed `module_class` or the source."""
    _kernels.clear()


def on_stream_of(like: Any) -> AbstractContextManager[Any]:
    """A context in which the caller's device and stream are CuPy's current ones."""
    if not arrays.is_torch(like) or arrays.on_host(like):
        return _NOTHING  # CuPy arrays are always on CuPy's current device and stream
    import cupy
    import torch

    stream = torch.cuda.current_stream(like.device)
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):  # since CuPy 14
        current = cupy.cuda.Stream.from_external(stream)
    else:
        current = cupy.cuda.ExternalStream(stream.cuda_stream, like.device.index)
    return _Both(cupy.cuda.Device(like.device.index), current)


def stream_of(like: Any) -> tuple[int, bool]:
    """The caller's stream as a number, and whether a CUDA graph is being captured on it."""
    if arrays.on_host(like):
        return 0, False
    import cupy

    with on_stream_of(like):
        stream = cupy.cuda.get_current_stream()
        return int(stream.ptr), bool(stream.is_capturing())


class _Both:
    """A context that enters a device and one of its streams."""

    def __init__(self, device: Any, stream: Any) -> None:
        self.device, self.stream = device, stream

    def __enter__(self) -> None:
        self.device.__enter__()
        self.stream.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.stream.__exit__(*error)
        self.device.__exit__(*error)


def _kernel(expression: str, device: int) -> Any:
    """The kernel on the current device, which is `device`; if several threads need it first, one compiles it."""
    kernel = _kernels.get((device, expression))
    if kernel is not None:
        return kernel
    with _compiling:
        kernel = _kernels.get((device, expression))
        if kernel is None:
            kernel = _kernels[device, expression] = _compile(expression, device)
    return kernel


def _compile(expression: str, device: int) -> Any:
    if expression not in INSTANTIATIONS:
        raise KeyError(f"{expression} is not in INSTANTIATIONS")
    make = module_class
    if make is None:
        import cupy

        make = cupy.RawModule
        _check_card(cupy, device)
    try:
        module = make(code=source(), options=OPTIONS, name_expressions=[expression])
        kernel = module.get_function(expression)
        if (room := shared_room(device)) > ALWAYS_SHARED:
            kernel.max_dynamic_shared_size_bytes = room
        return kernel
    except Exception as error:
        cure = _cure_of(error)
        if cure is None:
            raise
        raise CannotCompile(cure) from error


def _check_card(cupy: Any, device: int) -> None:
    capability = int(cupy.cuda.Device(device).compute_capability)
    if capability < OLDEST:
        raise CannotCompile(
            f"favorsharp's CUDA kernels need a card of compute capability 8.0 or newer, device {device} has "
            f"{capability // 10}.{capability % 10}: use favorsharp.use('reference'), or pip install "
            "'favorsharp[torch]' and torch tensors on the CPU"
        )


def _cure_of(error: Exception) -> str | None:
    """What to install if CuPy found no NVRTC, an NVRTC older than the GPU, or no headers; None for other errors."""
    text = str(error)
    if not any(word in text.lower() for word in ("nvrtc", "cuda headers", "cuda_path", "cudart", "include")):
        return None
    major = 13
    try:
        import cupy

        major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    except Exception:  # the CUDA runtime itself may be missing
        pass
    packages = (
        "'nvidia-cuda-nvrtc-cu12' 'nvidia-cuda-runtime-cu12'"
        if major == 12
        else f"'nvidia-cuda-nvrtc=={major}.*' 'nvidia-cuda-runtime=={major}.*'"
    )
    if "gpu-architecture" in text:  # NVRTC's message if it does not know the GPU's architecture
        return f"CuPy cannot compile, as the toolkit's NVRTC is older than the card: pip install -U {packages} ({text})"
    return f"CuPy cannot compile, as the toolkit's NVRTC or headers are missing: pip install {packages} ({text})"
