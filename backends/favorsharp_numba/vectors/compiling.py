"""How the functions of this backend are compiled, and how compiled code is cached on disk.

`jit`, `outlined` and `inlined` are the decorators of all compiled functions. Every function is compiled once for each
dtype, which it knows by its argument `one`, the number 1 in that dtype (`TAGS`).

Numba stores compiled code with the time stamp of the file that the function is in. The functions here contain code from
other files, so their stamp is a digest of all sources of the package: after an edit anywhere, all are compiled again.
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

from favorsharp_numba.vectors.parts import PartCompiler

VARIABLE = "FAVORSHARP_NUMBA_VECTORS"


@cache
def vector_bytes() -> int:
    """The width of vectors in bytes: 64, 32 or 16.

    The environment variable FAVORSHARP_NUMBA_VECTORS sets it. If vectors are wider than the processor's registers, the
    compiler splits them; it emits no instruction that the processor lacks.
    """
    text = os.environ.get(VARIABLE)
    if text is not None:
        if text not in ("16", "32", "64"):
            raise ValueError(f"environment variable {VARIABLE} must be 16, 32 or 64 (bytes), got {text!r}")
        return int(text)
    features = processor_features()
    if "avx512f" in features:
        return 64
    return 32 if "avx" in features else 16


@cache
def processor_features() -> frozenset[str]:
    """The instruction sets that compiled code may use: those of this processor, or of NUMBA_CPU_FEATURES."""
    if numba.config.CPU_FEATURES is not None:
        return frozenset(x[1:] for x in numba.config.CPU_FEATURES.split(",") if x.startswith("+"))
    if numba.config.CPU_NAME == "generic":
        return frozenset()
    return frozenset(name for name, has in llvmlite.binding.get_host_cpu_features().items() if has)


def num_vectors() -> int:
    """The number of vectors side by side in a register tile: as many as leave enough registers for its rows."""
    many_registers = vector_bytes() == 64 or "neon" in processor_features()
    return 4 if many_registers else 2


def jit(function: Callable[..., Any]) -> Any:
    """Compile a function that Python may call: without the interpreter's lock, and cached on disk if possible.

    The compiler must not reorder arithmetic (no fast-math): `exp2` rounds by adding and subtracting a constant.
    """
    return _cached(function, no_cfunc_wrapper=True)


def outlined(function: Callable[..., Any]) -> Any:
    """Compile a function that only other compiled functions call. A call from Python would crash the process.

    There is no code for such calls, and no machine code of the function by itself.
    """
    return _cached(function, no_cfunc_wrapper=True, no_cpython_wrapper=True, pipeline_class=PartCompiler)


def _cached(function: Callable[..., Any], **options: Any) -> Any:
    dispatcher = numba.njit(nogil=True, error_model="numpy", **options)(function)
    try:
        dispatcher._cache = _Cache(function)
    except RuntimeError:  # neither this folder nor the user's cache folder is writable: every process compiles
        pass
    return dispatcher


def inlined(function: Callable[..., Any]) -> Any:
    """A function whose statements are copied into each function that calls it, before the types are known."""
    return numba.njit(nogil=True, error_model="numpy", inline="always")(function)


@cache
def _sources_digest() -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    digest.update(f"{vector_bytes()},{num_vectors()}".encode())
    return digest.hexdigest()


def _stamped(locator: type) -> type:
    """A cache locator of Numba whose stamp is the digest of the package's sources."""

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
        # Numba reads the index of a cache before it compares its stamp. The index names classes of the sources that it
        # was made from, so that reading it raises if such a class no longer exists. Numba compares the version first.
        self._cache_file._version = f"{self._cache_file._version} {_sources_digest()}"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """As in Numba, but without registering the functions that only a compiler needs.

        That would take longer than the rest of a first call. If something is to be compiled, Numba still registers
        them.
        """
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)


TAGS: dict[str, Any] = {"float32": np.float32(1), "float64": np.float64(1)}
"""The argument `one` of compiled functions: the dtype of this number is the dtype that they compute in."""
