"""The choice between implementations: what the caller asks for by `use`, and the first backend that accepts a request.

`favorsharp.dispatch` calls it for every op.
"""

import functools
import os
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from favorsharp import discovery
from favorsharp.declarations import Backend, Kernel, Request
from favorsharp.discovery import REFERENCE, backend_named, entry_points, implementation_of, is_bundled

VARIABLE = "FAVORSHARP_BACKEND"


class BackendUnavailable(ValueError):
    """A backend was named and cannot run the op for these arrays. The message gives all reasons."""


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


def latest_wish() -> tuple[str, ...]:
    """The names given to the last `use`, in any context, which torch.compile can read."""
    return _latest_wish


def names_wished() -> tuple[tuple[str, ...], str]:
    """The backends that the caller has named, none by default, and a description of where they were named."""
    names = _wish.get()
    if names:
        return names, "use()"
    text = os.environ.get(VARIABLE)
    return (_parse(text), VARIABLE) if text else ((), "")


def is_restricted() -> bool:
    """Whether the caller has named the backends that may run, by `use` or in the environment."""
    return bool(names_wished()[0])


@functools.cache
def _parse(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    _check_names(names, f"environment variable {VARIABLE}={text!r}")
    return names


def _known() -> tuple[str, ...]:
    return (REFERENCE, *entry_points())


def _check_names(names: Iterable[str], source: str) -> None:
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{source}: a backend is named by a string, got {type(name).__name__}")
        if name not in _known():
            raise ValueError(f"{source}: backend {name!r} is unknown; known: {', '.join(_known())}")


def circumstances() -> Hashable | None:
    """What a choice depends on besides the request; None while `watch` records, so that every call is dispatched."""
    if _calls.get() is not None:
        return None
    return _wish.get(), os.environ.get(VARIABLE), _generation


_generation = 0
"""How often `rediscover` was called."""


def rediscover() -> None:
    """Forget which backends were found, loaded and chosen, so that they are looked up again."""
    discovery.forget()
    _parse.cache_clear()
    choose.cache_clear()
    global _generation
    _generation += 1


# The choice ----------------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """The name of an implementation, its kernel, and why those before it decline; None if there is none.

    The reference has no kernel.
    """

    name: str | None
    kernel: Kernel | None
    reasons: tuple[tuple[str, str], ...]


@functools.lru_cache(maxsize=4096)
def choose(request: Request, names: tuple[str, ...]) -> Choice:
    """The first of the names that accepts the request, and why those before it decline.

    Without names, the bundled backends are tried in their order, then the reference.
    """
    automatic = (*(name for name, point in entry_points().items() if is_bundled(point)), REFERENCE)
    reasons: list[tuple[str, str]] = []
    for name in names or automatic:
        if name == REFERENCE:
            return Choice(name, None, tuple(reasons))
        kernel, reason = offer(backend_named(name), request)
        if kernel is not None:
            return Choice(name, kernel, tuple(reasons))
        reasons.append((name, reason))
    return Choice(None, None, tuple(reasons))


def offer(backend: Backend, request: Request) -> tuple[Kernel | None, str]:
    """The backend's kernel for the request, or None and the reasons."""
    fault = backend.why_not()
    if fault is not None:
        return None, fault
    kernels = [kernel for kernel in backend.kernels if kernel.op == request.op]
    reasons = []
    for kernel in kernels:
        reason = kernel.why_not(request)
        if reason is None:
            found = implementation_of(kernel)
            if not isinstance(found, str):
                return kernel, ""
            reason = found
        reasons.append(reason)
    return None, " / ".join(dict.fromkeys(reasons)) or f"op {request.op}"


def decide(request: Request) -> Choice:
    """The implementation to run; raises if the caller named backends and none of them can run."""
    names, source = names_wished()
    choice = choose(request, names)
    if choice.name is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.reasons)
        raise BackendUnavailable(f"{request.op} cannot run as {source} asks: {reasons}")
    calls = _calls.get()
    if calls is not None:
        calls.append((request.op, choice.name))
    return choice
