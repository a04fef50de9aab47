"""Which implementation runs an operation: ops, kernels, backends, and the choice between them.

What this room promises:

- An op *is* its reference: a plain function in array API functions. A backend offers kernels, alternatives to it.
- The choice is made before the call, from a `Request` without shapes, so it is cached and does not change with the
  length of a sequence. A kernel's exception is a bug and surfaces; nothing falls back in the middle of a call.
- Backends are entry points of the group ``favorsharp.backends``. They are looked up on first need and stay strings
  until they are tried; a broken one is a warning that names it, never a broken call.
- The bundled backends are tried automatically, in the order of `BUNDLED`. Others run only when they are named:
  installing something must not change results.
- A backend that is named (by `use` or by the environment variable ``FAVORSHARP_BACKEND``) runs, or the call raises
  `BackendUnavailable` with every reason. A fallback is wanted only where it is written: ``use("numba", "reference")``.

Traced arrays (`torch.compile`, `make_fx`, `torch.func` and `jax.jit` transforms, fake tensors) have no values for a
kernel to read, and modes of torch that follow operations (counters of flops, selective checkpoints) would not see it.
Only kernels that say ``traceable=True`` and the reference run there. A name that cannot be honoured is an error there
too, at tracing time. `torch.compile` cannot see context variables; it asks for the names while it traces
and traces again when they change, provided they change in one thread: put `use` around the compiled call, not inside
the compiled function.

The author of an op writes a reference and decorates it with `Op`. The author of a backend writes kernels with the
op's own signature and declares them in a `Backend`, and lets `favorsharp.testing.check_backend` compare the two.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary

from favorsharp._arrays import (
    FLOATS,
    device_of,
    dtype_name,
    is_array,
    is_followed,
    library_of,
    mode_of_library,
    needs_gradient,
    signature_of,
    stamps_of,
)
from favorsharp._typing import Array

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "OPS",
    "Backend",
    "BackendUnavailable",
    "Explanation",
    "Kernel",
    "Op",
    "Request",
    "backends",
    "explain",
    "rediscover",
    "request_of",
    "use",
    "watch",
]

P = ParamSpec("P")
R = TypeVar("R")

GROUP = "favorsharp.backends"
VARIABLE = "FAVORSHARP_BACKEND"
REFERENCE = "reference"

BUNDLED = ("numba", "cuda")
"""The backends of this distribution, in the order in which they are tried when none is named."""

CURES = {"numba": "favorsharp[cpu]", "cupy": "favorsharp[cuda12]' or 'favorsharp[cuda13]", "torch": "favorsharp[torch]"}
"""What to install for a module that a backend requires."""


class BackendUnavailable(ValueError):
    """A backend was named and cannot run the op for these arrays. The message carries every reason."""


# What is asked for ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """Everything that the choice of an implementation depends on. No shapes.

    Attributes
    ----------
    op : str
        The op's name.
    library, device, dtype : str
        Of the arrays among the arguments, as `favorsharp._arrays` names them. Arrays of several floating dtypes give
        their names, narrow to wide: ``"float16+float32"``.
    family : str
        The family of the feature map among the arguments: "exponential", "elementwise", ...
    gradient : bool
        Whether the library records the call for a backward pass.
    traced : bool
        Whether an argument stands for values that are not known yet, or a mode of torch follows what is done to it.
    """

    op: str
    library: str
    device: str
    dtype: str
    family: str = "exponential"
    gradient: bool = False
    traced: bool = False


def request_of(op: str, *arguments: object) -> Request:
    """The request that a call of the op with these arguments makes.

    Library, device and dtype are read off the arguments that are arrays; whether a gradient is needed or values are
    traced also off the arrays inside dataclass values (feature maps, states).
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
            _collect(x, inner)
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


def _collect(x: object, arrays: list[Array]) -> None:
    """Append the arrays that a dataclass value holds, at any depth."""
    for name in getattr(type(x), "__dataclass_fields__", ()):
        part = getattr(x, name)
        if is_array(part):
            arrays.append(part)
        else:
            _collect(part, arrays)


def _common_dtype(arrays: list[Array]) -> str:
    """The floating dtype of the arrays, or all of them joined; masks and indices do not count."""
    names = [dtype_name(x) for x in arrays]
    floats = [name for name in FLOATS if name in names]
    return "+".join(floats) if floats else names[0]


