"""Namespaces, dtypes, devices and host copies of arrays, for all other modules of the package.

Only this module imports array-api-compat, and only this module distinguishes between array libraries. It imports no
array library itself: a caller who passes an array has already imported its library.
"""

import sys
from collections.abc import Callable, Iterable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import array_api_compat

from favorsharp._typing import Array, DType, Namespace

P = ParamSpec("P")
R = TypeVar("R")

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""Accepted dtypes, from narrow to wide. float16 and bfloat16 are widened to float32 before anything is summed."""


def is_array(x: object) -> bool:
    """Whether x is an array of a library that implements the standard."""
    # under torch.compile(dynamic=True) a traced number has no attributes to look up
    return type(x) not in (bool, int, float) and array_api_compat.is_array_api_obj(x)


def namespace_of(*arrays: Array | None) -> Namespace:
    """The namespace that the arrays share; None entries are ignored."""
    return array_api_compat.array_namespace(*(x for x in arrays if x is not None))


def library_of(x: Array) -> str:
    """The name of the library x belongs to: "numpy", "torch", "cupy", "jax", "array_api_strict", ..."""
    if array_api_compat.is_numpy_array(x):
        return "numpy"
    if array_api_compat.is_torch_array(x):
        return "torch"
    if array_api_compat.is_jax_array(x):
        return "jax"
    return type(x).__module__.partition(".")[0]


def device_of(x: Array) -> str:
    """The kind of device that x is on: "cpu", "cuda", or the library's own name for it."""
    library = library_of(x)
    if library == "numpy":
        return "cpu"
    if library == "torch":
        return str(x.device.type)
    if library == "cupy":
        return "cuda"
    if library == "jax":
        return "traced" if is_traced(x) else str(next(iter(x.devices())).platform)
    name = getattr(array_api_compat.device(x), "_device", None) or str(array_api_compat.device(x))
    return "cpu" if str(name).lower().startswith("cpu") else str(name)


def dtype_name(x: Array | DType) -> str:
    """The short name of the dtype, which is the same in every library, such as "float32"."""
    if isinstance(x, type):  # NumPy names its dtypes by scalar types
        return x.__name__
    dtype = getattr(x, "dtype", x)
    return _numpy_label(dtype) if type(dtype).__module__.startswith("numpy") else str(dtype).rpartition(".")[2]


@lru_cache(maxsize=64)  # NumPy builds the string at every call, which is a noticeable cost in small calls
def _numpy_label(dtype: DType) -> str:
    return str(dtype)


def is_traced(x: Array) -> bool:
    """Whether the numbers of x are unknown or must not be read directly, so that no decision may depend on them.

    True for torch tensors under `torch.compile`, in functorch transforms and in modes that trace or fake operations
    (`make_fx`, FakeTensorMode); for `meta` tensors; for subclasses that hold their numbers elsewhere (fake tensors,
    DTensors), from which a kernel would read an invalid pointer; for tensors with a tangent, which a kernel would lose;
    for JAX tracers; and for lazy arrays.
    """
    if array_api_compat.is_torch_array(x):
        torch = sys.modules["torch"]
        if torch.compiler.is_compiling():
            return True
        return bool(
            x.device.type == "meta"
            or type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
            or torch._C._functorch.peek_interpreter_stack() is not None
            or is_traced_by_mode()
            or (in_forward_mode(torch) and torch.autograd.forward_ad.unpack_dual(x).tangent is not None)
        )
    if array_api_compat.is_jax_array(x):
        return isinstance(x, sys.modules["jax"].core.Tracer)
    return bool(array_api_compat.is_lazy_array(x))


def is_followed(x: Array) -> bool:
    """Whether each operation on x has to go through its library: x is traced, or a mode of torch follows operations.

    Such a mode counts, logs, keeps or replaces the result of each operation (`FlopCounterMode`, selective checkpoints).
    It does not see kernels.
    """
    if is_traced(x):
        return True
    return bool(array_api_compat.is_torch_array(x)) and _has_modes(sys.modules["torch"])


def tensor_fault(x: Any) -> str | None:
    """Why the entries of a tensor cannot be read from its memory, and what is accepted; None if they can be read."""
    if x.is_nested:
        return "a nested one; accepted: a padded tensor with key_mask, or a packed one with cu_seqlens"
    if x.layout != sys.modules["torch"].strided:
        return f"layout {x.layout}; accepted: torch.strided, as to_dense() gives"
    if is_followed(x) or x.numel() == 0 or x._is_zerotensor():
        return None
    last = x.storage_offset() + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    if x.untyped_storage().nbytes() < (last + 1) * x.element_size():
        return f"one of shape {tuple(x.shape)} whose storage was freed; accepted: one with its memory"
    return None


