"""`HostModule` replaces `cupy.RawModule` where there is no GPU; it compiles the same source and names with shim.h."""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
HEADERS = ("shim.h", "tensor_cores.h", "numbers.h", "block.h", "fibers.h")
ORDERS = ("forward", "reverse", "random")
SANITIZERS = {
    "": ("-O1",),  # compiling takes longer than running
    "thread": ("-O1", "-g1", "-fsanitize=thread"),
    "address": ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
}
FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",  # kernels read shared memory as various types
    "-ffp-contract=off",
    "-fno-tree-loop-distribute-patterns",  # the sanitizers would report a loop that was compiled to memcpy
    "-Wall",
    "-Wno-unknown-pragmas",
)
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""What a block may have at most. Cards of compute capability 8.9 and 12.0 have what those of 8.6 have."""
DEFAULT_SHARED = 48 * 1024  # for more, a kernel must set max_dynamic_shared_size_bytes
GRID_LIMITS = (2**31 - 1, 65535, 65535)
MESSAGE_BYTES = 512

_one_launch = threading.Lock()  # the shim has one block, and torch runs backward in a thread of its own


class LaunchError(RuntimeError):
    """A launch that a GPU would refuse, or a mistake that the shim has found."""


@dataclass(frozen=True)
class Schedule:
    """The orders of threads and of blocks, each one of `ORDERS`, and the number of a barrier that is skipped."""

    threads: str = "forward"
    blocks: str = "forward"
    seed: int = 0
    without: int = -1


SCHEDULES = (
    Schedule("forward", "forward"),
    Schedule("reverse", "reverse"),
    Schedule("random", "random", 1),
)
_schedule = SCHEDULES[0]


@contextlib.contextmanager
def scheduled(schedule: Schedule) -> Iterator[None]:
    """Run the launches inside the block in this order, in every thread of Python."""
    global _schedule
    before, _schedule = _schedule, schedule
    try:
        yield
    finally:
        _schedule = before


class _CSchedule(ctypes.Structure):
    _fields_ = (
        *(("threads", ctypes.c_int), ("blocks", ctypes.c_int), ("seed", ctypes.c_uint)),
        *(("without", ctypes.c_int), ("reached", ctypes.c_void_p)),
    )


class HostModule:
    """Kernels of one source, compiled for the CPU when one is first needed.

    Parameters
    ----------
    code : str
        CUDA C++ source.
    options : sequence of str
        Options of NVRTC; only definitions (-D) have an effect here.
    name_expressions : sequence of str
        The kernels that may be asked for.
    """

    shared_limit = SHARED_LIMITS["sm_90"]
    launched: set[str] | None = None  # a test may put a set here, to which names of launched kernels are added
    reached: bytearray | None = None  # a test may put bytes here; those of barriers that are reached become 1
    family: Callable[[str], Sequence[str]] | None = None  # names that are built together

    def __init__(
        self, *, code: str, options: Sequence[str] = (), name_expressions: Sequence[str] = (), **_: Any
    ) -> None:
        self.code = code
        self.options = tuple(option for option in options if option.startswith("-D"))
        self.names = list(name_expressions)
        self._library: ctypes.CDLL | None = None

    def compile(self) -> None:
        """Build the library, unless it has been built before."""
        if self._library is None:
            self._library = ctypes.CDLL(str(build(self.code, self.names, self.options)))

    def get_function(self, name: str) -> "HostFunction":
        """The kernel of a name expression."""
        if name not in self.names:
            raise LaunchError(f"kernel {name!r} is not among the {len(self.names)} name_expressions of this module")
        family = type(self).family
        if family is not None and self._library is None:
            self.names = sorted({*self.names, *family(name)})
        self.compile()
        return HostFunction(self._library, self.names.index(name), name)


class TruncatingModule(HostModule):
    """Kernels whose tensor cores truncate when they add, as those of GPUs are reported to do; built one by one."""

    family = None

    def __init__(self, *, options: Sequence[str] = (), **others: Any) -> None:
        super().__init__(options=(*options, "-DHOST_TRUNCATES"), **others)


class HostFunction:
    """One kernel, called as CuPy calls one."""

    def __init__(self, library: ctypes.CDLL | None, number: int, name: str) -> None:
        self.name = name
        self._launch = getattr(library, f"host_launch_{number}")
        sizes = (ctypes.c_int * 128)()
        count = getattr(library, f"host_parameters_{number}")(sizes)
        self.parameters = tuple(sizes[:count])
        self._max_shared = DEFAULT_SHARED

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        """The most shared memory that a launch may use."""
        return self._max_shared

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, value: int) -> None:
        if value > HostModule.shared_limit:
            raise LaunchError(f"{self.name}: {value} bytes of shared memory; a block has {HostModule.shared_limit}")
        self._max_shared = value

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
        stream: Any = None,
    ) -> None:
        grid, block = ((*(int(x) for x in size), 1, 1)[:3] for size in (grid, block))
        if any(not 1 <= size <= limit for size, limit in zip(grid, GRID_LIMITS, strict=True)):
            raise LaunchError(f"{self.name}: grid {grid}; each must be at least 1 and at most {GRID_LIMITS}")
        threads = block[0] * block[1] * block[2]
        if not 32 <= threads <= 1024 or threads % 32:
            raise LaunchError(f"{self.name}: block {block}; the shim runs whole warps, at most 1024 threads")
        if shared_mem > self._max_shared:
            raise LaunchError(
                f"{self.name}: {shared_mem} bytes of shared memory, more than max_dynamic_shared_size_bytes "
                f"{self._max_shared}"
            )
        values, pointers = self._arguments(args)
        reached = HostModule.reached
        bytes_reached = None if reached is None else (ctypes.c_ubyte * len(reached)).from_buffer(reached)
        schedule = _CSchedule(
            *(ORDERS.index(_schedule.threads), ORDERS.index(_schedule.blocks), _schedule.seed, _schedule.without),
            None if bytes_reached is None else ctypes.addressof(bytes_reached),
        )
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        with _one_launch:
            failed = self._launch(
                (ctypes.c_uint * 3)(*grid),
                (ctypes.c_uint * 3)(*block),
                ctypes.c_size_t(shared_mem),
                ctypes.byref(schedule),
                pointers,
                message,
            )
        del values  # kept until here
        if failed:
            raise LaunchError(f"{self.name}: {message.value.decode()}")
        if HostModule.launched is not None:
            HostModule.launched.add(self.name)

    def _arguments(self, args: Sequence[Any]) -> tuple[list[Any], Any]:
        if len(args) != len(self.parameters):
            raise LaunchError(f"{self.name} takes {len(self.parameters)} arguments, got {len(args)}")
        values = [_value(x, size < 0) for x, size in zip(args, self.parameters, strict=True)]
        for i, (value, size) in enumerate(zip(values, self.parameters, strict=True)):
            if ctypes.sizeof(value) != abs(size):
                raise LaunchError(f"{self.name}: argument {i} has {ctypes.sizeof(value)} bytes, takes {abs(size)}")
        return values, (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))


def _value(x: Any, is_pointer: bool) -> Any:
    """The bytes that a launch passes for one argument: the address of an array, or a number or a structure by value."""
    if hasattr(x, "data") and hasattr(x.data, "ptr"):  # cupy.ndarray
        return ctypes.c_uint64(x.data.ptr)
    if isinstance(x, np.ndarray) and is_pointer:
        return ctypes.c_uint64(x.ctypes.data)
    if isinstance(x, np.generic | np.ndarray):
        return (ctypes.c_char * x.nbytes).from_buffer_copy(x.tobytes())
    if isinstance(x, bool):
        return ctypes.c_bool(x)
    if isinstance(x, int):
        return ctypes.c_int64(x)
    if isinstance(x, float):
        return ctypes.c_double(x)
    raise TypeError(f"a kernel takes arrays and numbers, got {type(x).__name__}")


def sanitizer() -> str:
    """The sanitizer that this process runs under: "", "thread" or "address" (see sanitized.py)."""
    return os.environ.get("FAVORSHARP_HOST_SANITIZER", "")


def compiler() -> str | None:
    """Path of g++, if there is one."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build(code: str, names: Sequence[str], options: Sequence[str] = ()) -> Path:
    """The shared library with launchers of these kernels.

    It is built once for each source, set of names and options.
    """
    unit = code + '\n#line 1 "launchers"\n' + "".join(map(_launcher, range(len(names)), names))
    flags = [*FLAGS, *SANITIZERS[sanitizer()], *options, "-include", str(HERE / "shim.h")]
    command = [compiler() or "g++", *flags]
    stamp = "\0".join([*command, unit, *((HERE / header).read_text() for header in HEADERS)])
    folder = Path(tempfile.gettempdir()) / f"favorsharp-host-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{hashlib.sha256(stamp.encode()).hexdigest()[:24]}.so"
    with open(library.with_suffix(".lock"), "w") as lock:  # workers of one test run wait for each other
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            source, fresh = library.with_suffix(".cpp"), library.with_suffix(".new")
            source.write_text(unit)
            # a sanitizer that was preloaded into this process would slow the compiler down threefold
            environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
            compiling = [*command, "-o", str(fresh), str(source)]
            done = subprocess.run(compiling, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise LaunchError(f"g++ refuses the source:\n{done.stderr[:8000]}")
            os.replace(fresh, library)
    return library


def _launcher(number: int, name: str) -> str:
    return (
        f'extern "C" __attribute__((visibility("default"))) int host_launch_{number}(const unsigned *grid, '
        "const unsigned *block, size_t shared, const host::Schedule *schedule, void **arguments, char *message) {\n"
        f"  return host::launch({name}, grid, block, shared, schedule, arguments, message);\n}}\n"
        f'extern "C" __attribute__((visibility("default"))) int host_parameters_{number}(int *sizes) {{\n'
        f"  return host::parameters({name}, sizes);\n}}\n"
    )
