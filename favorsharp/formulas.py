"""The closed formulas of the methods: from scaled moments to parameters, and the second moments of one feature.

A record in `favorsharp.methods` names the formulas of each method. They use scaled coordinates: x is sqrt(scale) times
the caller's queries, and y is sqrt(scale) times the keys.
"""

import math
from dataclasses import dataclass

from favorsharp._algebra import (
    apply,
    balance,
    bessel,
    common_axes,
    congruence,
    diagonal,
    identity,
    outer,
    principal,
    regular,
    row_sum,
    zeros_row,
)
from favorsharp._arrays import namespace_of
from favorsharp._typing import Array
from favorsharp.exact import log_gaussian
from favorsharp.moments import Moments
from favorsharp.parameters import Parameters, log_kernel_of


@dataclass(frozen=True)
class Statistics:
    """The input of the formulas: the moments of scaled points, and the ridge."""

    mean_x: Array
    mean_y: Array
    covariance_x: Array
    covariance_y: Array
    ridge: float
    cross: Array | None

    @property
    def alike(self) -> bool:
        """Whether queries and keys are the same points, so that a computation for one side serves both."""
        return self.mean_y is self.mean_x and self.covariance_y is self.covariance_x

    @property
    def second_x(self) -> Array:
        """The mean of x x^T."""
        return self.covariance_x + outer(self.mean_x, self.mean_x)

    @property
    def second_y(self) -> Array:
        """The mean of y y^T."""
        return self.covariance_y + outer(self.mean_y, self.mean_y)


Values = dict[str, Array]


def plain(data: Statistics) -> Values:
    """Parameters that do not depend on the data: plain Gaussian rows (FAVOR+, arXiv 2009.14794)."""
    eye = identity(data.covariance_x, data.covariance_y)
    return _values(eye, eye, zeros_row(eye))


def oprf(data: Statistics) -> Values:
    """The best a that is the same for all axes (FAVOR++, arXiv 2205.15317, theorem 4.2)."""
    eye = identity(data.covariance_x, data.covariance_y)
    return _values(eye, eye, _one_a(_pair_sums(data, eye, eye)))


def saderf(data: Statistics) -> Values:
    """A diagonal balance, and the same a for all axes (arXiv 2302.00787, section 4.3)."""
    m1, m2 = regular(data.second_x, data.second_y, data.ridge), regular(data.second_y, data.second_x, data.ridge)
    psi = (diagonal(m2) / diagonal(m1)) ** 0.25
    eye = identity(data.covariance_x, data.covariance_y)
    g1, g2 = eye * psi, eye / psi
    return _values(g1, g2, _one_a(_pair_sums(data, g1, g2)))


def aderf(data: Statistics) -> Values:
    """A full balance of the second moments, and the same a for all axes (arXiv 2302.00787, theorem 4.2)."""
    second = data.second_x
    g1, g2 = balance(second, second if data.alike else data.second_y, data.ridge)
    return _values(g1, g2, _one_a(_pair_sums(data, g1, g2)))


def sderf(data: Statistics) -> Values:
    """A rotation, and one a for each axis (arXiv 2302.00787, theorem 4.3)."""
    xp = namespace_of(data.mean_x)
    cross = outer(data.mean_x, data.mean_y)
    cross = cross if data.cross is None else cross + data.cross
    sums, g = principal(data.second_x + data.second_y + cross + xp.matrix_transpose(cross), data.ridge)
    return _values(g, g, _best_a(sums))


def optimal(data: Statistics) -> Values:
    """Centres, a full balance and one a for each axis: the smallest excess of the family (docs: theory, `optimal`)."""
    if data.cross is not None:
        g1, g2, sums = _balanced_pairs(data)
    elif data.covariance_y is data.covariance_x:
        variances, g1 = common_axes(data.covariance_x, data.ridge)
        g2, sums = g1, 2 * variances
    else:
        g1, g2 = balance(data.covariance_x, data.covariance_y, data.ridge)
        sums = _spread(data, g1, g2)
    return {**_values(g1, g2, _best_a(sums)), "center_x": data.mean_x, "center_y": data.mean_y}


