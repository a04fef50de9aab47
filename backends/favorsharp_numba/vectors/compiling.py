"""How kernels are compiled: one signature for each dtype, and a disk cache that knows every source of this package.

Numba files a compiled function under the time stamp of the one file it stands in. Kernels here are built from vector
code in other files, so their stamp is a digest of all sources of the package: an edit anywhere compiles anew.
"""

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from numba.core import caching
from numba.core.runtime import rtsys

VARIABLE = "FAVORSHARP_NUMBA_VECTORS"


@cache
def vector_bytes() -> int:
    """The width of a vector register in bytes: 64, 32 or 16; 0 for plain Numba code.

    The environment variable FAVORSHARP_NUMBA_VECTORS sets it. A vector wider than the processor's is split by the
    compiler: no instruction is emitted that the processor lacks.
    """
    text = os.environ.get(VARIABLE)
    if text is not None:
        if text not in ("0", "16", "32", "64"):
            raise ValueError(f"environment variable {VARIABLE} must be 0, 16, 32 or 64 (bytes), got {text!r}")
        return int(text)
    features = processor_features()
    if "avx512f" in features:
        return 64
    return 32 if "avx" in features else 16


@cache
def processor_features() -> frozenset[str]:
    """The instruction sets that compiled code may use: the host's, or what NUMBA_CPU_FEATURES says."""
    if numba.config.CPU_FEATURES is not None:
        return frozenset(x[1:] for x in numba.config.CPU_FEATURES.split(",") if x.startswith("+"))
    if numba.config.CPU_NAME == "generic":
        return frozenset()
    return frozenset(name for name, has in llvmlite.binding.get_host_cpu_features().items() if has)


def num_vectors() -> int:
    """Vectors side by side in a register tile: as many as leave room for its rows."""
    many_registers = vector_bytes() == 64 or "neon" in processor_features()
    return 4 if many_registers else 2


def jit(function: Callable[..., Any]) -> Any:
    """Compile a function without the interpreter, releasing its lock, cached on disk where that is possible.

    Nothing may be rearranged: `exp2` rounds by adding and subtracting a constant.
    """
    return _cached(function, no_cfunc_wrapper=True)


def outlined(function: Callable[..., Any]) -> Any:
    """As `jit`, for what compiled functions alone call: a call from Python would end the process.

    The code for such calls would take a tenth of the time in which kernels compile.
    """
    return _cached(function, no_cfunc_wrapper=True, no_cpython_wrapper=True)


def _cached(function: Callable[..., Any], **options: bool) -> Any:
    dispatcher = numba.njit(nogil=True, error_model="numpy", **options)(function)
    try:
        dispatcher._cache = _Cache(function)
    except RuntimeError:  # neither this folder nor the user's cache folder can be written to: compile in every process
        pass
    return dispatcher


def inlined(function: Callable[..., Any]) -> Any:
    """A part of kernels, compiled with each of them and never by itself.

    A function with code of its own is optimised once for itself and again inside of all that call it, at every level.
    """
    return numba.njit(nogil=True, error_model="numpy", inline="always")(function)


@cache
def _sources_digest() -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    digest.update(f"{vector_bytes()},{num_vectors()}".encode())
    return digest.hexdigest()


def _stamped(locator: type) -> type:
    """A cache locator whose stamp is the digest of the package's sources."""

    class Stamped(locator):  # type: ignore[misc]
        def get_source_stamp(self) -> str:
            return _sources_digest()

    return Stamped


class _Implementation(caching.CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = [_stamped(x) for x in caching.CompileResultCacheImpl._locator_classes]  # noqa: RUF012


class _Cache(caching.FunctionCache):  # type: ignore[misc]
    _impl_class = _Implementation

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        # An index names classes of the sources that it was made from, and is read before its stamp is looked at: one of
        # other sources would raise where a class has gone. The version stands before both.
        self._cache_file._version = f"{self._cache_file._version} {_sources_digest()}"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """As Numba's own, but for registering all that a compiler could need: compiled code needs the runtime alone.

        That would take longer than all else in a first call. A compilation registers it still.
        """
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)


# float32 and float64 values by which compiled functions know the dtype to work in
TAGS = {"float32": np.float32(1), "float64": np.float64(1)}
