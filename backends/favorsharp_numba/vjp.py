"""The ops `attention_vjp`, `kernel_matvec_vjp` and `exponential_features_vjp`: results and pullbacks on the CPU."""

from collections.abc import Callable
from typing import Any

from favorsharp.backend import check_unfollowed
from favorsharp_numba.exponential_features import exponential_features, exponential_features_backward
from favorsharp_numba.host.attention_gradients import attention_backward, attention_with_stats, of_arrays_of_map
from favorsharp_numba.host.kernel_matvec_gradients import kernel_matvec_backward
from favorsharp_numba.kernel_matvec import with_sums


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
    return _with_pullback(q, k, v, feature_map, key_mask=key_mask, window=window, causal=is_causal, of_map=of_map)


def attention_vjp_packed(
    q: Any, k: Any, v: Any, feature_map: Any, bounds: list[int], *, is_causal: bool = False, **options: Any
) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """As `attention_vjp`, within packed sequences."""
    return _with_pullback(q, k, v, feature_map, bounds=bounds, causal=is_causal, **options)


def _with_pullback(
    q: Any, k: Any, v: Any, feature_map: Any, *, of_map: bool = False, **options: Any
) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    out, exact, stats, _ = attention_with_stats(q, k, v, feature_map, **options)

    def pullback(gradient: Any) -> tuple[Any, ...]:
        check_unfollowed("gradient", gradient)
        *points, sums = attention_backward(gradient, q, k, v, feature_map, exact, stats, of_map=of_map, **options)
        return (*points, *of_arrays_of_map(feature_map, sums)[:2]) if of_map else tuple(points)

    return out, pullback


def kernel_matvec_vjp(
    x: Any, y: Any, v: Any, feature_map: Any, *, of_map: bool = False
) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """As `favorsharp.ops.vjp.kernel_matvec_vjp`."""
    out, problem = with_sums(x, y, v, feature_map)

    def pullback(gradient: Any) -> tuple[Any, ...]:
        check_unfollowed("gradient", gradient)
        *points, sums = kernel_matvec_backward(gradient, x, y, v, feature_map, problem, of_map=of_map)
        return (*points, *of_arrays_of_map(feature_map, sums)[:2]) if of_map else tuple(points)

    return out, pullback


def exponential_features_vjp(u: Any, rows: Any, row: Any, column: Any) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """As `favorsharp.ops.vjp.exponential_features_vjp`."""
    out = exponential_features(u, rows, row, column)

    def pullback(gradient: Any) -> tuple[Any, ...]:
        check_unfollowed("gradient", gradient)
        return exponential_features_backward(gradient, u, rows, row, column)

    return out, pullback
