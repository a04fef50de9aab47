"""Prototypes: a frozen feature map whose features are made from queries, in place of random rows (docs: theory).

A prototype c is a mean of queries, from a few k-means steps in the coordinates u = g1 (x - center_x) and
v = g2 (y - center_y) of `optimal`, in which the log kernel is u.v + f(x) + f(y). The log features of c are

    query:  TAU (u.c - |c|^2 / 2) - log z_c + h(x),        key:  v.c + f(y),

where z_c is the sum of exp(v.c + f(y)) over the keys of the fit. So the feature of c alone is exact attention from c,
and a query mixes the attention of the prototypes near it. h is linear. It cancels, except beside keys that are scored
exactly: there exp(f(x)) times the products of features should be near the kernel, so h is fitted to that.

The result is a `DenseExponentialMap` with g1, g2 times TINY and rows divided by it, so that the quadratic terms of such
maps are smaller than rounding errors.
"""

from dataclasses import replace
from typing import Any

from favorsharp._algebra import identity, outer, trace
from favorsharp._arrays import broadcast_shapes, cast, from_host, namespace_of, on_device_of
from favorsharp._nonfinite import hide
from favorsharp._typing import Array
from favorsharp._values import astype
from favorsharp.features.dense_exponential import DenseExponentialMap
from favorsharp.ops.landmark_metric import Metric
from favorsharp.ops.landmark_seeds import CANDIDATES, Noise, choose_seeds
from favorsharp.ops.landmarks import gather
from favorsharp.ops.tiles import tiles_of
from favorsharp.parameters import Parameters, embed_key, embed_query
from favorsharp.samples import SAMPLE, k_means, sampled

TAU = 2.0
"""How sharply queries prefer near prototypes. Without a window 3 is a little better, with one 1.5 to 2."""

STEPS = 5
"""Steps of k-means."""

TINY = 2.0**-20
"""A power of two, so that no digit of the rows changes."""

QUERIES, KEYS, RATE = 256, 512, 0.03
"""The most queries and keys that a step of refinement looks at, and the learning rate of Adam at the start."""

_RIDGE, _LEAST = 1e-2, 1e-6
"""The ridge of the linear function h: a multiple of tr / d, and a number.

u and v have equal variances, so the log kernel hardly depends on coordinates with a smaller one than that number.
"""


def prototype_map(
    fitted: Parameters, x: Array, seen_x: Array, y: Array, seen_y: Array, num_features: int, rng: Any
) -> DenseExponentialMap:
    """The map for pooled queries and keys, (*b, n, d) and (*b, s, d), and the parameters of `optimal` for them.

    `rng` is a NumPy generator.
    """
    p = astype(fitted, x.dtype)
    x, y = hide(x, seen_x), hide(y, seen_y)
    x, seen_x = sampled(x, seen_x, rng)
    u = embed_query(p, x)[0]
    points, log_share = _centres(u, seen_x, num_features, rng)
    logs = _log_denominators(p, namespace_of(u).concat(_together(points, u), axis=-2), y, seen_y)
    log_z, log_of_query = logs[..., :num_features, :], logs[..., num_features:, :]
    gate = _gate(u, points, log_share)
    slope, constant = _linear(u, log_of_query - _log_sum(gate), seen_x)
    return _as_map(p, points, log_share, log_z, slope, constant)


def _centres(u: Array, seen: Array, m: int, rng: Any) -> tuple[Array, Array]:
    """k-means centres of queries, (*b, m, d), and the logarithms of the shares with which they count, (*b, 1, m).

    If there are fewer different queries than centres, the first centre is repeated, and its copies share its weight.
    """
    xp = namespace_of(u)
    slots = CANDIDATES * m
    noise = Noise(rng.standard_normal(u.shape[-1]), rng.random(slots), rng.gumbel(size=slots))
    origin, covariance = xp.zeros_like(u[..., :1, :]), outer(u[..., :0, :], u[..., :0, :])
    euclidean = Metric(origin, identity(covariance, covariance), origin)
    alike = xp.where(seen, -xp.sum(u * u, axis=-1), -xp.inf)  # cancels s = |u|^2: all weights are equal
    index, used = choose_seeds(u, alike, euclidean, m, noise, kernel="softmax", scale=1.0)
    u = xp.broadcast_to(u, (*index.shape[:-1], *u.shape[-2:]))
    points, used = xp.take_along_axis(u, index[..., None], axis=-2), used[..., None, :]
    points = k_means(u, seen, points, used, STEPS)
    shared = ~used | (xp.arange(m, **on_device_of(u)) == 0)
    points = xp.where(xp.matrix_transpose(shared), points[..., :1, :], points)
    copies = xp.sum(cast(shared, u.dtype), axis=-1, keepdims=True)
    return points, xp.where(shared, -xp.log(copies), 0.0)


