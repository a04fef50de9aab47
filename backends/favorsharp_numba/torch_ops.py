"""The ops that torch differentiates on the CPU; the backward kernels compute their gradients.

Gradients flow to q, k and v, and to every array of a feature map. The reference computes them if they are to be
differentiated again (`create_graph=True`), or if a mode of torch traces or follows them. The state that causal
attention returns is differentiable too, through the reference. If a call takes a state, the reference computes all of
it, because only the reference carries gradients from one call to the next.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from favorsharp.backend import (
    State,
    attention_gradients,
    empty_state,
    features_gradients,
    kernel_matvec_gradients,
    recorded_or_followed,
    state_gradients,
)
from favorsharp.ops.causal_attention import causal_attention as causal_op
from favorsharp_numba import attention as plain_attention
from favorsharp_numba import causal_attention as plain_causal
from favorsharp_numba import exponential_features as plain_features
from favorsharp_numba import kernel_matvec as plain_matvec
from favorsharp_numba.causal_attention import recent
from favorsharp_numba.host.attention_gradients import attention_backward, attention_with_stats, of_arrays_of_map
from favorsharp_numba.host.kernel_matvec_gradients import kernel_matvec_backward
from favorsharp_numba.host.problem import packed_attention
from favorsharp_numba.kernel_matvec import with_sums


def exponential_features(u: Any, rows: Any, row: Any, column: Any, *, out: Any = None) -> Any:
    """As `favorsharp.ops.exponential_features.exponential_features`."""
    if not _recorded(u, rows, row, column, out):
        return plain_features.exponential_features(u, rows, row, column, out=out)
    result = _Features.apply(u, rows, row, column)
    if out is None:
        return result
    out[...] = result
    return out


def kernel_matvec(x: Any, y: Any, v: Any, feature_map: Any) -> Any:
    """As `favorsharp.ops.kernel_matvec.kernel_matvec`."""
    arrays = _arrays_of(feature_map)
    if not _recorded(x, y, v, *arrays):
        return plain_matvec.kernel_matvec(x, y, v, feature_map)
    return _Matvec.apply(feature_map, x, y, v, *arrays)


def attention(
    q: Any, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None, window: int = 0, out: Any = None
) -> Any:
    """As `favorsharp.ops.attention.attention`; written to `out` if torch records nothing."""
    if not _recorded(q, k, v, out, *_arrays_of(feature_map)):
        return plain_attention.attention(q, k, v, feature_map, key_mask=key_mask, window=window, out=out)
    return _Attention.apply(feature_map, key_mask, window, False, None, q, k, v, *_arrays_of(feature_map))


def causal_attention(
    q: Any,
    k: Any,
    v: Any,
    feature_map: Any,
    *,
    key_mask: Any = None,
    window: int = 0,
    state: State | None = None,
    out: Any = None,
) -> tuple[Any, State]:
    """As `favorsharp.ops.causal_attention.causal_attention`; written to `out` if torch records nothing."""
    arrays = _arrays_of(feature_map)
    carried = [] if state is None else [state.kv, state.z, state.c, state.recent_k, state.recent_v]
    if not _recorded(q, k, v, out, *arrays, *carried):
        return plain_causal.causal_attention(
            q, k, v, feature_map, key_mask=key_mask, window=window, state=state, out=out
        )
    if state is not None:
        return causal_op.reference(q, k, v, feature_map, key_mask=key_mask, window=window, state=state)
    out, kv, z, c = _Attention.apply(feature_map, key_mask, window, True, None, q, k, v, *arrays)
    state = empty_state(feature_map, tuple(kv.shape[:-2]), k.shape[-1], v.shape[-1], window, k[..., :0, :])
    state = replace(state, kv=kv, z=z, c=c)
    return out, replace(state, **recent(state, k, v, key_mask)) if window else state


def _packed(
    q: Any, k: Any, v: Any, feature_map: Any, bounds: list[int], *, causal: bool, out: Any = None,
    key_mask: Any = None, window: int = 0,
) -> Any:  # fmt: skip
    arrays = _arrays_of(feature_map)
    if not _recorded(q, k, v, out, *arrays):
        return packed_attention(q, k, v, feature_map, bounds, causal=causal, out=out, key_mask=key_mask, window=window)
    return _Attention.apply(feature_map, key_mask, window, causal, bounds, q, k, v, *arrays)


attention_packed = partial(_packed, causal=False)
causal_attention_packed = partial(_packed, causal=True)


def _recorded(*arrays: Any) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arrays)


def _arrays_of(feature_map: Any) -> list[Any]:
    """The arrays of a map that its features depend on, in the order of `favorsharp.backend.map_gradients`."""
    p = feature_map.parameters
    return [feature_map.rows, feature_map.log_weight, p.g1, p.g2, p.center_x, p.center_y]


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Any, rows: Any, row: Any, column: Any) -> Any:
        ctx.save_for_backward(u, rows, row, column)
        return plain_features.exponential_features(u, rows, row, column)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        if recorded_or_followed(gradient):
            return tuple(features_gradients(ctx.saved_tensors, gradient))
        return plain_features.exponential_features_backward(gradient, *ctx.saved_tensors)


class _Matvec(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feature_map: Any, x: Any, y: Any, v: Any, *arrays: Any) -> Any:
        out, ctx.problem = with_sums(x, y, v, feature_map)
        ctx.save_for_backward(x, y, v, *arrays)
        ctx.feature_map = feature_map
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        x, y, v, *arrays = ctx.saved_tensors
        if recorded_or_followed(gradient):
            return None, *kernel_matvec_gradients(ctx.feature_map, (x, y, v, *arrays), gradient)
        of_map = any(ctx.needs_input_grad[4:])
        *gradients, sums = kernel_matvec_backward(gradient, x, y, v, ctx.feature_map, ctx.problem, of_map=of_map)
        of_arrays = of_arrays_of_map(ctx.feature_map, sums) if of_map else [None] * len(arrays)
        return None, *gradients, *of_arrays


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, feature_map: Any, key_mask: Any, window: int, causal: bool, bounds: list[int] | None,
        q: Any, k: Any, v: Any, *arrays: Any,
    ) -> Any:  # fmt: skip
        options: dict[str, Any] = {"window": window, "causal": causal, "bounds": bounds}
        out, exact, stats, state = attention_with_stats(q, k, v, feature_map, key_mask=key_mask, **options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, exact, *arrays)
        ctx.feature_map, ctx.key_mask, ctx.options, ctx.stats = feature_map, key_mask, options, stats
        if state is None:
            return out
        return (out, *(torch.from_numpy(state[name]) for name in ("kv", "z", "c")))

    @staticmethod
    def backward(ctx: Any, gradient: Any, *of_state: Any) -> Any:
        q, k, v, exact, *arrays = ctx.saved_tensors
        if recorded_or_followed(gradient, *of_state):
            given = (q, k, v, *arrays), (gradient, *of_state)
            found = attention_gradients(ctx.feature_map, *given, key_mask=ctx.key_mask, **ctx.options)
            return (None, None, None, None, None, *found)
        of_map = any(ctx.needs_input_grad[8:])
        gradient = torch.zeros_like(exact) if gradient is None else gradient
        *gradients, sums = attention_backward(
            gradient, q, k, v, ctx.feature_map, exact, ctx.stats,
            key_mask=ctx.key_mask, of_map=of_map, **ctx.options,
        )  # fmt: skip
        of_arrays = of_arrays_of_map(ctx.feature_map, sums) if of_map else [None] * len(arrays)
        total = [*gradients, *of_arrays]
        if any(x is not None for x in of_state):
            window = ctx.options["window"]
            through = [None, *state_gradients(ctx.feature_map, ctx.key_mask, window, k, v, of_state)]
            total = [b if a is None else a if b is None else a + b for a, b in zip(total, through, strict=True)]
        return (None, None, None, None, None, *total)
