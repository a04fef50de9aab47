"""Autograd Functions for eager calls through which torch records gradients; `torch_ops` applies them.

Forward passes run the kernels, backward passes the backward kernels. Each Function holds the feature map itself. If the
gradients are differentiated again, the references compute them instead.
"""

from collections.abc import Callable
from typing import Any

import torch

from favorsharp.backend import (
    State,
    features_gradients,
    gradients_through_map,
    kernel_matvec_gradients,
    map_gradients,
    num_leaving,
    recorded_or_followed,
)
from favorsharp.ops.attention import attention
from favorsharp.ops.causal_attention import causal_attention
from favorsharp.ops.state import read, update
from favorsharp_cuda import state as plain_state
from favorsharp_cuda.attention import attention_with_stats
from favorsharp_cuda.causal_attention import causal_attention_with_stats
from favorsharp_cuda.exponential_features import exponential_features
from favorsharp_cuda.host import arrays as memory
from favorsharp_cuda.host.attention_gradients import attention_backward, sweep_of, width_of
from favorsharp_cuda.host.exponential_features_gradients import exponential_features_backward
from favorsharp_cuda.host.problem import sums_of
from favorsharp_cuda.host.state_gradients import read_backward, update_backward
from favorsharp_cuda.kernel_matvec import kernel_matvec
from favorsharp_cuda.torch.operators import after_zeros, first_keys, parted, sums_alone


class Features(torch.autograd.Function):
    """exp(u W^T + row + column)."""

    @staticmethod
    def forward(ctx: Any, u: Any, rows: Any, row: Any, column: Any) -> Any:
        width_of(u.shape[-1])
        ctx.save_for_backward(u, rows, row, column)
        return exponential_features(u, rows, row, column)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        if recorded_or_followed(gradient):
            return tuple(features_gradients(ctx.saved_tensors, gradient))
        return exponential_features_backward(gradient, *ctx.saved_tensors)


class Attention(torch.autograd.Function):
    """Attention and, if it is causal, the sums after it; the recent keys of a state come before the other keys."""

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
            out, stats, state = causal_attention_with_stats(*given, **options, state=state)
            after = sums_of(state)
        else:
            out, stats = attention_with_stats(*given, **options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, kv, z, c, *arrays, key_mask, out, stats, *after)
        ctx.feature_map, ctx.options = feature_map, (window, causal)
        return (out, *after) if causal else out

    @staticmethod
    def backward(ctx: Any, gradient: Any, *of_sums: Any) -> Any:
        (q, k, v, kv, z, c), arrays, (key_mask, out, stats, *after) = parted(ctx.saved_tensors, 6)
        window, causal = ctx.options
        sums = None if kv is None else (kv, z, c)
        if recorded_or_followed(gradient, *of_sums):
            again = _attention_again(key_mask, window, causal)
            given = (q, k, v, *(sums or ()), *arrays)
            found = gradients_through_map(again, ctx.feature_map, given, (gradient, *of_sums))
            none = () if sums else (None, None, None)
            return (None, None, None, None, *found[:3], *none, *found[3:])
        of_map = any(ctx.needs_input_grad[10:])
        gradient = torch.zeros_like(out) if gradient is None else gradient
        before = k.shape[-2] - q.shape[-2] if causal else 0
        points = [after_zeros(x, before) for x in (gradient, q, out, stats)]
        of_q, of_k, of_v, *of_state, map_sums = attention_backward(
            memory.cast(points[0], memory.name_of(q)), points[1], k, v, ctx.feature_map, *points[2:],
            key_mask=key_mask, window=window, causal=causal, of_map=of_map, state=sums,
        )  # fmt: skip
        total = [of_q.narrow(-2, before, q.shape[-2]), of_k, of_v, *(of_state or (None, None, None))]
        total += _of_arrays(ctx.feature_map, map_sums)
        if any(x is not None for x in of_sums):
            left = num_leaving(k.shape[-2], window) if window else k.shape[-2]
            keys = first_keys(left, k, v, key_mask)
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


