"""The operations that torch differentiates and compiles, with the backward kernels as their gradients.

Eager calls run the kernels inside an `autograd.Function` that holds the feature map itself. Traced calls
(`torch.compile`, `torch.func`, fake tensors) cannot: they see functional custom operators of tensors alone, which have
fake kernels, inside an `autograd.Function` of their own. Gradients flow to q, k, v and to every array of a feature map.
Forward-mode derivatives raise: no kernel computes them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from favorsharp._arrays import is_traced
from favorsharp.features.map_gradients import map_gradients
from favorsharp.ops.attention import attention as bidirectional_op
from favorsharp.ops.causal_attention import causal_attention as causal_op
from favorsharp.ops.state import State, empty_state, num_leaving, with_recent
from favorsharp.ops.state import decode_step as decode_op
from favorsharp.ops.state import read as reading_op
from favorsharp.ops.state import update as updating_op
from favorsharp.ops.vjp import features_gradients, gradients_through_map, kernel_matvec_gradients
from favorsharp_cuda import arrays as memory
from favorsharp_cuda import attention as plain_attention
from favorsharp_cuda import causal_attention as plain_causal
from favorsharp_cuda import exponential_features as plain_features
from favorsharp_cuda import kernel_matvec as plain_matvec
from favorsharp_cuda import state as plain_state
from favorsharp_cuda.exponential_features_gradients import exponential_features_backward
from favorsharp_cuda.gradients import attention_backward, sweep_of, width_of
from favorsharp_cuda.operators import (
    absorb_backward_op,
    absorb_op,
    arrays_of,
    attention_backward_op,
    attention_op,
    changes,
    decode_step_op,
    exponential_features_backward_op,
    exponential_features_op,
    gradients_of_map,
    kernel_matvec_backward_op,
    kernel_matvec_op,
    options_of,
    read_backward_op,
    read_op,
    read_with_stats_op,
    sums_alone,
    tensors_of,
    update_op,
)
from favorsharp_cuda.packed import packed
from favorsharp_cuda.problem import sums_of
from favorsharp_cuda.state import fitting, recent_of
from favorsharp_cuda.state_gradients import read_backward, update_backward


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
        return _TracedAttention.apply(
            options_of(feature_map, window, False), q, k, v, key_mask, None, None, None, *arrays
        )[0]
    if not _recorded(q, k, v, *arrays):
        return plain_attention.attention(
            q, k, v, feature_map, key_mask=key_mask, window=window, out=_unrecorded(out)
        )  # fmt: skip
    return _Attention.apply(feature_map, key_mask, window, False, q, k, v, None, None, None, *arrays)


def causal_attention(
    q: Any, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None, window: int = 0, state: State | None = None,
    out: Any = None,
) -> tuple[Any, State]:  # fmt: skip
    """As `favorsharp.ops.causal_attention.causal_attention`, in `out` where nothing is recorded."""
    arrays = arrays_of(feature_map)
    traced = is_traced(q)
    if not traced and not _recorded(q, k, v, *arrays, *_floats_of(state)):
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
    if traced:
        options = options_of(feature_map, window, True)
        out = _TracedAttention.apply(options, *points, key_mask, *sums, *arrays)[0]
        # an operator of its own, which compilers drop where nobody reads the state
        new = _absorbed(*_first(left, *points[1:], key_mask), sums, feature_map)
    else:
        out, *new = _Attention.apply(feature_map, key_mask, window, True, *points, *sums, *arrays)
    if state is None:
        # no slices: torch's take a guard of the device, which fake tensors of a machine without a GPU do not have
        state = empty_state(feature_map, tuple(new[0].shape[:-2]), k.shape[-1], v.shape[-1], window, k.narrow(-2, 0, 0))
    recent = _recent_from(left, k, v, key_mask) if window else {}
    return out.to(dtype), replace(state, **dict(zip(("kv", "z", "c"), new, strict=True)), **recent)


def update(state: State, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None) -> State:
    """As `favorsharp.ops.state.update`, of tensors that are traced or need gradients."""
    given = (k, v, *_floats_of(state), *arrays_of(feature_map))
    if _by_reference(*given):
        return updating_op.reference(state, k, v, feature_map, key_mask=key_mask)
    if not _recorded(*given):
        return _after(state, k, update_op(k, v, key_mask, *_of_state(state, feature_map)))
    if state.window:
        k, v, key_mask = with_recent(state, k, v, key_mask)
        left = num_leaving(k.shape[-2], state.window)
        state = replace(state, **_recent_from(left, k, v, key_mask))
        k, v, key_mask = _first(left, k, v, key_mask)
        if k.shape[-2] == 0:
            return state
    wide = memory.name_of(state.kv)
    sums = _absorbed(fitting(k, wide), fitting(v, wide), key_mask, sums_of(state), feature_map)
    return replace(state, **dict(zip(("kv", "z", "c"), sums, strict=True)))


def read(state: State, q: Any, feature_map: Any) -> Any:
    """As `favorsharp.ops.state.read`, of tensors that are traced or need gradients."""
    arrays = arrays_of(feature_map)
    given = (q, *_floats_of(state), *arrays)
    if _by_reference(*given):
        return reading_op.reference(state, q, feature_map)
    if not _recorded(*given):
        return read_op(q, *_of_state(state, feature_map))
    own = fitting(q, memory.name_of(state.kv))
    recent = state.recent_k.to(own.dtype), state.recent_v.to(own.dtype)
    sums = sums_of(state)
    if is_traced(q):
        scale, kernel, *_ = options_of(feature_map, 0, True)
        out = _TracedRead.apply((scale, kernel, state.window), own, *sums, *recent, state.recent_mask, *arrays)[0]
    else:
        out = _Read.apply(feature_map, state.recent_mask, own, *sums, *recent, *arrays)
    return out.to(q.dtype)


def decode_step(q: Any, k: Any, v: Any, state: State, feature_map: Any, *, key_mask: Any = None) -> tuple[Any, State]:
    """As `favorsharp.ops.state.decode_step`, of tensors that are traced or need gradients."""
    given = (q, k, v, *_floats_of(state), *arrays_of(feature_map))
    if _by_reference(*given):
        return decode_op.reference(q, k, v, state, feature_map, key_mask=key_mask)
    if _recorded(*given):
        state = update(state, k, v, feature_map, key_mask=key_mask)
        return read(state, q, feature_map), state
    out, *changed = decode_step_op(q, k, v, key_mask, *_of_state(state, feature_map))
    return out, _after(state, k, changed)


def kernel_matvec(x: Any, y: Any, v: Any, feature_map: Any) -> Any:
    """As `favorsharp.ops.kernel_matvec.kernel_matvec`."""
    arrays = arrays_of(feature_map)
    if is_traced(x):
        return _TracedMatvec.apply(options_of(feature_map, 0, False)[:2], x, y, v, *arrays)
    if not _recorded(x, y, v, *arrays):
        return plain_matvec.kernel_matvec(x, y, v, feature_map)
    return _Matvec.apply(feature_map, x, y, v, *arrays)


def _absorbed(k: Any, v: Any, key_mask: Any, sums: Any, feature_map: Any) -> Any:
    """kv, z and c after keys, recorded."""
    arrays = arrays_of(feature_map)
    if is_traced(k):
        return _TracedAbsorb.apply(options_of(feature_map, 0, True)[:2], k, v, key_mask, *sums, *arrays)
    return _Absorb.apply(feature_map, key_mask, k, v, *sums, *arrays)


def _floats_of(state: State | None) -> list[Any]:
    """The tensors of a state that gradients go through."""
    return [] if state is None else tensors_of(state)[:-1]


def _first(count: Any, k: Any, v: Any, key_mask: Any) -> tuple[Any, Any, Any]:
    """The first keys, values and mask."""
    return k.narrow(-2, 0, count), v.narrow(-2, 0, count), None if key_mask is None else key_mask.narrow(-1, 0, count)


def _recent_from(left: Any, k: Any, v: Any, key_mask: Any) -> dict[str, Any]:
    """What a state keeps of keys beside its features: those from a position on."""
    mask = k.new_ones(k.shape[:-1], dtype=torch.bool) if key_mask is None else key_mask
    count = k.shape[-2] - left
    return recent_of(k.narrow(-2, left, count), v.narrow(-2, left, count), mask.narrow(-1, left, count))


def _of_state(state: State, feature_map: Any) -> tuple[Any, ...]:
    """What operators take of a state and a map."""
    scale, kernel, window, _ = options_of(feature_map, state.window, True)
    return (*tensors_of(state), *arrays_of(feature_map), scale, kernel, window)


def _after(state: State, k: Any, changed: Any) -> State:
    return replace(state, **dict(zip(changes(state, k.shape[-2]), changed, strict=True)))


def _by_reference(*arrays: Any) -> bool:
    """Whether transforms are at work that states' kernels have no rule for: those of `torch.func`, and tangents."""
    if is_traced(arrays[0]):
        return not (_compiling() or isinstance(arrays[0], FakeTensor))
    return _has_tangent(*arrays)


