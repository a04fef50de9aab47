"""Nystrom's method: a map of kernels with centres, which are chosen from sample points (docs: theory, nystrom).

With the centres C, the kernel K(x, y) is replaced by K(x, C) A K(C, y). The centres are drawn from a sample of queries
and keys: m uniformly, and half as many in proportion to the error of the kernel of the point with itself that some of
the first ones leave. They move part of the way to the means of the points around them. A has the rank m, and describes
the m largest directions of K(C, C). It is the inverse of K(C, C) along these, plus what a ridge regression of the
kernel matrix of the sample adds to it.
"""

import math
from dataclasses import replace
from typing import Any

from favorsharp._algebra import identity, outer
from favorsharp._arrays import broadcast_shapes, cast, from_host, namespace_of, on_device_of
from favorsharp._typing import Array
from favorsharp._values import astype
from favorsharp.features.nystrom import NystromMap, gaussian
from favorsharp.ops.state import hide
from favorsharp.parameters import Parameters, embed_key, embed_query
from favorsharp.samples import SAMPLE, k_means, sampled

OVERSAMPLING = 1.5
"""Centres for each feature; one is drawn uniformly."""

FIRST = 0.25
"""The share of uniform centres whose errors the others are drawn by."""

TOWARDS_MEANS = 0.5
"""The part of the way from a point of the sample to the mean of the points around it that a centre moves."""

LEAST = 1e-5
"""What features leave of the kernels of points with themselves, on average, below which no regression follows."""

NOISE = 8.0
"""Eigenvalues below this times the root of m and the precision of the dtype of the features are left out. Along such a
direction the rounding errors of kernels would be a tenth of the feature or more."""

RIDGE = 0.1
"""The ridge of the regression, in units of one point's square features."""


