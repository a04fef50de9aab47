"""Helpers for arrays: addresses, strides, dtypes, devices and allocation. Most modules of this package use them.

Arrays are CuPy arrays or torch tensors. Tests also run the kernels on the CPU, with NumPy arrays and CPU tensors.
"""

import sys
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np

from favorsharp_cuda.host.recording import active

WIDER = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
"""The dtype that kernels compute in, for each dtype of their arrays."""


def is_torch(x: Any) -> bool:
    """Whether x is a torch tensor."""
    return _of_torch(type(x))  # type: ignore[arg-type]  # mypy takes type[Any] for not hashable


@cache
def _of_torch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch" or hasattr(kind, "data_ptr")


def is_numpy(x: Any) -> bool:
    """Whether x is a NumPy array."""
    return isinstance(x, np.ndarray)


def on_host(x: Any) -> bool:
    """Whether x is in host memory, as in tests that run the kernels on the CPU."""
    return is_numpy(x) or (is_torch(x) and x.device.type != "cuda")


def name_of(x: Any) -> str:
    """The name of x's dtype without that of the library, such as "float32"."""
    return _name(x.dtype)


@lru_cache(maxsize=64)
def _name(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


def device_number(x: Any) -> int:
    """The number of the GPU that x is on; 0 if x is in host memory."""
    if is_numpy(x):
        return 0
    if is_torch(x):
        return int(x.device.index or 0)
    return int(x.device.id)


def address_of(x: Any) -> int:
    """The address of x's first item."""
    if not is_torch(x):
        return int(x.__array_interface__["data"][0] if is_numpy(x) else x.data.ptr)
    place = int(x.data_ptr())
    if not place and x.numel() > 0:
        raise TypeError(
            f"a tensor of shape {tuple(x.shape)} on {x.device} has no memory that a kernel can use: it is fake, or "
            "its storage was freed; accepted: tensors with their numbers, outside of torch's fake modes"
        )
    return place


def place_of(x: Any) -> tuple[int, tuple[int, ...]]:
    """The address of x's first item, and its strides in items."""
    if is_torch(x):
        return address_of(x), tuple(x.stride())
    item = x.dtype.itemsize
    if any(step % item for step in x.strides):
        raise ValueError(f"an array has strides {x.strides}; accepted: multiples of the size of an item, {item} bytes")
    return address_of(x), tuple(step // item for step in x.strides)


def computed_item(dtype: str) -> int:
    """Bytes of one number in the dtype that kernels compute in for arrays of the given dtype."""
    return 8 if WIDER[dtype] == "float64" else 4


def _item_of(x: Any) -> int:
    """Bytes of one item of x."""
    return int(x.element_size() if is_torch(x) else x.dtype.itemsize)


def _beside(x: Any, like: Any) -> bool:
    """Whether x is on the device of `like`."""
    return is_numpy(x) or bool(x.device == like.device)


def extent_of(x: Any) -> tuple[int, int]:
    """The lowest address that belongs to an item of x, and the address behind the last item."""
    start, strides = place_of(x)
    item = _item_of(x)
    reach = [item * step * (size - 1) for size, step in zip(x.shape, strides, strict=True)]
    if 0 in x.shape:
        return start, start
    return start + sum(min(0, step) for step in reach), start + sum(max(0, step) for step in reach) + item


def usable_where_it_lies(x: Any) -> bool:
    """Whether a kernel can read and write the items of x at their addresses."""
    if is_torch(x):
        return not (x.is_neg() or x.is_conj())
    return not is_numpy(x) or bool(x.flags.aligned and x.dtype.isnative)


def readable(x: Any) -> Any:
    """The array in a form that kernels can read; it is copied only if necessary.

    The result has no gradient and no pending negation or conjugation. It is aligned and in native byte order.
    """
    if is_torch(x):
        x = x.detach() if x.requires_grad else x
        return x.resolve_neg().resolve_conj() if x.is_neg() or x.is_conj() else x
    return x if usable_where_it_lies(x) else np.array(x, dtype=x.dtype.newbyteorder("="))


def target(out: Any, inputs: Sequence[Any], shape: tuple[int, ...], dtype: str) -> Any:
    """The array that a kernel writes its result to: `out` if the kernel can write there, otherwise a new array.

    A new array is made if there is no `out`, or if `out` has another dtype, is on another device, is not aligned,
    repeats items (stride 0), or overlaps the memory of an input.
    """
    if out is None or name_of(out) != dtype or not usable_where_it_lies(out) or not _beside(out, inputs[0]):
        return empty(inputs[0], shape, dtype)
    start, strides = place_of(out)
    low, high = extent_of(out)
    repeated = any(step == 0 and size > 1 for step, size in zip(strides, out.shape, strict=True))
    taken = (extent_of(x) for x in inputs if x is not None)
    if repeated or start % _item_of(out) or any(first < high and low < stop for first, stop in taken):
        return empty(inputs[0], shape, dtype)
    if is_torch(out) and not out.is_inference():
        sys.modules["torch"].autograd.graph.increment_version(out)  # torch counts writes to a tensor
    return out


def empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """A new array, not initialised, of the library of `like` and on its device.

    CuPy allocates on the current device; `launch.run` checks that arrays are on it.
    """
    if is_torch(like):
        torch = sys.modules["torch"]
        x = torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
        if active.recording is not None:
            active.recording.allocated(x, shape, dtype)
        return x
    if is_numpy(like):
        return np.empty(shape, dtype)
    import cupy

    return cupy.empty(shape, dtype)


def upload(like: Any, host: Any) -> Any:
    """A NumPy array of numbers as an array of the library of `like`, on its device."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.from_numpy(np.ascontiguousarray(host)).to(like.device)
    if is_numpy(like):
        return np.ascontiguousarray(host)
    import cupy

    x = cupy.empty(host.shape, host.dtype)
    x.set(np.ascontiguousarray(host))
    return x


def cast(x: Any, dtype: str) -> Any:
    """The array in the given dtype; the array itself if it has that dtype already."""
    if name_of(x) == dtype:
        return x
    return x.to(getattr(sys.modules["torch"], dtype)) if is_torch(x) else x.astype(dtype)
