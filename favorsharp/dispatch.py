"""Which implementation runs an operation: ops, kernels, backends, and the choice between them.

What this module promises:

- An op is defined by its reference, a plain function in array API functions. A backend offers kernels: other
  implementations of an op.
- The implementation is chosen before the call, from a `Request` that holds no shapes. So the choice can be cached, and
  does not change with the length of a sequence. An exception inside a kernel is a bug, and reaches the caller: no other
  implementation is tried once a kernel was chosen.
- Backends are entry points of the group ``favorsharp.backends``. They are looked up when first needed, and imported
  when first tried. A broken backend causes a warning that names it, and never breaks a call that does not need it.
- The bundled backends are tried automatically, in the order of `BUNDLED`. Other backends run only when they are named,
  because installing a package must not change results.
- A backend that is named (by `use` or by the environment variable ``FAVORSHARP_BACKEND``) runs, or the call raises
  `BackendUnavailable` with all reasons. A call falls back only where the caller asks for it:
  ``use("numba", "reference")``.

Traced arrays (`torch.compile`, `make_fx`, `torch.func` and `jax.jit` transforms, fake tensors) have no values that a
kernel could read. Modes of torch that follow operations (counters of flops, selective checkpoints) would not notice
what a kernel does. So in both cases only the reference and kernels that are declared ``traceable=True`` run. If a named
backend has no such kernel, the call raises an error. `torch.compile` cannot see context variables. It reads the names
that `use` was given while it traces, and traces again when they change, provided that only one thread changes them. So
put `use` around the compiled call, not inside the compiled function.

The author of an op writes a reference and decorates it with `Op`. The author of a backend writes kernels with the
signature of the op, declares them in a `Backend`, and compares them with the references by
`favorsharp.testing.check_backend`.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, TypeVar, cast

from favorsharp._arrays import under_own_settings
from favorsharp.declarations import Backend, Implementation, Kernel, Request, request_of

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "OPS",
    "Backend",
    "BackendUnavailable",
    "Explanation",
    "Implementation",
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


class BackendUnavailable(ValueError):
    """A backend was named and cannot run the op for these arrays. The message gives all reasons."""


# Discovery -----------------------------------------------------------------------------------------------------------


@functools.cache
def _entry_points() -> "Mapping[str, EntryPoint]":
    """The entry point of each backend by name: the bundled ones first, in their order, then the others by name."""
    found: dict[str, EntryPoint] = {}
    import importlib.metadata  # slow: a third of the time allowed for `import favorsharp`

    known = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: (not _is_ours(point), _rank(point)))
    for point in known:
        if point.name == REFERENCE:
            _warn(f"the name {REFERENCE!r} is taken; ignoring {_describe(point)}")
        elif (first := found.setdefault(point.name, point)).value != point.value:
            _warn(f"two backends are named {point.name!r}; using {_describe(first)}, ignoring {_describe(point)}")
    return found


@functools.cache
def _backend(name: str) -> Backend:
    """Load the backend of that name; if that fails, warn, and return a backend that has a `fault`."""
    point = _entry_points()[name]
    try:
        backend = point.load()
        if not isinstance(backend, Backend):
            raise TypeError(f"expected a favorsharp.dispatch.Backend, got {type(backend).__name__}")
        if backend.name != name:
            raise ValueError(f"the entry point is named {name!r}, its backend {backend.name!r}")
    except Exception as error:  # a broken plugin must not break the calls of those who do not use it
        fault = f"could not be loaded: {type(error).__name__}: {error}"
        _warn(f"{_describe(point)} {fault}")
        return Backend(name, fault=fault)
    return backend


@functools.cache
def _function(target: str) -> Callable[..., Any] | str:
    """The function that a kernel's target names, or the reason why it cannot be imported."""
    module, _, name = target.partition(":")
    try:
        function: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception as error:  # this runs before the call, to decide whether the kernel can be chosen
        fault = f"{target} could not be imported: {type(error).__name__}: {error}"
        _warn(fault)
        return fault
    return cast(Callable[..., Any], function)


@functools.cache
def _implementation(kernel: Kernel) -> Implementation | str:
    """What a kernel declares, imported; or the reason why it cannot be imported."""
    run, packed, plan, of_points = (
        None if target is None else _function(target)
        for target in (kernel.target, kernel.packed, kernel.plan, kernel.of_points)
    )
    for found in (run, packed, plan, of_points):
        if isinstance(found, str):
            return found
    return Implementation(run, packed, plan, kernel.takes_out, of_points)  # type: ignore[arg-type]  # none of them is a string