def _halves(points: Array) -> Array:
    """-|c|^2 / 2 as a row, (*b, 1, m)."""
    xp = namespace_of(points)
    return -0.5 * xp.matrix_transpose(xp.sum(points * points, axis=-1, keepdims=True))


def _gate(u: Array, points: Array, log_share: Array) -> Array:
    """The logarithms of the weights with which queries mix prototypes, up to a factor of each query, (*b, n, m)."""
    return TAU * (u @ namespace_of(u).matrix_transpose(points) + _halves(points)) + log_share


def _log_sum(logs: Array) -> Array:
    xp = namespace_of(logs)
    top = xp.max(logs, axis=-1, keepdims=True)
    return top + xp.log(xp.sum(xp.exp(logs - top), axis=-1, keepdims=True))


def _log_denominators(p: Parameters, points: Array, y: Array, seen: Array) -> Array:
    """The logarithm of the sum over keys of exp(v.c + f(y)) for each point c, (*b, r, 1); 0 if no key counts."""
    xp = namespace_of(points)
    batch = broadcast_shapes(points.shape[:-2], y.shape[:-2])
    total = None
    for start, stop in tiles_of(y.shape[-2], points.shape[-2], batch):
        v, factor = embed_key(p, y[..., start:stop, :])
        logs = v @ xp.matrix_transpose(points) + factor
        total = gather(xp.where(seen[..., start:stop, None], logs, -xp.inf), factor, total)
    assert total is not None  # there is one tile or more
    none = total.den == 0
    return xp.where(none, 0.0, xp.log(xp.where(none, 1.0, total.den)) + total.ref)


def _linear(u: Array, wanted: Array, seen: Array) -> tuple[Array, Array]:
    """The linear function of u that is nearest to the wanted numbers: its slope (*b, 1, d) and constant (*b, 1, 1)."""
    xp = namespace_of(u)
    weight = cast(seen, u.dtype)[..., None]
    weight = weight / xp.maximum(xp.sum(weight, axis=-2, keepdims=True), xp.ones_like(weight[..., :1, :]))
    mean, level = (xp.sum(weight * a, axis=-2, keepdims=True) for a in (u, wanted))
    centred = u - mean
    covariance = outer(weight * centred, centred)
    along = outer(centred, weight * (wanted - level))
    eye = identity(covariance, covariance)
    ridge = _RIDGE / u.shape[-1] * trace(covariance) + _LEAST
    slope = xp.matrix_transpose(xp.linalg.solve(covariance + ridge * eye, along))
    return slope, level - xp.sum(slope * mean, axis=-1, keepdims=True)


def _as_map(
    p: Parameters, points: Array, log_share: Array, log_z: Array, slope: Array, constant: Array
) -> DenseExponentialMap:
    """The map with these prototypes. The slope of h moves center_y: f(x) is linear in center_y."""
    xp = namespace_of(points)
    shift = slope @ p.g1
    moved = xp.sum((shift @ xp.matrix_transpose(p.g2)) * points, axis=-1, keepdims=True)
    column = TAU * _halves(points) + log_share + xp.matrix_transpose(moved - log_z) + constant
    m = points.shape[-2]
    column = column + xp.log(xp.zeros_like(column) + m)  # the map divides by m
    own = replace(
        p,
        method="prototypes",
        a=xp.zeros_like(p.a),
        g1=p.g1 * (TAU * TINY),
        g2=p.g2 * TINY,
        center_y=p.center_y + shift,
    )
    rows = points / TINY
    return DenseExponentialMap(own, m, rows, rows, column)


# Refinement -----------------------------------------------------------------------------------------------------------


def refined(
    found: DenseExponentialMap, x: Array, seen_x: Array, y: Array, seen_y: Array, steps: int, rng: Any
) -> DenseExponentialMap:
    """The map after steps of Adam on the Kullback-Leibler divergence of its attention weights from the exact ones.

    Rows and log weights are trained, on queries and keys that each step draws from those of the fit.
    """
    import numpy as np

    xp, x, y = namespace_of(x), hide(x, seen_x), hide(y, seen_y)
    trained = [found.rows * TINY, found.log_weight]
    means, squares = ([xp.zeros_like(z) for z in trained] for _ in range(2))
    own = found
    for step in range(1, steps + 1):
        points = [*_some(x, seen_x, QUERIES, rng), *_some(y, seen_y, KEYS, rng)]
        rate = RATE * 0.5 * (1 + np.cos(np.pi * (step - 1) / steps))
        for i, slope in enumerate(_slopes(own, *points)):
            means[i] = 0.9 * means[i] + 0.1 * slope
            squares[i] = 0.99 * squares[i] + 0.01 * slope * slope
            scale = xp.sqrt(squares[i] / (1 - 0.99**step)) + 1e-12
            trained[i] = trained[i] - float(rate) / (1 - 0.9**step) * means[i] / scale
        own = replace(found, rows=trained[0] / TINY, log_weight=trained[1])
    return _on_scale(own, *_some(x, seen_x, SAMPLE, rng), *_some(y, seen_y, SAMPLE, rng))


