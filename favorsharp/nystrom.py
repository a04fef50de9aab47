"""Nystrom's method: a map of kernels with m centres, which are chosen from sample points (docs: theory, nystrom).

With the centres C, the kernel K(x, y) is replaced by K(x, C) K(C, C)^-1 K(C, y). Centres are drawn one after the other
from a sample of queries and keys, each in proportion to the error of the kernel of the point with itself that the
centres so far leave: randomly pivoted Cholesky (arXiv 2207.06503). Then a few steps of k-means move them.
"""

from dataclasses import replace
from typing import Any

from favorsharp._algebra import identity, zeros_row
from favorsharp._arrays import broadcast_shapes, cast, from_host, namespace_of, on_device_of
from favorsharp._typing import Array
from favorsharp._values import astype
from favorsharp.features.nystrom import NystromMap
from favorsharp.ops.state import hide
from favorsharp.parameters import Parameters, embed_key, embed_query
from favorsharp.samples import k_means, sampled

STEPS = 3
"""Steps of k-means. With ten, errors are 1 % smaller."""


def nystrom_map(
    fitted: Parameters, x: Array, seen_x: Array, y: Array, seen_y: Array, num_features: int, rng: Any
) -> NystromMap:
    """The map for pooled queries and keys, (*b, n, d) and (*b, s, d), and the parameters of `optimal` for them.

    `rng` is a NumPy generator. The inverse root leaves out eigenvalues that rounding errors in the dtype of the
    parameters would swamp.
    """
    xp = namespace_of(x, y)
    least = num_features * float(xp.finfo(fitted.g1.dtype).eps)
    p = _coordinates(astype(fitted, x.dtype))
    x, seen_x = sampled(hide(x, seen_x), seen_x, rng)
    y, seen_y = sampled(hide(y, seen_y), seen_y, rng)
    u, v = embed_query(p, x)[0], embed_key(p, y)[0]
    batch = broadcast_shapes(u.shape[:-2], v.shape[:-2])
    points = xp.concat([xp.broadcast_to(a, (*batch, *a.shape[-2:])) for a in (u, v)], axis=-2)
    seen = xp.concat([xp.broadcast_to(a, (*batch, a.shape[-1])) for a in (seen_x, seen_y)], axis=-1)
    centres = _pivots(points, seen, num_features, rng)
    centres = k_means(points, seen, centres, xp.ones_like(centres[..., :1, :1], dtype=xp.bool), STEPS)
    return NystromMap(p, num_features, centres, _inverse_root(_gaussian(centres, centres), least))


def _coordinates(p: Parameters) -> Parameters:
    """The coordinates of centres: those of `optimal`, or with the Gaussian kernel the points minus a common mean."""
    own = replace(p, method="nystrom", a=namespace_of(p.a).zeros_like(p.a))
    if p.kernel == "softmax":
        return own
    eye, mean = identity(p.g1, p.g2), 0.5 * (p.center_x + p.center_y)
    return replace(own, g1=eye, g2=eye, center_x=mean + zeros_row(eye), center_y=mean + zeros_row(eye))


def _gaussian(points: Array, centres: Array) -> Array:
    """exp(-|u - c|^2 / 2), (*b, n, m)."""
    xp = namespace_of(points)
    own, other = (xp.sum(a * a, axis=-1, keepdims=True) for a in (points, centres))
    squares = own + xp.matrix_transpose(other) - 2 * (points @ xp.matrix_transpose(centres))
    return xp.exp(-0.5 * xp.maximum(squares, xp.zeros_like(squares)))


def _pivots(points: Array, seen: Array, m: int, rng: Any) -> Array:
    """Centres, chosen by randomly pivoted Cholesky, (*b, m, d); some are equal if fewer points count."""
    xp = namespace_of(points)
    left = cast(seen, points.dtype)  # what the centres so far leave of the kernel of each point with itself
    least = 1e3 * float(xp.finfo(points.dtype).eps)
    shares = from_host(rng.random(m), points)
    factor = xp.zeros((*points.shape[:-1], 0), dtype=points.dtype, **on_device_of(points))
    centres = []
    for i in range(m):
        along = xp.cumulative_sum(left, axis=-1)
        pick = xp.argmax(cast(along > shares[i] * along[..., -1:], xp.int8), axis=-1, keepdims=True)
        centre = xp.take_along_axis(points, pick[..., None], axis=-2)
        row = xp.take_along_axis(factor, pick[..., None], axis=-2)
        rest = xp.take_along_axis(left, pick, axis=-1)[..., None]
        column = _gaussian(points, centre) - factor @ xp.matrix_transpose(row)
        column = xp.where(rest > least, column / xp.sqrt(xp.where(rest > least, rest, 1.0)), 0.0)
        factor = xp.concat([factor, column], axis=-1)
        left = left - column[..., 0] ** 2
        left = xp.where((left > least) & seen, left, 0.0)
        centres.append(centre)
    return xp.concat(centres, axis=-2)


def _inverse_root(matrix: Array, least: float) -> Array:
    """The inverse root of a second moment; eigenvalues below `least` times the largest are left out."""
    xp = namespace_of(matrix)
    values, axes = xp.linalg.eigh(matrix)
    values = values[..., None, :]
    kept = values > least * values[..., -1:]
    return axes * xp.where(kept, 1 / xp.sqrt(xp.where(kept, values, 1.0)), 0.0) @ xp.matrix_transpose(axes)
