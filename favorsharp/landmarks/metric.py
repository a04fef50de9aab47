"""The metric in which two keys are near if the queries cannot tell them apart (docs: theory, landmarks).

Queries are modelled as N(mu, S_x), and keys have the covariance S_y. The squared error of a query is weighted by Z^-t,
where Z is its denominator. The density of queries times Z^-t is Gaussian, with the covariance M = (S_x^-1 + t S_y)^-1
and the mean mu_t = M S_x^-1 mu. Under this density, the inner product of the kernels of two centred keys y, y' is

    exp( s + s' - |u - u'|^2 / 2 ),    u = L'y,    M = L L',    s = mu_t.y + |u|^2.
"""

from favorsharp._arrays import broadcast_shapes, cholesky, namespace_of, on_device_of, solve
from favorsharp._autodiff import without_gradient
from favorsharp._typing import DType
from favorsharp.landmarks.settings import Landmarks
from favorsharp.moments import Moments
from favorsharp.ops.landmark_metric import Metric

RIDGE, STREAM_RIDGE = 1e-6, 1e-3
"""Multiples of tr(S_x) / d that are added to S_x, in whole calls and in streams, whose later queries differ."""

_TINY = 1e-150
"""Added to S_x too, so that it has a Cholesky factor if all queries are equal."""


def metric_of(moments: Moments, settings: Landmarks, ridge: float, dtype: DType) -> Metric:
    """The metric for queries and keys with these moments (of points that are not scaled), in the given dtype.

    If no query has been seen, queries are assumed to have the distribution of the keys.
    """
    xp = namespace_of(moments.mean_x, moments.mean_y)
    size = moments.size
    scale = settings.scale_of(size)
    root = scale**0.5
    seen = moments.count_x > 0
    center = without_gradient(moments.mean_y) * root
    mean = xp.where(seen, without_gradient(moments.mean_x) * root, center)
    cov_y = without_gradient(moments.covariance_y) * scale
    cov_x = xp.where(seen, without_gradient(moments.covariance_x) * scale, cov_y)
    batch = broadcast_shapes(cov_x.shape[:-2], cov_y.shape[:-2])
    eye = xp.broadcast_to(xp.eye(size, dtype=cov_x.dtype, **on_device_of(cov_x)), (*batch, size, size))
    if settings.kernel == "gaussian":  # keys have the weights exp(-|y|^2 / 2), so their covariance is (S_y^-1 + I)^-1
        mean = mean - center
        cov_y = solve(eye + cov_y, xp.broadcast_to(cov_y, eye.shape))
    relative = max(ridge, 8 * size * float(xp.finfo(cov_x.dtype).eps))
    trace = xp.sum(xp.linalg.diagonal(cov_x), axis=-1)[..., None, None]
    tiny = max(_TINY, float(xp.finfo(cov_x.dtype).smallest_normal))
    a = cholesky(cov_x + (relative / size * trace + tiny) * eye)
    at = xp.matrix_transpose(a)
    inner = cholesky(eye + settings.tilt * (at @ cov_y @ a))
    lift = xp.matrix_transpose(solve(inner, at, lower=True))  # L L' = A (I + t A' S_y A)^-1 A'
    direction = mean - settings.tilt * (mean @ cov_y @ lift @ xp.matrix_transpose(lift))  # M S_x^-1 = I - t M S_y
    return Metric(*(xp.astype(x, dtype) for x in (center, lift, direction)))
