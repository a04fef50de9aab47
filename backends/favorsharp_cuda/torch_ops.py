"""The operations that torch differentiates and compiles, with the backward kernels as their gradients.

Eager calls run the kernels inside an `autograd.Function` that holds the feature map itself. Traced calls
(`torch.compile`, `torch.func`, fake tensors) cannot: they see functional custom operators of tensors alone, which have
fake kernels, inside an `autograd.Function` of their own. Gradients flow to q, k, v and to every array of a feature map.
Forward-mode derivatives raise: no kernel computes them.
"""

from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from favorsharp._arrays import is_traced
from favorsharp.features.map_gradients import map_gradients
from favorsharp.ops.causal_attention import causal_attention as causal_op
from favorsharp.ops.state import State, empty_state, num_leaving
from favorsharp.ops.state import decode_step as decode_op
from favorsharp.ops.state import read as reading_op
from favorsharp.ops.state import update as updating_op
from favorsharp.ops.vjp import attention_gradients, features_gradients, state_gradients
from favorsharp_cuda import attention as plain_attention
from favorsharp_cuda import causal_attention as plain_causal
from favorsharp_cuda import exponential_features as plain_features
from favorsharp_cuda.exponential_features_gradients import exponential_features_backward
from favorsharp_cuda.gradients import attention_backward, sweep_of, width_of
from favorsharp_cuda.operators import (
    arrays_of,
    attention_backward_op,
    attention_op,
    changes,
    decode_step_op,
    exponential_features_backward_op,
    exponential_features_op,
    gradients_of_map,
    key_state_op,
    options_of,
    read_op,
    tensors_of,
    update_op,
)
from favorsharp_cuda.packed import packed
from favorsharp_cuda.state import recent_of


def exponential_features(u: Any, rows: Any, row: Any, column: Any, *, out: Any = None) -> Any:
    """As `favorsharp.ops.exponential_features.exponential_features`."""
    given = (u, rows, row, column)
    if not (is_traced(u) or _recorded(*given) or (out is not None and _recorded(out))):
        return plain_features.exponential_features(*given, out=out)
    result = (_TracedFeatures if is_traced(u) else _Features).apply(*given)
    if out is None:
        return result
    out[...] = result
    return out


def attention(
    q: Any, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None, window: int = 0, out: Any = None
) -> Any:
    """As `favorsharp.ops.attention.attention`, in `out` where nothing is recorded."""
    arrays = arrays_of(feature_map)
    if is_traced(q):
        return _TracedAttention.apply(options_of(feature_map, window, False), q, k, v, key_mask, *arrays)[0]
    if not _recorded(q, k, v, *arrays):
        return plain_attention.attention(
            q, k, v, feature_map, key_mask=key_mask, window=window, out=_unrecorded(out)
        )  # fmt: skip
    return _Attention.apply(feature_map, key_mask, window, False, q, k, v, *arrays)


def causal_attention(
    q: Any, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None, window: int = 0, state: State | None = None,
    out: Any = None,
) -> tuple[Any, State]:  # fmt: skip
    """As `favorsharp.ops.causal_attention.causal_attention`, in `out` where nothing is recorded.

    A returned state is differentiable through the reference; where a state comes in and gradients are recorded, the
    reference computes the call, as only it carries gradients from one call to the next.
    """
    arrays = arrays_of(feature_map)
    carried = [] if state is None else [state.kv, state.z, state.c, state.recent_k, state.recent_v]
    traced = is_traced(q)
    if not traced and not _recorded(q, k, v, *arrays, *carried):
        return plain_causal.causal_attention(
            q, k, v, feature_map, key_mask=key_mask, window=window, state=state, out=_unrecorded(out)
        )  # fmt: skip
    if state is not None:
        return causal_op.reference(q, k, v, feature_map, key_mask=key_mask, window=window, state=state)
    if traced:
        options = options_of(feature_map, window, True)
        out = _TracedAttention.apply(options, q, k, v, key_mask, *arrays)[0]
        # an operator of its own, which compilers drop where nobody reads the state
        kv, z, c = key_state_op(k, v, key_mask, *arrays, *options)
    else:
        out, kv, z, c = _Attention.apply(feature_map, key_mask, window, True, q, k, v, *arrays)
    # no slices: torch's take a guard of the device, which fake tensors of a machine without a GPU do not have
    n = k.shape[-2]
    state = empty_state(feature_map, tuple(kv.shape[:-2]), k.shape[-1], v.shape[-1], window, k.narrow(-2, 0, 0))
    recent: dict[str, Any] = {}
    if window:
        mask = k.new_ones(k.shape[:-1], dtype=torch.bool) if key_mask is None else key_mask
        left = num_leaving(n, window)
        recent = recent_of(k.narrow(-2, left, n - left), v.narrow(-2, left, n - left), mask.narrow(-1, left, n - left))
    return out, replace(state, kv=kv, z=z, c=c, **recent)


