"""Results together with their pullbacks, which map the gradient of a result to the gradients of the arguments.

`dispatch` calls these functions for the `*_vjp` ops. Pullbacks run the backward kernels.
"""

from collections.abc import Callable
from typing import Any

from favorsharp.backend import check_unfollowed
from favorsharp_cuda.attention import attention_with_stats
from favorsharp_cuda.causal_attention import causal_attention_with_stats
from favorsharp_cuda.exponential_features import exponential_features
from favorsharp_cuda.host import arrays
from favorsharp_cuda.host.attention_gradients import attention_backward
from favorsharp_cuda.host.exponential_features_gradients import exponential_features_backward
from favorsharp_cuda.host.gradient_sizes import sweep_of, width_of
from favorsharp_cuda.host.packed import packed_vjp
from favorsharp_cuda.kernel_matvec import kernel_matvec


def attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    feature_map: Any,
    *,
    key_mask: Any = None,
    window: int = 0,
    is_causal: bool = False,
    of_map: bool = False,
) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """As `favorsharp.ops.vjp.attention_vjp`."""
    sweep_of(q, q.shape[-1], v.shape[-1])
    options = {"key_mask": key_mask, "window": window}
    if is_causal:
        out, stats, _ = causal_attention_with_stats(q, k, v, feature_map, **options)
    else:
        out, stats = attention_with_stats(q, k, v, feature_map, **options)

    def pullback(gradient: Any) -> tuple[Any, ...]:
        check_unfollowed("gradient", gradient)
        gradient = arrays.cast(gradient, arrays.name_of(q))
        *points, sums = attention_backward(
            gradient, q, k, v, feature_map, out, stats, causal=is_causal, of_map=of_map, **options
        )
        return (*points, *sums.rows_and_weights(feature_map)) if sums is not None else tuple(points)

    return out, pullback


def kernel_matvec_vjp(
    x: Any, y: Any, v: Any, feature_map: Any, *, of_map: bool = False
) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """As `favorsharp.ops.vjp.kernel_matvec_vjp`."""
    sweep_of(x, x.shape[-1], v.shape[-1])
    out = kernel_matvec(x, y, v, feature_map)

    def pullback(gradient: Any) -> tuple[Any, ...]:
        check_unfollowed("gradient", gradient)
        gradient = arrays.cast(gradient, arrays.name_of(x))
        *points, sums = attention_backward(gradient, x, y, v, feature_map, None, None, of_map=of_map)
        return (*points, *sums.rows_and_weights(feature_map)) if sums is not None else tuple(points)

    return out, pullback


attention_vjp_packed = packed_vjp(attention_vjp)


def exponential_features_vjp(u: Any, rows: Any, row: Any, column: Any) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """As `favorsharp.ops.vjp.exponential_features_vjp`."""
    width_of(u.shape[-1])
    out = exponential_features(u, rows, row, column)

    def pullback(gradient: Any) -> tuple[Any, ...]:
        check_unfollowed("gradient", gradient)
        return exponential_features_backward(arrays.cast(gradient, arrays.name_of(u)), u, rows, row, column)

    return out, pullback