attention.packed = packed(attention)  # type: ignore[attr-defined]
causal_attention.packed = packed(causal_attention)  # type: ignore[attr-defined]
attention.takes_out = causal_attention.takes_out = True  # type: ignore[attr-defined]


def _recorded(*arrays: Any) -> bool:
    """Whether torch follows what happens to one of the tensors, for a backward pass or in forward mode."""
    return (torch.is_grad_enabled() and any(x.requires_grad for x in arrays)) or _has_tangent(*arrays)


def _has_tangent(*arrays: Any) -> bool:
    """Whether one of the tensors is followed in forward mode."""
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
    """Attention, and the sums after it if it is causal; keys that a state keeps come before the others."""

    @staticmethod
    def forward(
        ctx: Any, feature_map: Any, key_mask: Any, window: int, causal: bool, q: Any, k: Any, v: Any,
        kv: Any, z: Any, c: Any, *arrays: Any,
    ) -> Any:  # fmt: skip
        sweep_of(q, q.shape[-1], v.shape[-1])
        given, options = (q, k, v, feature_map), {"key_mask": key_mask, "window": window}
        after: tuple[Any, ...] = ()
        if causal:
            state = None if kv is None else sums_alone(k, v, (kv, z, c), window)
            out, stats, state = plain_causal.causal_attention_with_stats(*given, **options, state=state)
            after = sums_of(state)
        else:
            out, stats = plain_attention.attention_with_stats(*given, **options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, kv, z, c, *arrays, key_mask, out, stats, *after)
        ctx.feature_map, ctx.options = feature_map, (window, causal)
        return (out, *after) if causal else out

    @staticmethod
    def backward(ctx: Any, gradient: Any, *of_sums: Any) -> Any:
        (q, k, v, kv, z, c), arrays, (key_mask, out, stats, *after) = _parted(ctx.saved_tensors, 6)
        window, causal = ctx.options
        sums = None if kv is None else (kv, z, c)
        if torch.is_grad_enabled():
            again = _attention_again(key_mask, window, causal)
            given = (q, k, v, *(sums or ()), *arrays)
            found = gradients_through_map(again, ctx.feature_map, given, (gradient, *of_sums))
            none = () if sums else (None, None, None)
            return (None, None, None, None, *found[:3], *none, *found[3:])
        of_map = any(ctx.needs_input_grad[10:])
        gradient = torch.zeros_like(out) if gradient is None else gradient
        before = k.shape[-2] - q.shape[-2] if causal else 0
        points = [_after_none(x, before) for x in (gradient, q, out, stats)]
        of_q, of_k, of_v, *of_state, map_sums = attention_backward(
            memory.cast(points[0], memory.name_of(q)), points[1], k, v, ctx.feature_map, *points[2:],
            key_mask=key_mask, window=window, causal=causal, of_map=of_map, state=sums,
        )  # fmt: skip
        total = [of_q.narrow(-2, before, q.shape[-2]), of_k, of_v, *(of_state or (None, None, None))]
        total += _of_arrays(ctx.feature_map, map_sums)
        if any(x is not None for x in of_sums):
            left = num_leaving(k.shape[-2], window) if window else k.shape[-2]
            keys = _first(left, k, v, key_mask)
            *through, map_sums = update_backward(
                _materialised(of_sums, after), *keys[:2], sums, tuple(after), ctx.feature_map,
                key_mask=keys[2], of_map=of_map,
            )  # fmt: skip
            for x, more in zip((of_k, of_v), through, strict=False):
                x.narrow(-2, 0, left).add_(more)
            added = [None, None, None, *(through[2:] or (None, None, None))]
            added += _of_arrays(ctx.feature_map, map_sums)
            total = [b if a is None else a if b is None else a + b for a, b in zip(total, added, strict=True)]
        return (None, None, None, None, *total)