# What is offered -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op, declared by a string and imported on first use.

    Attributes
    ----------
    op : str
        The op's name.
    target : str
        ``"module:function"``; the function has the op's own signature. It may have attributes: `plan`, of decode_step,
        takes the arguments of a first call and returns a function for calls like it, layouts of arrays included, or
        None; `packed`, of attention, causal attention and attention_vjp, takes the bounds of packed sequences after
        the map, gives no state, and is as differentiable as the function; `takes_out`, of attention and causal
        attention, says that they and their `packed` take an array for the result as `out`, and return it where they
        used it.
    libraries, devices, dtypes, families : frozenset of str
        The values of a `Request` that it accepts.
    differentiable : bool
        Whether it records a backward pass where the arrays need one.
    traceable : bool
        Whether it runs on arrays without values, under `torch.compile`, `torch.func` transforms or `jax.jit`, and as
        operations that modes of torch see.
    """

    op: str
    target: str
    libraries: frozenset[str]
    devices: frozenset[str]
    dtypes: frozenset[str]
    families: frozenset[str] = frozenset({"exponential"})
    differentiable: bool = False
    traceable: bool = False

    def __post_init__(self) -> None:
        if not all(self.target.partition(":")):
            raise ValueError(f"target must read 'module:function', got {self.target!r}")
        for name in ("libraries", "devices", "dtypes", "families"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise TypeError(f"{name} must be a set of names, got the string {value!r}")
            object.__setattr__(self, name, frozenset(value))

    def why_not(self, request: Request) -> str | None:
        """Why it declines the request; None where it accepts."""
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
class Backend:
    """A set of kernels and what they need. Plain data: declaring one imports nothing.

    Attributes
    ----------
    name : str
        What `use` calls it; the name of its entry point.
    requires : tuple of str
        Modules without which none of its kernels runs.
    kernels : tuple of Kernel
        Several kernels may implement one op; the first that accepts a request runs.
    fault : str, optional
        Why none of it can be used, where that is known from the start: discovery sets it on a broken plugin.
    """

    name: str
    requires: tuple[str, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    fault: str | None = None

    def why_not(self) -> str | None:
        """Why none of its kernels can run here; None where they can. Imports nothing."""
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
    except (ImportError, ValueError):  # a parent that is missing, a module without a spec
        return False


MODULES = {
    "exponential_features": "exponential_features",
    "attention": "attention",
    "causal_attention": "causal_attention",
    "update": "state",
    "read": "state",
    "decode_step": "state",
    "kernel_matvec": "kernel_matvec",
    "attention_vjp": "vjp",
    "kernel_matvec_vjp": "vjp",
    "exponential_features_vjp": "vjp",
}
"""The module of each op in this package and, under the same name, in the bundled backends."""
DIFFERENTIABLE = ("exponential_features", "attention", "causal_attention", "kernel_matvec")
"""What the bundled backends offer to torch's autograd, in their modules `torch_ops`."""
TRACEABLE = ("update", "read", "decode_step")
"""What one that is traceable has there too; calls without gradients that are not traced have no need of it."""


def bundled_kernels(
    package: str, library: str, device: str, dtypes: Iterable[str], *, traceable: bool = False
) -> tuple[Kernel, ...]:
    """The kernels of a bundled backend: for the arrays of one library, and for torch tensors on the same device.

    `traceable` says that those for torch's autograd also run on tensors without values, and that states have such too.
    """

    def kernel(
        op: str, module: str, library: str, *, differentiable: bool = False, traceable: bool = False
    ) -> Kernel:  # fmt: skip
        return Kernel(
            op=op,
            target=f"{package}.{module}:{op}",
            libraries=frozenset({library}),
            devices=frozenset({device}),
            dtypes=frozenset(dtypes),
            differentiable=differentiable,
            traceable=traceable,
        )

    return (
        *(kernel(op, module, library) for op, module in MODULES.items()),
        *(kernel(op, "torch_ops", "torch", differentiable=True, traceable=traceable) for op in DIFFERENTIABLE),
        *(kernel(op, module, "torch") for op, module in MODULES.items() if op not in DIFFERENTIABLE),
        *(kernel(op, "torch_ops", "torch", differentiable=True, traceable=True) for op in TRACEABLE if traceable),
    )


# Where backends come from --------------------------------------------------------------------------------------------


@functools.cache
def _entry_points() -> "Mapping[str, EntryPoint]":
    """The entry point of each backend by name: the bundled ones first, in their order, then the others by name."""
    found: dict[str, EntryPoint] = {}
    import importlib.metadata  # a third of the time that `import favorsharp` may take, for who never calls an op

    known = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: (not _is_ours(point), _rank(point)))
    for point in known:
        if point.name == REFERENCE:
            _warn(f"the name {REFERENCE!r} is taken; ignoring {_describe(point)}")
        elif (first := found.setdefault(point.name, point)).value != point.value:
            _warn(f"two backends are named {point.name!r}; using {_describe(first)}, ignoring {_describe(point)}")
    return found


