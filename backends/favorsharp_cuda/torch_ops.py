"""The ops for torch tensors, which torch can differentiate and compile. `dispatch` calls these functions.

Calls of which torch records nothing run the kernels directly. Others go through the operators of
`favorsharp_cuda.torch.operators`: eager calls that torch records, and calls that are traced (`torch.compile`,
`torch.func`, fake tensors) or followed by a mode of torch. Gradients flow to q, k, v and to every array of a feature
map. Forward-mode derivatives raise an error, because no kernel computes them.
"""

from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from favorsharp.backend import State, arrays_of, empty_state, is_followed, num_leaving, with_recent, with_sums
from favorsharp.ops.state import decode_step as decode_op
from favorsharp.ops.state import read as reading_op
from favorsharp.ops.state import update as updating_op
from favorsharp.torch_operators import has_tangent, recorded
from favorsharp_cuda import attention as plain_attention
from favorsharp_cuda import causal_attention as plain_causal
from favorsharp_cuda import exponential_features as plain_features
from favorsharp_cuda import kernel_matvec as plain_matvec
from favorsharp_cuda.host import arrays as memory
from favorsharp_cuda.host.gradient_sizes import sweep_of, width_of
from favorsharp_cuda.host.packed import packed
from favorsharp_cuda.host.problem import lows_of, sums_of
from favorsharp_cuda.state import fitting, recent_of
from favorsharp_cuda.torch.operators import (
    ABSORB,
    ATTENTION,
    DECODE_STEP,
    EXPONENTIAL_FEATURES,
    KERNEL_MATVEC,
    READ,
    UPDATE,
    changes,
    sums_alone,
    tensors_of,
)


def exponential_features(u: Any, rows: Any, row: Any, column: Any, *, out: Any = None) -> Any:
    """As `favorsharp.ops.exponential_features.exponential_features`."""
    given = (u, rows, row, column)
    followed = is_followed(u)
    if not followed and not recorded(*given, out):
        return plain_features.exponential_features(*given, out=out)
    if not followed:
        width_of(u.shape[-1])
    (result,) = EXPONENTIAL_FEATURES(None, *given)
    if out is None:
        return result
    out[...] = result
    return out


def attention(
    q: Any, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None, window: int = 0, out: Any = None
) -> Any:
    """As `favorsharp.ops.attention.attention`; `out` is used if torch records nothing."""
    followed = is_followed(q)
    if not followed and not recorded(q, k, v, *arrays_of(feature_map)):
        return plain_attention.attention(q, k, v, feature_map, key_mask=key_mask, window=window, out=_unrecorded(out))
    if not followed:
        sweep_of(q, q.shape[-1], v.shape[-1])
    return ATTENTION(feature_map, q, k, v, key_mask, None, None, None, window=window, causal=False)[0]


def causal_attention(
    q: Any, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None, window: int = 0, state: State | None = None,
    out: Any = None,
) -> tuple[Any, State]:  # fmt: skip
    """As `favorsharp.ops.causal_attention.causal_attention`; `out` is used if torch records nothing."""
    followed = is_followed(q)
    if not followed and not recorded(q, k, v, *arrays_of(feature_map), *_floats_of(state)):
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
    made: tuple[Any, ...] = (None, None)
    if not followed:  # one pass over the keys gives the result and the sums, which the two operators only record
        made = _computed(*points, feature_map, key_mask, window, sums)
    given = (feature_map, *points, key_mask, *sums)
    (out,) = ATTENTION(*given, window=window, causal=True, made=made[0])
    # in traced calls the state has an operator of its own, which compilers remove if the state is not used
    new = ABSORB(feature_map, *_first(left, *points[1:], key_mask), *sums, made=made[1])
    if state is None:
        # `narrow`, because slicing would guard the device, which fails for fake CUDA tensors on a machine without a GPU
        state = empty_state(feature_map, tuple(new[0].shape[:-2]), k.shape[-1], v.shape[-1], window, k.narrow(-2, 0, 0))
    recent = _recent_from(left, k, v, key_mask) if window else {}
    return out.to(dtype), with_sums(state, *new, **recent)


def _computed(q: Any, k: Any, v: Any, feature_map: Any, key_mask: Any, window: int, sums: Any) -> Any:
    """The further tensors that `ATTENTION` keeps of a causal call, and the sums after it."""
    sweep_of(q, q.shape[-1], v.shape[-1])
    state = sums_alone(k, v, sums, window)
    with torch.no_grad():
        out, stats, after = plain_causal.causal_attention_with_stats(
            q, k, v, feature_map, key_mask=key_mask, window=window, state=state
        )
    return (out, stats), sums_of(after)


