"""Arrays as addresses: where one lies, on which device, and how to make another beside it.

CuPy arrays, torch tensors, and NumPy arrays where tests run the kernels on the host.
"""

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

WIDER = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
"""What each dtype is computed in."""


def is_torch(x: Any) -> bool:
    """Whether x is a tensor."""
    return type(x).__module__.partition(".")[0] == "torch" or hasattr(x, "data_ptr")


def is_numpy(x: Any) -> bool:
    """Whether x is NumPy's."""
    return isinstance(x, np.ndarray)


def on_host(x: Any) -> bool:
    """Whether x is not on a GPU: where tests run the kernels."""
    return is_numpy(x) or (is_torch(x) and x.device.type != "cuda")


def name_of(x: Any) -> str:
    """The dtype's short name."""
    return _name(x.dtype)


@lru_cache(maxsize=64)
def _name(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


def device_number(x: Any) -> int:
    """The number of the GPU; 0 for host memory."""
    if is_numpy(x):
        return 0
    if is_torch(x):
        return int(x.device.index or 0)
    return int(x.device.id)


def place_of(x: Any) -> tuple[int, tuple[int, ...]]:
    """The address of the first item, and the strides in items."""
    if is_torch(x):
        place = int(x.data_ptr())
        if not place and x.numel() > 0:
            raise TypeError(
                f"a tensor of shape {tuple(x.shape)} on {x.device} has no memory that a kernel can use: it is fake, or "
                "its storage was freed; accepted: tensors with their numbers, outside of torch's fake modes"
            )
        return place, tuple(x.stride())
    start = x.__array_interface__["data"][0] if is_numpy(x) else x.data.ptr
    item = x.dtype.itemsize
    if any(step % item for step in x.strides):
        raise ValueError(f"strides {x.strides} must be multiples of the item's size, {item}")
    return int(start), tuple(step // item for step in x.strides)


def computed_item(dtype: str) -> int:
    """Bytes of a number in the dtype that arrays of this one are computed in."""
    return 8 if WIDER[dtype] == "float64" else 4


def _item_of(x: Any) -> int:
    """Bytes of an item."""
    return int(x.element_size() if is_torch(x) else x.dtype.itemsize)


def _beside(x: Any, like: Any) -> bool:
    """Whether an array is on another's device."""
    return is_numpy(x) or bool(x.device == like.device)


def extent_of(x: Any) -> tuple[int, int]:
    """The addresses between which all items lie."""
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
    """The array without a gradient and without lazy conjugation, in native byte order."""
    if is_torch(x):
        x = x.detach()
        return x if usable_where_it_lies(x) else x.resolve_neg().resolve_conj()
    return x if usable_where_it_lies(x) else np.array(x, dtype=x.dtype.newbyteorder("="))


def target(out: Any, inputs: Sequence[Any], shape: tuple[int, ...], dtype: str) -> Any:
    """What a kernel writes its result to: `out`, or a new array where a kernel cannot, or must not, write there.

    That is where there is none, or it is of another dtype, on another device, not aligned, or shares an input's memory.
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
        sys.modules["torch"].autograd.graph.increment_version(out)  # as any write to it does
    return out


def empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """A new array of like's library, beside it."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    if is_numpy(like):
        return np.empty(shape, dtype)
    import cupy

    return cupy.empty(shape, dtype)


def upload(like: Any, host: Any) -> Any:
    """A NumPy array of numbers as an array of like's library, beside it."""
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
    """The array in another dtype; itself where it has it."""
    if name_of(x) == dtype:
        return x
    return x.to(getattr(sys.modules["torch"], dtype)) if is_torch(x) else x.astype(dtype)