def _has_modes(torch: Any) -> bool:
    """Whether a mode of torch sees operations; a mode that only sets the device of new tensors does not count."""
    if torch._C._len_torch_dispatch_stack():
        return True
    count = torch._C._len_torch_function_stack()
    return count > 0 and any(type(torch._C._get_function_stack_at(i)).__name__ != "DeviceContext" for i in range(count))


def _modes_trace(torch: Any) -> bool:
    """Whether one of the active modes returns tensors without numbers, or records operations."""
    keys = torch._C._TorchDispatchModeKey
    if any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL)):
        return True
    return bool(torch._ops._len_torch_dispatch_stack_pre_dispatch())


def is_traced_by_mode() -> bool:
    """Whether a mode of torch records or fakes operations (`make_fx`, FakeTensorMode): results have no numbers."""
    torch = sys.modules.get("torch")
    return torch is not None and _has_modes(torch) and _modes_trace(torch)


def is_scripting() -> bool:
    """Whether `torch.jit.trace`, or an exporter that uses it, records operations."""
    torch = sys.modules.get("torch")
    return torch is not None and not torch.compiler.is_compiling() and bool(torch._C._is_tracing())


def is_compiling() -> bool:
    """Whether torch is tracing a call to compile it."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.compiler.is_compiling())


def in_forward_mode(torch: Any) -> bool:
    """Whether torch is inside `torch.autograd.forward_ad.dual_level()`."""
    return bool(torch.autograd.forward_ad._current_level >= 0)


def has_fused_attention(*arrays: Array) -> bool:
    """Whether `fused_attention` takes these arrays: tensors on a GPU or a like device, that no derivative follows.

    Some of torch's kernels have no second derivatives and no derivatives in forward mode.
    """
    if not array_api_compat.is_torch_array(arrays[0]) or arrays[0].device.type == "cpu":
        return False
    torch = sys.modules["torch"]
    differentiated = in_forward_mode(torch) or (torch.is_grad_enabled() and any(x.requires_grad for x in arrays))
    return not differentiated and not any(is_followed(x) for x in arrays)


def fused_attention(q: Array, k: Array, v: Array, bias: Array, scale: float) -> Array:
    """Softmax attention with the bias (*b, n, s), by the kernel that torch chooses for the device."""
    attend = sys.modules["torch"].nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=bias, scale=scale)


def signature_of(x: Any, *, with_layout: bool = False) -> Any:
    """A hashable value of all that the checks and the choice of an implementation read of x; None if it has none.

    There is one for plain NumPy arrays, for torch tensors, and for values of exactly the types bool, int, str and
    None. `with_layout` adds the memory layout of an array, such as its strides.
    """
    kind = type(x)
    module = kind.__module__
    if module == "numpy":
        if kind.__name__ != "ndarray":
            return None
        return (x.shape, x.dtype, x.strides, x.flags.aligned) if with_layout else (x.shape, x.dtype)
    if module == "torch":
        if kind.__name__ != "Tensor":
            return None
        try:
            told = (kind, x.shape, x.dtype, x.device, x.layout, x.requires_grad)
            return (*told, x.stride(), x.is_neg()) if with_layout else told
        except RuntimeError:  # nested tensors have no shape, and some layouts no strides
            return None
    return (kind, x) if x is None or kind is bool or kind is int or kind is str else None


def stamps_of(arrays: Iterable[Array]) -> tuple[Any, ...]:
    """A value that changes when torch tensors are written to in place, or begin or cease to need gradients."""
    torch = sys.modules.get("torch")
    if torch is None:
        return ()
    kind = torch.Tensor  # parameters too, which an optimiser writes to
    held = [x for x in arrays if isinstance(x, kind)]
    try:
        return tuple([(x.requires_grad, x._version) for x in held])
    except RuntimeError:  # tensors made in inference mode have no version
        return tuple([None if x.is_inference() else (x.requires_grad, x._version) for x in held])


def mode_of_library() -> Any:
    """The global settings that torch's results depend on; None if torch traces, transforms or follows operations."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    if (
        torch.compiler.is_compiling()
        or (inner := torch._C)._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or inner._len_torch_dispatch_stack()
        or inner._is_tracing()
        or (inner._len_torch_function_stack() and _has_modes(torch))
    ):
        return None
    return bool(torch.is_grad_enabled()), bool(torch.is_inference_mode_enabled())


