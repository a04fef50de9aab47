"""Builds the structure that kernels take as their argument, from arrays with any leading axes and strides.

`plain` and `tiles` use the layout `PROBLEM`, the modules of gradients use `GRADIENTS`, both of `declarations`.
"""

import math
from array import array
from collections.abc import Sequence
from functools import cache, lru_cache
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
        self._axes = _axes_of(self.batch, tuple(keys))
        self.heads = math.prod(self.batch)
        self._numbers = array("q", bytes(layout.itemsize))  # all fields are numbers of eight bytes
        self._layout, self._places = layout, _places_of(layout)
        self._write("shape", _padded([self.batch[axis] for axis in self._axes], 1))
        self.held: list[Any] = []

    def set(self, **numbers: int) -> None:
        """Set fields that are numbers."""
        for name, value in numbers.items():
            self._numbers[self._places[name]] = value

    def copy(self) -> "Problem":
        """A copy of the problem with the same fields."""
        other = Problem.__new__(Problem)
        other.__dict__ |= self.__dict__
        other._numbers, other.held = self._numbers[:], self.held[:]
        return other

    @property
    def values(self) -> Any:
        """The structure as a NumPy array of shape (1,), which shares the memory of the problem."""
        return np.frombuffer(self._numbers, self._layout)

    def array(self, name: str, x: Any, trailing: int = 2) -> None:
        """Set an array of shape (*b, rows, columns), or (*b, rows) if `trailing` is 1."""
        x = arrays.readable(x)
        self.held.append(x)
        start, strides = arrays.place_of(x)
        place = self._places[name]
        steps = _steps_of_array(tuple(x.shape), strides, trailing, len(self.batch), self._axes)
        self._numbers[place] = start
        self._numbers[place + 1 : place + 1 + len(steps)] = steps

    def side(self, name: str, **numbers: int) -> None:
        """Set fields of one side of the maps, "query" or "key"."""
        for field, value in numbers.items():
            self._numbers[self._places[f"{name}.{field}"]] = value

    def sums(self, suffix: str, sums: "Sums | None", low: "Lows" = (None, None)) -> None:
        """Set the sums of a state and their low parts, if there are any; `suffix` is "in" or "out"."""
        for name, x in zip(("kv", "z", "c"), sums or (), strict=sums is not None):
            self.array(f"{name}_{suffix}", x)
        self.lows(suffix, low)

    def lows(self, suffix: str, low: "Lows") -> None:
        """Set the low parts of sums, if there are any."""
        for name, x in zip(("kv_low", "z_low"), low, strict=True):
            if x is not None:
                self.array(f"{name}_{suffix}", x)

    def number(self, name: str, batch: tuple[int, ...]) -> None:
        """Set the steps along each axis from which a kernel computes a head's number in another batch.

        The other batch broadcasts to this one.
        """
        steps = [math.prod(batch[axis + 1 :]) for axis in range(len(batch))]
        self._write(name, self._steps(batch, tuple(steps)))

    def axes(self, name: str, numbers: Sequence[int]) -> None:
        """Set one number for each axis of the batch."""
        self._write(name, _padded([numbers[axis] for axis in self._axes], 1))

    def hold(self, x: Any) -> int:
        """Keep an array alive, and return its address."""
        self.held.append(x)
        return arrays.address_of(x)

    def _steps(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
        return _steps(shape, strides, len(self.batch), self._axes)

    def _write(self, name: str, numbers: Sequence[int]) -> None:
        place = self._places[name]
        self._numbers[place : place + len(numbers)] = array("q", numbers)


@lru_cache(maxsize=1024)
def _axes_of(batch: tuple[int, ...], keys: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a batch that are longer than 1; those along which the keys are broadcast come last."""
    axes = [axis for axis, size in enumerate(batch) if size != 1]
    of_keys = [1] * (len(batch) - len(keys)) + list(keys)
    axes.sort(key=lambda axis: of_keys[axis] == 1)
    if len(axes) > AXES:
        raise ValueError(f"batch {batch} has {len(axes)} axes longer than 1, accepted: at most {AXES}")
    return tuple(axes)


@cache
def _places_of(layout: Any) -> dict[str, int]:
    """Where each field of a structure begins, counted in numbers of eight bytes; also "field.field" of a nested one."""
    places = {}
    for name, (kind, offset) in ((name, field[:2]) for name, field in layout.fields.items()):
        places[name] = offset // 8
        for inner, field in (kind.fields or {}).items():
            places[f"{name}.{inner}"] = (offset + field[1]) // 8
    return places


@lru_cache(maxsize=4096)
def _steps_of_array(
    shape: tuple[int, ...], strides: tuple[int, ...], trailing: int, rank: int, axes: tuple[int, ...]
) -> "array[int]":
    """The fields of an `Array` behind its address, in their order."""
    column, leading = strides[-1] if trailing == 2 else 0, len(shape) - trailing
    return array("q", (strides[-trailing], column, *_steps(shape[:leading], strides[:leading], rank, axes)))


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