@functools.cache
def _backend(name: str) -> Backend:
    """The backend of that name, loaded; one with a fault, and a warning, where loading fails."""
    point = _entry_points()[name]
    try:
        backend = point.load()
        if not isinstance(backend, Backend):
            raise TypeError(f"expected a favorsharp.dispatch.Backend, got {type(backend).__name__}")
        if backend.name != name:
            raise ValueError(f"the entry point is named {name!r}, its backend {backend.name!r}")
    except Exception as error:  # whatever a plugin does must not break the calls of those who do not use it
        fault = f"could not be loaded: {type(error).__name__}: {error}"
        _warn(f"{_describe(point)} {fault}")
        return Backend(name, fault=fault)
    return backend


@functools.cache
def _function(target: str) -> Callable[..., Any] | str:
    """The function a kernel's target names, or the reason why it cannot be had."""
    module, _, name = target.partition(":")
    try:
        function: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception as error:  # still before the call: this decides whether the kernel can be chosen
        fault = f"{target} could not be imported: {type(error).__name__}: {error}"
        _warn(fault)
        return fault
    return cast(Callable[..., Any], function)


def backends() -> Mapping[str, Backend]:
    """Every backend that is installed, by name: the bundled ones in the order they are tried, then the others."""
    return {name: _backend(name) for name in _entry_points()}


def rediscover() -> None:
    """Look for backends again: forget what was found, loaded and decided."""
    for cached in (_entry_points, _backend, _function, _parse, _choose):
        cached.cache_clear()
    _settled.clear()


def _is_ours(point: "EntryPoint") -> bool:
    return point.dist is not None and point.dist.name == "favorsharp"


def _rank(point: "EntryPoint") -> tuple[int, str]:
    return (BUNDLED.index(point.name) if point.name in BUNDLED else len(BUNDLED), point.name)


def _describe(point: "EntryPoint") -> str:
    owner = f" of {point.dist.name}" if point.dist is not None else ""
    return f"backend {point.name!r} ({point.value}{owner})"


def _warn(message: str) -> None:
    warnings.warn(f"favorsharp: {message}", RuntimeWarning, stacklevel=2)


# What the caller wishes ----------------------------------------------------------------------------------------------

_wish: ContextVar[tuple[str, ...]] = ContextVar("favorsharp_use", default=())
_latest_wish: tuple[str, ...] = ()
"""The names given to `use` last, in any context: torch.compile guards this one, as it cannot read the other."""

_calls: ContextVar[list[tuple[str, str]] | None] = ContextVar("favorsharp_calls", default=None)


@contextmanager
def use(*names: str) -> Iterator[None]:
    """Run every op by the first of the named backends that can, or raise.

    Parameters
    ----------
    *names : str
        Backends in order of preference. "reference" is one: ``use("numba", "reference")`` falls back to it.

    Raises
    ------
    ValueError
        If a name is unknown.
    BackendUnavailable
        By a call inside the block, if none of the names can run it. The message says why.

    Examples
    --------
    >>> import favorsharp as fs
    >>> with fs.use("reference"):
    ...     pass
    """
    global _latest_wish
    if not names:
        raise ValueError(f"use() needs the name of a backend; known: {', '.join(_known())}")
    _check_names(names, "use()")
    before = _latest_wish
    token = _wish.set(names)
    _latest_wish = names
    try:
        yield
    finally:
        _latest_wish = before
        _wish.reset(token)


@contextmanager
def watch() -> Iterator[list[tuple[str, str]]]:
    """Record what runs: a list that grows by (op, implementation) with every call of an op inside the block.

    Calls that are compiled or jitted are recorded when they are traced.
    """
    calls: list[tuple[str, str]] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def _names_wished() -> tuple[tuple[str, ...], str]:
    """The names that the caller asked for, none by default, and where they were asked for."""
    names = _wish.get()
    if names:
        return names, "use()"
    text = os.environ.get(VARIABLE)
    return (_parse(text), VARIABLE) if text else ((), "")