def update(state: State, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None) -> State:
    """As `favorsharp.ops.state.update`, of tensors that are traced and of which no gradient is needed."""
    if not _is_opaque(k):
        return updating_op.reference(state, k, v, feature_map, key_mask=key_mask)
    return _after(state, k, update_op(k, v, key_mask, *_of_state(state, feature_map)))


def read(state: State, q: Any, feature_map: Any) -> Any:
    """As `favorsharp.ops.state.read`, of tensors that are traced and of which no gradient is needed."""
    if not _is_opaque(q):
        return reading_op.reference(state, q, feature_map)
    return read_op(q, *_of_state(state, feature_map))


def decode_step(q: Any, k: Any, v: Any, state: State, feature_map: Any, *, key_mask: Any = None) -> tuple[Any, State]:
    """As `favorsharp.ops.state.decode_step`, of tensors that are traced and of which no gradient is needed."""
    if not _is_opaque(q):
        return decode_op.reference(q, k, v, state, feature_map, key_mask=key_mask)
    out, *changed = decode_step_op(q, k, v, key_mask, *_of_state(state, feature_map))
    return out, _after(state, k, changed)


def _of_state(state: State, feature_map: Any) -> tuple[Any, ...]:
    """What operators take of a state and a map."""
    scale, kernel, window, _ = options_of(feature_map, state.window, True)
    return (*tensors_of(state), *arrays_of(feature_map), scale, kernel, window)


def _after(state: State, k: Any, changed: Any) -> State:
    return replace(state, **dict(zip(changes(state, k.shape[-2]), changed, strict=True)))


def _is_opaque(x: Any) -> bool:
    """Whether a traced tensor goes to an operator: a compiler's, or a fake one.

    Those of `torch.func` and with tangents go to the reference: the operators of states have no derivatives.
    """
    return _compiling() or isinstance(x, FakeTensor)


attention.packed = packed(attention)  # type: ignore[attr-defined]
causal_attention.packed = packed(causal_attention)  # type: ignore[attr-defined]
attention.takes_out = causal_attention.takes_out = True  # type: ignore[attr-defined]


