"""Functions for dataclasses of arrays: the arrays that they hold, and copies with changed arrays or another dtype."""

from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass, replace
from typing import Any

from favorsharp._arrays import cast, dtype_name, is_array, library_of
from favorsharp._typing import Array


def map_arrays(value: Any, change: Callable[[Array], Array]) -> Any:
    """A copy of a dataclass with `change` applied to each array in it, and in the dataclasses that it holds."""
    changed = {}
    for field in fields(value):
        entry = getattr(value, field.name)
        if is_dataclass(entry):
            changed[field.name] = map_arrays(entry, change)
        elif is_array(entry):
            changed[field.name] = change(entry)
    return replace(value, **changed)


def held_arrays(value: Any) -> list[Array]:
    """The arrays that a dataclass holds, at any depth; not those that it computes when they are asked for."""
    names = _names(value)
    if not names:
        return []
    held = vars(value) if hasattr(value, "__dict__") else {name: getattr(value, name, None) for name in names}
    found: list[Array] = []
    for name in names:
        part = held.get(name)
        found += [part] if is_array(part) else held_arrays(part)
    return found


def fields_alone(value: Any) -> dict[str, Any]:
    """The fields of a dataclass for pickle; a tensor that is a part of larger memory is copied."""
    return {field.name: _alone(getattr(value, field.name)) for field in fields(value)}


def _alone(x: Any) -> Any:
    part = is_array(x) and library_of(x) == "torch" and not x.requires_grad and x.untyped_storage().nbytes() > x.nbytes
    return x.clone() if part else x


def _names(value: Any) -> Collection[str]:
    return getattr(type(value), "__dataclass_fields__", ())


def astype(value: Any, dtype: Any) -> Any:
    """A copy of a dataclass with its arrays of numbers in the given dtype; the value itself if they have it already.

    Callers rely on getting the value itself, because backends keep what they derive from an object while it exists.
    """
    same = True

    def change(x: Array) -> Array:
        nonlocal same
        if x.dtype == dtype or dtype_name(x) == "bool":
            return x
        changed = cast(x, dtype)
        same = same and changed is x
        return changed

    changed = map_arrays(value, change)
    return value if same else changed
