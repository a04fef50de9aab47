"""Turns arrays and feature maps into what kernels take: addresses, strides and packed constants.

Arrays are read in place wherever a kernel can read them. Everything else in `host` calls this module.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from favorsharp.backend import FoldedSide, derived, fold, to_host
from favorsharp_numba.kernels.arguments import (
    ALPHA,
    BETA,
    HEADER,
    NEAR_ALPHA,
    NEAR_HALF,
    NEAR_HALF_SCALED,
    NEAR_SCALE,
    OFFSET,
    ONE,
    Mask,
    Points,
    Sizes,
)
from favorsharp_numba.vectors.compiling import TAGS
from favorsharp_numba.vectors.emitter import BYTES, VECTORS

LOG2E = 1 / math.log(2)
KINDS = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}


def name_of(x: Any) -> str:
    """The dtype's short name."""
    return _dtype_name(x.dtype)


@cache  # NumPy builds the string at every call, which is a noticeable cost in small calls
def _dtype_name(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


def is_torch(x: Any) -> bool:
    """Whether x is a torch tensor."""
    return not isinstance(x, np.ndarray) and hasattr(x, "data_ptr")


def start_of(x: Any) -> int:
    """The address of the first item."""
    return int(x.data_ptr() if is_torch(x) else x.__array_interface__["data"][0])


class Address:
    """The address of an array's first item, its shape, and its strides in bytes. It keeps the array alive."""

    def __init__(self, x: Any) -> None:
        self.kind = name_of(x)
        if is_torch(x):
            x = x.detach()
            if not usable_where_it_lies(x):
                x = x.resolve_neg().resolve_conj()
            self.item = x.element_size()
            self.start, self.shape = x.data_ptr(), tuple(x.shape)
            if not self.start and x.numel() > 0:
                x = _with_memory(x)
                self.start = x.data_ptr()
            self.strides = tuple(step * self.item for step in x.stride())
        else:
            if not usable_where_it_lies(x):
                x = np.array(x, dtype=x.dtype.newbyteorder("="))
            self.item = x.itemsize
            self.start, self.shape, self.strides = start_of(x), x.shape, x.strides
        self.owner = x  # the memory must live as long as the address is in use

    def offsets(self, batch: tuple[int, ...], trailing: int) -> "Constant":
        """The offset of every entry of a batch that the leading axes broadcast to."""
        leading = len(self.shape) - trailing
        return _offsets(self.shape[:leading], self.strides[:leading], batch)

    def extent(self) -> tuple[int, int]:
        """The addresses between which all items lie."""
        reach = [step * (size - 1) for size, step in zip(self.shape, self.strides, strict=True)]
        if math.prod(self.shape) == 0:
            return self.start, self.start
        return self.start + sum(min(0, x) for x in reach), self.start + sum(max(0, x) for x in reach) + self.item


def _with_memory(x: Any) -> Any:
    """A copy of a tensor that has no address because it stands for zeros.

    Raise TypeError for other tensors without address.
    """
    if x._is_zerotensor():
        return x.clone()
    raise TypeError(
        f"a tensor of shape {tuple(x.shape)} on {x.device} has no memory that a kernel can use: it is fake, or its "
        "storage was freed; accepted: tensors with their numbers, outside of torch's fake modes"
    )


def check_memory(arrays: Sequence[Any]) -> None:
    """Raise TypeError if a tensor that has items has no address."""
    for x in arrays:
        if is_torch(x) and x.numel() > 0 and not x.data_ptr():
            _with_memory(x)


def usable_where_it_lies(x: Any) -> bool:
    """Whether a kernel can read and write the items of x at their addresses."""
    if is_torch(x):
        return not (x.is_neg() or x.is_conj())
    return bool(x.flags.aligned and x.dtype.isnative)


class Constant(NamedTuple):
    """A flat read-only array of integers, and its address."""

    values: Any
    address: int


@lru_cache(maxsize=1024)
def _offsets(shape: tuple[int, ...], strides: tuple[int, ...], batch: tuple[int, ...]) -> Constant:
    """The distance in bytes of every entry of a batch from the first, if the leading axes broadcast to it."""
    missing = len(batch) - len(shape)
    offsets = np.zeros((1,) * len(batch), dtype=np.int64)
    for axis, (size, step) in enumerate(zip(shape, strides, strict=True), missing):
        if size > 1:
            reach = np.arange(size, dtype=np.int64) * step
            offsets = offsets + reach.reshape((-1,) + (1,) * (len(batch) - axis - 1))
    return _constant(np.broadcast_to(offsets, batch))


def _constant(x: Any) -> Constant:
    flat = np.array(x).reshape(-1)
    flat.flags.writeable = False
    return Constant(flat, start_of(flat))


class Held:
    """Makes arguments of kernels from arrays, and keeps the arrays alive whose addresses they contain.

    Attributes
    ----------
    of_torch : bool
        Whether points of torch are among them.
    """

    def __init__(self) -> None:
        self.arrays: list[Any] = []
        self.of_torch = False

    def keep(self, x: Any) -> int:
        """The address of a NumPy array."""
        self.arrays.append(x)
        return start_of(x)

    def constant(self, x: Constant) -> int:
        """The address of a constant."""
        self.arrays.append(x)
        return x.address

    def points(self, x: Any, batch: tuple[int, ...]) -> Points:
        """An array (*b, n, size) as a kernel takes it."""
        a = Address(x)
        self.arrays.append(a)
        self.of_torch = self.of_torch or is_torch(x)
        offsets = self.constant(a.offsets(batch, 2))
        return Points(KINDS[a.kind], a.start, offsets, a.strides[-2], a.strides[-1], a.item)

    def layout(self, x: Any, batch: tuple[int, ...]) -> list[int]:
        """The fields of `points` other than the address of the array."""
        return [part for name, part in self.points(x, batch)._asdict().items() if name != "base"]

    def mask(self, x: Any, batch: tuple[int, ...]) -> Mask:
        """A mask (*b, n) as a kernel takes it; None is no mask."""
        if x is None:
            return Mask(0, 0, 0)
        a = Address(x)
        self.arrays.append(a)
        return Mask(a.start, self.constant(a.offsets(batch, 1)), a.strides[-1])

    def place(self, x: Any) -> int:
        """The place of a NumPy array."""
        return self.keep(x) // int(x.itemsize)


def host(x: Any) -> Any:
    """An array of a map or of a state as a NumPy array, without a copy."""
    if not is_torch(x):
        return np.asarray(x)
    check_memory((x,))
    return x.detach().numpy(force=True)


# Packed maps ---------------------------------------------------------------------------------------------------------


class Packed:
    """The constants of a map's two sides, queries and keys, in the layout of `Sizes`: a row for each map of a batch."""

    def __init__(self, feature_map: Any, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self.one = TAGS[dtype]
        self.batch: tuple[int, ...] = tuple(feature_map.batch_shape)
        self.query, self.key = fold(feature_map, to_host, dtype=dtype)
        self.has_dense = any(np.any(side.dense) for side in (self.query, self.key))
        self.count, self.m, self.d = self.query.rows.shape
        self.lanes = BYTES // self.dtype.itemsize
        self.panel = VECTORS * self.lanes
        self.gaussian = feature_map.parameters.kernel == "gaussian"
        self._by_size: dict[int, tuple[Sizes, Any, Any]] = {}

    def for_values(self, e: int | None) -> tuple[Sizes, Any, Any]:
        """The sizes and both sides' constants for values of size e; of any size if e is None."""
        if e is None:
            e = next(iter(tuple(self._by_size)), self.d)
        found = self._by_size.get(e)
        if found is None:
            sizes = self.layout(e)
            found = sizes, *self.constants(sizes)
            if len(self._by_size) >= MOST_SIZES:
                self._by_size = {}
            self._by_size[e] = found
        return found

    @cached_property
    def of_points(self) -> tuple[Sizes, Any, Any]:
        """As `for_values`, for features of points: the matrices `dense` are lower triangular.

        Attention does not use them: the decomposition takes as long as it would save there at some thousand points.
        """
        if not self.has_dense:
            return self.for_values(None)
        s, sides = self.layout(self.d), (self.query, self.key)
        first, second = (self._packed(replace(side, dense=lower_triangular(side.dense)), s) for side in sides)
        return s, first, second

    def layout(self, e: int) -> Sizes:
        """The sizes of a problem with values of size e, and where the constants are."""
        d, m = self.d, self.m
        d_pad, m_pad, e_pad = (self.padded(x) for x in (d, m, e))
        center = -(-HEADER // self.lanes) * self.lanes
        linear, near_center = center + d_pad, center + 2 * d_pad
        near_scaled = near_center + d_pad
        near_shift = near_scaled + d_pad
        column = near_shift + d_pad
        rows = column + m_pad
        panels = rows + m * d_pad
        dense = panels + -(-m_pad // self.panel) * d * self.panel
        matrix = -(-d_pad // self.panel) * d * self.panel if self.has_dense else 0
        dense_back = dense + matrix
        zeros = dense_back + matrix
        total = self.padded(zeros + max(d_pad, e_pad))
        places = center, linear, near_center, near_scaled, near_shift, column, rows, panels, dense, dense_back
        return Sizes(
            d, d_pad, m, m_pad, e, e_pad, m_pad + self.lanes, *places, int(self.has_dense), int(self.gaussian), total
        )

    def padded(self, x: int) -> int:
        """The size rounded up to whole vectors, at least one."""
        return max(1, -(-x // self.lanes)) * self.lanes

    def constants(self, s: Sizes) -> tuple[Any, Any]:
        """The packed constants of queries and of keys, (count, s.total)."""
        return self._packed(self.query, s), self._packed(self.key, s)

    def _packed(self, side: FoldedSide, s: Sizes) -> Any:
        out = np.zeros((self.count, s.total), self.dtype)
        out[:, ALPHA], out[:, OFFSET], out[:, BETA] = side.root, LOG2E * side.offset, LOG2E * side.beta
        out[:, ONE], out[:, NEAR_SCALE] = 1, LOG2E
        out[:, NEAR_ALPHA], out[:, NEAR_HALF], out[:, NEAR_HALF_SCALED] = LOG2E * side.root, -LOG2E / 2, -0.5 / LOG2E
        for place, x in (
            (s.center, side.center),
            (s.linear, LOG2E * side.linear),
            (s.near_center, side.near_center),
            (s.near_scaled, LOG2E * side.near_center),
            (s.near_shift, LOG2E * (side.center - side.near_center)),
        ):
            out[:, place : place + s.d] = x
        out[:, s.column : s.column + s.m_pad] = -np.inf
        out[:, s.column : s.column + s.m] = LOG2E * side.column
        matrix = LOG2E * side.rows
        rows = np.zeros((self.count, s.m, s.d_pad), self.dtype)
        rows[:, :, : s.d] = matrix
        out[:, s.rows : s.rows + s.m * s.d_pad] = rows.reshape(self.count, s.m * s.d_pad)
        self._put_panels(out, s.panels, np.swapaxes(matrix, -1, -2), s.m_pad)
        if s.has_dense:
            dense = math.sqrt(LOG2E) * side.dense
            self._put_panels(out, s.dense, dense, s.d_pad)
            self._put_panels(out, s.dense_back, np.swapaxes(dense, -1, -2), s.d_pad)
        return out

    def _put_panels(self, out: Any, place: int, matrix: Any, columns: int) -> None:
        """Write a matrix (count, d, n) into the rows of `out`, panel by panel: (panels, d, panel)."""
        count, d, n = matrix.shape
        panels = -(-columns // self.panel)
        spread = np.zeros((count, d, panels * self.panel), self.dtype)
        spread[:, :, :n] = matrix
        spread = spread.reshape(count, d, panels, self.panel).swapaxes(1, 2)
        size = panels * d * self.panel
        out[:, place : place + size] = spread.reshape(count, size)


def lower_triangular(dense: Any) -> Any:
    """The lower triangular matrices with the same quadratic forms |z dense|^2, (count, d, d)."""
    return np.swapaxes(np.linalg.qr(np.swapaxes(dense, -1, -2), mode="r"), -1, -2)


MOST_SIZES = 4
"""The most sizes of values for which a packed map keeps its constants."""


def pack(feature_map: Any, dtype: str, e: int | None) -> tuple[Packed, Sizes, Any, Any]:
    """The packed map, its sizes and both sides' constants for values of size e; of any size if e is None.

    A forward and a backward pass share the packed map, though their values differ in size.
    """
    packed = packed_map(feature_map, dtype)
    return packed, *packed.for_values(e)


def packed_map(feature_map: Any, dtype: str) -> Packed:
    """The packed map: the same object until a tensor of the map is written to."""
    packed: Packed = derived(feature_map, ("numba", dtype), lambda: Packed(feature_map, dtype))
    return packed


# Batches -------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def indices(batch: tuple[int, ...], whole: tuple[int, ...]) -> Constant:
    """The flat index of the entry of `batch` that broadcasts to each entry of `whole`."""
    return _constant(np.broadcast_to(np.arange(math.prod(batch), dtype=np.int64).reshape(batch), whole))


@lru_cache(maxsize=1024)
def members(batch: tuple[int, ...], whole: tuple[int, ...]) -> tuple[Constant, Constant]:
    """The query heads (entries of `whole`), sorted by key head (entry of `batch`), and the start of each key head."""
    heads = indices(batch, whole).values
    starts = np.zeros(math.prod(batch) + 1, np.int64)
    np.cumsum(np.bincount(heads, minlength=math.prod(batch)), out=starts[1:])
    return _constant(np.argsort(heads, kind="stable").astype(np.int64)), _constant(starts)


@lru_cache(maxsize=1024)
def _broadcast(shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    return np.broadcast_shapes(*shapes)


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The shape that leading axes broadcast to."""
    return _broadcast(tuple(tuple(shape) for shape in shapes))


def empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """A new array of the library and device of `like`."""
    if is_torch(like):
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    return np.empty(shape, dtype)


def target(out: Any, inputs: Sequence[Any], shape: tuple[int, ...], dtype: str) -> Any:
    """The array that a kernel writes its result to: `out`, or a new array if `out` cannot be used.

    `out` cannot be used if it is None, if a kernel cannot write to it in place, or if it shares memory with an input or
    itself.
    """
    if out is None or not usable_where_it_lies(out):
        return empty(inputs[0], shape, dtype)
    given, places = Address(out), [Address(x).extent() for x in inputs if x is not None]
    low, high = given.extent()
    repeated = any(step == 0 and size > 1 for step, size in zip(given.strides, given.shape, strict=True))
    if repeated or any(start < high and low < stop for start, stop in places):
        return empty(inputs[0], shape, dtype)
    if is_torch(out) and not out.is_inference():
        import torch

        torch.autograd.graph.increment_version(out)  # so that autograd knows of the write
    return out


def numpy_or_torch(like: Any, x: Any) -> Any:
    """A NumPy array as an array of the library of `like`, without a copy."""
    if is_torch(like):
        import torch

        return torch.from_numpy(x)
    return x


def promoted(*names: str) -> str:
    """The dtype that floating dtypes promote to."""
    distinct = set(names)
    if distinct == {"float16", "bfloat16"}:
        return "float32"
    return max(distinct, key=["float16", "bfloat16", "float32", "float64"].index)


def widened(name: str) -> str:
    """The dtype that kernels compute in for arrays of a dtype."""
    return "float64" if name == "float64" else "float32"


def summed_to(gradient: Any, shape: tuple[int, ...]) -> Any:
    """The sum over the axes along which an array of a shape was broadcast."""
    while gradient.ndim > len(shape):
        gradient = gradient.sum(axis=0)
    axes = tuple(i for i, size in enumerate(shape) if size == 1 and gradient.shape[i] != 1)
    return gradient.sum(axis=axes, keepdims=True) if axes else gradient


def like_array(value: Any, like: Any) -> Any:
    """A NumPy array as an array of the library and dtype of `like`."""
    if is_torch(like):
        return numpy_or_torch(like, np.ascontiguousarray(value)).to(like.dtype)
    return value.astype(like.dtype, copy=False)


def expanded(x: Any, shape: tuple[int, ...]) -> Any:
    """An array broadcast to a shape, without a copy."""
    return x.expand(shape) if is_torch(x) else np.broadcast_to(x, shape)