def records_gradients(arrays: Iterable[Array]) -> bool:
    """Whether torch would record operations on any of the arrays for a backward pass."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_grad_enabled():
        return False
    return any(getattr(x, "requires_grad", False) for x in arrays)


def needs_gradient(x: Array) -> bool:
    """Whether the library would record operations on x for a backward pass."""
    if array_api_compat.is_torch_array(x):
        return bool(x.requires_grad and sys.modules["torch"].is_grad_enabled())
    return False


def without_gradient(x: Array) -> Array:
    """The same values, treated as constants in differentiation."""
    if array_api_compat.is_torch_array(x):
        return x.detach()
    if array_api_compat.is_jax_array(x):
        return sys.modules["jax"].lax.stop_gradient(x)
    return x


def compute_dtype(xp: Namespace, *arrays: Array) -> DType:
    """The common dtype of the arrays, widened to at least float32; sums and states have this dtype."""
    dtype = result_dtype(xp, *arrays)
    return xp.float32 if dtype_name(dtype) in ("float16", "bfloat16") else dtype


def result_dtype(xp: Namespace, *arrays: Array) -> DType:
    """The dtype that the arrays promote to."""
    dtypes = [x.dtype for x in arrays]
    names = {dtype_name(dtype) for dtype in dtypes}
    if len(names) == 1:
        return dtypes[0]
    if "bfloat16" in names:  # unknown to the standard, and torch's own function for it cannot be compiled
        return named_dtype(xp, "float64" if "float64" in names else "float32")
    return xp.result_type(*dtypes)


def statistics_dtype(x: Array) -> DType:
    """The widest dtype that the device of x supports; moments and fits are computed in it.

    It is float64 nearly everywhere. It is float32 on devices without float64 (Metal, the no_float64 device of
    array-api-strict) and in JAX, unless 64 bits are enabled there.
    """
    xp = namespace_of(x)
    device = None if library_of(x) == "jax" else array_api_compat.device(x)
    known = xp.__array_namespace_info__().dtypes(device=device, kind="real floating")
    return known.get("float64", xp.float32)


def under_own_settings(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function so that some global settings of the caller do not affect its arithmetic.

    The functions here rely on exp of a large negative number being 0, so `numpy.errstate(under="raise")` must not apply
    to them; settings for overflow and invalid results stay as the caller has them. They also rely on broadcasting of
    arrays of different ranks, which the array API standard allows, so `jax.numpy_rank_promotion("raise")` must not
    apply either.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        np, jax = sys.modules.get("numpy"), sys.modules.get("jax")
        if np is None or is_compiling():
            return function(*args, **kwargs)
        with np.errstate(under="ignore"):
            if jax is None or jax.config.jax_numpy_rank_promotion == "allow":
                return function(*args, **kwargs)
            with jax.numpy_rank_promotion("allow"):
                return function(*args, **kwargs)

    return call


def cast(x: Array, dtype: DType) -> Array:
    """The values of x in the given dtype; x itself if it has that dtype already."""
    return x if x.dtype == dtype else namespace_of(x).astype(x, dtype)


def nearest_dtype(name: str, like: Array) -> DType:
    """The dtype of that name, or a substitute if the library or the device of `like` does not have it.

    The substitute for float16 and bfloat16 is float32, which holds the same numbers. The substitute for float64 is
    `statistics_dtype`.
    """
    xp = namespace_of(like)
    if name == "float64":
        return statistics_dtype(like)
    return named_dtype(xp, name if hasattr(xp, name) or name not in FLOATS else "float32")


def named_dtype(xp: Namespace, name: str) -> DType:
    """The dtype object of that name in the library."""
    return getattr(xp, name)


def from_host(values: Any, like: Array, dtype: DType | None = None) -> Array:
    """Host values as an array of like's library, on its device, in the given or like's dtype."""
    dtype = like.dtype if dtype is None else dtype
    return namespace_of(like).asarray(values, dtype=dtype, **on_device_of(like))


def on_device_of(x: Array) -> dict[str, Any]:
    """The keyword that makes a creation function put its result on the device of x; none if x is a JAX tracer."""
    if array_api_compat.is_jax_array(x) and is_traced(x):
        return {}
    return {"device": array_api_compat.device(x)}


def to_host(x: Array) -> Any:
    """The values of x as a NumPy array, with bfloat16 as float32; a copy unless they are on the host already."""
    import numpy as np

    if array_api_compat.is_torch_array(x):
        if is_traced(x):
            raise TypeError(
                "the numbers of a tensor are needed, and it is traced or faked (torch.compile, make_fx, a fake or meta "
                "tensor, torch.func); accepted: a tensor with numbers, outside of these"
            )
        if (fault := tensor_fault(x)) is not None:
            raise TypeError(f"the numbers of a tensor are needed, and it is {fault}")
        x = x.detach().cpu()
        return np.asarray((x.float() if dtype_name(x) == "bfloat16" else x).numpy())
    if array_api_compat.is_cupy_array(x):
        return x.get()
    if library_of(x) == "array_api_strict":
        x = array_api_compat.to_device(x, sys.modules["array_api_strict"].Device("CPU_DEVICE"))
    host = np.asarray(x)
    return host.astype(np.float32) if dtype_name(host) == "bfloat16" else host  # NumPy has no bfloat16 of its own


def device_label(x: Array) -> Any:
    """A value that is equal for two arrays on the same device; None if the device is not known."""
    if library_of(x) == "jax":
        return None if is_traced(x) else frozenset(x.devices())
    return array_api_compat.device(x)


def broadcast_shapes(*shapes: Iterable[int]) -> tuple[int, ...]:
    """The shape that the given shapes broadcast to; raises ValueError if they do not broadcast."""
    result: list[int] = []
    for shape in shapes:
        sizes = list(shape)
        result = [1] * (len(sizes) - len(result)) + result
        offset = len(result) - len(sizes)
        for axis, size in enumerate(sizes, offset):
            if size != 1 and result[axis] not in (1, size):
                raise ValueError(f"shapes {', '.join(str(tuple(s)) for s in shapes)} do not broadcast")
            result[axis] = size if size != 1 else result[axis]
    return tuple(result)


def recorded_gradients(
    function: Callable[..., tuple[Array, ...]], arrays: Iterable[Array], gradients: Iterable[Array | None]
) -> list[Array | None]:
    """Differentiate a function of torch tensors, given the gradients of its results; None for a tensor that needs none.

    If torch records gradients, these are recorded too, so that they can be differentiated again.
    """
    torch = sys.modules["torch"]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [x.view_as(x) for x in arrays]  # autograd.grad stops at these views; the graph goes on to the arrays
        reached = [
            (x, gradient)
            for x, gradient in zip(function(*own), gradients, strict=True)
            if gradient is not None and x.requires_grad
        ]
        wanted = [x for x in own if x.requires_grad]
        if not reached:
            return [None] * len(own)
        results, given = zip(*reached, strict=True)
        found = iter(torch.autograd.grad(results, wanted, given, create_graph=again, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in own]


def recorded_or_followed(*gradients: Array | None) -> bool:
    """Whether kernels cannot process torch's gradients, because these are recorded themselves, traced or followed."""
    if sys.modules["torch"].is_grad_enabled():
        return True
    return any(x is not None and is_followed(x) for x in gradients)


def differentiate(
    function: Callable[..., Array], arrays: tuple[Array, ...]
) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
    """The result of function(*arrays), and a function from its gradient to the gradients of the arrays.

    The library of the arrays does the differentiation.
    """
    library = library_of(arrays[0])
    if library == "torch":
        torch = sys.modules["torch"]
        leaves = [x.detach().requires_grad_() for x in arrays]
        with torch.enable_grad():
            out = function(*leaves)

        def pullback(gradient: Array) -> tuple[Array, ...]:
            if not out.requires_grad:  # an empty result
                return tuple(torch.zeros_like(x) for x in leaves)
            found: tuple[Array, ...] = torch.autograd.grad(
                out, leaves, gradient, retain_graph=True, materialize_grads=True
            )
            return found

        return out.detach(), pullback
    if library == "jax":
        result: tuple[Array, Callable[[Array], tuple[Array, ...]]] = sys.modules["jax"].vjp(function, *arrays)
        return result
    raise TypeError(
        f"{library} arrays cannot be differentiated by their own library, and no backend that can is installed; "
        "accepted: NumPy arrays with favorsharp[cpu], CuPy arrays with favorsharp[cuda13], torch tensors, JAX arrays"
    )
