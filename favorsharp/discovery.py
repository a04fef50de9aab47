"""Finds backends through entry points, and imports what they declare. `favorsharp.choice` calls it."""

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from favorsharp.declarations import Backend, Implementation, Kernel

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "favorsharp.backends"
REFERENCE = "reference"

BUNDLED = ("numba", "cuda")
"""The backends of this distribution, in the order in which they are tried when none is named."""


@functools.cache
def entry_points() -> "Mapping[str, EntryPoint]":
    """The entry point of each backend by name: the bundled ones first, in their order, then the others by name."""
    found: dict[str, EntryPoint] = {}
    import importlib.metadata  # slow: it would take a third of the time allowed for `import favorsharp`

    known = importlib.metadata.entry_points(group=GROUP)
    for point in sorted(known, key=lambda point: (not is_bundled(point), _rank(point))):
        if point.name == REFERENCE:
            _warn(f"the name {REFERENCE!r} is taken; ignoring {_describe(point)}")
        elif (first := found.setdefault(point.name, point)).value != point.value:
            _warn(f"two backends are named {point.name!r}; using {_describe(first)}, ignoring {_describe(point)}")
    return found


@functools.cache
def backend_named(name: str) -> Backend:
    """Load the backend of that name; if that fails, warn, and return a backend that has a `fault`."""
    point = entry_points()[name]
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
def implementation_of(kernel: Kernel) -> Implementation | str:
    """What a kernel declares, imported; or the reason why it cannot be imported."""
    run, packed, plan, of_points = (
        None if target is None else _function(target)
        for target in (kernel.target, kernel.packed, kernel.plan, kernel.of_points)
    )
    for found in (run, packed, plan, of_points):
        if isinstance(found, str):
            return found
    return Implementation(run, packed, plan, kernel.takes_out, of_points)  # type: ignore[arg-type]  # none of them is a string


def backends() -> Mapping[str, Backend]:
    """Every installed backend by name: the bundled ones in the order in which they are tried, then the others."""
    return {name: backend_named(name) for name in entry_points()}


def forget() -> None:
    """Look backends and their functions up again when they are next needed."""
    for cached in (entry_points, backend_named, _function, implementation_of):
        cached.cache_clear()


def is_bundled(point: "EntryPoint") -> bool:
    """Whether the backend of an entry point belongs to this distribution."""
    return point.dist is not None and point.dist.name == "favorsharp"


def _rank(point: "EntryPoint") -> tuple[int, str]:
    return (BUNDLED.index(point.name) if point.name in BUNDLED else len(BUNDLED), point.name)


def _describe(point: "EntryPoint") -> str:
    owner = f" of {point.dist.name}" if point.dist is not None else ""
    return f"backend {point.name!r} ({point.value}{owner})"


def _warn(message: str) -> None:
    warnings.warn(f"favorsharp: {message}", RuntimeWarning, stacklevel=2)
