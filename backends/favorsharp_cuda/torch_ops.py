"""The ops for torch tensors, which torch can differentiate and compile. `dispatch` calls these functions.

Calls that need no gradients run the kernels directly. Eager calls that need gradients run them inside a Function that
holds the feature map itself (`torch_eager`). Traced calls (`torch.compile`, `torch.func`, fake tensors), and calls that
a mode of torch follows, run custom operators that take only tensors and numbers (`operators`), inside Functions of
their own (`torch_traced`). Gradients flow to q, k, v and to every array of a feature map. Forward-mode derivatives
raise an error, because no kernel computes them.
"""

from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from favorsharp.backend import State, empty_state, is_followed, num_leaving, with_recent, with_sums
from favorsharp.ops.state import decode_step as decode_op
from favorsharp.ops.state import read as reading_op
from favorsharp.ops.state import update as updating_op
from favorsharp_cuda import attention as plain_attention
from favorsharp_cuda import causal_attention as plain_causal
from favorsharp_cuda import exponential_features as plain_features
from favorsharp_cuda import kernel_matvec as plain_matvec
from favorsharp_cuda.host import arrays as memory
from favorsharp_cuda.host.packed import packed
from favorsharp_cuda.host.problem import lows_of, sums_of
from favorsharp_cuda.state import fitting, recent_of
from favorsharp_cuda.torch import eager, traced
from favorsharp_cuda.torch.operators import (
    arguments_of,
    arrays_of,
    changes,
    decode_step_op,
    first_keys,
    options_of,
    read_op,
    tensors_of,
    update_op,
)


def exponential_features(u: Any, rows: Any, row: Any, column: Any, *, out: Any = None) -> Any:
    """As `favorsharp.ops.exponential_features.exponential_features`."""
    given = (u, rows, row, column)
    if not (is_followed(u) or _recorded(*given) or (out is not None and _recorded(out))):
        return plain_features.exponential_features(*given, out=out)
    result = (traced.Features if is_followed(u) else eager.Features).apply(*given)
    if out is None:
        return result
    out[...] = result
    return out


def attention(
    q: Any, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None, window: int = 0, out: Any = None
) -> Any:
    """As `favorsharp.ops.attention.attention`; `out` is used if torch records nothing."""
    arrays = arrays_of(feature_map)
    if is_followed(q):
        return traced.Attention.apply(
            options_of(feature_map, window, False), q, k, v, key_mask, None, None, None, *arrays
        )[0]
    if not _recorded(q, k, v, *arrays):
        return plain_attention.attention(
            q, k, v, feature_map, key_mask=key_mask, window=window, out=_unrecorded(out)
        )  # fmt: skip
    return eager.Attention.apply(feature_map, key_mask, window, False, q, k, v, None, None, None, *arrays)


def causal_attention(
    q: Any, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None, window: int = 0, state: State | None = None,
    out: Any = None,
) -> tuple[Any, State]:  # fmt: skip
    """As `favorsharp.ops.causal_attention.causal_attention`; `out` is used if torch records nothing."""
    arrays = arrays_of(feature_map)
    followed = is_followed(q)
    if not followed and not _recorded(q, k, v, *arrays, *_floats_of(state)):
        return plain_causal.causal_attention(
            q, k, v, feature_map, key_mask=key_mask, window=window, state=state, out=_unrecorded(out)
        )  # fmt: skip
    sums: tuple[Any, ...] = (None, None, None)
    points, dtype = (q, k, v), q.dtype
    if state is not None:
        sums, wide = sums_of(state), memory.name_of(state.kv)
        if state.recent_k.shape[-2]:
            k, v, key_mask = with_recent(state, k, v, key_mask)
        points = fitting(q, wide), fitting(k, wide), fitting(v, wide)
    n = k.shape[-2]
    left = num_leaving(n, window) if window else n
    if followed:
        options = options_of(feature_map, window, True)
        out = traced.Attention.apply(options, *points, key_mask, *sums, *arrays)[0]
        # the state has an operator of its own, which compilers remove if the state is not used
        new = _absorbed(*first_keys(left, *points[1:], key_mask), sums, feature_map)
    else:
        out, *new = eager.Attention.apply(feature_map, key_mask, window, True, *points, *sums, *arrays)
    if state is None:
        # `narrow`, because slicing would guard the device, which fails for fake CUDA tensors on a machine without a GPU
        state = empty_state(feature_map, tuple(new[0].shape[:-2]), k.shape[-1], v.shape[-1], window, k.narrow(-2, 0, 0))
    recent = _recent_from(left, k, v, key_mask) if window else {}
    return out.to(dtype), with_sums(state, *new, **recent)


