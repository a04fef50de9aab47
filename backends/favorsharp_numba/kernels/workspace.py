"""Workspaces: the memory in which a thread that runs a kernel keeps its tiles, features and sums.

A workspace consists of parts, one behind the other. A *layout* is a function of the sizes of a problem and of a first
place. It returns a named tuple: the first place of every part, in order, and as `end` the place behind the last part. A
kernel calls its layout with the place of its workspace. The host calls the same layout with the place 0 and allocates
`end` items (`items_of`). So the memory that a kernel uses and the memory that it gets cannot differ.

Layouts are compiled into the kernels that call them; `on_host` turns one into a plain Python function.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from types import FunctionType
from typing import Any

from favorsharp_numba.vectors.compiling import jit


def kernel(layout: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a kernel, and remember the layout of its workspace in its attribute `layout`."""

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = jit(function)
        dispatcher.layout = layout
        return dispatcher

    return compiled


@lru_cache(maxsize=1024)  # computing a layout would slow down small calls
def items_of(kernel: Any, sizes: Any) -> int:
    """The number of items of a kernel's workspace, for problems of the given sizes."""
    return int(on_host(kernel.layout)(sizes, 0).end)


@cache
def on_host(function: Any) -> Callable[..., Any]:
    """A function that is `inlined` in kernels, as plain Python, and with it the inlined functions that it calls.

    If it were called directly, Numba would compile it.
    """
    plain = function.py_func
    names = {name: value for name, value in plain.__globals__.items() if name in plain.__code__.co_names}
    return FunctionType(
        plain.__code__,
        {name: on_host(value) if hasattr(value, "py_func") else value for name, value in names.items()},
    )
