"""Gradients for callers without automatic differentiation: the public function `vjp`."""

from itertools import pairwise
from typing import Any

from favorsharp._arrays import cast, namespace_of, result_dtype
from favorsharp._autodiff import differentiate
from favorsharp._checks import check_attention, check_choice, check_floats
from favorsharp._heads import merge_heads, split_heads
from favorsharp._typing import Array
from favorsharp.calls import Call, check_bounds, checked
from favorsharp.features import PositiveFeatureMap
from favorsharp.landmarks.settings import Landmarks
from favorsharp.landmarks.verbs import landmark_vjp
from favorsharp.methods import DENSE_EXPONENTIAL
from favorsharp.ops.vjp import Pullback, attention_vjp, exponential_features_vjp, kernel_matvec_vjp
from favorsharp.plans import prepared_map
from favorsharp.regression import check_products, columns, gather, products

__all__ = ["vjp"]


def vjp(function: Any, *arguments: Any, **options: Any) -> tuple[Array, Pullback]:
    """The result of a function, and its vector-Jacobian product as a second function (as `jax.vjp` returns them).

    Use it to train with NumPy and CuPy arrays. Backward kernels compute their gradients, which needs
    `favorsharp[cpu]` or `favorsharp[cuda13]`. It also takes torch and JAX arrays, though these libraries can
    differentiate the functions themselves.

    Parameters
    ----------
    function : {linear_attention, kernel_matvec}, their names, "exponential_features" or the op of that name
        `linear_attention(q, k, v, feature_map)` takes the options is_causal, window, key_mask, enable_gqa and
        cu_seqlens. `kernel_matvec` has the arguments (x, y, v, feature_map). With `of_map=True`, these two also return
        the gradients of the rows and log_weight of a dense-exponential map. `exponential_features` has the arguments
        (u, rows, row, column).
    *arguments, **options
        Arguments and options of the function.

    Returns
    -------
    out : array
    pullback : callable
        Takes a gradient shaped like `out`, and returns the gradients of the arrays among the arguments, in their shapes
        and dtypes: (dq, dk, dv) or (dx, dy, dv), followed by (drows, dlog_weight) with `of_map`; or
        (du, drows, drow, dcolumn).

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or if no backend and no library here can differentiate such arrays.

    Examples
    --------
    With torch; NumPy arrays work the same way where `favorsharp[cpu]` is installed.

    >>> import torch, favorsharp as fs
    >>> q, k, v = torch.randn(3, 16, 4)
    >>> fm = fs.feature_map(fs.fit(q, k), 32, rng=0)
    >>> out, pullback = fs.vjp(fs.linear_attention, q, k, v, fm, is_causal=True)
    >>> dq, dk, dv = pullback(torch.ones_like(out))
    >>> dv.shape
    torch.Size([16, 4])
    """
    name = function if isinstance(function, str) else getattr(function, "__name__", repr(function))
    run = _FUNCTIONS[check_choice("function", name, _FUNCTIONS)]
    out, inner = run(*arguments, **options)

    def pullback(gradient: Array) -> tuple[Array, ...]:
        check_floats(gradient=gradient, out=out)
        if tuple(gradient.shape) != tuple(out.shape):  # with another shape, kernels would read past its end
            raise ValueError(
                f"gradient has shape {tuple(gradient.shape)}; accepted: that of the result, {tuple(out.shape)}"
            )
        found: tuple[Array, ...] = inner(gradient)
        return found

    return out, pullback


def _kernel_matvec(x: Array, y: Array, v: Array, feature_map: Any, *, of_map: bool = False) -> tuple[Array, Pullback]:
    v, single = columns("v", v)
    prepared = prepared_map(feature_map, check_products(x, y, v, feature_map))
    _check_of_map(of_map, feature_map)
    if isinstance(prepared, PositiveFeatureMap):
        out, inner = kernel_matvec_vjp(x, y, v, prepared, of_map=of_map)
    else:

        def signed(x: Array, y: Array, v: Array) -> Array:
            return cast(products(gather(y, v, prepared), x, prepared), result_dtype(namespace_of(x, y, v), x, y, v))

        out, inner = differentiate(signed, (x, y, v))
    if not single:
        return out, inner

    def pullback(gradient: Array) -> tuple[Array, ...]:
        dx, dy, dv, *of_rows = inner(gradient[..., None])
        return dx, dy, dv[..., 0], *of_rows

    return out[..., 0], pullback


