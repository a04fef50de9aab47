"""Copies of frozen dataclasses in which the arrays are changed, or have another dtype."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from favorsharp._arrays import cast, dtype_name, is_array
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


def astype(value: Any, dtype: Any) -> Any:
    """A copy of a dataclass with its arrays of numbers in the given dtype; the value itself if they have it already.

    It matters that the value itself is returned: backends keep what they derive from an object as long as it exists.
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