def update(state: State, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None) -> State:
    """As `favorsharp.ops.state.update`, for tensors that are traced or need gradients."""
    given = (k, v, *_floats_of(state), *arrays_of(feature_map))
    if _by_reference(*given):
        return updating_op.reference(state, k, v, feature_map, key_mask=key_mask)
    if not recorded(*given):
        held = (*tensors_of(state), *lows_of(state))
        return _after(state, k, UPDATE.direct(feature_map, k, v, key_mask, *held, window=state.window))
    if state.window:
        k, v, key_mask = with_recent(state, k, v, key_mask)
        left = num_leaving(k.shape[-2], state.window)
        state = replace(state, **_recent_from(left, k, v, key_mask))
        k, v, key_mask = _first(left, k, v, key_mask)
        if k.shape[-2] == 0:
            return state
    wide = memory.name_of(state.kv)
    k, v = fitting(k, wide), fitting(v, wide)
    if not is_followed(k):
        sweep_of(k, k.shape[-1], v.shape[-1])
    return with_sums(state, *ABSORB(feature_map, k, v, key_mask, *sums_of(state)))


def read(state: State, q: Any, feature_map: Any) -> Any:
    """As `favorsharp.ops.state.read`, for tensors that are traced or need gradients."""
    given = (q, *_floats_of(state), *arrays_of(feature_map))
    if _by_reference(*given):
        return reading_op.reference(state, q, feature_map)
    own = fitting(q, memory.name_of(state.kv))
    recent = state.recent_k.to(own.dtype), state.recent_v.to(own.dtype), state.recent_mask
    if not is_followed(q):
        sweep_of(own, q.shape[-1], state.v_size)
    return READ(feature_map, own, *sums_of(state), *recent)[0].to(q.dtype)


def decode_step(q: Any, k: Any, v: Any, state: State, feature_map: Any, *, key_mask: Any = None) -> tuple[Any, State]:
    """As `favorsharp.ops.state.decode_step`, for tensors that are traced or need gradients."""
    given = (q, k, v, *_floats_of(state), *arrays_of(feature_map))
    if _by_reference(*given):
        return decode_op.reference(q, k, v, state, feature_map, key_mask=key_mask)
    if recorded(*given):
        state = update(state, k, v, feature_map, key_mask=key_mask)
        return read(state, q, feature_map), state
    held = (*tensors_of(state), *lows_of(state))
    out, *changed = DECODE_STEP.direct(feature_map, q, k, v, key_mask, *held, window=state.window)
    return out, _after(state, k, changed)


def decode_step_plan(*_: Any) -> None:
    """Tokens that are traced or recorded have no plan."""


def kernel_matvec(x: Any, y: Any, v: Any, feature_map: Any) -> Any:
    """As `favorsharp.ops.kernel_matvec.kernel_matvec`."""
    followed = is_followed(x)
    if not followed and not recorded(x, y, v, *arrays_of(feature_map)):
        return plain_matvec.kernel_matvec(x, y, v, feature_map)
    if not followed:
        sweep_of(x, x.shape[-1], v.shape[-1])
    return KERNEL_MATVEC(feature_map, x, y, v)[0]


attention_packed = packed(attention)
causal_attention_packed = packed(causal_attention)


def _floats_of(state: State | None) -> tuple[Any, ...]:
    """The tensors of a state that can have gradients; empty without a state."""
    return () if state is None else tensors_of(state)[:-1]


def _first(count: Any, k: Any, v: Any, key_mask: Any) -> tuple[Any, Any, Any]:
    """The first `count` keys, their values and their mask."""
    return k.narrow(-2, 0, count), v.narrow(-2, 0, count), None if key_mask is None else key_mask.narrow(-1, 0, count)


def _recent_from(left: Any, k: Any, v: Any, key_mask: Any) -> dict[str, Any]:
    """The keys from position `left` on, with their values and mask, as the fields of a state's recent keys."""
    mask = k.new_ones(k.shape[:-1], dtype=torch.bool) if key_mask is None else key_mask
    count = k.shape[-2] - left
    return recent_of(k.narrow(-2, left, count), v.narrow(-2, left, count), mask.narrow(-1, left, count))


def _after(state: State, k: Any, changed: Any) -> State:
    return replace(state, **dict(zip(changes(state, k.shape[-2]), changed, strict=True)))


def _by_reference(*arrays: Any) -> bool:
    """Whether the references must compute an op of states, because its operators do not support the call.

    They support neither transforms of `torch.func`, nor forward mode, nor tensor subclasses with their own dispatch.
    """
    if torch.compiler.is_compiling() or isinstance(arrays[0], FakeTensor):
        return False
    if type(arrays[0]).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None or has_tangent(*arrays)


def _unrecorded(out: Any) -> Any:
    """`out`, or None if a kernel must not write to it because torch traces or records operations on it."""
    return None if out is None or is_followed(out) or recorded(out) else out
