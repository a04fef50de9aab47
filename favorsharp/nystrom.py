"""Nystrom's method: a map of kernels with centres, which are chosen from sample points (docs: theory, nystrom).

With the centres C, a Gaussian kernel W and a matrix A, the kernel K(x, y) is replaced by W(x, C) A W(C, y). The centres
are drawn from a sample of queries and keys: some uniformly, and the others in proportion to the part of the kernel of a
point with itself that the first ones leave unexplained. Then they move towards the means of the points around them.

If K is neither smooth nor narrow, W is a little wider than K, so that its functions are nearer to the largest
eigenvectors of the kernel matrix. The centres also move towards the mean of all points, and A comes from a regression
of the kernel matrix of points of the sample. Otherwise W is K, and A is the inverse of W(C, C).
"""

import math
from dataclasses import replace
from typing import Any

from favorsharp._algebra import inverse_of_lower, on_diagonal, outer, row_sum, trace
from favorsharp._arrays import broadcast_shapes, cast, from_host, namespace_of, on_device_of
from favorsharp._autodiff import is_traced
from favorsharp._nonfinite import hide
from favorsharp._typing import Array
from favorsharp._values import astype
from favorsharp.features.nystrom import NystromMap, gaussian
from favorsharp.parameters import Parameters, embed_key, embed_query
from favorsharp.samples import SAMPLE, k_means, sampled

SHARPNESS = 0.9
"""The scale of W, in units of that of K, if W is wider than K."""

FIRST = 0.2
"""The share of centres that are drawn uniformly if W is wider than K. The others are drawn by what these leave
unexplained."""

FIRST_OF_EQUAL = 0.5
"""The share of centres that are drawn uniformly if W is K."""

TOWARDS_MEANS = 0.7
"""The part of the way from a point of the sample to the mean of the points around it that a centre moves."""

INWARDS = 0.3
"""The part of the remaining way to the mean of all points that centres then move, if W is wider than K."""

FARTHEST = 0.45
"""The longest way that a centre moves, in widths of the kernel: no point may be far from its own centre."""

REGRESSED = 2.0
"""Points of the regression for each feature; the centres were made from the first of them."""

WEIGHT = 3.0
"""How often the points that centres were made from count in the regression."""

NOISE = 8.0
"""Eigenvalues below this times the root of m and the precision of the dtype of the features are left out. Along such a
direction the rounding errors of kernels would be a tenth of the feature or more."""

SMOOTH = 0.02
NARROW = 0.85
"""W is wider than K if the smallest eigenvalue of the matrix of K at the first centres is between these numbers. A
wider W would lose digits if K is smooth, and reach too far if K is so narrow that hardly any two points are near."""

COARSE = 1e-6
"""Where no combination of W of length 1 has a smaller sum of squares on the points of the regression, W is used as it
is, and float32 is enough."""

RIDGE = 4.0
"""What is added to the square sums of the functions of the regression, in units of their sum and of the precision."""


def sample_size(num_features: int) -> int:
    """The number of points that a map is made from, if there are so many."""
    return max(SAMPLE, math.ceil(REGRESSED * num_features))


