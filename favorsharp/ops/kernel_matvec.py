"""K(x, y) @ v through features, not normalised; the public `kernel_matvec` calls this op."""

from favorsharp._arrays import broadcast_shapes, cast, compute_dtype, namespace_of, result_dtype
from favorsharp._typing import Array, PositiveMap
from favorsharp.dispatch import Op
from favorsharp.ops.state import absorb, empty_state, log_features, read_partial
from favorsharp.ops.tiles import tiles_of


@Op
def kernel_matvec(x: Array, y: Array, v: Array, feature_map: PositiveMap) -> Array:
    """An unbiased estimate of K(x, y) @ v in O((n + s) m (d + e)).

    Parameters
    ----------
    x : array, shape (*b, n, d)
    y : array, shape (*b, s, d)
    v : array, shape (*b, s, e)
    feature_map : PositiveFeatureMap
        In the dtype to compute in.

    Returns
    -------
    array, shape (*b, n, e)
        In the dtype that x, y and v promote to. Overflows only if the exact result does.
    """
    xp = namespace_of(x, y, v)
    dtype, out_dtype = compute_dtype(xp, x, y, v), result_dtype(xp, x, y, v)
    batch = broadcast_shapes(y.shape[:-2], v.shape[:-2], feature_map.batch_shape)
    full_batch = broadcast_shapes(x.shape[:-2], batch)
    state = absorb(
        empty_state(feature_map, batch, y.shape[-1], v.shape[-1], 0, cast(y[..., :0, :], dtype)),
        y,
        v,
        None,
        feature_map,
    )
    outs = []
    for a, b in tiles_of(x.shape[-2], state.num_features, full_batch):
        part = read_partial(state, log_features(feature_map, "query", cast(x[..., a:b, :], dtype)))
        out = cast(part.num * xp.exp(part.ref), out_dtype)
        outs.append(xp.broadcast_to(out, (*full_batch, *out.shape[-2:])))
    return outs[0] if len(outs) == 1 else xp.concat(outs, axis=-2)
