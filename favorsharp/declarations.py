"""The requests of calls, and the kernels and backends that serve them; `favorsharp.choice` chooses between kernels."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from favorsharp._arrays import FLOATS, device_of, dtype_name, is_array, library_of
from favorsharp._autodiff import is_followed, needs_gradient
from favorsharp._typing import Array
from favorsharp._values import held_arrays

__all__ = ["Backend", "Implementation", "Kernel", "Request", "request_of"]

CURES = {"numba": "favorsharp[cpu]", "cupy": "favorsharp[cuda12]' or 'favorsharp[cuda13]", "torch": "favorsharp[torch]"}
"""The extra to install for a module that a backend requires."""


# Requests ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """All properties of a call on which the choice of an implementation depends. Shapes are not among them.

    Attributes
    ----------
    op : str
        The op's name.
    library, device, dtype : str
        Those of the array arguments, as `favorsharp._arrays` names them. If the arrays have several floating dtypes,
        their names are joined, from narrow to wide: ``"float16+float32"``.
    family : str
        The family of the feature map among the arguments: "exponential", "elementwise", ...
    gradient : bool
        Whether the library records the call for a backward pass.
    traced : bool
        Whether an argument is traced, so that its values are not known yet, or a mode of torch follows operations.

    Examples
    --------
    >>> import numpy as np
    >>> from favorsharp.dispatch import request_of
    >>> request = request_of("read", np.ones((4, 2), "float32"))
    >>> request.library, request.device, request.dtype, request.gradient
    ('numpy', 'cpu', 'float32', False)
    """

    op: str
    library: str
    device: str
    dtype: str
    family: str = "exponential"
    gradient: bool = False
    traced: bool = False


def request_of(op: str, *arguments: object) -> Request:
    """The request for a call of the op with these arguments.

    Library, device and dtype are those of the arguments that are arrays. Whether gradients are needed and whether
    values are traced also depends on the arrays inside dataclass arguments (feature maps, states).
    """
    arrays: list[Array] = []
    inner: list[Array] = []
    family = "exponential"
    for x in arguments:
        if x is None or isinstance(x, (int, float, str)):
            continue
        if is_array(x):
            arrays.append(x)
        else:
            inner += held_arrays(x)
            family = getattr(x, "family", "custom" if hasattr(x, "log_key") else family)
    if not (arrays or inner):
        raise TypeError(f"{op} needs an array among its arguments to choose an implementation by, got none")
    first = arrays[0] if arrays else inner[0]
    everything = arrays + inner
    return Request(
        op=op,
        library=library_of(first),
        device=device_of(first),
        dtype=_common_dtype(arrays or inner),
        family=family,
        gradient=any(needs_gradient(x) for x in everything),
        traced=any(is_followed(x) for x in everything),
    )


def _common_dtype(arrays: list[Array]) -> str:
    """The name of the floating dtype of the arrays; if there are several, their names joined. Masks do not count."""
    names = [dtype_name(x) for x in arrays]
    floats = [name for name in FLOATS if name in names]
    return "+".join(floats) if floats else names[0]


# Kernels and backends ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op, declared by a string and imported on first use.

    Attributes
    ----------
    op : str
        The op's name.
    target : str
        ``"module:function"``; the function has the signature of the op.
    libraries, devices, dtypes, families : frozenset of str
        The values of a `Request` that the kernel accepts.
    differentiable : bool
        Whether the kernel records a backward pass for arrays that need gradients.
    traceable : bool
        Whether the kernel runs on arrays without values, under `torch.compile`, `torch.func` transforms or `jax.jit`,
        and as operations that modes of torch see.
    packed : str, optional
        For attention, causal_attention and attention_vjp: ``"module:function"``, the same for packed sequences. The
        function takes their bounds, a list of integers, after the map. There are one or more points. It returns no
        state, and is differentiable if the kernel is.
    plan : str, optional
        For decode_step and landmark_stream: ``"module:function"``. The function takes the arguments of a first call;
        for decode_step, the queries that share a key head are joined (`favorsharp._heads.join_queries`). It returns a
        function for calls whose arrays have the same shapes, dtypes and memory layouts (for landmark_stream, except
        those of the state), or None if it has no such function.
    takes_out : bool
        For attention and causal_attention: whether the function, and `packed`, take an array for the result as `out`.
        They return that array if they wrote to it.
    of_points : str, optional
        For exponential_features: ``"module:function"``, which computes features from the points that a map gets. It is
        called as function(x, feature_map, side, logarithms=..., out=...) with side "query" or "key", returns features
        or their logarithms in the dtype of x, and writes them to `out` if that is not None. It is not called if torch
        records gradients.

    Examples
    --------
    >>> from favorsharp.dispatch import Kernel, Request
    >>> kernel = Kernel("read", "mine.read:read", libraries={"numpy"}, devices={"cpu"}, dtypes={"float64"})
    >>> kernel.why_not(Request("read", "numpy", "cpu", "float64")) is None
    True
    >>> kernel.why_not(Request("read", "numpy", "cpu", "float32"))
    'dtype float32'
    """

    op: str
    target: str
    libraries: frozenset[str]
    devices: frozenset[str]
    dtypes: frozenset[str]
    families: frozenset[str] = frozenset({"exponential"})
    differentiable: bool = False
    traceable: bool = False
    packed: str | None = None
    plan: str | None = None
    takes_out: bool = False
    of_points: str | None = None

    def __post_init__(self) -> None:
        for name in ("target", "packed", "plan", "of_points"):
            value = getattr(self, name)
            if value is not None and not all(value.partition(":")):
                raise ValueError(f"{name} must read 'module:function', got {value!r}")
        for name in ("libraries", "devices", "dtypes", "families"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise TypeError(f"{name} must be a set of names, got the string {value!r}")
            object.__setattr__(self, name, frozenset(value))

    def why_not(self, request: Request) -> str | None:
        """The reason why the kernel declines the request; None if it accepts."""
        if request.op != self.op:
            return f"op {request.op}"
        if request.library not in self.libraries:
            return f"library {request.library}"
        if request.traced and not self.traceable:
            return "traced arrays, or a mode of torch that follows operations"
        if request.device not in self.devices and not (request.traced and request.device == "traced"):
            return f"device {request.device}"
        if request.dtype not in self.dtypes:
            return f"dtype {request.dtype}"
        if request.family not in self.families:
            return f"{request.family} feature maps"
        if request.gradient and not self.differentiable:
            return "gradients"
        return None


@dataclass(frozen=True)
class Implementation:
    """The function that runs an op, and the other functions that its kernel declares (see `Kernel`)."""

    run: Callable[..., Any]
    packed: Callable[..., Any] | None = None
    plan: Callable[..., Any] | None = None
    takes_out: bool = False
    of_points: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Backend:
    """A set of kernels and the modules that they need. It is plain data: declaring a backend imports nothing.

    Attributes
    ----------
    name : str
        The name that `use` takes, and the name of the entry point.
    requires : tuple of str
        Modules that every kernel of the backend needs.
    kernels : tuple of Kernel
        Several kernels may implement the same op; the first one that accepts a request runs.
    fault : str, optional
        Why the backend cannot be used at all, if that is known from the start: discovery sets it for a broken plugin.

    Examples
    --------
    >>> from favorsharp.dispatch import Backend, Kernel
    >>> kernel = Kernel("read", "mine.read:read", libraries={"numpy"}, devices={"cpu"}, dtypes={"float64"})
    >>> Backend("mine", requires=("numpy",), kernels=(kernel,)).why_not() is None
    True
    """

    name: str
    requires: tuple[str, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    fault: str | None = None

    def why_not(self) -> str | None:
        """The reason why no kernel of the backend can run here; None if one can. Imports nothing."""
        if self.fault is not None:
            return self.fault
        missing = [module for module in self.requires if not _can_find(module)]
        if not missing:
            return None
        cures = [f"pip install '{CURES[module]}'" for module in missing if module in CURES]
        return f"needs {' and '.join(missing)}" + (f": {'; '.join(cures)}" if cures else "")


def _can_find(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent package is missing, or a module has no spec
        return False