def nystrom_map(
    fitted: Parameters, x: Array, seen_x: Array, y: Array, seen_y: Array, num_features: int, rng: Any
) -> NystromMap:
    """The map for pooled queries and keys, (*b, n, d) and (*b, s, d), and the parameters fitted to them.

    The parameters are those of `optimal`; for the Gaussian kernel they are those of `posrf`, with g1 and g2 the
    identity. `rng` is a NumPy generator. Directions in which rounding errors would dominate are left out.
    """
    xp = namespace_of(x, y)
    least = NOISE * math.sqrt(num_features) * float(xp.finfo(fitted.g1.dtype).eps)
    most = sample_size(num_features)
    p = fitted if fitted.kernel == "gaussian" else astype(fitted, x.dtype)  # the former needs no d x d matrices
    if y is x:
        points, seen = _few(x, seen_x, rng, most)
        points = points if p.kernel == "gaussian" else embed_query(p, points)[0]
    else:
        x, seen_x = _few(x, seen_x, rng, most // 2)
        y, seen_y = _few(y, seen_y, rng, most // 2)
        x, y = (x, y) if p.kernel == "gaussian" else (embed_query(p, x)[0], embed_key(p, y)[0])
        points, seen = _joined(x, y), _joined(seen_x[..., None], seen_y[..., None])[..., 0]
    p = replace(p, method="nystrom", a=xp.zeros_like(p.a))
    if p.kernel == "gaussian":  # the coordinates are the points minus a mean: no product with g1 or g2
        points = points * math.sqrt(p.scale)
        centre = _mean(points, seen)
        points, p = points - centre, replace(p, center_x=centre, center_y=centre)
    order, wider = _order(points, seen, num_features, least, from_host(rng.gumbel(size=(2, most)), points))
    points, seen = _taken(points, order), xp.take_along_axis(seen, order, axis=-1)
    sharpness = xp.where(wider, SHARPNESS, xp.ones_like(points[..., :1, :1]))
    centres = xp.sqrt(sharpness) * _centres(points, seen, wider, num_features)
    count = min(points.shape[-2], max(SAMPLE // 2, math.ceil(REGRESSED * num_features)))
    root = _root(points[..., :count, :], seen[..., :count], centres, sharpness, least)
    return NystromMap(p, num_features, centres, root, sharpness)


def _few(x: Array, seen: Array, rng: Any, most: int) -> tuple[Array, Array]:
    """Up to `most` of the points that count, with 0 in place of others, and which entries are filled."""
    x = hide(x, seen)
    if x.shape[-2] > most:
        return sampled(x, seen, rng, most)
    rng.random(most)  # later numbers must not depend on how many points do not count
    return x, seen


def _joined(a: Array, b: Array) -> Array:
    """Both along the point axis, (*b, n, d) and (*b, s, d) -> (*b, n + s, d)."""
    xp = namespace_of(a, b)
    batch = broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return xp.concat([xp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (a, b)], axis=-2)


def _mean(points: Array, seen: Array) -> Array:
    """The mean of the points that count, (*b, 1, d); zeros if there are none."""
    xp = namespace_of(points)
    weight = cast(seen, points.dtype)[..., None, :]
    count = xp.sum(weight, axis=-1, keepdims=True)
    return weight @ points / xp.maximum(count, xp.ones_like(count))


def _order(points: Array, seen: Array, m: int, least: float, noise: Array) -> tuple[Array, Array]:
    """The order in which points become centres, (*b, n), and whether W is wider than K, (*b, 1, 1).

    Points that do not count are the last. `noise` has two rows of Gumbel numbers.
    """
    xp = namespace_of(points)
    # the random numbers of a point must not depend on masked points
    rank = xp.cumulative_sum(cast(seen, xp.int64), axis=-1) - 1
    rank = xp.maximum(rank, xp.zeros_like(rank))
    key, other = (
        xp.take_along_axis(row + xp.zeros_like(seen[..., :1], dtype=row.dtype), rank, axis=-1)
        for row in (noise[0, :], noise[1, :])
    )
    order = xp.argsort(xp.where(seen, key, -xp.inf), axis=-1, descending=True)
    count, more = (max(1, round(share * m)) for share in (FIRST, FIRST_OF_EQUAL))
    left, smallest = _left(points, order[..., :count], least)
    wider = (smallest > SMOOTH) & (smallest < NARROW)
    if is_traced(points) or not bool(xp.all(wider)):
        left = xp.where(wider[..., 0], left, _left(points, order[..., :more], least)[0])
    drawn = xp.argsort(order, axis=-1) < xp.where(wider[..., 0], xp.full_like(order[..., :1], count), more)
    key = xp.where(seen, xp.where(drawn, xp.inf, xp.log(left) + other), -xp.inf)
    return xp.argsort(key, axis=-1, descending=True), wider


def _left(points: Array, chosen: Array, least: float) -> tuple[Array, Array]:
    """What centres at chosen points leave unexplained of the kernel of each point with itself, (*b, n).

    Also the smallest eigenvalue of the kernel matrix of these centres, (*b, 1, 1).
    """
    xp = namespace_of(points)
    centres = _taken(points, chosen)
    axes, values, kept = _directions(gaussian(centres, centres), least)
    features = gaussian(points, centres) @ (axes * xp.where(kept, 1 / xp.sqrt(values), 0.0))
    left = xp.clip(1 - xp.sum(features * features, axis=-1), float(xp.finfo(points.dtype).eps), 1.0)
    return left, xp.min(values, axis=-1, keepdims=True)


def _taken(a: Array, order: Array) -> Array:
    """Rows in an order, (*b, n, e) and (*b, k) -> (*b, k, e)."""
    xp = namespace_of(a, order)
    return xp.take(a, order, axis=0) if a.ndim == 2 else xp.take_along_axis(a, order[..., None], axis=-2)


def _centres(points: Array, seen: Array, wider: Array, m: int) -> Array:
    """Centres (*b, m, d) near the first points; they are repeated if fewer than m points count."""
    xp = namespace_of(points)
    count = xp.sum(cast(seen, xp.int64), axis=-1, keepdims=True)
    slot = xp.arange(m, dtype=xp.int64, **on_device_of(points)) % xp.maximum(count, xp.ones_like(count))
    centres = _taken(points, slot)
    narrow, used = cast(centres, xp.float32), xp.ones_like(centres[..., :1, :1], dtype=xp.bool)
    means = cast(k_means(cast(points, xp.float32), seen, narrow, used, 1), points.dtype)
    # copies of a point stay equal: if they differed, the regression could not distinguish their functions
    halves = 0.5 * xp.matrix_transpose(row_sum(narrow * narrow))
    means = _taken(means, xp.argmax(narrow @ xp.matrix_transpose(narrow) - halves, axis=-1))
    way = TOWARDS_MEANS * (means - centres)
    way = way + INWARDS * cast(wider, points.dtype) * (_mean(points, seen) - centres - way)
    length = xp.sqrt(xp.sum(way * way, axis=-1, keepdims=True))
    way = way * xp.clip(FARTHEST / xp.where(length > 0, length, 1.0), None, 1.0)
    return xp.where(count[..., None] > m, centres + way, centres)  # with all points among the centres, the map is exact


def _root(points: Array, seen: Array, centres: Array, sharpness: Array, least: float) -> Array:
    """A root of A, (*b, m, m): that of the inverse of W(C, C) if W is K, else that of a regression.

    The regression needs no eigenvectors, and only float32, if W is well-conditioned.
    """
    xp = namespace_of(points)
    wider = sharpness < 1
    first = xp.arange(points.shape[-2], **on_device_of(points)) < centres.shape[-2]
    weight = (cast(seen, points.dtype) * (1 + (WEIGHT**0.5 - 1) * cast(first, points.dtype)))[..., None]
    if not is_traced(points) and bool(xp.all(wider)) and points.shape[-2] >= 1.5 * centres.shape[-2]:
        near, to = (cast(a, xp.float32) for a in (xp.sqrt(sharpness) * points, centres))
        functions = gaussian(near, to) * cast(weight, xp.float32)
        combined = _orthonormal(cast(functions, points.dtype))
        if bool(xp.all(xp.sum(combined * combined, axis=(-2, -1)) < 1 / COARSE)):
            return _regressed(points, weight, combined, functions @ cast(combined, xp.float32))
    axes, values, kept = _directions(gaussian(centres, centres), least)
    usual = axes * xp.where(kept, 1 / xp.sqrt(values), 0.0)
    if not is_traced(points) and not bool(xp.any(wider)):
        return usual
    axes = axes * xp.where(kept, 1 / values, 0.0)
    functions = (gaussian(xp.sqrt(sharpness) * points, centres) @ axes) * weight
    inner = _orthonormal(functions)
    return xp.where(wider, _regressed(points, weight, axes @ inner, functions @ inner), usual)


def _regressed(points: Array, weight: Array, combined: Array, functions: Array) -> Array:
    """A root of the A for which W A W^T is nearest to the kernel matrix of weighted points.

    `combined` (*b, m, m) holds combinations of W that are orthonormal on these points, and `functions` (*b, n, m) their
    values there, in the dtype in which kernels may be taken.
    """
    narrow = functions.dtype
    points, functions = cast(points, narrow), functions * cast(weight, narrow)
    xp = namespace_of(points)
    moment = cast(outer(functions, gaussian(points, points) @ functions), combined.dtype)
    size = trace(moment)
    rounding = 8 * float(xp.finfo(narrow).eps) * xp.where(size > 0, size, 1.0)  # 0 if no point counts
    return combined @ xp.linalg.cholesky(on_diagonal(moment, rounding))


def _orthonormal(functions: Array) -> Array:
    """The combinations of functions that are orthonormal on the points, (*b, n, m) -> (*b, m, m)."""
    xp = namespace_of(functions)
    square = outer(functions, functions)
    size = trace(square)
    ridge = RIDGE * float(xp.finfo(square.dtype).eps) * xp.where(size > 0, size, 1.0)  # 0 if no point counts
    return xp.matrix_transpose(inverse_of_lower(xp.linalg.cholesky(on_diagonal(square, ridge))))


def _directions(matrix: Array, least: float) -> tuple[Array, Array, Array]:
    """Eigenvectors, eigenvalues as a row, and a mask of those above `least` and above rounding errors.

    The other eigenvalues are replaced by `least`.
    """
    xp = namespace_of(matrix)
    values, axes = (xp.flip(a, axis=-1) for a in xp.linalg.eigh(matrix))
    values = values[..., None, :]
    rounding = matrix.shape[-1] * float(xp.finfo(values.dtype).eps) * values[..., :1]
    kept = values > xp.maximum(rounding, xp.full_like(rounding, least))
    return axes, xp.where(kept, values, least), kept