def _linear_attention(
    q: Array,
    k: Array,
    v: Array,
    feature_map: Any,
    *,
    is_causal: bool = False,
    window: int = 0,
    key_mask: Array | None = None,
    enable_gqa: bool = False,
    cu_seqlens: Any = None,
    of_map: bool = False,
) -> tuple[Array, Pullback]:
    if isinstance(feature_map, Landmarks):
        check_attention(q, k, v, is_causal=is_causal, key_mask=key_mask, enable_gqa=enable_gqa)
        _check_of_map(of_map, feature_map)
        bounds = None if cu_seqlens is None else check_bounds(cu_seqlens, q.shape[-2], k.shape[-2])
        shared = {"is_causal": is_causal, "window": window, "key_mask": key_mask, "enable_gqa": enable_gqa}
        return landmark_vjp(q, k, v, feature_map, bounds=bounds, **shared)
    call = checked(q, k, v, feature_map, is_causal=is_causal, window=window, key_mask=key_mask, enable_gqa=enable_gqa)
    _check_of_map(of_map, feature_map)
    bounds = None if cu_seqlens is None else check_bounds(cu_seqlens, q.shape[-2], k.shape[-2])
    out, inner = _attention_vjp(call, bounds, of_map)

    def pullback(gradient: Array) -> tuple[Array, ...]:
        dq, dk, dv, *of_rows = inner(split_heads(call.group, gradient))
        shapes = (feature_map.rows.shape, feature_map.log_weight.shape) if of_map else ()
        return (
            merge_heads(call.group, dq),
            *(x if call.group == 1 else x[..., 0, :, :] for x in (dk, dv)),
            *(call.xp.reshape(x, shape) for x, shape in zip(of_rows, shapes, strict=True)),
        )

    return merge_heads(call.group, out), pullback


def _attention_vjp(call: Call, bounds: list[int] | None, of_map: bool) -> tuple[Array, Pullback]:
    """The result and pullback of a checked call; if heads are grouped, with the group axis."""
    options: dict[str, Any] = {"window": call.window, "is_causal": call.is_causal, "of_map": of_map}
    chosen = attention_vjp.implementation(*call.arguments, key_mask=call.key_mask)
    found: tuple[Array, Pullback]
    if bounds is None:
        found = chosen.run(*call.arguments, key_mask=call.key_mask, **options)
        return found
    if chosen.packed is not None and call.q.shape[-2] > 0:
        found = chosen.packed(*call.arguments, bounds, key_mask=call.key_mask, **options)
        return found
    spans = [(a, b) for a, b in pairwise(bounds) if a < b] or [(0, 0)]
    pieces = []
    for a, b in spans:
        mask = None if call.key_mask is None else call.key_mask[..., a:b]
        points = (x[..., a:b, :] for x in (call.q, call.k, call.v))
        pieces.append(chosen.run(*points, call.feature_map, key_mask=mask, **options))
    return call.xp.concat([out for out, _ in pieces], axis=-2), _packed_pullback(pieces, spans, of_map)


def _check_of_map(of_map: bool, feature_map: Any) -> None:
    if of_map and isinstance(feature_map, Landmarks):
        raise ValueError("of_map needs a dense-exponential map, got landmarks, which hold no numbers")
    if of_map and feature_map.parameters.method not in DENSE_EXPONENTIAL:
        raise ValueError(
            f"of_map needs a dense-exponential map ({' '.join(DENSE_EXPONENTIAL)}), "
            f"got method {feature_map.parameters.method_name!r}"
        )


def _packed_pullback(pieces: list[tuple[Array, Pullback]], spans: list[tuple[int, int]], of_map: bool) -> Pullback:
    def pullback(gradient: Array) -> tuple[Array, ...]:
        xp = namespace_of(gradient)
        found = [inner(gradient[..., a:b, :]) for (_, inner), (a, b) in zip(pieces, spans, strict=True)]
        points = tuple(xp.concat([piece[i] for piece in found], axis=-2) for i in range(3))
        return points + tuple(sum(piece[i] for piece in found) for i in ((3, 4) if of_map else ()))

    return pullback


_FUNCTIONS: dict[str, Any] = {
    "exponential_features": exponential_features_vjp,
    "linear_attention": _linear_attention,
    "kernel_matvec": _kernel_matvec,
}
"""The functions that `vjp` differentiates, by name."""