@functools.cache
def _parse(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    _check_names(names, f"environment variable {VARIABLE}={text!r}")
    return names


def _known() -> tuple[str, ...]:
    return (REFERENCE, *_entry_points())


def _check_names(names: Iterable[str], source: str) -> None:
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{source}: a backend is named by a string, got {type(name).__name__}")
        if name not in _known():
            raise ValueError(f"{source}: backend {name!r} is unknown; known: {', '.join(_known())}")


# The choice ----------------------------------------------------------------------------------------------------------


class _Choice(NamedTuple):
    name: str | None
    target: str | None
    reasons: tuple[tuple[str, str], ...]


@functools.lru_cache(maxsize=4096)
def _choose(request: Request, names: tuple[str, ...]) -> _Choice:
    """The first of the names that takes the request, and why those before it decline.

    Without names: the bundled backends in their order, then the reference.
    """
    automatic = (*(name for name, point in _entry_points().items() if _is_ours(point)), REFERENCE)
    reasons: list[tuple[str, str]] = []
    for name in names or automatic:
        if name == REFERENCE:
            return _Choice(name, None, tuple(reasons))
        kernel, reason = _offer(_backend(name), request)
        if kernel is not None:
            return _Choice(name, kernel.target, tuple(reasons))
        reasons.append((name, reason))
    return _Choice(None, None, tuple(reasons))


def _offer(backend: Backend, request: Request) -> tuple[Kernel | None, str]:
    """The backend's kernel for the request, or the reasons why it has none."""
    fault = backend.why_not()
    if fault is not None:
        return None, fault
    kernels = [kernel for kernel in backend.kernels if kernel.op == request.op]
    reasons = []
    for kernel in kernels:
        reason = kernel.why_not(request)
        if reason is None:
            function = _function(kernel.target)
            if not isinstance(function, str):
                return kernel, ""
            reason = function
        reasons.append(reason)
    return None, " / ".join(dict.fromkeys(reasons)) or f"op {request.op}"


def _decide(request: Request) -> _Choice:
    """What to run. Raises where no named backend can."""
    names, source = _names_wished()
    choice = _choose(request, names)
    if choice.name is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.reasons)
        raise BackendUnavailable(f"{request.op} cannot run as {source} asks: {reasons}")
    calls = _calls.get()
    if calls is not None:
        calls.append((request.op, choice.name))
    return choice


def _decide_while_tracing(latest_wish: tuple[str, ...], *request: Any) -> tuple[str | None, str | None]:
    """As `_decide`, for torch.compile: run, not traced; given `_latest_wish` only to be asked again when it changes.

    The error is returned to be raised by traced code, as Dynamo takes an exception here for its own failure. The
    function is left in `_loaded`, where traced code finds it without an import; and with it the backend's others that
    may be traced, as Dynamo takes that dictionary for a whole graph as it was at the first look.
    """
    try:
        choice = _decide(Request(*request))
    except BackendUnavailable as error:
        return None, str(error)
    if choice.name is not None and choice.target is not None:
        for target in {kernel.target for kernel in _backend(choice.name).kernels if kernel.traceable}:
            function = _function(target)
            if not isinstance(function, str):
                _loaded[target] = function
    return choice.target, None


_loaded: dict[str, Callable[..., Any]] = {}
"""The kernels that traced calls run, by target."""

# What torch.compiler.assume_constant_result does, without importing torch.
_decide_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


# The op --------------------------------------------------------------------------------------------------------------

OPS: dict[str, "Op[..., Any]"] = {}
"""Every op by name."""


