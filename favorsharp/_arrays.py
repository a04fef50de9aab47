"""Namespaces, dtypes, devices and host copies of arrays, for all other modules of the package.

Only this module and `_autodiff` import array-api-compat and distinguish between array libraries. They import no array
library themselves: a caller who passes an array has already imported its library.
"""

import sys
from collections.abc import Callable, Iterable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import array_api_compat

from favorsharp._autodiff import is_compiling, is_traced, tensor_fault
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


def signature_of(x: Any, *, with_layout: bool = False) -> Any:
    """A hashable value that holds all that checks and the choice of an implementation read of x, or None.

    Plain NumPy arrays, torch tensors, and values of exactly the types bool, int, str and None have such a value.
    `with_layout` adds the memory layout of an array, such as its strides.
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
    """A value that changes when a torch tensor is written to in place, or begins or ceases to need gradients."""
    torch = sys.modules.get("torch")
    if torch is None:
        return ()
    kind = torch.Tensor  # this includes parameters, which an optimiser writes to
    held = [x for x in arrays if isinstance(x, kind)]
    try:
        return tuple([(x.requires_grad, x._version) for x in held])
    except RuntimeError:  # tensors made in inference mode have no version
        return tuple([None if x.is_inference() else (x.requires_grad, x._version) for x in held])


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
    if "bfloat16" in names:  # the standard does not know it, and torch.compile cannot trace torch's own function for it
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


def is_on_gpu(x: Array) -> bool:
    """Whether the host would have to wait for the device of x in order to read a number from it."""
    if array_api_compat.is_torch_array(x):
        return bool(x.device.type != "cpu")
    return bool(array_api_compat.is_cupy_array(x))


def cholesky(x: Array) -> Array:
    """The lower Cholesky factor, (*b, d, d).

    If x has none, it is NaN on a GPU, where the host does not wait for the check.
    """
    if not (array_api_compat.is_torch_array(x) and is_on_gpu(x)):
        return namespace_of(x).linalg.cholesky(x)  # CuPy does not wait either
    torch = sys.modules["torch"]
    factor, failed = torch.linalg.cholesky_ex(x)
    return torch.where(failed[..., None, None] == 0, factor, torch.nan)


def solve(a: Array, b: Array, *, lower: bool = False) -> Array:
    """The solution x of a x = b, (*b, d, d), (*b, d, e) -> (*b, d, e); like `cholesky`, it never makes the host wait.

    `lower` says that a is a lower triangle, which needs no pivots.
    """
    if not (array_api_compat.is_torch_array(a) and is_on_gpu(a)):
        return namespace_of(a, b).linalg.solve(a, b)
    linalg = sys.modules["torch"].linalg
    return linalg.solve_triangular(a, b, upper=False) if lower else linalg.solve_ex(a, b)[0]


def stream_label(x: Array) -> int:
    """The stream on which CuPy copies from the host, as a number.

    0 for libraries whose copies are complete on return.
    """
    return int(sys.modules["cupy"].cuda.get_current_stream().ptr) if array_api_compat.is_cupy_array(x) else 0


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