class _Absorb(torch.autograd.Function):
    """The sums after keys."""

    @staticmethod
    def forward(
        ctx: Any, feature_map: Any, key_mask: Any, k: Any, v: Any, kv: Any, z: Any, c: Any, *arrays: Any
    ) -> Any:
        sweep_of(k, k.shape[-1], v.shape[-1])
        state = plain_state.update(sums_alone(k, v, (kv, z, c), 0), k, v, feature_map, key_mask=key_mask)
        after = sums_of(state)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(k, v, kv, z, c, *arrays, key_mask, *after)
        ctx.feature_map = feature_map
        return after

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (k, v, *sums), arrays, (key_mask, *after) = _parted(ctx.saved_tensors, 5)
        if torch.is_grad_enabled():

            def again(own: Any, k: Any, v: Any, *sums: Any) -> Any:
                state = updating_op.reference(sums_alone(k, v, sums, 0), k, v, own, key_mask=key_mask)
                return sums_of(state)

            return None, None, *gradients_through_map(again, ctx.feature_map, (k, v, *sums, *arrays), gradients)
        *found, map_sums = update_backward(
            _materialised(gradients, after), k, v, tuple(sums), tuple(after), ctx.feature_map,
            key_mask=key_mask, of_map=any(ctx.needs_input_grad[7:]),
        )  # fmt: skip
        return None, None, *found, *_of_arrays(ctx.feature_map, map_sums)


