"""The ops: a call of an op runs the implementation that `favorsharp.choice` chooses, and `explain` says which and why.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar, cast

from favorsharp._arrays import under_own_settings
from favorsharp._autodiff import constant_while_compiling
from favorsharp.choice import (
    VARIABLE,
    BackendUnavailable,
    Choice,
    choose,
    circumstances,
    decide,
    is_restricted,
    latest_wish,
    names_wished,
    offer,
    rediscover,
    use,
    watch,
)
from favorsharp.declarations import Backend, Implementation, Kernel, Request, request_of
from favorsharp.discovery import REFERENCE, backend_named, backends, entry_points, implementation_of, is_bundled

__all__ = [
    "OPS",
    "VARIABLE",
    "Backend",
    "BackendUnavailable",
    "Explanation",
    "Implementation",
    "Kernel",
    "Op",
    "Request",
    "backends",
    "circumstances",
    "explain",
    "is_restricted",
    "rediscover",
    "request_of",
    "use",
    "watch",
]

P = ParamSpec("P")
R = TypeVar("R")

OPS: dict[str, "Op[..., Any]"] = {}
"""Every op by name."""


class Op(Generic[P, R]):
    """An operation that backends may implement; the class is the decorator of its reference.

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

    Examples
    --------
    >>> from favorsharp.dispatch import OPS
    >>> attention = OPS["attention"]
    >>> attention.name, callable(attention.reference)
    ('attention', True)
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
                latest_wish(),
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
        kernel = decide(request).kernel
        # a kernel is chosen only if it could be imported, so this is no string
        return self._own if kernel is None else cast(Implementation, implementation_of(kernel))

    def offers_of_points(self, *args: Any) -> bool:
        """Whether a call with these arguments would run a kernel that has `of_points`. `watch` does not record this."""
        request = request_of(self.name, *args)
        if request.traced or request.gradient:
            return False
        kernel = choose(request, names_wished()[0]).kernel
        return kernel is not None and kernel.of_points is not None

    def __repr__(self) -> str:
        return f"<favorsharp op {self.name}>"

    def __reduce__(self) -> str:
        return self.name


# While torch.compile traces -----------------------------------------------------------------------------------------


@constant_while_compiling
def _decide_while_tracing(latest: tuple[str, ...], *request: Any) -> tuple[str | None, str | None]:
    """`decide` for torch.compile, which runs this function instead of tracing it.

    `latest` is an argument only so that torch.compile calls this again when it changes. An error is returned, and
    traced code raises it, because Dynamo would take an exception here for a failure of its own. The implementation is
    stored in `_loaded`, where traced code finds it without an import. All traceable kernels of the backend are stored
    with it, because Dynamo assumes that the dictionary does not change while it traces a graph.
    """
    try:
        choice = decide(Request(*request))
    except BackendUnavailable as error:
        return None, str(error)
    if choice.name is None or choice.kernel is None:
        return None, None
    for kernel in backend_named(choice.name).kernels:
        found = implementation_of(kernel) if kernel.traceable else ""
        if not isinstance(found, str):
            _loaded[kernel.target] = found
    return choice.kernel.target, None


_loaded: dict[str, Implementation] = {}
"""The implementations that traced calls run, by target."""

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

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> with fs.use("reference"):
    ...     found = fs.explain("attention", like=np.ones((4, 2)))
    >>> found.request.dtype, found.reasons["reference"]
    ('float64', 'chosen')
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

    Raises
    ------
    TypeError, ValueError
        If the op is unknown, or if there is no array in `like`.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> with fs.use("reference"):
    ...     fs.explain(fs.linear_attention, like=np.ones((4, 2))).chosen
    'reference'
    """
    name = _op_name(op)
    request = request_of(name, *(like if isinstance(like, (tuple, list)) else (like,)))
    names, source = names_wished()
    choice = choose(request, names)
    reasons = {} if choice.name is None else {choice.name: "chosen"}
    reasons.update(choice.reasons)
    for other in (*entry_points(), REFERENCE):
        if other not in reasons:
            reasons[other] = _why_not_tried(other, request, choice, source if names and other not in names else "")
    return Explanation(name, request, choice.name, reasons)


def _why_not_tried(name: str, request: Request, choice: Choice, source: str) -> str:
    """Why an implementation was not tried."""
    if source:
        return f"not named by {source}"
    if name != REFERENCE:
        kernel, reason = offer(backend_named(name), request)
        if kernel is None:
            return reason
        if not is_bundled(entry_points()[name]):
            return "can run it, when named by use()"
    return f"can run it, {choice.name} comes first"


def _op_name(op: object) -> str:
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    name = {"linear_attention": "attention"}.get(name, name)
    if name not in OPS:
        raise ValueError(f"op {name!r} is unknown; known: {', '.join(sorted(OPS))}")
    return name