_generation = 0
"""How often `rediscover` was called."""


def backends() -> Mapping[str, Backend]:
    """Every installed backend by name: the bundled ones in the order in which they are tried, then the others."""
    return {name: _backend(name) for name in _entry_points()}


def rediscover() -> None:
    """Forget which backends were found, loaded and chosen, so that they are looked up again."""
    for cached in (_entry_points, _backend, _function, _implementation, _parse, _choose):
        cached.cache_clear()
    global _generation
    _generation += 1


def _is_ours(point: "EntryPoint") -> bool:
    return point.dist is not None and point.dist.name == "favorsharp"


def _rank(point: "EntryPoint") -> tuple[int, str]:
    return (BUNDLED.index(point.name) if point.name in BUNDLED else len(BUNDLED), point.name)


def _describe(point: "EntryPoint") -> str:
    owner = f" of {point.dist.name}" if point.dist is not None else ""
    return f"backend {point.name!r} ({point.value}{owner})"


def _warn(message: str) -> None:
    warnings.warn(f"favorsharp: {message}", RuntimeWarning, stacklevel=2)


# Which backends the caller names -------------------------------------------------------------------------------------

_wish: ContextVar[tuple[str, ...]] = ContextVar("favorsharp_use", default=())
_latest_wish: tuple[str, ...] = ()
"""The names given to the last `use`, in any context: torch.compile guards this one, not context variables."""

_calls: ContextVar[list[tuple[str, str]] | None] = ContextVar("favorsharp_calls", default=None)


@contextmanager
def use(*names: str) -> Iterator[None]:
    """Inside the block, every op runs by the first named backend that can run it, or raises.

    Parameters
    ----------
    *names : str
        Backends in order of preference. "reference" stands for the references: ``use("numba", "reference")`` falls back
        to them.

    Raises
    ------
    ValueError
        If a name is unknown.
    BackendUnavailable
        Raised by a call inside the block, if no named backend can run it. The message says why.

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
    """Record which implementations run: each call of an op inside the block appends (op, implementation) to the list.

    Compiled or jitted calls are recorded when they are traced.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> from favorsharp.dispatch import watch
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 16, 4))
    >>> feature_map = fs.feature_map(fs.fit(q, k), 32, rng=0)
    >>> with fs.use("reference"), watch() as calls:
    ...     out = fs.linear_attention(q, k, v, feature_map)
    >>> calls
    [('attention', 'reference')]
    """
    calls: list[tuple[str, str]] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def _names_wished() -> tuple[tuple[str, ...], str]:
    """The names that the caller asked for, none by default, and a description of where."""
    names = _wish.get()
    if names:
        return names, "use()"
    text = os.environ.get(VARIABLE)
    return (_parse(text), VARIABLE) if text else ((), "")


def is_restricted() -> bool:
    """Whether the caller has named the backends that may run, by `use` or in the environment."""
    return bool(_names_wished()[0])


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


def circumstances() -> Hashable | None:
    """What a choice depends on besides the request; None while `watch` records, so that no call is skipped."""
    if _calls.get() is not None:
        return None
    return _wish.get(), os.environ.get(VARIABLE), _generation


# The choice ----------------------------------------------------------------------------------------------------------


class _Choice(NamedTuple):
    name: str | None
    kernel: Kernel | None
    reasons: tuple[tuple[str, str], ...]


@functools.lru_cache(maxsize=4096)
def _choose(request: Request, names: tuple[str, ...]) -> _Choice:
    """The first of the names that accepts the request, and why those before it decline.

    Without names, the bundled backends are tried in their order, then the reference.
    """
    automatic = (*(name for name, point in _entry_points().items() if _is_ours(point)), REFERENCE)
    reasons: list[tuple[str, str]] = []
    for name in names or automatic:
        if name == REFERENCE:
            return _Choice(name, None, tuple(reasons))
        kernel, reason = _offer(_backend(name), request)
        if kernel is not None:
            return _Choice(name, kernel, tuple(reasons))
        reasons.append((name, reason))
    return _Choice(None, None, tuple(reasons))


def _offer(backend: Backend, request: Request) -> tuple[Kernel | None, str]:
    """The backend's kernel for the request, or None and the reasons."""
    fault = backend.why_not()
    if fault is not None:
        return None, fault
    kernels = [kernel for kernel in backend.kernels if kernel.op == request.op]
    reasons = []
    for kernel in kernels:
        reason = kernel.why_not(request)
        if reason is None:
            found = _implementation(kernel)
            if not isinstance(found, str):
                return kernel, ""
            reason = found
        reasons.append(reason)
    return None, " / ".join(dict.fromkeys(reasons)) or f"op {request.op}"