def update(state: State, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None) -> State:
    """As `favorsharp.ops.state.update`, for tensors that are traced or need gradients."""
    given = (k, v, *_floats_of(state), *arrays_of(feature_map))
    if _by_reference(*given):
        return updating_op.reference(state, k, v, feature_map, key_mask=key_mask)
    if not _recorded(*given):
        changed = update_op(k, v, key_mask, *arguments_of(state, feature_map), *lows_of(state))
        return _after(state, k, changed)
    if state.window:
        k, v, key_mask = with_recent(state, k, v, key_mask)
        left = num_leaving(k.shape[-2], state.window)
        state = replace(state, **_recent_from(left, k, v, key_mask))
        k, v, key_mask = first_keys(left, k, v, key_mask)
        if k.shape[-2] == 0:
            return state
    wide = memory.name_of(state.kv)
    sums = _absorbed(fitting(k, wide), fitting(v, wide), key_mask, sums_of(state), feature_map)
    return with_sums(state, *sums)


def read(state: State, q: Any, feature_map: Any) -> Any:
    """As `favorsharp.ops.state.read`, for tensors that are traced or need gradients."""
    arrays = arrays_of(feature_map)
    given = (q, *_floats_of(state), *arrays)
    if _by_reference(*given):
        return reading_op.reference(state, q, feature_map)
    if not _recorded(*given):
        return read_op(q, *arguments_of(state, feature_map))
    own = fitting(q, memory.name_of(state.kv))
    recent = state.recent_k.to(own.dtype), state.recent_v.to(own.dtype)
    sums = sums_of(state)
    if is_followed(q):
        options = options_of(feature_map, state.window, True)[:3]
        out = traced.Read.apply(options, own, *sums, *recent, state.recent_mask, *arrays)[0]
    else:
        out = eager.Read.apply(feature_map, state.recent_mask, own, *sums, *recent, *arrays)
    return out.to(q.dtype)


def decode_step(q: Any, k: Any, v: Any, state: State, feature_map: Any, *, key_mask: Any = None) -> tuple[Any, State]:
    """As `favorsharp.ops.state.decode_step`, for tensors that are traced or need gradients."""
    given = (q, k, v, *_floats_of(state), *arrays_of(feature_map))
    if _by_reference(*given):
        return decode_op.reference(q, k, v, state, feature_map, key_mask=key_mask)
    if _recorded(*given):
        state = update(state, k, v, feature_map, key_mask=key_mask)
        return read(state, q, feature_map), state
    out, *changed = decode_step_op(q, k, v, key_mask, *arguments_of(state, feature_map), *lows_of(state))
    return out, _after(state, k, changed)


def kernel_matvec(x: Any, y: Any, v: Any, feature_map: Any) -> Any:
    """As `favorsharp.ops.kernel_matvec.kernel_matvec`."""
    arrays = arrays_of(feature_map)
    if is_followed(x):
        return traced.Matvec.apply(options_of(feature_map, 0, False)[:2], x, y, v, *arrays)
    if not _recorded(x, y, v, *arrays):
        return plain_matvec.kernel_matvec(x, y, v, feature_map)
    return eager.Matvec.apply(feature_map, x, y, v, *arrays)


attention_packed = packed(attention)
causal_attention_packed = packed(causal_attention)


def _absorbed(k: Any, v: Any, key_mask: Any, sums: Any, feature_map: Any) -> Any:
    """The sums kv, z and c after keys, recorded for a backward pass."""
    arrays = arrays_of(feature_map)
    if is_followed(k):
        return traced.Absorb.apply(options_of(feature_map, 0, True)[:2], k, v, key_mask, *sums, *arrays)
    return eager.Absorb.apply(feature_map, key_mask, k, v, *sums, *arrays)


def _floats_of(state: State | None) -> list[Any]:
    """The tensors of a state that can have gradients; none without a state."""
    return [] if state is None else tensors_of(state)[:-1]


def _recent_from(left: Any, k: Any, v: Any, key_mask: Any) -> dict[str, Any]:
    """The keys from position `left` on, with their values and mask, as the fields of a state's recent keys."""
    mask = k.new_ones(k.shape[:-1], dtype=torch.bool) if key_mask is None else key_mask
    count = k.shape[-2] - left
    return recent_of(k.narrow(-2, left, count), v.narrow(-2, left, count), mask.narrow(-1, left, count))


def _after(state: State, k: Any, changed: Any) -> State:
    return replace(state, **dict(zip(changes(state, k.shape[-2]), changed, strict=True)))


def _by_reference(*arrays: Any) -> bool:
    """Whether the references have to compute an op of states, because its operators do not support the call.

    That is so under transforms of `torch.func`, in forward mode, and for tensors of a subclass with its own dispatch.
    """
    if torch.compiler.is_compiling() or isinstance(arrays[0], FakeTensor):
        return False
    if type(arrays[0]).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None or _has_tangent(*arrays)


def _recorded(*arrays: Any) -> bool:
    """Whether torch records operations on one of the tensors, for a backward pass or in forward mode."""
    return (torch.is_grad_enabled() and any(x.requires_grad for x in arrays)) or _has_tangent(*arrays)


def _has_tangent(*arrays: Any) -> bool:
    """Whether one of the tensors has a tangent (forward mode)."""
    level = forward_ad._current_level
    return level >= 0 and any(forward_ad.unpack_dual(x, level=level).tangent is not None for x in arrays)


def _unrecorded(out: Any) -> Any:
    """`out`, or None if a kernel must not write to it because torch traces or records operations on it."""
    return None if out is None or is_followed(out) or _recorded(out) else out