class _Read(torch.autograd.Function):
    """What queries read of a state, its recent keys and values included."""

    @staticmethod
    def forward(ctx: Any, feature_map: Any, recent_mask: Any, q: Any, *tensors: Any) -> Any:
        sweep_of(q, q.shape[-1], tensors[0].shape[-1])
        out, stats = plain_state.read_with_stats(_state_to_read(tensors[:5], recent_mask), q, feature_map)
        ctx.save_for_backward(q, *tensors, recent_mask, out, stats)
        ctx.feature_map = feature_map
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        (q, *tensors), arrays, (recent_mask, out, stats) = _parted(ctx.saved_tensors, 6)
        if torch.is_grad_enabled():

            def again(own: Any, q: Any, *tensors: Any) -> Any:
                return (reading_op.reference(_state_to_read(tensors, recent_mask), q, own),)

            return None, None, *gradients_through_map(again, ctx.feature_map, (q, *tensors, *arrays), (gradient,))
        *found, map_sums = read_backward(
            memory.cast(gradient, memory.name_of(q)), q, _state_to_read(tensors, recent_mask), ctx.feature_map, out,
            stats, of_map=any(ctx.needs_input_grad[8:]),
        )  # fmt: skip
        return None, None, *found, *_of_arrays(ctx.feature_map, map_sums)


class _Matvec(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feature_map: Any, x: Any, y: Any, v: Any, *arrays: Any) -> Any:
        sweep_of(x, x.shape[-1], v.shape[-1])
        ctx.save_for_backward(x, y, v, *arrays)
        ctx.feature_map = feature_map
        return plain_matvec.kernel_matvec(x, y, v, feature_map)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        x, y, v, *arrays = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *kernel_matvec_gradients(ctx.feature_map, (x, y, v, *arrays), gradient)
        *found, map_sums = attention_backward(
            memory.cast(gradient, memory.name_of(x)), x, y, v, ctx.feature_map, None, None,
            of_map=any(ctx.needs_input_grad[4:]),
        )  # fmt: skip
        return None, *found, *_of_arrays(ctx.feature_map, map_sums)


def _parted(saved: Any, count: int) -> tuple[Any, Any, Any]:
    """The first tensors that were saved, the six of a map, and the others."""
    return saved[:count], saved[count : count + 6], saved[count + 6 :]


def _of_arrays(feature_map: Any, sums: Any) -> Any:
    """The gradients of a map's arrays, or none."""
    return [None] * 6 if sums is None else map_gradients(feature_map, sums.finished())


def _materialised(gradients: Any, like: Any) -> Any:
    """Gradients, zeros in place of those that are not there."""
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, like, strict=True))


def _after_none(x: Any, count: int) -> Any:
    """Rows of zeros, then those of x: queries at the places of keys that came before them see nothing."""
    return x if count == 0 else torch.cat([x.new_zeros((*x.shape[:-2], count, x.shape[-1])), x], dim=-2)


def _state_to_read(tensors: Any, recent_mask: Any) -> State:
    kv, z, c, recent_k, recent_v = tensors
    return State(kv, z, c, 0, recent_k, recent_v, recent_mask, fingerprint=None)


