"""Checks of the arguments of public functions.

Every message names the argument, what was passed, and what is accepted.
"""

import math
import operator
from collections.abc import Iterable
from typing import Any

from favorsharp._arrays import FLOATS, broadcast_shapes, device_label, dtype_name, is_array, library_of, namespace_of
from favorsharp._autodiff import is_followed, is_scripting, tensor_fault
from favorsharp._typing import Array, DType, Namespace


def check_array(name: str, x: Any) -> None:
    """Raise unless x is an array whose items lie in memory; NumPy's masked arrays and matrices are refused too."""
    if type(x).__module__.startswith("torch.fx."):
        raise TypeError(
            f"{name} is a {_kind(x)} of torch.fx.symbolic_trace, which has no shape; accepted there: a function that "
            "torch.fx.wrap makes a leaf; or use torch.export or make_fx, which trace with example tensors"
        )
    if not is_array(x):
        raise TypeError(
            f"{name} must be an array of an array API library (NumPy, torch, CuPy, JAX, ...), got {_kind(x)}"
        )
    if library_of(x) == "numpy" and type(x).__name__ in ("MaskedArray", "matrix"):
        raise TypeError(f"{name} must be a plain array, got {_kind(x)}, whose mask or operators would be ignored")
    if library_of(x) == "torch":
        _check_tensor(name, x)


def _check_tensor(name: str, x: Any) -> None:
    if is_scripting():
        raise TypeError(
            "torch.jit.trace (and torch.onnx.export with dynamo=False, which uses it) takes sizes for constants, so "
            "that its graph would be wrong at other lengths; accepted: torch.export, torch.compile, make_fx, and "
            "torch.onnx.export with dynamo=True"
        )
    if (fault := tensor_fault(x)) is not None:
        raise TypeError(f"{name} must be a dense tensor, got {fault}")


def check_floats(**named: Any) -> Namespace:
    """Check that the named values are real floating arrays of one library on one device.

    Returns
    -------
    namespace
        The functions of the library that the arrays share.
    """
    arrays = named
    for name, x in arrays.items():
        check_array(name, x)
    check_together(**arrays)
    for name, x in arrays.items():
        dtype = dtype_name(x)
        if dtype not in FLOATS or (dtype == "bfloat16" and library_of(x) == "numpy"):
            raise TypeError(f"{name} has dtype {dtype}; accepted: {', '.join(FLOATS)} where the library has them")
    return namespace_of(*arrays.values())


def check_in_memory(**named: Any) -> None:
    """Raise if any of the named arrays is a dask array, in functions that take only arrays in memory."""
    lazy = [name for name, x in named.items() if library_of(x) == "dask"]
    if lazy:
        raise TypeError(
            f"{', '.join(lazy)} must be in memory, got dask arrays; accepted: what .compute() returns. moments and fit "
            "take dask arrays, and so do kernel_matvec and nadaraya_watson with a NumPy feature map"
        )


def check_unfollowed(name: str, x: Array) -> None:
    """Raise if kernels cannot read an array that a pullback gets, because it is traced or followed by a mode."""
    if is_followed(x):
        raise TypeError(
            f"{name} is traced, or a mode of torch follows operations, but the forward call was not; accepted: both "
            "calls inside the same trace or mode"
        )


def check_together(**named: Any) -> None:
    """Check that the named arrays belong to one library and live on one device; None entries are skipped."""
    arrays = {name: x for name, x in named.items() if x is not None}
    libraries = {name: library_of(x) for name, x in arrays.items()}
    if len(set(libraries.values())) > 1:
        check_in_memory(**arrays)
        raise TypeError(f"all arrays must come from one library, got {_listing(libraries)}")
    spread = {name: "a DTensor" if type(x).__name__ == "DTensor" else "not one" for name, x in arrays.items()}
    if len(set(spread.values())) > 1:
        raise TypeError(
            f"all tensors must be DTensors or none, got {_listing(spread)}; favorsharp.distributed.linear_attention "
            "takes DTensors with a map of plain tensors"
        )
    devices = {name: device_label(x) for name, x in arrays.items()}
    known = [device for device in devices.values() if device is not None]
    if any(device != known[0] for device in known):  # CuPy's devices can be compared, but have no hash
        raise ValueError(f"all arrays must be on one device, got {_listing(devices)}")


