"""Ops that return a result and its vector-Jacobian product; `favorsharp.vjp` and the backends call this module.

The references let the arrays' own library differentiate. For a library that cannot do that, a backend must implement
the op.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from favorsharp._arrays import namespace_of
from favorsharp._autodiff import differentiate, recorded_gradients
from favorsharp._typing import Array, PositiveMap
from favorsharp.dispatch import Op
from favorsharp.ops.attention import attention
from favorsharp.ops.causal_attention import causal_attention
from favorsharp.ops.exponential_features import exponential_features
from favorsharp.ops.kernel_matvec import kernel_matvec
from favorsharp.ops.state import empty_state, update

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


def state_gradients(
    feature_map: Any, key_mask: Array | None, window: int, k: Array, v: Array, gradients: tuple[Array | None, ...]
) -> tuple[Array, ...]:
    """Gradients of k, v and the arrays of a map (`MAP_ARRAYS`), from the gradients of the kv, z and c of a state.

    The reference is differentiated, for backends whose kernels differentiate only results.
    """

    def result(*arrays: Array) -> Array:
        keys, values, *of_map = arrays
        own = _with_arrays(feature_map, *of_map)
        batch = tuple(next(x for x in gradients if x is not None).shape[:-2])
        state = empty_state(own, batch, k.shape[-1], v.shape[-1], window, keys[..., :0, :])
        state = update.reference(state, keys, values, own, key_mask=key_mask)
        total: Any = 0.0
        for x, gradient in zip((state.kv, state.z, state.c), gradients, strict=True):
            if gradient is not None:
                total = total + namespace_of(x).sum(x * gradient)
        return total

    p = feature_map.parameters
    arrays = (k, v, feature_map.rows, feature_map.log_weight, p.g1, p.g2, p.center_x, p.center_y)
    total, pullback = differentiate(result, arrays)
    return pullback(namespace_of(k).ones_like(total))


def attention_gradients(
    feature_map: Any,
    arrays: Sequence[Array],
    gradients: Sequence[Array | None],
    *,
    key_mask: Array | None,
    window: int,
    causal: bool,
    bounds: Sequence[int] | None = None,
) -> list[Array | None]:
    """Gradients of q, k, v and the arrays of a map (`MAP_ARRAYS`) that can be differentiated again.

    The reference is differentiated, for backends whose kernels differentiate once. `gradients` are those of the result
    and, for causal attention without bounds, those of the kv, z and c of its state.
    """

    def results(own: Any, q: Array, k: Array, v: Array) -> tuple[Array, ...]:
        parts = [(0, q.shape[-2], k.shape[-2])] if bounds is None else [(a, b, b) for a, b in pairwise(bounds)]
        outs = []
        for start, stop, end in parts:
            mask = None if key_mask is None else key_mask[..., start:end]
            points = q[..., start:stop, :], k[..., start:end, :], v[..., start:end, :]
            if causal:
                out, state = causal_attention.reference(*points, own, key_mask=mask, window=window)
            else:
                out = attention.reference(*points, own, key_mask=mask, window=window)
            outs.append(out)
        out = outs[0] if bounds is None else namespace_of(q).concat(outs, axis=-2)
        return (out, state.kv, state.z, state.c)[: len(gradients)] if causal else (out,)

    return gradients_through_map(results, feature_map, arrays, gradients)


def kernel_matvec_gradients(feature_map: Any, arrays: Sequence[Array], gradient: Array) -> list[Array | None]:
    """Gradients of x, y, v and the arrays of a map that can be differentiated again; as `attention_gradients`."""

    def product(own: Any, x: Array, y: Array, v: Array) -> tuple[Array]:
        return (kernel_matvec.reference(x, y, v, own),)

    return gradients_through_map(product, feature_map, arrays, (gradient,))


def gradients_through_map(
    function: Callable[..., tuple[Array, ...]],
    feature_map: Any,
    arrays: Sequence[Array],
    gradients: Sequence[Array | None],
) -> list[Array | None]:
    """Gradients of arrays, the last six of which belong to a map (`MAP_ARRAYS`), that can be differentiated again.

    They are the gradients through `function(map, *others)`.
    """

    def results(*own: Array) -> tuple[Array, ...]:
        return function(_with_arrays(feature_map, *own[-6:]), *own[:-6])

    return recorded_gradients(results, arrays, gradients)


def features_gradients(arrays: Sequence[Array], gradient: Array) -> list[Array | None]:
    """Gradients of the arguments of `exponential_features` that can be differentiated again."""
    return recorded_gradients(lambda *own: (exponential_features.reference(*own),), arrays, (gradient,))


def _arrays_of(feature_map: Any, of_map: bool) -> tuple[Array, ...]:
    """The arrays of the map whose gradients `of_map` asks for."""
    return (feature_map.rows, feature_map.log_weight) if of_map else ()


def _points_and_map(feature_map: Any, arrays: tuple[Array, ...]) -> tuple[tuple[Array, Array, Array], Any]:
    """The three arrays of points and values, and the map, with the rows and log_weight that follow, if any do."""
    first, second, values, *own = arrays
    if own:
        feature_map = replace(feature_map, rows=own[0], log_weight=own[1])
    return (first, second, values), feature_map


def _with_arrays(
    feature_map: Any, rows: Array, log_weight: Array, g1: Array, g2: Array, center_x: Array, center_y: Array
) -> Any:
    """The map with other arrays in place of its own."""
    parameters = replace(feature_map.parameters, g1=g1, g2=g2, center_x=center_x, center_y=center_y)
    return replace(feature_map, parameters=parameters, rows=rows, log_weight=log_weight)