def _recorded(*arrays: Any) -> bool:
    """Whether torch follows what happens to one of the tensors, for a backward pass or in forward mode."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in arrays):
        return True
    level = forward_ad._current_level
    return level >= 0 and any(forward_ad.unpack_dual(x, level=level).tangent is not None for x in arrays)


def _unrecorded(out: Any) -> Any:
    """The tensor for a result, unless torch has to follow, or to do by itself, what is written to it."""
    return None if out is None or is_traced(out) or _recorded(out) else out


# Eager ---------------------------------------------------------------------------------------------------------------


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Any, rows: Any, row: Any, column: Any) -> Any:
        width_of(u.shape[-1])
        ctx.save_for_backward(u, rows, row, column)
        return plain_features.exponential_features(u, rows, row, column)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        if torch.is_grad_enabled():
            return tuple(features_gradients(ctx.saved_tensors, gradient))
        return exponential_features_backward(gradient, *ctx.saved_tensors)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, feature_map: Any, key_mask: Any, window: int, causal: bool, q: Any, k: Any, v: Any, *arrays: Any
    ) -> Any:
        sweep_of(q, q.shape[-1], v.shape[-1])
        given = (q, k, v, feature_map)
        if causal:
            out, stats, state = plain_causal.causal_attention_with_stats(*given, key_mask=key_mask, window=window)
        else:
            out, stats = plain_attention.attention_with_stats(*given, key_mask=key_mask, window=window)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, stats, key_mask, *arrays)
        ctx.feature_map, ctx.options = feature_map, (window, causal)
        return (out, state.kv, state.z, state.c) if causal else out

    @staticmethod
    def backward(ctx: Any, gradient: Any, *of_state: Any) -> Any:
        q, k, v, out, stats, key_mask, *arrays = ctx.saved_tensors
        window, causal = ctx.options
        if torch.is_grad_enabled():
            given = (q, k, v, *arrays), (gradient, *of_state)
            found = attention_gradients(ctx.feature_map, *given, key_mask=key_mask, window=window, causal=causal)
            return (None, None, None, None, *found)
        of_map = any(ctx.needs_input_grad[7:])
        gradient = torch.zeros_like(out) if gradient is None else gradient
        *total, sums = attention_backward(
            gradient, q, k, v, ctx.feature_map, out, stats,
            key_mask=key_mask, window=window, causal=causal, of_map=of_map,
        )  # fmt: skip
        total += [None] * len(arrays) if sums is None else map_gradients(ctx.feature_map, sums.finished())
        if any(x is not None for x in of_state):
            through = [None, *state_gradients(ctx.feature_map, key_mask, window, k, v, of_state)]
            total = [b if a is None else a if b is None else a + b for a, b in zip(total, through, strict=True)]
        return (None, None, None, None, *total)


# Traced --------------------------------------------------------------------------------------------------------------


def _compiling() -> bool:
    """Whether a compiler traces: it cannot follow one Function into another, and refuses second derivatives itself."""
    return bool(torch.compiler.is_compiling())


class _TracedFeatures(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(u: Any, rows: Any, row: Any, column: Any) -> Any:
        return exponential_features_op(u, rows, row, column)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        run = exponential_features_backward_op if _compiling() else _TracedFeaturesBackward.apply
        return run(gradient, *ctx.saved_tensors)


class _TracedAttention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # no *arrays: torch.compile tells this form from that with ctx by the number of parameters
        options: Any, q: Any, k: Any, v: Any, key_mask: Any,
        rows: Any, log_weight: Any, g1: Any, g2: Any, center_x: Any, center_y: Any,
    ) -> Any:  # fmt: skip
        return attention_op(q, k, v, key_mask, rows, log_weight, g1, g2, center_x, center_y, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        options, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.options = options
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Any, _: Any) -> Any:
        q, k, v, key_mask, *arrays, out, stats = ctx.saved_tensors
        of_map = any(ctx.needs_input_grad[5:])
        given = (gradient, q, k, v, key_mask, *arrays, *ctx.options, out, stats)
        if _compiling():
            found = attention_backward_op(*given, of_map=of_map)
        else:
            found = _TracedAttentionBackward.apply(of_map, *given)
        of_arrays = gradients_of_map(found[3:], arrays, ctx.options) if of_map else [None] * len(arrays)
        return (None, *found[:3], None, *of_arrays)


class _Once(torch.autograd.Function):
    """Gradients, which cannot be differentiated again: `torch.func` records them, and has to be told."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("favorsharp's CUDA kernels have no second derivatives; use('reference') has")


class _TracedFeaturesBackward(_Once):
    @staticmethod
    def forward(*given: Any) -> Any:
        return exponential_features_backward_op(*given)


class _TracedAttentionBackward(_Once):
    @staticmethod
    def forward(of_map: bool, *given: Any) -> Any:
        return tuple(attention_backward_op(*given, of_map=of_map))
