"""What array libraries record, differentiate and trace, and whether kernels may run then; the package asks here."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import array_api_compat

from favorsharp._typing import Array


def constant_while_compiling(function: Any) -> Any:
    """A function that torch's compiler runs in Python, once for each graph, and whose result it takes as a constant.

    `torch.compiler.assume_constant_result` sets the same attribute, but it imports the compiler: more than a second.
    """
    function._dynamo_marked_constant = True
    return function


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
    """Whether a mode of torch is active that sees operations.

    A mode that only sets the device of new tensors does not count.
    """
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
    """Whether a mode of torch records or fakes operations (`make_fx`, FakeTensorMode): then results have no numbers."""
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


def is_capturing(x: Array) -> bool:
    """Whether the operations on x are being captured in a CUDA graph."""
    if array_api_compat.is_torch_array(x):
        return x.device.type == "cuda" and bool(sys.modules["torch"].cuda.is_current_stream_capturing())
    if array_api_compat.is_cupy_array(x):
        return bool(sys.modules["cupy"].cuda.get_current_stream().is_capturing())
    return False


def in_forward_mode(torch: Any) -> bool:
    """Whether torch is inside `torch.autograd.forward_ad.dual_level()`."""
    return bool(torch.autograd.forward_ad._current_level >= 0)


def has_fused_attention(*arrays: Array) -> bool:
    """Whether `fused_attention` takes these arrays: tensors outside the CPU of which no derivative is recorded.

    Some of torch's kernels have no second derivatives and no derivatives in forward mode.
    """
    if not array_api_compat.is_torch_array(arrays[0]) or arrays[0].device.type == "cpu":
        return False
    torch = sys.modules["torch"]
    differentiated = in_forward_mode(torch) or (torch.is_grad_enabled() and any(x.requires_grad for x in arrays))
    return not differentiated and not any(is_followed(x) for x in arrays)


def fused_attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Softmax attention by the kernel that torch chooses for the device; fast kernels take arrays of four axes only."""
    attend = sys.modules["torch"].nn.functional.scaled_dot_product_attention
    batch = q.shape[:-2]
    if len(batch) != 2:
        q, k, v = (x.reshape(1, math.prod(batch), *x.shape[-2:]) for x in (q, k, v))
    out = attend(q, k, v, scale=scale)
    return out.reshape(*batch, *out.shape[-2:])


def mode_of_library() -> Any:
    """The global settings on which torch's results depend; None if torch traces, transforms or follows operations."""
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


@contextmanager
def outside_modes(x: Array) -> Iterator[None]:
    """A context for computing a value that outlives the active modes of torch.

    Inside it, no dispatch mode follows operations, and no tensor is fake or made for inference only.
    """
    if not array_api_compat.is_torch_array(x):
        yield
        return
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), sys.modules["torch"].inference_mode(False):
        yield


def recorded_gradients(
    function: Callable[..., tuple[Array, ...]], arrays: Iterable[Array | None], gradients: Iterable[Array | None]
) -> list[Array | None]:
    """Differentiate a function of torch tensors, given the gradients of its results; None for a tensor that needs none.

    The function also takes masks, and None in place of a tensor.

    If torch records gradients, these are recorded too, so that they can be differentiated again.
    """
    torch = sys.modules["torch"]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # autograd.grad stops at these views; the graph continues to the arrays
        own = [None if x is None else x.view_as(x) for x in arrays]
        reached = [
            (x, gradient)
            for x, gradient in zip(function(*own), gradients, strict=True)
            if gradient is not None and x.requires_grad
        ]
        wanted = [x for x in own if x is not None and x.requires_grad]
        if not reached:
            return [None] * len(own)
        results, given = zip(*reached, strict=True)
        found = iter(torch.autograd.grad(results, wanted, given, create_graph=again, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in own]


def recorded_or_followed(*gradients: Array | None) -> bool:
    """Whether kernels must not compute gradients, because torch records, traces or follows the backward pass itself."""
    if sys.modules["torch"].is_grad_enabled():
        return True
    return any(x is not None and is_followed(x) for x in gradients)


def differentiate(
    function: Callable[..., Array], arrays: tuple[Array, ...]
) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
    """The result of function(*arrays), and a function from its gradient to the gradients of the arrays.

    The library of the arrays computes these gradients.
    """
    if array_api_compat.is_torch_array(arrays[0]):
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
    if array_api_compat.is_jax_array(arrays[0]):
        result: tuple[Array, Callable[[Array], tuple[Array, ...]]] = sys.modules["jax"].vjp(function, *arrays)
        return result
    library = type(arrays[0]).__module__.partition(".")[0]
    raise TypeError(
        f"{library} arrays cannot be differentiated by their own library, and no backend that can is installed; "
        "accepted: NumPy arrays with favorsharp[cpu], CuPy arrays with favorsharp[cuda13], torch tensors, JAX arrays"
    )
