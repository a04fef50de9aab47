"""Results and their pullbacks, by the backward kernels."""

from collections.abc import Callable
from typing import Any

import numpy as np

from favorsharp_numba.arguments import host, like_array, summed_to
from favorsharp_numba.exponential_features import exponential_features, exponential_features_backward
from favorsharp_numba.gradients import attention_backward, attention_with_stats


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
    options = {"key_mask": key_mask, "window": window, "causal": is_causal}
    out, stats, _ = attention_with_stats(q, k, v, feature_map, **options)

    def pullback(gradient: Any) -> tuple[Any, ...]:
        *points, sums = attention_backward(gradient, q, k, v, feature_map, out, stats, of_map=of_map, **options)
        return (*points, *_of_map(feature_map, sums)) if of_map else tuple(points)

    return out, pullback


def exponential_features_vjp(u: Any, rows: Any, row: Any, column: Any) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """As `favorsharp.ops.vjp.exponential_features_vjp`."""
    out = exponential_features(u, rows, row, column)
    return out, lambda gradient: exponential_features_backward(gradient, u, rows, row, column)


def _of_map(feature_map: Any, sums: dict[str, Any]) -> tuple[Any, Any]:
    """The gradients of rows and log_weight: log features are z (rows g)^T + log_weight / 2 and what does not depend on
    either.
    """
    p = feature_map.parameters
    rows = sums["query_points"] @ np.swapaxes(host(p.g1), -1, -2) + sums["key_points"] @ np.swapaxes(host(p.g2), -1, -2)
    log_weight = (sums["query_column"] + sums["key_column"]) / 2
    return tuple(  # type: ignore[return-value]
        like_array(summed_to(x, tuple(like.shape)), like)
        for x, like in ((rows, feature_map.rows), (log_weight, feature_map.log_weight))
    )
