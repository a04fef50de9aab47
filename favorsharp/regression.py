"""Products with kernel matrices by random features: K(x, y) @ v, and the Nadaraya-Watson estimate.

`kernel_matvec`, `nadaraya_watson` and `leave_one_out` are public; the scikit-learn estimators call the parts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from favorsharp._arrays import (
    broadcast_shapes,
    cast,
    compute_dtype,
    namespace_of,
    on_device_of,
    result_dtype,
    under_own_settings,
)
from favorsharp._checks import check_array, check_broadcast, check_floats, check_points, check_same_size
from favorsharp._chunks import as_chunked, is_chunked, point_blocks, tree_reduce
from favorsharp._typing import Array
from favorsharp._values import astype
from favorsharp.features import FeatureMap, PositiveFeatureMap
from favorsharp.landmarks.attention import read_state
from favorsharp.landmarks.settings import Landmarks
from favorsharp.landmarks.state import LandmarkState, log_weights, state_with
from favorsharp.landmarks.verbs import check_means, landmark_means
from favorsharp.moments import Moments, combine, moments
from favorsharp.ops.attention import attention
from favorsharp.ops.kernel_matvec import kernel_matvec as kernel_matvec_op
from favorsharp.ops.state import State, empty_state, read_partial
from favorsharp.ops.state import read as read_op
from favorsharp.ops.state import update as update_op
from favorsharp.ops.tiles import tiles_of
from favorsharp.plans import prepared_map


@dataclass(frozen=True, eq=False)
class SignedSums:
    """Sums of signed key features times values, divided by exp(top).

    Attributes
    ----------
    total : array, shape (*b, m, e + 1)
        The last column is the sum for values of 1.
    top : array, shape (*b, 1, 1)
        The largest log factor of the points so far; -inf if there are none.
    """

    total: Array
    top: Array


Sums = State | SignedSums
"""The sums over points y and their values that an estimate reads; `gather` makes them, and `combine` joins them."""


@combine.register
@under_own_settings
def _combine_sums(a: SignedSums, b: Any) -> SignedSums:
    if not isinstance(b, SignedSums) or a.total.shape[-2:] != b.total.shape[-2:]:
        raise ValueError(f"combine needs sums of one map and one value size, got {a} and {b}")
    xp = namespace_of(a.total, b.total)
    top = xp.maximum(a.top, b.top)
    safe = xp.where(top == -xp.inf, 0.0, top)
    return SignedSums(a.total * xp.exp(a.top - safe) + b.total * xp.exp(b.top - safe), top)


@under_own_settings
def kernel_matvec(x: Array, y: Array, v: Array, /, feature_map: FeatureMap) -> Array:
    """An unbiased estimate of K(x, y) @ v in time O((n + s) m (d + e)).

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

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> x, y = np.random.default_rng(0).standard_normal((2, 100, 2))
    >>> feature_map = fs.feature_map(fs.fit(x, y, kernel="gaussian"), 4096, rng=0)
    >>> estimate = fs.kernel_matvec(x, y, np.ones(100), feature_map)
    >>> exact = fs.kernel_matrix(x, y, kernel="gaussian").sum(1)
    >>> bool(abs(estimate / exact - 1).mean() < 0.1)
    True
    """
    if is_chunked(x, y, v):
        return _chunked(x, y, v, feature_map, products)
    v, single = columns("v", v)
    prepared = prepared_map(feature_map, check_products(x, y, v, feature_map))
    if isinstance(prepared, PositiveFeatureMap):
        out = kernel_matvec_op(x, y, v, prepared)
    else:
        out = cast(products(gather(y, v, prepared), x, prepared), result_dtype(namespace_of(x, y, v), x, y, v))
    return out[..., 0] if single else out


@under_own_settings
def nadaraya_watson(x: Array, y: Array, v: Array, /, feature_map: FeatureMap | Landmarks) -> Array:
    """The kernel-weighted mean of v at each x: K(x, y) @ v with the rows of K normalised to sum 1.

    Parameters
    ----------
    x : array, shape (*b, n, d)
        The points at which to estimate.
    y : array, shape (*b, s, d)
        The points at which v is known.
    v : array, shape (*b, s, e) or (s,)
    feature_map : FeatureMap or Landmarks
        With a signed map the estimated denominator of a row can be zero or negative; such a row is NaN.

    Returns
    -------
    array, shape (*b, n, e), or (*b, n) for a v of one axis
        In the dtype that x, y and v promote to. Zeros if there are no points y.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> x = np.linspace(-1, 1, 200)[:, None]
    >>> feature_map = fs.feature_map(fs.fit(x, x, kernel="gaussian", scale=50), 256, rng=0)
    >>> asked = np.array([[-0.5], [0.0], [0.5]])
    >>> fs.nadaraya_watson(asked, x, x[:, 0], feature_map).round(1) + 0.0
    array([-0.5,  0. ,  0.5])
    """
    if isinstance(feature_map, Landmarks):
        if is_chunked(x, y, v):
            return _chunked_landmarks(x, y, v, feature_map)
        v, single = columns("v", v)
        out = landmark_means(x, y, v, feature_map)
        return out[..., 0] if single else out
    if is_chunked(x, y, v):
        return _chunked(x, y, v, feature_map, means)
    v, single = columns("v", v)
    prepared = prepared_map(feature_map, check_products(x, y, v, feature_map))
    if isinstance(prepared, PositiveFeatureMap):
        out = attention(x, y, v, prepared)
    else:
        out = cast(means(gather(y, v, prepared), x, prepared), result_dtype(namespace_of(x, y, v), x, y, v))
    return out[..., 0] if single else out


def columns(name: str, v: Any) -> tuple[Array, bool]:
    """Return v with a value axis, and whether that axis was missing."""
    check_array(name, v)
    return (v[:, None], True) if v.ndim == 1 else (v, False)


def _chunked(x: Array, y: Array, v: Array, feature_map: Any, finish: Callable[[Sums, Array, Any], Array]) -> Array:
    """A lazy dask array: each chunk of y gives sums, a tree joins them, and each chunk of x reads the result."""
    import dask
    import numpy as np

    v, single = columns("v", v)
    x, y, v = as_chunked(x=x, y=y, v=v)
    if not isinstance(feature_map, FeatureMap):
        raise TypeError(f"feature_map must be a favorsharp.FeatureMap, got {type(feature_map).__name__}")
    # the checks run on stand-ins with the same shapes and dtypes but without data, so nothing is computed here
    hollow = [np.broadcast_to(np.zeros((), dtype=a.dtype), a.shape) for a in (x, y, v)]
    dtype = check_products(hollow[0], hollow[1], hollow[2], feature_map)
    out_dtype = np.result_type(*(a.dtype for a in hollow))
    batch = broadcast_shapes(*(a.shape[:-2] for a in hollow), feature_map.batch_shape)
    prepared: Any = astype(feature_map, dtype)
    held = dask.delayed(prepared, traverse=False)
    pairs = zip(point_blocks(y), point_blocks(v, like=y), strict=True)
    sums = tree_reduce(_joined, [dask.delayed(gather)(a.astype(dtype), b, held) for a, b in pairs])
    out = _read_by_chunks(finish, sums, x, held, (*batch, v.shape[-1]), out_dtype)
    return out[..., 0] if single else out


def _chunked_landmarks(x: Array, y: Array, v: Array, settings: Landmarks) -> Array:
    """A lazy dask array: each chunk of y is compressed with the moments of all points, and a tree joins the states."""
    import dask
    import numpy as np

    v, single = columns("v", v)
    x, y, v = as_chunked(x=x, y=y, v=v)
    hollow = [np.broadcast_to(np.zeros((), dtype=a.dtype), a.shape) for a in (x, y, v)]
    check_means(*hollow)
    batch = broadcast_shapes(*(a.shape[:-2] for a in hollow))
    seen, held = dask.delayed(Moments)(**vars(moments(x, y))), dask.delayed(settings, traverse=False)
    pairs = zip(point_blocks(y), point_blocks(v, like=y), strict=True)
    states = tree_reduce(_joined, [dask.delayed(_landmarks_of)(a, b, seen, held) for a, b in pairs])
    shape = (*batch, v.shape[-1])
    out = _read_by_chunks(_read_landmarks, states, x, held, shape, np.result_type(*(a.dtype for a in hollow)))
    return out[..., 0] if single else out


def _landmarks_of(y: Array, v: Array, seen: Moments, settings: Landmarks) -> LandmarkState:
    log_weight = log_weights(y, None, compute_dtype(namespace_of(y, v), y, v))
    return state_with(y, v, log_weight, seen, settings)


def _read_landmarks(state: LandmarkState, x: Array, settings: Landmarks) -> Array:
    return read_state(state, x)


def _read_by_chunks(finish: Any, held: Any, x: Any, feature_map: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """The results of each chunk of x from the delayed sums or state of all points y; `shape` omits the point axis."""
    import dask
    import dask.array as da

    blocks = []
    for size, block in zip(x.chunks[-2], point_blocks(x), strict=True):
        own = (*shape[:-1], size, shape[-1])
        blocks.append(
            da.from_delayed(dask.delayed(_finished)(finish, held, block, feature_map, own, dtype), own, dtype)
        )
    return da.concatenate(blocks, axis=-2)


def _joined(parts: list[Any]) -> Any:
    return reduce(combine, parts)


def _finished(finish: Any, sums: Sums, x: Array, feature_map: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    out = cast(finish(sums, x, feature_map), dtype)
    return namespace_of(out).broadcast_to(out, shape)


def check_products(x: Array, y: Array, v: Array, feature_map: Any) -> Any:
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


@under_own_settings
def gather(y: Array, v: Array, feature_map: Any, weight: Array | None = None) -> Sums:
    """The sums of a block of points and values.

    The arguments have been checked, and the map is in the dtype to compute in. A positive weight (*b, s) multiplies the
    contribution of its point.
    """
    xp = namespace_of(y, v)
    if weight is not None or not feature_map.positive:
        ones = xp.ones_like(v[..., :1]) if weight is None else weight[..., None]
        v = xp.concat([v * ones, ones], axis=-1)
    dtype = compute_dtype(xp, y, v)
    batch = broadcast_shapes(y.shape[:-2], v.shape[:-2], feature_map.batch_shape)
    if feature_map.positive:
        empty = empty_state(feature_map, batch, y.shape[-1], v.shape[-1], 0, cast(y[..., :0, :], dtype))
        state = update_op(empty, y, v, feature_map)
        if weight is None:
            return state
        (kv, z), (kv_low, z_low) = (_last_column_apart(x) for x in (state.kv, state.kv_low))
        return replace(state, kv=kv, z=z, kv_low=kv_low, z_low=z_low)
    m = feature_map.num_features
    sums = SignedSums(
        xp.zeros((*batch, m, v.shape[-1]), dtype=dtype, **on_device_of(y)),
        xp.full((*batch, 1, 1), -xp.inf, dtype=dtype, **on_device_of(y)),
    )
    for a, b in tiles_of(y.shape[-2], m, batch):
        if a == b:
            continue
        features, log_factor = feature_map.key_parts(cast(y[..., a:b, :], dtype))
        top = xp.max(log_factor, axis=-2, keepdims=True)
        weighted = features * xp.exp(log_factor - top)
        sums = combine(sums, SignedSums(xp.matrix_transpose(weighted) @ cast(v[..., a:b, :], dtype), top))
    return sums


def _last_column_apart(kv: Array | None) -> tuple[Array | None, Array | None]:
    """The first columns of kv, and its last column as a row: the sums of weighted values, and those of weights."""
    if kv is None:
        return None, None
    return kv[..., :-1], namespace_of(kv).matrix_transpose(kv[..., -1:])


@under_own_settings
def products(sums: Sums, x: Array, feature_map: Any) -> Array:
    """K(x, y) @ v for the y and v in the sums, in the dtype of the sums."""
    if isinstance(sums, State):

        def rows(tile: Array) -> Array:
            part = read_partial(sums, feature_map.log_query(tile))
            return part.num * namespace_of(tile).exp(part.ref)
    else:

        def rows(tile: Array) -> Array:
            features, log_factor = feature_map.query_parts(tile)
            return (features @ sums.total[..., :-1]) * namespace_of(tile).exp(log_factor + sums.top)

    return _by_tiles(rows, sums, x, feature_map)


@under_own_settings
def means(sums: Sums, x: Array, feature_map: Any) -> Array:
    """The kernel-weighted mean of the v in the sums, in the dtype of the sums; see `nadaraya_watson`."""
    if isinstance(sums, State):
        return read_op(sums, cast(x, sums.kv.dtype), feature_map)

    def rows(tile: Array) -> Array:
        out = feature_map.query_parts(tile)[0] @ sums.total
        return _divided(out[..., :-1], out[..., -1:])

    out = _by_tiles(rows, sums, x, feature_map)
    empty = sums.top == -namespace_of(x).inf
    return namespace_of(x).where(empty, 0.0, out)


def leave_one_out(x: Array, v: Array, /, feature_map: FeatureMap) -> Array:
    """The Nadaraya-Watson estimate at each point from all the others, in one pass over the points.

    The sums over all points are computed once, and the contribution of each point is subtracted for its own estimate,
    so the n estimates cost as much as `nadaraya_watson`. To choose a bandwidth, compare the mean square differences
    from v for maps of several scales.

    Parameters
    ----------
    x : array, shape (*b, n, d)
    v : array, shape (*b, n, e) or (n,)
    feature_map : FeatureMap

    Returns
    -------
    array, shape (*b, n, e), or (*b, n) for a v of one axis
        In the dtype that x and v promote to. The estimate of a point is NaN if the other points have less than 1e-10
        (in float32, 1e-4) of the total weight, because the remaining sums are then only rounding errors. With a signed
        map it is also NaN if the weight of the others is not positive.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> rng = np.random.default_rng(0)
    >>> x = rng.uniform(-1, 1, (200, 1))
    >>> v = np.sin(5 * x[:, 0]) + 0.1 * rng.standard_normal(200)
    >>> errors = {}
    >>> for scale in (1, 100):
    ...     feature_map = fs.feature_map(fs.fit(x, x, kernel="gaussian", scale=scale), 256, rng=0)
    ...     errors[scale] = np.mean((v - fs.leave_one_out(x, v, feature_map)) ** 2)
    >>> min(errors, key=errors.get)
    100
    """
    v, single = columns("v", v)
    out = left_out(x, v, astype(feature_map, check_products(x, x, v, feature_map)))
    return out[..., 0] if single else out


@under_own_settings
def left_out(x: Array, v: Array, prepared: Any, weight: Array | None = None) -> Array:
    """`leave_one_out` with positive weights (*b, n) of the points; a point is left out with all its weight.

    The arguments have been checked, and the map, which may consist of landmarks, is in the dtype to compute in.
    """
    xp = namespace_of(x, v)
    dtype = compute_dtype(xp, x, v)
    sums = gather(x, v, prepared, weight)
    least = 1e-4 if dtype == xp.float32 else 1e-10
    outs = []
    batch = broadcast_shapes(x.shape[:-2], v.shape[:-2], prepared.batch_shape)
    for a, b in tiles_of(x.shape[-2], prepared.num_features, batch):
        tile, values = cast(x[..., a:b, :], dtype), cast(v[..., a:b, :], dtype)
        if isinstance(sums, State):
            lq, lk = prepared.log_query(tile), prepared.log_key(tile)
            part = read_partial(sums, lq)
            num, den = part.num, part.den
            own = xp.sum(xp.exp(lq + lk - part.ref), axis=-1, keepdims=True)
        else:
            query, _ = prepared.query_parts(tile)
            key, log_factor = prepared.key_parts(tile)
            both = query @ sums.total
            num, den = both[..., :-1], both[..., -1:]
            own = xp.sum(query * key, axis=-1, keepdims=True) * xp.exp(log_factor - sums.top)
        if weight is not None:
            own = own * weight[..., a:b, None]
        left = xp.where(den - own > least * den, den - own, 0.0 * den)
        outs.append(cast(_divided(num - own * values, left), result_dtype(xp, x, v)))
    return outs[0] if len(outs) == 1 else xp.concat(outs, axis=-2)


def _divided(num: Array, den: Array) -> Array:
    """Return num / den; NaN where den is not positive."""
    xp = namespace_of(num)
    return xp.where(den > 0, num / xp.where(den > 0, den, 1.0), xp.nan)


def _by_tiles(rows: Callable[[Array], Array], sums: Sums, x: Array, feature_map: Any) -> Array:
    """Apply `rows` to x, one tile of points at a time."""
    xp = namespace_of(x)
    held = sums.kv if isinstance(sums, State) else sums.total
    batch = broadcast_shapes(x.shape[:-2], held.shape[:-2], feature_map.batch_shape)
    outs = []
    for a, b in tiles_of(x.shape[-2], feature_map.num_features, batch):
        out = rows(cast(x[..., a:b, :], held.dtype))
        outs.append(xp.broadcast_to(out, (*batch, *out.shape[-2:])))
    return outs[0] if len(outs) == 1 else xp.concat(outs, axis=-2)