def _balanced_pairs(data: Statistics) -> tuple[Array, Array, Array]:
    """The balance for weighted pairs, and the variances of u + v.

    In such pairs u and v are correlated, so the principal axes of u + v differ from those of u and v.
    """
    assert data.cross is not None
    g1, g2 = balance(data.covariance_x, data.covariance_y, data.ridge)
    transposed = namespace_of(g1).matrix_transpose
    mixed = g1 @ data.cross @ transposed(g2)
    own = [g @ s @ transposed(g) for g, s in ((g1, data.covariance_x), (g2, data.covariance_y))]
    sums, axes = principal(own[0] + own[1] + mixed + transposed(mixed), data.ridge)
    return axes @ g1, axes @ g2, sums


def poisson(data: Statistics) -> Values:
    """The rate with the smallest second moment (arXiv 2205.15317, section 3.2)."""
    xp = namespace_of(data.mean_x)
    products = diagonal(data.second_x) * diagonal(data.second_y)
    rate = xp.sqrt(row_sum(products) / products.shape[-1])
    return {**plain(data), "rate": xp.where(rate > 0, rate, 1e-6)}  # if all data are zero, the smallest rate is best


def geometric(data: Statistics) -> Values:
    """The success probability that minimises a bound on the mean log second moment.

    log I0(sqrt t) is concave in t, so the mean over pairs of log I0(2 |x_l y_l| / sqrt(1 - p)) is at most its value at
    the root mean square of x_l y_l, which the moments give.
    """
    xp = namespace_of(data.mean_x)
    root = xp.sqrt(diagonal(data.second_x) * diagonal(data.second_y))
    size = root.shape[-1]

    # The derivative vanishes where p / (1 - p) sum_l z_l I1(z_l) / I0(z_l) = 2 d with z = 2 root / sqrt(1 - p), and its
    # sign changes once. Bisection in log(p / (1 - p)) finds that zero up to rounding; a search for the smallest value
    # would be accurate only to the square root of the rounding error. The upper end keeps p below 1: for data of zeros
    # the best p is 1, and float32 would round to it.
    low, high = xp.zeros_like(root[..., :1]) - 40.0, xp.zeros_like(root[..., :1]) + 13.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        z = 2 * root * xp.sqrt(1 + xp.exp(middle))
        rising = xp.exp(middle) * row_sum(z * bessel(z)[1]) > 2 * size
        low, high = xp.where(rising, low, middle), xp.where(rising, middle, high)
    return {**plain(data), "rate": _sigmoid(0.5 * (low + high))}


def _values(g1: Array, g2: Array, a: Array) -> Values:
    zero = zeros_row(g1)
    return {"a": a + zero, "g1": g1, "g2": g2, "center_x": zero, "center_y": zero}


def _log_variance(a: Array, s: Array) -> Array:
    """h(s), the contribution of one axis to the mean log second moment at a given a."""
    xp = namespace_of(s)
    return xp.log(1 - 4 * a) - 0.5 * xp.log(1 - 8 * a) + s / (1 - 8 * a)


def _best_a(s: Array) -> Array:
    """The a that minimises h(s), where s is the mean square of u + v (docs: theory, eq. 2)."""
    xp = namespace_of(s)
    # two forms of the same root, each used where nothing cancels; rounding can leave s slightly below zero
    s = xp.maximum(s, xp.zeros_like(s))
    small, large = xp.where(s < 0.5, s, 0.0), xp.where(s < 0.5, 0.5, s)
    below = -small / (1 - 2 * small + xp.sqrt((2 * small + 1) ** 2 + 8 * small))
    above = (1 - 2 * large - xp.sqrt((2 * large + 1) ** 2 + 8 * large)) / 16
    return xp.where(s < 0.5, below, above)


def _one_a(sums: Array) -> Array:
    """The best a that is the same for all axes."""
    return _best_a(row_sum(sums) / sums.shape[-1])


def _spread(data: Statistics, g1: Array, g2: Array) -> Array:
    """The variance of u_l plus that of v_l, shape (*b, 1, d)."""
    first = congruence(g1, data.covariance_x)
    alike = g2 is g1 and data.covariance_y is data.covariance_x
    return first + (first if alike else congruence(g2, data.covariance_y))


def _pair_sums(data: Statistics, g1: Array, g2: Array) -> Array:
    """The mean over pairs of (u_l + v_l)^2, without centring, shape (*b, 1, d)."""
    shift = apply(g1, data.mean_x) + apply(g2, data.mean_y)
    sums = _spread(data, g1, g2) + shift * shift
    if data.cross is None:
        return sums
    xp = namespace_of(g1)
    return sums + 2 * xp.matrix_transpose(xp.sum((g1 @ data.cross) * g2, axis=-1, keepdims=True))