def _attention_again(key_mask: Any, window: int, causal: bool) -> Callable[..., tuple[Any, ...]]:
    """The reference of what `_Attention` computes, of a map and its tensors."""

    def again(own: Any, q: Any, k: Any, v: Any, *sums: Any) -> tuple[Any, ...]:
        if not causal:
            return (bidirectional_op.reference(q, k, v, own, key_mask=key_mask, window=window),)
        state, mask = None, key_mask
        if sums:
            before = k.shape[-2] - q.shape[-2]
            state = sums_alone(k, v, sums, window)
            if before:
                recent = recent_of(k[..., :before, :], v[..., :before, :], mask[..., :before])
                state = replace(state, **recent)
            k, v, mask = k[..., before:, :], v[..., before:, :], None if mask is None else mask[..., before:]
        out, state = causal_op.reference(q, k, v, own, key_mask=mask, window=window, state=state)
        return out, *sums_of(state)

    return again


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
        options: Any, q: Any, k: Any, v: Any, key_mask: Any, kv: Any, z: Any, c: Any,
        rows: Any, log_weight: Any, g1: Any, g2: Any, center_x: Any, center_y: Any,
    ) -> Any:  # fmt: skip
        return attention_op(q, k, v, key_mask, rows, log_weight, g1, g2, center_x, center_y, *options, kv, z, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        options, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.options = options
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Any, _: Any) -> Any:
        (q, k, v, key_mask, *sums), arrays, (out, stats) = _parted(ctx.saved_tensors, 7)
        of_map, before = any(ctx.needs_input_grad[8:]), 0
        if sums[0] is not None:  # then attention is causal
            before = k.shape[-2] - q.shape[-2]
            gradient, q, out, stats = (_after_none(x, before) for x in (gradient, q, out, stats))
        given = (gradient, q, k, v, key_mask, *arrays, *ctx.options, *sums, out, stats)
        found = _gradients(attention_backward_op, of_map, given)
        of_q = found[0].narrow(-2, before, q.shape[-2] - before)
        count = 3 if sums[0] is None else 6
        of_sums = (None, None, None) if sums[0] is None else found[3:6]
        return (None, of_q, *found[1:3], None, *of_sums, *_of_map(found[count:], arrays, ctx.options))


class _TracedAbsorb(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        options: Any, k: Any, v: Any, key_mask: Any, kv: Any, z: Any, c: Any,
        rows: Any, log_weight: Any, g1: Any, g2: Any, center_x: Any, center_y: Any,
    ) -> Any:  # fmt: skip
        return absorb_op(k, v, key_mask, rows, log_weight, g1, g2, center_x, center_y, *options, kv, z, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        options, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.options = options

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (k, v, key_mask, *sums), arrays, after = _parted(ctx.saved_tensors, 6)
        given = (*gradients, k, v, key_mask, *arrays, *ctx.options, *sums, *after)
        found = _gradients(absorb_backward_op, any(ctx.needs_input_grad[7:]), given)
        count = 2 if sums[0] is None else 5
        of_sums = (None, None, None) if sums[0] is None else found[2:5]
        return (None, *found[:2], None, *of_sums, *_of_map(found[count:], arrays, ctx.options))


class _TracedRead(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        options: Any, q: Any, kv: Any, z: Any, c: Any, recent_k: Any, recent_v: Any, recent_mask: Any,
        rows: Any, log_weight: Any, g1: Any, g2: Any, center_x: Any, center_y: Any,
    ) -> Any:  # fmt: skip
        of_map = (rows, log_weight, g1, g2, center_x, center_y)
        return read_with_stats_op(q, kv, z, c, recent_k, recent_v, recent_mask, *of_map, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        options, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.options = options
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Any, _: Any) -> Any:
        tensors, arrays, (out, stats) = _parted(ctx.saved_tensors, 7)
        given = (gradient, *tensors, *arrays, *ctx.options, out, stats)
        found = _gradients(read_backward_op, any(ctx.needs_input_grad[8:]), given)
        return (None, *found[:6], None, *_of_map(found[6:], arrays, ctx.options))


class _TracedMatvec(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        options: Any, x: Any, y: Any, v: Any,
        rows: Any, log_weight: Any, g1: Any, g2: Any, center_x: Any, center_y: Any,
    ) -> Any:  # fmt: skip
        return kernel_matvec_op(x, y, v, rows, log_weight, g1, g2, center_x, center_y, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        options, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.options = options

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        points, arrays, _ = _parted(ctx.saved_tensors, 3)
        given = (gradient, *points, *arrays, *ctx.options)
        found = _gradients(kernel_matvec_backward_op, any(ctx.needs_input_grad[4:]), given)
        return (None, *found[:3], *_of_map(found[3:], arrays, ctx.options))


def _gradients(op: Any, of_map: bool, given: Any) -> Any:
    """What a backward operator gives, which cannot be differentiated again."""
    return op(*given, of_map=of_map) if _compiling() else _TracedBackward.apply(op, of_map, *given)


def _of_map(sums: Any, arrays: Any, options: Any) -> Any:
    """The gradients of a map's arrays from the ten sums, or none."""
    return gradients_of_map(sums, arrays, options) if len(sums) else [None] * len(arrays)


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


class _TracedBackward(_Once):
    @staticmethod
    def forward(op: Any, of_map: bool, *given: Any) -> Any:
        return tuple(op(*given, of_map=of_map))