def _decide(request: Request) -> _Choice:
    """The implementation to run; raises if the caller named backends and none of them can run."""
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
    """`_decide` for torch.compile, which runs this function instead of tracing it.

    `latest_wish` is an argument only so that torch.compile calls this again when it changes. An error is returned, and
    traced code raises it, because Dynamo would take an exception here for a failure of its own. The implementation is
    stored in `_loaded`, where traced code finds it without an import. All traceable kernels of the backend are stored
    with it, because Dynamo assumes that the dictionary does not change while it traces a graph.
    """
    try:
        choice = _decide(Request(*request))
    except BackendUnavailable as error:
        return None, str(error)
    if choice.name is None or choice.kernel is None:
        return None, None
    for kernel in _backend(choice.name).kernels:
        found = _implementation(kernel) if kernel.traceable else ""
        if not isinstance(found, str):
            _loaded[kernel.target] = found
    return choice.kernel.target, None


_loaded: dict[str, Implementation] = {}
"""The implementations that traced calls run, by target."""

# What torch.compiler.assume_constant_result does, without importing torch.
_decide_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


# The op --------------------------------------------------------------------------------------------------------------

OPS: dict[str, "Op[..., Any]"] = {}
"""Every op by name."""


class Op(Generic[P, R]):
    """An operation that backends may implement; the class is used as the decorator of the reference.

    A call of the op runs the implementation that the arguments, `use` and the environment choose. The docstring of the
    reference is the contract of the op. The reference runs if no kernel does, and every kernel is compared with it.

    Parameters
    ----------
    reference : callable
        A function of arrays, feature maps, states and plain options. The op is registered under the function's name.

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
        self.reference = under_own_settings(reference)
        self._own = Implementation(self.reference)
        other = OPS.setdefault(self.name, self)
        if other.reference.__module__ != reference.__module__:
            raise ValueError(
                f"{reference.__module__} defines op {self.name!r}, and so does {other.reference.__module__}"
            )
        OPS[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the implementation that the arguments, `use` and the environment choose."""
        return cast(R, self.implementation(*args, **kwargs).run(*args, **kwargs))

    def implementation(self, *args: P.args, **kwargs: P.kwargs) -> Implementation:
        """The implementation that a call with these arguments runs."""
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
            return self._own if target is None else _loaded[target]
        kernel = _decide(request).kernel
        # a kernel is chosen only if it could be imported, so this is no string
        return self._own if kernel is None else cast(Implementation, _implementation(kernel))

    def offers_of_points(self, *args: Any) -> bool:
        """Whether such a call would run a kernel whose `of_points` can be called. `watch` does not record this."""
        request = request_of(self.name, *args)
        if request.traced or request.gradient:
            return False
        kernel = _choose(request, _names_wished()[0]).kernel
        return kernel is not None and kernel.of_points is not None

    def __repr__(self) -> str:
        return f"<favorsharp op {self.name}>"

    def __reduce__(self) -> str:
        return self.name


# Explanations --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """Which implementation runs an op for a request, and why the others do not.

    Attributes
    ----------
    op : str
    request : Request
    chosen : str or None
        None if every backend that `use` or the environment names declines; a call would raise.
    reasons : mapping of str to str
        For every known implementation, in the order in which they are printed: "chosen", or why it does not run.
    """

    op: str
    request: Request
    chosen: str | None
    reasons: Mapping[str, str] = field(hash=False)

    def __str__(self) -> str:
        return "\n".join(f"{name}: {reason}" for name, reason in self.reasons.items())


def explain(op: "Op[..., Any] | Callable[..., Any] | str", like: Any) -> Explanation:
    """Which implementation runs an op for given arrays, and why the others do not.

    Parameters
    ----------
    op : Op, str or callable
        The op, its name, or the public function that runs it: ``linear_attention`` stands for "attention".
    like : array or tuple
        An array, or several of the arguments: arrays, a feature map, a state.

    Returns
    -------
    Explanation
        Printed, it has one line for each implementation. Inside `use` it shows the choice that a call there makes.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> with fs.use("reference"):
    ...     fs.explain(fs.linear_attention, like=np.ones((4, 2))).chosen
    'reference'
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
    """Why an implementation was not tried."""
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
