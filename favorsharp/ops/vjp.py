"""Ops that return a result and its vector-Jacobian product; `favorsharp.vjp` and the backends call this module.

The references let the arrays' own library differentiate. For a library that cannot do that, a backend must implement
the op.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from favorsharp._autodiff import differentiate
from favorsharp._typing import Array, PositiveMap
from favorsharp.dispatch import Op
from favorsharp.ops.attention import attention
from favorsharp.ops.causal_attention import causal_attention
from favorsharp.ops.exponential_features import exponential_features
from favorsharp.ops.kernel_matvec import kernel_matvec

Pullback = Callable[[Array], tuple[Array, ...]]
"""A function from the gradient of a result to the gradients of the arguments."""


@Op
def attention_vjp(
    q: Array,
    k: Array,
    v: Array,
    feature_map: PositiveMap,
    *,
    key_mask: Array | None = None,
    window: int = 0,
    is_causal: bool = False,
    of_map: bool = False,
) -> tuple[Array, Pullback]:
    """Bidirectional or causal attention and its pullback.

    Parameters
    ----------
    q, k, v, feature_map, key_mask, window
        As in `attention` and `causal_attention`.
    is_causal : bool
        Whether attention is causal.
    of_map : bool
        Whether the pullback also gives the gradients of the map's rows and log_weight; for dense-exponential maps.

    Returns
    -------
    out : array, shape (*b, n, e)
    pullback : callable
        (*b, n, e) -> (dq, dk, dv) or (dq, dk, dv, drows, dlog_weight), in the shapes and dtypes of the arguments.
    """

    def result(*arrays: Array) -> Array:
        points, own = _points_and_map(feature_map, arrays)
        if is_causal:
            return causal_attention.reference(*points, own, key_mask=key_mask, window=window)[0]
        return attention.reference(*points, own, key_mask=key_mask, window=window)

    return differentiate(result, (q, k, v, *_arrays_of(feature_map, of_map)))


@Op
def kernel_matvec_vjp(
    x: Array, y: Array, v: Array, feature_map: PositiveMap, *, of_map: bool = False
) -> tuple[Array, Pullback]:
    """K(x, y) @ v through features and its pullback.

    Parameters
    ----------
    x, y, v, feature_map
        As in `kernel_matvec`.
    of_map : bool
        Whether the pullback also gives the gradients of the map's rows and log_weight; for dense-exponential maps.

    Returns
    -------
    out : array, shape (*b, n, e)
    pullback : callable
        (*b, n, e) -> (dx, dy, dv) or (dx, dy, dv, drows, dlog_weight), in the shapes and dtypes of the arguments.
    """

    def result(*arrays: Array) -> Array:
        points, own = _points_and_map(feature_map, arrays)
        return kernel_matvec.reference(*points, own)

    return differentiate(result, (x, y, v, *_arrays_of(feature_map, of_map)))


@Op
def exponential_features_vjp(u: Array, rows: Array, row: Array, column: Array) -> tuple[Array, Pullback]:
    """exp(u W^T + row + column) and its pullback.

    Parameters
    ----------
    u, rows, row, column
        As in `exponential_features`.

    Returns
    -------
    out : array, shape (*b, n, m)
    pullback : callable
        (*b, n, m) -> (du, drows, drow, dcolumn), in the shapes and dtypes of the arguments.
    """
    return differentiate(exponential_features.reference, (u, rows, row, column))


def _arrays_of(feature_map: Any, of_map: bool) -> tuple[Array, ...]:
    """The arrays of the map whose gradients `of_map` asks for."""
    return (feature_map.rows, feature_map.log_weight) if of_map else ()


def _points_and_map(feature_map: Any, arrays: tuple[Array, ...]) -> tuple[tuple[Array, Array, Array], Any]:
    """The three arrays of points and values, and the map.

    Its rows and log_weight are the further arrays, if there are any.
    """
    first, second, values, *own = arrays
    if own:
        feature_map = replace(feature_map, rows=own[0], log_weight=own[1])
    return (first, second, values), feature_map
