"""Kernel operators through features: K(x, y) @ v, and the Nadaraya-Watson estimate."""

from typing import Any

from favorsharp._arrays import broadcast_shapes, cast, compute_dtype, namespace_of, on_device_of, result_dtype
from favorsharp._checks import check_array, check_broadcast, check_floats, check_points, check_same_size
from favorsharp._typing import Array
from favorsharp.features import FeatureMap, PositiveFeatureMap
from favorsharp.features.base import SignedFeatureMap
from favorsharp.ops.attention import attention
from favorsharp.ops.kernel_matvec import kernel_matvec as kernel_matvec_op
from favorsharp.ops.state import tiles_of
from favorsharp.parameters import astype


def kernel_matvec(x: Array, y: Array, v: Array, feature_map: FeatureMap) -> Array:
    """An unbiased estimate of K(x, y) @ v in O((n + s) m (d + e)).

    Parameters
    ----------
    x : array, shape (*b, n, d)
    y : array, shape (*b, s, d)
    v : array, shape (*b, s, e) or (s,)
    feature_map : FeatureMap
        Positive or signed.

    Returns
    -------
    array, shape (*b, n, e), or (*b, n) for a v of one axis
        In the dtype that x, y and v promote to.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """
    v, single = _columns(v)
    prepared: Any = astype(feature_map, _check(x, y, v, feature_map))
    if isinstance(prepared, PositiveFeatureMap):
        out = kernel_matvec_op(x, y, v, prepared)
    else:
        out = _signed_products(x, y, v, prepared, normalise=False)
    return out[..., 0] if single else out


def nadaraya_watson(x: Array, y: Array, v: Array, feature_map: FeatureMap) -> Array:
    """The kernel-weighted mean of v at each x: K(x, y) @ v with rows normalised.

    Parameters
    ----------
    x : array, shape (*b, n, d)
        Where to estimate.
    y : array, shape (*b, s, d)
        Where v is known.
    v : array, shape (*b, s, e) or (s,)
    feature_map : FeatureMap
        With a signed map the estimated denominator of a row can fail to be positive; such a row is NaN.

    Returns
    -------
    array, shape (*b, n, e), or (*b, n) for a v of one axis
        In the dtype that x, y and v promote to. Zeros where there are no keys.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """
    v, single = _columns(v)
    prepared: Any = astype(feature_map, _check(x, y, v, feature_map))
    if isinstance(prepared, PositiveFeatureMap):
        out = attention(x, y, v, prepared)
    else:
        out = _signed_products(x, y, v, prepared, normalise=True)
    return out[..., 0] if single else out


def _columns(v: Any) -> tuple[Array, bool]:
    """Return v with a value axis, and whether it had none."""
    check_array("v", v)
    return (v[:, None], True) if v.ndim == 1 else (v, False)


def _check(x: Array, y: Array, v: Array, feature_map: Any) -> Any:
    """Check the arguments and return the dtype to compute in."""
    xp = check_floats(x=x, y=y, v=v)
    if not isinstance(feature_map, FeatureMap):
        raise TypeError(f"feature_map must be a favorsharp.FeatureMap, got {type(feature_map).__name__}")
    check_floats(x=x, feature_map=feature_map.projection)
    for name, array, letters in (("x", x, "(*b, n, d)"), ("y", y, "(*b, s, d)"), ("v", v, "(*b, s, e) or (s,)")):
        check_points(name, array, letters)
    size = feature_map.parameters.size
    check_same_size("d", x=(-1, x.shape[-1]), y=(-1, y.shape[-1]), feature_map=(-1, size))
    check_same_size("s", y=(-2, y.shape[-2]), v=(-2, v.shape[-2]))
    batches = {"x": x.shape[:-2], "y": y.shape[:-2], "v": v.shape[:-2], "feature_map": feature_map.batch_shape}
    check_broadcast("x (*b, n, d), y (*b, s, d), v (*b, s, e)", **batches)
    return compute_dtype(xp, x, y, v)


def _signed_products(x: Array, y: Array, v: Array, feature_map: SignedFeatureMap, *, normalise: bool) -> Array:
    """K(x, y) @ v by signed features, tile by tile; the scalar factors of points are kept as logarithms."""
    xp = namespace_of(x, y, v)
    out_dtype = result_dtype(xp, x, y, v)
    dtype = compute_dtype(xp, x, y, v)
    batch = broadcast_shapes(x.shape[:-2], y.shape[:-2], v.shape[:-2], feature_map.batch_shape)
    n, s, m = x.shape[-2], y.shape[-2], feature_map.num_features
    if s == 0:
        return xp.zeros((*batch, n, v.shape[-1]), dtype=out_dtype, **on_device_of(x))
    if normalise:
        v = xp.concat([v, xp.ones_like(v[..., :1])], axis=-1)
    total, top = None, None
    for a, b in tiles_of(s, m, batch):
        features, log_factor = feature_map.key_parts(cast(y[..., a:b, :], dtype))
        tile_top = xp.max(log_factor, axis=-2, keepdims=True)
        weighted = features * xp.exp(log_factor - tile_top)
        tile_total = xp.matrix_transpose(weighted) @ cast(v[..., a:b, :], dtype)
        if total is None:
            total, top = tile_total, tile_top
        else:
            higher = xp.maximum(top, tile_top)
            total = total * xp.exp(top - higher) + tile_total * xp.exp(tile_top - higher)
            top = higher
    outs = []
    for a, b in tiles_of(n, m, batch):
        features, log_factor = feature_map.query_parts(cast(x[..., a:b, :], dtype))
        out = features @ total
        if normalise:
            weight = out[..., -1:]
            out = xp.where(weight > 0, out[..., :-1] / xp.where(weight > 0, weight, 1.0), xp.nan)
        else:
            out = out * xp.exp(log_factor + top)
        outs.append(xp.broadcast_to(cast(out, out_dtype), (*batch, *out.shape[-2:])))
    return outs[0] if len(outs) == 1 else xp.concat(outs, axis=-2)