class Op(Generic[P, R]):
    """A function that backends may implement too; the decorator of a reference.

    Calling the op calls the implementation that the arguments, `use` and the environment choose. The reference is
    the documentation, the fallback and what every kernel is compared with.

    Parameters
    ----------
    reference : callable
        Takes arrays, feature maps and states, and plain options; registered under its own name.

    Attributes
    ----------
    name : str
    reference : callable
    """

    name: str
    reference: Callable[P, R]

    def __init__(self, reference: Callable[P, R]) -> None:
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.reference = reference
        other = OPS.setdefault(self.name, self)
        if other.reference.__module__ != reference.__module__:
            raise ValueError(
                f"{reference.__module__} defines op {self.name!r}, and so does {other.reference.__module__}"
            )
        OPS[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the implementation that the arguments, `use` and the environment choose."""
        return self.implementation(*args, **kwargs)(*args, **kwargs)

    def implementation(self, *args: P.args, **kwargs: P.kwargs) -> Callable[P, R]:
        """The function that a call with these arguments runs."""
        request = request_of(self.name, *args, *kwargs.values())
        if request.traced:
            target, error = _decide_while_tracing(
                _latest_wish,
                request.op,
                request.library,
                request.device,
                request.dtype,
                request.family,
                request.gradient,
                request.traced,
            )
            if error is not None:
                raise BackendUnavailable(error)
        else:
            target = _decide(request).target
        if target is None:
            return self.reference
        found = _loaded[target] if request.traced else _function(target)
        return cast(Callable[P, R], found)  # not a reason: the decision has seen to that

    def __repr__(self) -> str:
        return f"<favorsharp op {self.name}>"

    def __reduce__(self) -> str:
        return self.name


# Calls like one before -----------------------------------------------------------------------------------------------

_settled: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()
"""By feature map and `call_signature`: the implementation and the prepared map that an earlier call came to.

Checks and choice take longer than a token's arithmetic. A signature holds everything they look at, so that a call with
the signature of an earlier one passes them as that one did.
"""

MOST_SETTLED = 64
"""Signatures remembered for each map; with more, as lengths vary, the oldest is forgotten."""


class Known:
    """A part of a signature that calls pass on from one to the next: its hash is worked out once."""

    __slots__ = ("_hash", "parts")

    def __init__(self, parts: Hashable) -> None:
        self.parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known) and self.parts == other.parts


def call_signature(
    feature_map: Any, *arguments: object, with_layout: bool = False, known: Hashable = ()
) -> tuple[Hashable, ...] | None:
    """What the checks of a call and its choice depend on; None where a call has to be looked at each time.

    `with_layout` adds how arrays lie in memory, and `known` what is known of further arguments.
    """
    mode = mode_of_library()
    if mode is None or known is None or _calls.get() is not None:
        return None
    held = getattr(feature_map, "arrays", None)  # after the mode: a compiler cannot follow a cached property
    if held is None:
        return None
    signature: list[Hashable] = [mode, _wish.get(), os.environ.get(VARIABLE), stamps_of(held), known]
    for x in arguments:
        part = signature_of(x, with_layout=with_layout)
        if part is None:
            return None
        signature.append(part)
    return tuple(signature)


def recall(feature_map: Any, signature: tuple[Hashable, ...] | None) -> tuple[Any, Any] | None:
    """The implementation and the prepared map of an earlier call with this map and signature."""
    known = _settled.get(feature_map) if signature is not None else None
    found = None if known is None else known.get(signature)
    return None if found is None else (found[0], feature_map if found[1] is None else found[1])


def settle(feature_map: Any, signature: tuple[Hashable, ...] | None, implementation: Any, prepared: Any) -> None:
    """Remember what a call with this map and signature came to."""
    if signature is None:
        return
    known = _settled.setdefault(feature_map, {})
    while len(known) >= MOST_SETTLED:
        known.pop(next(iter(known)), None)
    known[signature] = implementation, None if prepared is feature_map else prepared  # the map must not keep itself


# Seeing it -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """Which implementation runs an op for a request, and why the others do not.

    Attributes
    ----------
    op : str
    request : Request
    chosen : str or None
        None where the backends that `use` or the environment name all decline: the call raises.
    reasons : mapping of str to str
        Of every implementation that is known, in the order of the text.
    """

    op: str
    request: Request
    chosen: str | None
    reasons: Mapping[str, str] = field(hash=False)

    def __str__(self) -> str:
        return "\n".join(f"{name}: {reason}" for name, reason in self.reasons.items())


def explain(op: "Op[..., Any] | Callable[..., Any] | str", like: Any) -> Explanation:
    """Which implementation runs an op for such arrays, and why the others decline.

    Parameters
    ----------
    op : Op, str or callable
        The op, its name, or the public function that runs it: ``linear_attention`` stands for "attention".
    like : array or tuple
        An array, or several of the arguments: arrays, a feature map, a state.

    Returns
    -------
    Explanation
        Its text has one line for each implementation. Inside `use` it shows the choice that a call there makes.
    """
    name = _op_name(op)
    request = request_of(name, *(like if isinstance(like, (tuple, list)) else (like,)))
    names, source = _names_wished()
    choice = _choose(request, names)
    reasons = {} if choice.name is None else {choice.name: "chosen"}
    reasons.update(choice.reasons)
    for other in (*_entry_points(), REFERENCE):
        if other not in reasons:
            reasons[other] = _why_not_tried(other, request, choice, source if names and other not in names else "")
    return Explanation(name, request, choice.name, reasons)


def _why_not_tried(name: str, request: Request, choice: _Choice, source: str) -> str:
    """Why an implementation was not reached."""
    if source:
        return f"not named by {source}"
    if name != REFERENCE:
        kernel, reason = _offer(_backend(name), request)
        if kernel is None:
            return reason
        if not _is_ours(_entry_points()[name]):
            return "can run it, when named by use()"
    return f"can run it, {choice.name} comes first"


def _op_name(op: object) -> str:
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    name = {"linear_attention": "attention"}.get(name, name)
    if name not in OPS:
        raise ValueError(f"op {name!r} is unknown; known: {', '.join(sorted(OPS))}")
    return name