def check_mask(name: str, mask: Any, letters: str, **of: Array) -> None:
    """Check that a mask is boolean, and fits the library, device, leading axes and point axis of the array it masks."""
    if mask is None:
        return
    ((owner, x),) = of.items()
    points = x.shape[:-1]
    check_array(name, mask)
    check_together(**{owner: x, name: mask})
    if dtype_name(mask) not in ("bool", "bool_"):
        raise TypeError(f"{name} has dtype {dtype_name(mask)}; accepted: bool, True where a point is visible")
    if mask.ndim < 1 or mask.shape[-1] != points[-1]:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; accepted: {letters} with last axis {points[-1]}")
    check_broadcast(letters, **{name: mask.shape[:-1], owner: points[:-1]})


def check_points(name: str, x: Array, letters: str) -> None:
    """Check that an array has a point axis and a coordinate axis."""
    if x.ndim < 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; accepted: {letters}, two axes at least")
    if x.shape[-1] < 1:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; accepted: {letters} with a last axis of 1 or more")


def check_same_size(letter: str, **named: tuple[int, int]) -> None:
    """Check that axes that share a letter have the same length; each entry is (axis, length)."""
    sizes_found = [size for _, size in named.values()]  # symbolic sizes of torch.export have no hash
    if any(size != sizes_found[0] for size in sizes_found):
        sizes = ", ".join(f"{name} has {letter}={size}" for name, (_, size) in named.items())
        raise ValueError(f"{' and '.join(named)} must agree in {letter}: {sizes}")


def check_broadcast(letters: str, **shapes: Iterable[int]) -> tuple[int, ...]:
    """Check that leading axes broadcast together, and return what they broadcast to."""
    try:
        return broadcast_shapes(*shapes.values())
    except ValueError:
        listing = _listing({name: tuple(shape) for name, shape in shapes.items()})
        raise ValueError(f"leading axes *b must broadcast together ({letters}), got {listing}") from None


def check_scale(scale: Any, default: float) -> float:
    """Turn scale into a positive finite float; None means the default."""
    if scale is None:
        return default
    if isinstance(scale, bool | str | complex):
        raise TypeError(f"scale must be a positive finite number, got {scale!r}")
    try:
        value = float(scale)
    except (TypeError, ValueError):
        raise TypeError(f"scale must be a positive finite number, got {_kind(scale)}") from None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"scale must be a positive finite number, got {value}")
    return value


def check_integer(name: str, value: Any, least: int) -> int:
    """Turn value into an int that is no smaller than least."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer of {least} or more, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer of {least} or more, got {_kind(value)}") from None
    if number < least:
        raise ValueError(f"{name} must be an integer of {least} or more, got {number}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """Check that value is True or False; a mask that is passed in place of a flag would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_kind(value)}")
    return value


def check_choice(name: str, value: Any, known: Iterable[str], also: str = "") -> str:
    """Check that value is one of the known names; the error lists them."""
    names = tuple(known)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(names)}{also}, got {_kind(value)}")
    if value not in names:
        raise ValueError(f"{name} {value!r} is unknown; accepted: {', '.join(names)}{also}")
    return value