def _some(x: Array, seen: Array, most: int, rng: Any) -> tuple[Array, Array]:
    """A sample of the points, at the same positions for all heads, and a mask of those that count."""
    xp = namespace_of(x)
    order = xp.arange(x.shape[-2], **on_device_of(x))
    index = from_host(rng.permutation(x.shape[-2])[:most], x, dtype=order.dtype)
    return xp.take(x, index, axis=-2), xp.take(seen, index, axis=-1)


def _slopes(own: DenseExponentialMap, x: Array, seen_x: Array, y: Array, seen_y: Array) -> tuple[Array, Array]:
    """The gradients of the mean divergence over queries, with respect to rows times TINY and to log weights."""
    xp = namespace_of(x)
    logs = own.log_kernel(x, y)
    exact = xp.exp(logs - _log_total(logs, seen_y))
    queries, keys, _ = _balanced(own, x, y, seen_y)
    products = queries @ xp.matrix_transpose(keys)
    total = xp.sum(products, axis=-1, keepdims=True)
    tiny = 100 * float(xp.finfo(x.dtype).smallest_normal)
    slope = 1 / xp.where(total > 0, total, 1.0) - exact / xp.where(products > tiny, products, tiny)
    slope = xp.where(seen_y[..., None, :], slope, 0.0) * _weights(seen_x, x)
    of_queries = queries * (slope @ keys)
    of_keys = keys * (xp.matrix_transpose(slope) @ queries)
    u, v = embed_query(own.parameters, x)[0] / TINY, embed_key(own.parameters, y)[0] / TINY
    of_rows = xp.matrix_transpose(of_queries) @ u + xp.matrix_transpose(of_keys) @ v
    return of_rows, xp.sum(of_queries, axis=-2, keepdims=True)


def _on_scale(own: DenseExponentialMap, x: Array, seen_x: Array, y: Array, seen_y: Array) -> DenseExponentialMap:
    """The map times a number, so that the mean over queries of the log ratio of the denominators is 0."""
    xp = namespace_of(x)
    queries, keys, factor = _balanced(own, x, y, seen_y)
    total = xp.sum(queries @ xp.matrix_transpose(keys), axis=-1, keepdims=True)
    ratio = _log_total(own.log_kernel(x, y), seen_y) - factor - xp.log(xp.where(total > 0, total, 1.0))
    return replace(own, log_weight=own.log_weight + xp.sum(_weights(seen_x, x) * ratio, axis=-2, keepdims=True))


def _balanced(own: DenseExponentialMap, x: Array, y: Array, seen_y: Array) -> tuple[Array, Array, Array]:
    """Features of queries and of keys, divided by the exponential of the third result, a number for each query.

    The largest feature of a query and the largest key feature in a column are 1.
    """
    xp = namespace_of(x)
    keys = xp.where(seen_y[..., None], own.log_features("key", y), -xp.inf)
    top = xp.max(keys, axis=-2, keepdims=True)
    top = xp.where(top == -xp.inf, 0.0, top)
    queries = own.log_features("query", x) + top
    factor = xp.max(queries, axis=-1, keepdims=True)
    return xp.exp(queries - factor), xp.exp(keys - top), factor


def _log_total(logs: Array, seen_y: Array) -> Array:
    """The logarithms of the sums over the keys that count; 0 if there are none."""
    xp = namespace_of(logs)
    some = xp.any(seen_y, axis=-1)[..., None, None]
    return _log_sum(xp.where(some, xp.where(seen_y[..., None, :], logs, -xp.inf), 0.0))


def _weights(seen: Array, like: Array) -> Array:
    """Equal weights of the points that count, whose sum is 1, (*b, n, 1)."""
    xp = namespace_of(like)
    counted = cast(seen, like.dtype)[..., None]
    total = xp.sum(counted, axis=-2, keepdims=True)
    return counted / xp.where(total > 0, total, 1.0)


def _together(a: Array, b: Array) -> list[Array]:
    """Both arrays with the same leading axes."""
    xp = namespace_of(a, b)
    batch = broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return [xp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (a, b)]