class Absorb(torch.autograd.Function):
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
        (k, v, *sums), arrays, (key_mask, *after) = parted(ctx.saved_tensors, 5)
        if recorded_or_followed(*gradients):

            def again(own: Any, k: Any, v: Any, *sums: Any) -> Any:
                state = update.reference(sums_alone(k, v, sums, 0), k, v, own, key_mask=key_mask)
                return sums_of(state)

            return None, None, *gradients_through_map(again, ctx.feature_map, (k, v, *sums, *arrays), gradients)
        *found, map_sums = update_backward(
            _materialised(gradients, after), k, v, tuple(sums), tuple(after), ctx.feature_map,
            key_mask=key_mask, of_map=any(ctx.needs_input_grad[7:]),
        )  # fmt: skip
        return None, None, *found, *_of_arrays(ctx.feature_map, map_sums)


class Read(torch.autograd.Function):
    """What queries read from a state, its recent keys and values included."""

    @staticmethod
    def forward(ctx: Any, feature_map: Any, recent_mask: Any, q: Any, *tensors: Any) -> Any:
        sweep_of(q, q.shape[-1], tensors[0].shape[-1])
        out, stats = plain_state.read_with_stats(_state_to_read(tensors[:5], recent_mask), q, feature_map)
        ctx.save_for_backward(q, *tensors, recent_mask, out, stats)
        ctx.feature_map = feature_map
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        (q, *tensors), arrays, (recent_mask, out, stats) = parted(ctx.saved_tensors, 6)
        if recorded_or_followed(gradient):

            def again(own: Any, q: Any, *tensors: Any) -> Any:
                return (read.reference(_state_to_read(tensors, recent_mask), q, own),)

            return None, None, *gradients_through_map(again, ctx.feature_map, (q, *tensors, *arrays), (gradient,))
        *found, map_sums = read_backward(
            memory.cast(gradient, memory.name_of(q)), q, _state_to_read(tensors, recent_mask), ctx.feature_map, out,
            stats, of_map=any(ctx.needs_input_grad[8:]),
        )  # fmt: skip
        return None, None, *found, *_of_arrays(ctx.feature_map, map_sums)


class Matvec(torch.autograd.Function):
    """K(x, y) @ v."""

    @staticmethod
    def forward(ctx: Any, feature_map: Any, x: Any, y: Any, v: Any, *arrays: Any) -> Any:
        sweep_of(x, x.shape[-1], v.shape[-1])
        ctx.save_for_backward(x, y, v, *arrays)
        ctx.feature_map = feature_map
        return kernel_matvec(x, y, v, feature_map)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        x, y, v, *arrays = ctx.saved_tensors
        if recorded_or_followed(gradient):
            return None, *kernel_matvec_gradients(ctx.feature_map, (x, y, v, *arrays), gradient)
        *found, map_sums = attention_backward(
            memory.cast(gradient, memory.name_of(x)), x, y, v, ctx.feature_map, None, None,
            of_map=any(ctx.needs_input_grad[4:]),
        )  # fmt: skip
        return None, *found, *_of_arrays(ctx.feature_map, map_sums)


def _of_arrays(feature_map: Any, sums: Any) -> Any:
    """The gradients of a map's arrays, or six times None if there are no sums for them."""
    return [None] * 6 if sums is None else map_gradients(feature_map, sums.finished())


def _materialised(gradients: Any, like: Any) -> Any:
    """Gradients, with zeros in place of missing ones."""
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, like, strict=True))


def _state_to_read(tensors: Any, recent_mask: Any) -> State:
    """The state of the tensors that `Read` takes after q. Reading does not depend on the window, which is set to 0."""
    kv, z, c, recent_k, recent_v = tensors
    return State(kv, z, c, 0, recent_k, recent_v, recent_mask, fingerprint=None)


def _attention_again(key_mask: Any, window: int, causal: bool) -> Callable[..., tuple[Any, ...]]:
    """A function of a map and tensors that computes the result of `Attention` by the references."""

    def again(own: Any, q: Any, k: Any, v: Any, *sums: Any) -> tuple[Any, ...]:
        options = {"key_mask": key_mask, "window": window}
        if not causal:
            return (attention.reference(q, k, v, own, **options),)
        before, state = k.shape[-2] - q.shape[-2], sums_alone(k, v, sums, window) if sums else None
        out, state = causal_attention.reference(after_zeros(q, before), k, v, own, **options, state=state)
        return out.narrow(-2, before, q.shape[-2]), *sums_of(state)

    return again