def check_attention(
    q: Array, k: Array, v: Array, *, is_causal: bool, key_mask: Array | None, enable_gqa: bool
) -> tuple[Namespace, int]:
    """Check the arguments that all attention functions share; return the namespace and the query heads per key head."""
    xp = check_floats(q=q, k=k, v=v)
    check_points("q", q, "(*b, n, d)")
    check_points("k", k, "(*b, s, d)")
    check_points("v", v, "(*b, s, e)")
    check_same_size("d", q=(-1, q.shape[-1]), k=(-1, k.shape[-1]))
    check_same_size("s", k=(-2, k.shape[-2]), v=(-2, v.shape[-2]))
    check_mask("key_mask", key_mask, "(*b, s)", k=k)
    group = check_group(check_flag("enable_gqa", enable_gqa), q, k)
    if group > 1 and (v.ndim < 3 or v.shape[-3] not in (1, k.shape[-3])):
        raise ValueError(
            f"enable_gqa needs v to have the heads of k: v has shape {tuple(v.shape)}, k has {tuple(k.shape)}"
        )
    heads = (*q.shape[:-3], k.shape[-3]) if group > 1 else q.shape[:-2]
    check_broadcast("q (*b, n, d), k (*b, s, d), v (*b, s, e)", q=heads, k=k.shape[:-2], v=v.shape[:-2])
    if check_flag("is_causal", is_causal) and q.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"is_causal needs as many queries as keys: q has n={q.shape[-2]}, k has s={k.shape[-2]}; "
            "to continue after a prefix, pass its state"
        )
    return xp, group


def check_group(enable_gqa: bool, q: Array, k: Array, names: tuple[str, str] = ("q", "k")) -> int:
    """The number of query heads that share a key head; 1 without `enable_gqa`."""
    if not enable_gqa:
        return 1
    for name, x in zip(names, (q, k), strict=True):
        if x.ndim < 3:
            raise ValueError(
                f"enable_gqa needs a head axis: {name} has shape {tuple(x.shape)}; accepted: (*b, heads, n, d)"
            )
    heads, key_heads = q.shape[-3], k.shape[-3]
    if key_heads == 0 or heads % key_heads:
        raise ValueError(
            f"enable_gqa needs a multiple of the key heads: {names[0]} has {heads} heads, {names[1]} has {key_heads}"
        )
    return int(heads // key_heads)


def check_window(window: Any, q: Array, k: Array) -> int:
    """Check the block length of a window, which needs as many queries as keys; 0 means no window."""
    length = check_integer("window", window, 0)
    if length and q.shape[-2] != k.shape[-2]:
        raise ValueError(f"window needs as many queries as keys: q has n={q.shape[-2]}, k has s={k.shape[-2]}")
    return length


def check_window_of_state(held: int, window: int, is_causal: bool) -> None:
    """Check that a call that continues from a state has the window of the state, and is causal if there is a window."""
    if held != window:
        raise ValueError(f"window must be that of the state, {held}, got {window}")
    if window and not is_causal:
        raise ValueError("a window with a state needs is_causal=True: a bidirectional window takes no state")


def check_group_of_state(enable_gqa: bool, q: Array, batch: tuple[int, ...]) -> int:
    """The number of query heads that share a head of a state with these leading axes; 1 without `enable_gqa`."""
    if not check_flag("enable_gqa", enable_gqa):
        check_broadcast("q (*b, n, d)", q=q.shape[:-2], state=batch)
        return 1
    heads, key_heads = (shape[-1] if shape else 0 for shape in (q.shape[:-2], batch))
    if key_heads == 0 or heads == 0 or heads % key_heads:
        raise ValueError(
            f"enable_gqa needs a multiple of the key heads: q has {heads} heads, the state has {key_heads}"
        )
    return int(heads // key_heads)


def check_out(out: Any, q: Array, shape: tuple[int, ...], dtype: DType) -> None:
    """Check that out has the library and the device of q, the given shape and dtype, and can be written to."""
    check_floats(q=q, out=out)
    if library_of(out) == "jax":
        raise TypeError("out must be an array that can be written to; JAX arrays cannot: use the returned value")
    if tuple(out.shape) != shape or out.dtype != dtype:
        raise ValueError(
            f"out has shape {tuple(out.shape)} and dtype {dtype_name(out)}; accepted: {shape} and {dtype_name(dtype)}"
        )
    if library_of(out) == "numpy" and not out.flags.writeable:
        raise ValueError("out must be an array that can be written to, got a read-only one")


def _kind(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__name__}".removeprefix("builtins.")


def _listing(named: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in named.items())
