"""Builds the structure that kernels take as their argument, from arrays with any leading axes and strides.

`plain` and `tiles` use the layout `PROBLEM`, the modules of gradients use `GRADIENTS`, both of `declarations`.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from favorsharp.backend import broadcast_shapes
from favorsharp_cuda.host import arrays
from favorsharp_cuda.host.declarations import AXES, PROBLEM


class Problem:
    """The argument of one launch: fills the structure, and keeps the arrays alive whose addresses it holds.

    Parameters
    ----------
    batch : tuple of int
        The leading axes of the call. Each index into them is a head, and the blocks of a kernel are numbered by head.
    layout : dtype
        The layout of the structure.
    keys : tuple of int, optional
        The leading axes of the keys, which broadcast to `batch`. If they are given, heads that share a key head have
        consecutive numbers.
    """

    def __init__(self, batch: Sequence[int], layout: Any = PROBLEM, keys: Sequence[int] = ()) -> None:
        self.batch = tuple(batch)
        axes = [axis for axis, size in enumerate(self.batch) if size != 1]
        of_keys = [1] * (len(self.batch) - len(keys)) + list(keys)
        axes.sort(key=lambda axis: of_keys[axis] == 1)
        if len(axes) > AXES:
            raise ValueError(f"batch {self.batch} has {len(axes)} axes longer than 1, accepted: at most {AXES}")
        self._axes = axes
        self.heads = math.prod(self.batch)
        self.values = np.zeros(1, layout)
        self.values["shape"] = _padded([self.batch[axis] for axis in axes], 1)
        self.held: list[Any] = []

    def set(self, **numbers: int) -> None:
        """Set fields that are numbers."""
        for name, value in numbers.items():
            self.values[name] = value

    def array(self, name: str, x: Any, trailing: int = 2) -> None:
        """Set an array of shape (*b, rows, columns), or (*b, rows) if `trailing` is 1."""
        x = arrays.readable(x)
        self.held.append(x)
        start, strides = arrays.place_of(x)
        entry = self.values[name]
        entry["start"], entry["row"] = start, strides[-trailing]
        entry["column"] = strides[-1] if trailing == 2 else 0
        entry["axis"] = self._steps(tuple(x.shape[:-trailing]), strides[: len(x.shape) - trailing])

    def sums(self, suffix: str, sums: "Sums | None", low: "Lows" = (None, None)) -> None:
        """Set the sums of a state and their low parts, as far as there are any; `suffix` is "in" or "out"."""
        for name, x in zip(("kv", "z", "c"), sums or (), strict=sums is not None):
            self.array(f"{name}_{suffix}", x)
        self.lows(suffix, low)

    def lows(self, suffix: str, low: "Lows") -> None:
        """Set the low parts of sums, as far as there are any."""
        for name, x in zip(("kv_low", "z_low"), low, strict=True):
            if x is not None:
                self.array(f"{name}_{suffix}", x)

    def number(self, name: str, batch: tuple[int, ...]) -> None:
        """Set the steps along each axis from which a kernel computes a head's number in another batch.

        The other batch broadcasts to this one.
        """
        steps = [math.prod(batch[axis + 1 :]) for axis in range(len(batch))]
        self.values[name] = self._steps(batch, tuple(steps))

    def axes(self, name: str, numbers: Sequence[int]) -> None:
        """Set one number for each axis of the batch."""
        self.values[name] = _padded([numbers[axis] for axis in self._axes], 1)

    def hold(self, x: Any) -> int:
        """Keep an array alive, and return its address."""
        self.held.append(x)
        return arrays.place_of(x)[0]

    def _steps(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
        return _steps(shape, strides, len(self.batch), tuple(self._axes))


@lru_cache(maxsize=1024)
def _steps(shape: tuple[int, ...], strides: tuple[int, ...], rank: int, axes: tuple[int, ...]) -> list[int]:
    missing = rank - len(shape)
    steps = [0] * missing + [step if size != 1 else 0 for size, step in zip(shape, strides, strict=True)]
    return _padded([steps[axis] for axis in axes], 0)


def _padded(values: list[int], filler: int) -> list[int]:
    """The values for all axes of the structure: those of the batch are its last axes, the others get the filler."""
    return [filler] * (AXES - len(values)) + values


def key_batch_of(feature_map: Any, k: Any, v: Any, key_mask: Any = None, state: Any = None) -> tuple[int, ...]:
    """The leading axes to which keys, values, mask, map and state broadcast together."""
    shapes = [tuple(feature_map.batch_shape)]
    shapes += [tuple(x.shape[:-2]) for x in (k, v) if x is not None]
    shapes += [tuple(key_mask.shape[:-1])] if key_mask is not None else []
    shapes += [tuple(state.kv.shape[:-2])] if state is not None else []
    return broadcast_shapes(*shapes)


Sums = tuple[Any, Any, Any]
"""kv (*b, m, e), z and c (*b, 1, m), as in a State."""


def sums_of(state: Any) -> Sums:
    """The sums of a state."""
    return state.kv, state.z, state.c


Lows = tuple[Any, Any]
"""The low parts of kv and z, as in a State; None stands for zeros."""


def lows_of(state: Any) -> Lows:
    """The low parts of the sums of a state."""
    return state.kv_low, state.z_low


def new_lows(sums: Sums) -> Lows:
    """Arrays for the low parts of new sums, which a kernel will write; none in float64."""
    dtype = arrays.name_of(sums[0])
    if dtype == "float64":
        return None, None
    kv, z = (arrays.empty(x, tuple(x.shape), dtype) for x in sums[:2])
    return kv, z


def new_sums(like: Any, batch: tuple[int, ...], m: int, e: int, dtype: str) -> Sums:
    """Arrays for sums, which a kernel will write."""
    return (
        arrays.empty(like, (*batch, m, e), dtype),
        arrays.empty(like, (*batch, 1, m), dtype),
        arrays.empty(like, (*batch, 1, m), dtype),
    )