def nystrom_map(
    fitted: Parameters, x: Array, seen_x: Array, y: Array, seen_y: Array, num_features: int, rng: Any
) -> NystromMap:
    """The map for pooled queries and keys, (*b, n, d) and (*b, s, d), and the parameters fitted to them.

    These are those of `optimal`, or of `posrf` for the Gaussian kernel: g1 and g2 are the identity then. `rng` is a
    NumPy generator. Directions that rounding errors would swamp are left out.
    """
    xp = namespace_of(x, y)
    least = NOISE * math.sqrt(num_features) * float(xp.finfo(fitted.g1.dtype).eps)
    most = max(SAMPLE, 2 * num_features)
    if y is x:
        x, seen_x = sampled(hide(x, seen_x), seen_x, rng, most)
        y, seen_y = x[..., :0, :], seen_x[..., :0]
    else:
        x, seen_x = sampled(hide(x, seen_x), seen_x, rng, most // 2)
        y, seen_y = sampled(hide(y, seen_y), seen_y, rng, most // 2)
    seen = _joined(seen_x[..., None], seen_y[..., None])
    p = _coordinates(astype(fitted, x.dtype), _joined(x, y), seen)
    if p.kernel == "gaussian":  # the coordinates are the points minus a mean: no product with g1 or g2
        points = _joined(x, y) * math.sqrt(p.scale) - p.center_x
    else:
        points = _joined(embed_query(p, x)[0], embed_key(p, y)[0])
    noise = from_host(rng.gumbel(size=(2, most)), points)
    centres = _centres(points, seen[..., 0], num_features, least, noise)
    root = _inverse_root(gaussian(centres, centres), num_features, least)
    points, seen = sampled(points, seen[..., 0], rng, max(SAMPLE // 2, 2 * num_features))  # enough for the regression
    stretch = _stretch(points, gaussian(points, centres) @ root, seen[..., None])
    return NystromMap(p, num_features, centres, root @ stretch)


def _joined(a: Array, b: Array) -> Array:
    """Both along the point axis, (*b, n, d) and (*b, s, d) -> (*b, n + s, d)."""
    xp = namespace_of(a, b)
    batch = broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return xp.concat([xp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (a, b)], axis=-2)


def _coordinates(p: Parameters, points: Array, seen: Array) -> Parameters:
    """The coordinates of centres: those of the fit, and with the Gaussian kernel the points minus their mean."""
    own = replace(p, method="nystrom", a=namespace_of(p.a).zeros_like(p.a))
    if p.kernel == "softmax":
        return own
    centre = _mean(points, seen) * math.sqrt(p.scale)
    return replace(own, center_x=centre, center_y=centre)


def _mean(points: Array, seen: Array) -> Array:
    """The mean of the points that count, (*b, 1, d); zeros if there are none."""
    xp = namespace_of(points)
    weight = cast(seen, points.dtype)
    count = xp.sum(weight, axis=-2, keepdims=True)
    return xp.sum(points * weight, axis=-2, keepdims=True) / xp.maximum(count, xp.ones_like(count))


def _centres(points: Array, seen: Array, m: int, least: float, noise: Array) -> Array:
    """Centres, (*b, c, d); some are equal if fewer points count. `noise` has two rows of Gumbel numbers."""
    xp = namespace_of(points)
    # which numbers a point gets must not depend on masked points
    rank = xp.cumulative_sum(cast(seen, xp.int64), axis=-1) - 1
    count, rank = rank[..., -1:] + 1, xp.maximum(rank, xp.zeros_like(rank))
    key, other = (
        xp.take_along_axis(row + xp.zeros_like(seen[..., :1], dtype=row.dtype), rank, axis=-1)
        for row in (noise[0, :], noise[1, :])
    )
    key = xp.where(seen, key, -xp.inf)
    uniform = _take(points, key, count, m)
    first = uniform[..., : max(1, round(FIRST * m)), :]
    features = gaussian(points, first) @ _inverse_root(gaussian(first, first), first.shape[-2], least)
    log_left = xp.log(xp.clip(1 - xp.sum(features * features, axis=-1), float(xp.finfo(features.dtype).eps), 1.0))
    drawn = xp.argsort(xp.argsort(key, axis=-1, descending=True), axis=-1) < m
    pivots = xp.where(seen, xp.where(drawn, -1e30, log_left + other), -xp.inf)
    centres = _take(points, pivots, count, math.ceil(OVERSAMPLING * m) - m)
    centres = xp.concat([uniform, centres], axis=-2)
    means = k_means(points, seen, centres, xp.ones_like(centres[..., :1, :1], dtype=xp.bool), 1)
    return centres + TOWARDS_MEANS * (means - centres)


def _take(points: Array, key: Array, count: Array, m: int) -> Array:
    """The points with the largest keys, (*b, m, d); repeated if there are fewer than m, which `count` says."""
    xp = namespace_of(points)
    order = xp.argsort(key, axis=-1, descending=True)
    slot = xp.arange(m, dtype=count.dtype, **on_device_of(points)) % xp.maximum(count, xp.ones_like(count))
    index = xp.take_along_axis(order, cast(slot + xp.zeros_like(count), order.dtype), axis=-1)
    return xp.take_along_axis(points, index[..., None], axis=-2)


def _stretch(points: Array, features: Array, seen: Array) -> Array:
    """L with L L^T = I + B, where features B features^T is nearest to what the features leave of the kernel matrix.

    What they leave has no negative eigenvalues, so B has none. float32 is enough for the products, because B is small
    where features are large. Where features leave less than `LEAST`, rounding errors could be larger, and B is 0.
    """
    xp = namespace_of(points)
    wide, weight = points.dtype, cast(seen, points.dtype)
    features = features * weight
    own = xp.sum(weight - xp.sum(features * features, axis=-1, keepdims=True), axis=(-2, -1), keepdims=True)
    points, features = cast(points, xp.float32), cast(features, xp.float32)
    moment = outer(features, features)
    left = cast(outer(features, gaussian(points, points) @ features) - moment @ moment, wide)
    moment = cast(moment, wide)
    eye = identity(moment, moment)
    inverse = xp.linalg.inv(moment + RIDGE * eye)
    added = xp.where(own > LEAST * xp.sum(weight, axis=(-2, -1), keepdims=True), inverse @ left @ inverse, 0.0)
    return xp.linalg.cholesky(eye + 0.5 * (added + xp.matrix_transpose(added)))


def _inverse_root(matrix: Array, m: int, least: float) -> Array:
    """R of m columns with R R^T the inverse of a second moment along its m largest directions.

    Eigenvalues below `least`, or that rounding errors of the decomposition would swamp, are left out. The columns are
    eigenvectors: mixed ones would lose digits where kernels are rounded to float32.
    """
    xp = namespace_of(matrix)
    values, axes = xp.linalg.eigh(matrix)
    values, axes = values[..., None, -m:], axes[..., -m:]
    rounding = matrix.shape[-1] * float(xp.finfo(values.dtype).eps) * values[..., -1:]
    kept = values > xp.maximum(rounding, xp.full_like(rounding, least))
    return axes * xp.where(kept, 1 / xp.sqrt(xp.where(kept, values, 1.0)), 0.0)