def _sigmoid(t: Array) -> Array:
    return 1 / (1 + namespace_of(t).exp(-t))


# The second moments of one feature ------------------------------------------------------------------------------------


def dense_second_moment(p: Parameters, x: Array, y: Array) -> Array:
    """Log E[(f1 f2)^2] of dense-exponential features, for unscaled points (arXiv 2302.00787, theorem 4.1)."""
    xp = namespace_of(x, y)
    u, v = x * math.sqrt(p.scale), y * math.sqrt(p.scale)
    shrink = 1 / xp.sqrt(1 - 8 * p.a)
    sums = -2 * log_gaussian(apply(p.g1, u - p.center_x) * shrink, -apply(p.g2, v - p.center_y) * shrink, 1.0)
    constant = row_sum(_log_variance(p.a, xp.zeros_like(p.a)))
    return constant + sums + 2 * log_kernel_of(p, x, y)


def trig_second_moment(p: Parameters, x: Array, y: Array) -> Array:
    """Log E[(f1 f2)^2] of trigonometric features, where a pair of cosine and sine counts as one feature."""
    xp = namespace_of(x, y)
    value = xp.log1p(xp.exp(4 * log_gaussian(x, y, p.scale))) - math.log(2)
    root = math.sqrt(p.scale)
    return value if p.kernel == "gaussian" else value + _squares(x * root, y * root)


def poisson_second_moment(p: Parameters, x: Array, y: Array) -> Array:
    """Log E[(f1 f2)^2] of Poisson features (arXiv 2205.15317, section 3.2)."""
    u, v, rate = x * math.sqrt(p.scale), y * math.sqrt(p.scale), _rate(p)
    value = p.size * rate + (u * u) @ namespace_of(v).matrix_transpose(v * v) / rate
    return value - _squares(u, v) if p.kernel == "gaussian" else value


def geometric_second_moment(p: Parameters, x: Array, y: Array) -> Array:
    """Log E[(f1 f2)^2] of geometric features (arXiv 2205.15317, section 3.3)."""
    xp = namespace_of(x, y)
    u, v, rate = x * math.sqrt(p.scale), y * math.sqrt(p.scale), _rate(p)
    products = xp.abs(u)[..., :, None, :] * xp.abs(v)[..., None, :, :]
    value = xp.sum(bessel(2 * products / xp.sqrt(1 - rate)[..., None])[0], axis=-1) - p.size * xp.log(rate)
    return value - _squares(u, v) if p.kernel == "gaussian" else value


def _rate(p: Parameters) -> Array:
    """The rate of a method that draws counts."""
    assert p.rate is not None
    return p.rate


def _squares(u: Array, v: Array) -> Array:
    """|u|^2 + |v|^2 of every pair."""
    return row_sum(u * u) + namespace_of(v).matrix_transpose(row_sum(v * v))


def dense_excess(p: Parameters, data: Moments) -> Array:
    """The excess of dense-exponential features, from the moments of unscaled points."""
    root = math.sqrt(p.scale)
    mean_u, mean_v = apply(p.g1, data.mean_x * root - p.center_x), apply(p.g2, data.mean_y * root - p.center_y)
    second_u = congruence(p.g1, data.covariance_x * p.scale) + mean_u * mean_u
    second_v = congruence(p.g2, data.covariance_y * p.scale) + mean_v * mean_v
    return row_sum(_log_variance(p.a, second_u + second_v + 2 * mean_u * mean_v))


def poisson_excess(p: Parameters, data: Moments) -> Array:
    """The excess of Poisson features, from the moments of unscaled points."""
    squares = diagonal(data.second_x) * diagonal(data.second_y) * p.scale**2
    products = data.mean_x * data.mean_y * p.scale
    rate = _rate(p)
    return p.size * rate + row_sum(squares) / rate - 2 * row_sum(products)


# Logarithms of elementwise features ----------------------------------------------------------------------------------


def log_relu(z: Array) -> Array:
    """Log max(z, 0)."""
    xp = namespace_of(z)
    return xp.where(z <= 0, -xp.inf, xp.log(xp.where(z <= 0, 1.0, z)))


def log_elu(z: Array) -> Array:
    """log(elu(z) + 1): z below zero, log(1 + z) above."""
    xp = namespace_of(z)
    return xp.where(z < 0, z, xp.log1p(xp.where(z < 0, 0.0, z)))
