"""The public functions `fit`, `excess` and `log_second_moment`, and `Parameters`, which feature maps are made from.

`fit` goes from moments to parameters by closed formulas (docs: theory). The formulas use scaled coordinates: x is
sqrt(scale) times the caller's queries, and y is sqrt(scale) times the keys.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from favorsharp._arrays import (
    cast,
    compute_dtype,
    dtype_name,
    from_host,
    is_array,
    is_traced,
    named_dtype,
    namespace_of,
    on_device_of,
    statistics_dtype,
    under_own_settings,
)
from favorsharp._checks import (
    check_broadcast,
    check_choice,
    check_floats,
    check_points,
    check_same_size,
    check_scale,
)
from favorsharp._chunks import is_chunked
from favorsharp._typing import Array, Elementwise
from favorsharp.attention_moments import attention_moments
from favorsharp.exact import kernel_scale, log_gaussian, log_softmax_kernel, times_power
from favorsharp.moments import Moments, moments

Method = str | Elementwise


@dataclass(frozen=True, eq=False, repr=False)
class Parameters:
    """The parameters of a feature map, without its random rows.

    A dense-exponential feature is exp(sum_l a_l w_l^2 + sqrt(1 - 4 a_l) w_l u_l + (1/4) log(1 - 4 a_l) - |u|^2 / 2).
    Here u is g1 (x - center_x) for queries and g2 (y - center_y) for keys, with g1^T g2 = I (arXiv 2302.00787, theorem
    4.1).

    Attributes
    ----------
    method : str or callable
    kernel : {"softmax", "gaussian"}
    scale : float
        The scale of the kernel. The arrays below refer to points multiplied by its square root.
    a : array, shape (*b, 1, d)
        At most 0. With 0, the exponent has no quadratic term in w.
    g1, g2 : array, shape (*b, d, d)
        The transforms of queries and of keys.
    center_x, center_y : array, shape (*b, 1, d)
        Subtracted before the transforms; scalar factors of each point compensate for this exactly.
    rate : array, shape (*b, 1, 1), or None
        The rate of the counts that `poisson` and `geometric` draw.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k = np.random.default_rng(0).standard_normal((2, 64, 4))
    >>> fs.fit(q, k)
    Parameters(method='optimal', kernel='softmax', scale=0.5, d=4, batch=(), dtype='float64')
    """

    method: Method
    kernel: str
    scale: float
    a: Array
    g1: Array
    g2: Array
    center_x: Array
    center_y: Array
    rate: Array | None = None

    @property
    def size(self) -> int:
        """The number of coordinates, d."""
        return int(self.g1.shape[-1])

    @property
    def method_name(self) -> str:
        """The name of the method; for a callable, its `__name__`."""
        return self.method if isinstance(self.method, str) else getattr(self.method, "__name__", "callable")

    def __repr__(self) -> str:
        batch = tuple(self.g1.shape[:-2])
        return (
            f"Parameters(method={self.method_name!r}, kernel={self.kernel!r}, scale={self.scale:g}, d={self.size}, "
            f"batch={batch}, dtype={dtype_name(self.g1)!r})"
        )


def fit(
    x: Array | Moments,
    y: Array | None = None,
    *,
    method: Method = "optimal",
    kernel: str = "softmax",
    scale: float | None = None,
    axis: int | tuple[int, ...] = -2,
    mask_x: Array | None = None,
    mask_y: Array | None = None,
    ridge: float | None = None,
    enable_gqa: bool = False,
    weighting: float | None = None,
    is_causal: bool = False,
) -> Parameters:
    """Compute the parameters of a feature map by the closed formula of the method.

    `fit(x, y, ...)` takes queries and keys; `fit(moments, ...)` takes moments that were gathered before. The estimate
    is unbiased for any data; the fit lowers its variance for data like those it was fitted to.

    Parameters
    ----------
    x : array, shape (*b, n, d), or Moments
        Queries, not scaled.
    y : array, shape (*b, s, d)
        Keys, not scaled.
    method : str or callable
        `posrf` (FAVOR+), `oprf` (FAVOR++), `saderf`, `aderf`, `sderf` (FAVOR#), or `optimal`, which has the smallest
        excess of all these; `hyperbolic`; the signed methods `trig`, `poisson` and `geometric`; `relu` and `elu`, which
        do not estimate the kernel; or a callable that maps projected inputs elementwise to non-negative features.
    kernel : {"softmax", "gaussian"}
        exp(scale x.y), or exp(-scale |x - y|^2 / 2).
    scale : float, optional
        Positive and finite. None means d**-0.5 for softmax and 1 for Gaussian.
    axis, mask_x, mask_y, enable_gqa
        As in `moments`.
    ridge : float, optional
        Makes it possible to fit constant columns, one-hot data, or fewer points than coordinates. The diagonal of a
        second moment S is increased by ridge * tr(S) / d, and by up to half as much again, differently for each
        coordinate. None means 1e-6, or more if only float32 is available; 0 means no ridge.
    weighting : float, optional
        If given, each pair of query and key is weighted by its attention to this power, so that the fit is best where
        attention is large; 0.5 to 1 are good choices. Without it, all pairs have equal weight. The weights take time
        O(n s d), so pass a calibration sample. The result is that of
        `fit(attention_moments(x, y, weighting=...))`.
    is_causal : bool
        With a weighting: pairs in which the key comes after the query have weight 0.

    Returns
    -------
    parameters : Parameters
        In the dtype of the data, widened to at least float32; computed in float64 if the device has it.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or the data hold values that are not finite.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k = np.random.default_rng(0).standard_normal((2, 8, 2, 64, 4))
    >>> fs.fit(q, k, axis=(0, -2))  # one fit for each of two heads
    Parameters(method='optimal', kernel='softmax', scale=0.5, d=4, batch=(1, 2), dtype='float64')
    >>> fs.fit(fs.moments(q, k), method="oprf", kernel="gaussian")  # from moments
    Parameters(method='oprf', kernel='gaussian', scale=1, d=4, batch=(8, 2), dtype='float64')
    """
    return fit_named(
        ("x", "y"),
        x,
        y,
        method=method,
        kernel=kernel,
        scale=scale,
        ridge=ridge,
        axis=axis,
        mask_x=mask_x,
        mask_y=mask_y,
        enable_gqa=enable_gqa,
        weighting=weighting,
        is_causal=is_causal,
    )


@under_own_settings
def fit_named(
    names: tuple[str, str],
    x: Array | Moments,
    y: Array | None,
    *,
    method: Method,
    kernel: str,
    scale: float | None,
    ridge: float | None = None,
    weighting: float | None = None,
    is_causal: bool = False,
    **gathering: Any,
) -> Parameters:
    """`fit`, with error messages that use the caller's names for the data."""
    check_method(method)
    check_choice("kernel", kernel, ("softmax", "gaussian"))
    if isinstance(x, Moments):
        defaults = {"y": None, "axis": -2, "mask_x": None, "mask_y": None, "enable_gqa": False}
        defaults |= {"weighting": None, "is_causal": False}
        values = {"y": y, **gathering, "weighting": weighting, "is_causal": is_causal}
        given = [name for name, value in values.items() if is_array(value) or value != defaults[name]]
        if given:
            raise TypeError(f"fit(moments) takes no {', '.join(given)}: the moments have them in")
        data = _known(x)
        near = scale
    elif y is None:
        raise TypeError("fit takes queries and keys, or one Moments: y is missing")
    else:
        x, y, near = _in_range(x, y, scale)
        if weighting is not None:
            data = attention_moments(
                x, y, weighting=weighting, kernel=kernel, scale=near, is_causal=is_causal, **gathering
            )
        elif is_causal:
            raise ValueError("is_causal=True says which pairs a weighting counts; accepted with weighting=...")
        else:
            data = _known(moments(x, y, **gathering))
    for name, mean, covariance in zip(
        names, (data.mean_x, data.mean_y), (data.covariance_x, data.covariance_y), strict=True
    ):
        if not is_traced(covariance):
            xp = namespace_of(covariance)
            if not bool(xp.all(xp.isfinite(mean)) & xp.all(xp.isfinite(covariance))):
                raise ValueError(
                    f"{name} holds values that are not finite (or whose squares are not): cannot fit to them"
                )
    scale, near = kernel_scale(kernel, scale, data.size), kernel_scale(kernel, near, data.size)
    cross = None if data.cross is None else data.cross * near
    statistics = _Statistics(*_scaled(data, near), ridge=_ridge(ridge, data), cross=cross)
    solve = _FITS[method] if isinstance(method, str) else _plain
    values = {name: _restore(value, data) for name, value in solve(statistics).items()}
    return Parameters(method=method, kernel=kernel, scale=scale, **values)


def _in_range(x: Array, y: Array, scale: float | None) -> tuple[Array, Array, float | None]:
    """The points and the scale; if only float32 is available, in a unit in which squares do not leave its range."""
    if scale is None or is_chunked(x, y):
        return x, y, scale
    check_floats(x=x, y=y)
    wide = statistics_dtype(x)
    if dtype_name(wide) == "float64":
        return x, y, scale
    scale = check_scale(scale, 1.0)
    power = math.frexp(scale)[1] // 2
    return times_power(cast(x, wide), power), times_power(cast(y, wide), power), math.ldexp(scale, -2 * power)


def _known(data: Moments) -> Moments:
    """The moments, with dask arrays computed to NumPy arrays: a fit needs the values, and they are small."""
    if not is_chunked(data.mean_x):
        return data
    import dask

    names = [field.name for field in fields(data) if field.name != "dtype"]
    return replace(data, **dict(zip(names, dask.compute(*(getattr(data, name) for name in names)), strict=True)))


def check_method(method: Any) -> None:
    """Raise unless method is a known name or a callable."""
    if not callable(method):
        check_choice("method", method, METHODS, also=", or a callable")


@under_own_settings
def excess(parameters: Parameters, x: Array, y: Array) -> Array:
    """The mean over all pairs of log E[(f1 f2)^2] - 2 log K; it is 0 for features without variance.

    It is computed from moments in time O((n + s) d^2), without a loop over pairs.

    Parameters
    ----------
    parameters : Parameters
        The parameters of a dense-exponential method, `hyperbolic` or `poisson`.
    x : array, shape (*b, n, d)
    y : array, shape (*b, s, d)

    Returns
    -------
    array, shape (*b)

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described; if the mean of the method's second moment has no closed form (`trig`,
        `geometric`); or if the method does not estimate the kernel.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k = np.random.default_rng(0).standard_normal((2, 64, 4))
    >>> optimal, posrf = (fs.excess(fs.fit(q, k, method=method), q, k) for method in ("optimal", "posrf"))
    >>> bool(optimal < posrf)
    True
    """
    xp = check_data(parameters, x=x, y=y)
    near_x, near_y, near = _in_range(x, y, parameters.scale)
    scale = check_scale(near, 1.0)
    data, root = moments(near_x, near_y), math.sqrt(scale)
    p = astype(parameters, data.mean_x.dtype)
    if p.method == "poisson":
        squares = _diagonal(data.second_x) * _diagonal(data.second_y) * scale**2
        products = data.mean_x * data.mean_y * scale
        value = p.size * p.rate + _sum(squares) / p.rate - 2 * _sum(products)
    elif p.method in DENSE_EXPONENTIAL:
        mean_u, mean_v = _apply(p.g1, data.mean_x * root - p.center_x), _apply(p.g2, data.mean_y * root - p.center_y)
        second_u = _congruence(p.g1, data.covariance_x * scale) + mean_u * mean_u
        second_v = _congruence(p.g2, data.covariance_y * scale) + mean_v * mean_v
        value = _sum(_log_variance(p.a, second_u + second_v + 2 * mean_u * mean_v))
    else:
        raise ValueError(
            f"excess is known in closed form for {', '.join(DENSE_EXPONENTIAL)} and poisson, got method "
            f"{p.method_name!r}; for trig and geometric average log_second_moment over a sample"
        )
    return cast(value[..., 0, 0], compute_dtype(xp, x, y))


@under_own_settings
def log_second_moment(parameters: Parameters, x: Array, y: Array) -> Array:
    """The logarithm of the second moment E[(f1(x) f2(y))^2] of one feature, for every pair of small inputs.

    The variance of one feature's estimate is exp(log_second_moment) - K^2 (arXiv 2302.00787, theorem 4.1).

    Parameters
    ----------
    parameters : Parameters
        The parameters of any method except `relu`, `elu` and callables. For `trig`, one feature is a pair of cosine
        and sine.
    x : array, shape (*b, n, d)
    y : array, shape (*b, s, d)

    Returns
    -------
    array, shape (*b, n, s)

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or the method does not estimate the kernel.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k = np.random.default_rng(0).standard_normal((2, 64, 4))
    >>> log_moment = fs.log_second_moment(fs.fit(q, k), q, k)
    >>> log_moment.shape
    (64, 64)
    >>> bool((log_moment >= 2 * np.log(fs.kernel_matrix(q, k))).all())  # no variance is negative
    True
    """
    xp = check_data(parameters, x=x, y=y)
    p = astype(parameters, statistics_dtype(x))
    x, y, dtype = cast(x, p.g1.dtype), cast(y, p.g1.dtype), compute_dtype(xp, x, y)
    u, v = x * math.sqrt(p.scale), y * math.sqrt(p.scale)
    squares = xp.sum(u * u, axis=-1)[..., :, None] + xp.sum(v * v, axis=-1)[..., None, :]
    gaussian = -squares if p.kernel == "gaussian" else 0.0
    if p.method in DENSE_EXPONENTIAL:
        shrink = 1 / xp.sqrt(1 - 8 * p.a)
        sums = -2 * log_gaussian(_apply(p.g1, u - p.center_x) * shrink, -_apply(p.g2, v - p.center_y) * shrink, 1.0)
        constant = _sum(_log_variance(p.a, xp.zeros_like(p.a)))
        value = constant + sums + 2 * log_kernel_of(p, x, y)
    elif p.method == "trig":
        value = xp.log1p(xp.exp(4 * log_gaussian(x, y, p.scale))) - math.log(2)
        value = value + (0.0 if p.kernel == "gaussian" else squares)
    elif p.method == "poisson":
        value = p.size * p.rate + (u * u) @ xp.matrix_transpose(v * v) / p.rate + gaussian
    elif p.method == "geometric":
        products = xp.abs(u)[..., :, None, :] * xp.abs(v)[..., None, :, :]
        total = xp.sum(_log_i0(2 * products / xp.sqrt(1 - p.rate)[..., None]), axis=-1)
        value = total - p.size * xp.log(p.rate) + gaussian
    else:
        raise ValueError(
            f"method {p.method_name!r} does not estimate the kernel: its features have no second moment to give"
        )
    return cast(value, dtype)


def check_data(parameters: Parameters, **named: Array) -> Any:
    """Check that arrays fit the parameters they are used with, and return their namespace."""
    if not isinstance(parameters, Parameters):
        raise TypeError(f"parameters must be favorsharp.Parameters, got {type(parameters).__name__}")
    xp = check_floats(**named, parameters=parameters.g1)
    for name, x in named.items():
        check_points(name, x, "(*b, n, d)")
        check_same_size("d", **{name: (-1, x.shape[-1]), "parameters": (-1, parameters.size)})
    batches = {name: x.shape[:-2] for name, x in named.items()}
    check_broadcast("(*b, n, d)", **batches, parameters=parameters.g1.shape[:-2])
    return xp


def embed_query(p: Parameters, x: Array) -> tuple[Array, Array]:
    """Return u = g1 (x - center_x) for unscaled queries, and the log of a factor that depends on x only, (*b, n, 1).

    K(x, y) = exp(u.v + factor_x + factor_y), where `embed_key` returns v and factor_y.
    """
    return _embed(p, x, p.g1, p.center_x, p.center_y)


def embed_key(p: Parameters, y: Array) -> tuple[Array, Array]:
    """Return v = g2 (y - center_y) for unscaled keys, and the log of a factor that depends on y only, (*b, s, 1)."""
    return _embed(p, y, p.g2, p.center_y, p.center_x)


def log_kernel_of(p: Parameters, x: Array, y: Array) -> Array:
    """The exact log kernel that the parameters' features estimate, (*b, n, d), (*b, s, d) -> (*b, n, s)."""
    if p.kernel == "gaussian":
        return cast(log_gaussian(x, y, p.scale), compute_dtype(namespace_of(x, y), x, y))
    root = math.sqrt(p.scale)
    return log_softmax_kernel(x * root, y * root)


def map_arrays(value: Any, change: Callable[[Array], Array]) -> Any:
    """A copy of a dataclass with `change` applied to each of its arrays, including those of an inner `Parameters`."""
    changed = {}
    for field in fields(value):
        entry = getattr(value, field.name)
        if isinstance(entry, Parameters):
            changed[field.name] = map_arrays(entry, change)
        elif is_array(entry):
            changed[field.name] = change(entry)
    return replace(value, **changed)


def astype(value: Any, dtype: Any) -> Any:
    """A copy of a dataclass with its arrays in the given dtype; the value itself if they have it already.

    Returning the value itself matters: backends cache what they derive from a value for as long as that object exists.
    """
    same = True

    def change(x: Array) -> Array:
        nonlocal same
        changed = cast(x, dtype)
        same = same and changed is x
        return changed

    changed = map_arrays(value, change)
    return value if same else changed


def _embed(p: Parameters, x: Array, g: Array, own: Array, other: Array) -> tuple[Array, Array]:
    xp = namespace_of(x)
    z = x * math.sqrt(p.scale) - own
    if p.kernel == "softmax":
        # x.y = (x - c1).(y - c2) + c2.(x - c1) + c1.(y - c2) + c1.c2
        factor = z @ xp.matrix_transpose(other) + 0.5 * _sum(own * other)
    else:
        # the same identity, with every term of |x - y|^2 in centred coordinates: a common offset causes no rounding
        gap = other - own
        factor = z @ xp.matrix_transpose(gap) - 0.5 * _sum(z * z) - 0.25 * _sum(gap * gap)
    return _apply(g, z), factor


@dataclass(frozen=True)
class _Statistics:
    """The scaled moments and the ridge, from which the closed formulas compute the parameters."""

    mean_x: Array
    mean_y: Array
    covariance_x: Array
    covariance_y: Array
    ridge: float
    cross: Array | None

    @property
    def second_x(self) -> Array:
        return self.covariance_x + _outer(self.mean_x, self.mean_x)

    @property
    def second_y(self) -> Array:
        return self.covariance_y + _outer(self.mean_y, self.mean_y)


_Values = dict[str, Array]


def _plain(data: _Statistics) -> _Values:
    """Parameters that do not depend on the data: plain Gaussian rows (FAVOR+, arXiv 2009.14794)."""
    identity = _identity(data.covariance_x, data.covariance_y)
    return _values(identity, identity, xp_zeros(identity))


def _oprf(data: _Statistics) -> _Values:
    """One a for all axes (FAVOR++, arXiv 2205.15317, theorem 4.2)."""
    identity = _identity(data.covariance_x, data.covariance_y)
    return _values(identity, identity, _one_a(_pair_sums(data, identity, identity)))


def _saderf(data: _Statistics) -> _Values:
    """A diagonal balance, one a (arXiv 2302.00787, section 4.3)."""
    m1, m2 = _regular(data.second_x, data.second_y, data.ridge), _regular(data.second_y, data.second_x, data.ridge)
    psi = (_diagonal(m2) / _diagonal(m1)) ** 0.25
    identity = _identity(data.covariance_x, data.covariance_y)
    g1, g2 = identity * psi, identity / psi
    return _values(g1, g2, _one_a(_pair_sums(data, g1, g2)))


def _aderf(data: _Statistics) -> _Values:
    """A full balance of the second moments, one a (arXiv 2302.00787, theorem 4.2)."""
    g1, g2 = _balance(data.second_x, data.second_y, data.ridge)
    return _values(g1, g2, _one_a(_pair_sums(data, g1, g2)))


def _sderf(data: _Statistics) -> _Values:
    """A rotation, one a for each axis (arXiv 2302.00787, theorem 4.3)."""
    xp = namespace_of(data.mean_x)
    cross = _outer(data.mean_x, data.mean_y)
    cross = cross if data.cross is None else cross + data.cross
    sums, g = _principal(data.second_x + data.second_y + cross + xp.matrix_transpose(cross), data.ridge)
    return _values(g, g, _best_a(sums))


def _optimal(data: _Statistics) -> _Values:
    """Centres, a full balance and one a for each axis: the smallest excess of the family (docs: theory, `optimal`)."""
    g1, g2 = _balance(data.covariance_x, data.covariance_y, data.ridge)
    if data.cross is None:
        sums = _congruence(g1, data.covariance_x) + _congruence(g2, data.covariance_y)
    else:  # u and v of weighted pairs are correlated, so the axes of u + v differ
        xp = namespace_of(g1)
        mixed = g1 @ data.cross @ xp.matrix_transpose(g2)
        own = [g @ s @ xp.matrix_transpose(g) for g, s in ((g1, data.covariance_x), (g2, data.covariance_y))]
        sums, axes = _principal(own[0] + own[1] + mixed + xp.matrix_transpose(mixed), data.ridge)
        g1, g2 = axes @ g1, axes @ g2
    return {**_values(g1, g2, _best_a(sums)), "center_x": data.mean_x, "center_y": data.mean_y}


def _poisson(data: _Statistics) -> _Values:
    """The rate with the smallest second moment (arXiv 2205.15317, section 3.2)."""
    xp = namespace_of(data.mean_x)
    products = _diagonal(data.second_x) * _diagonal(data.second_y)
    rate = xp.sqrt(_sum(products) / products.shape[-1])
    return {**_plain(data), "rate": xp.where(rate > 0, rate, 1e-6)}  # data of zeros: the smaller the better


def _geometric(data: _Statistics) -> _Values:
    """The success probability that minimises a bound on the mean log second moment.

    log I0(sqrt t) is concave in t, so the mean over pairs of log I0(2 |x_l y_l| / sqrt(1 - p)) is at most its value at
    the root mean square of x_l y_l, which the moments give.
    """
    xp = namespace_of(data.mean_x)
    root = xp.sqrt(_diagonal(data.second_x) * _diagonal(data.second_y))
    size = root.shape[-1]

    # The derivative vanishes where p / (1 - p) sum_l z_l I1(z_l) / I0(z_l) = 2 d with z = 2 root / sqrt(1 - p), and its
    # sign changes once. Bisection for that zero in log(p / (1 - p)) is accurate to rounding; a search for the smallest
    # value would be accurate only to the square root of rounding. The upper end keeps p below 1: for data of zeros the
    # best p is 1, and float32 would round to it.
    low, high = xp.zeros_like(root[..., :1]) - 40.0, xp.zeros_like(root[..., :1]) + 13.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        z = 2 * root * xp.sqrt(1 + xp.exp(middle))
        rising = xp.exp(middle) * _sum(z * _bessel(z)[1]) > 2 * size
        low, high = xp.where(rising, low, middle), xp.where(rising, middle, high)
    return {**_plain(data), "rate": _sigmoid(0.5 * (low + high))}


# a plain dict, because torch.compile cannot read a mapping proxy in a function that has written to any dict
_FITS: Mapping[str, Callable[[_Statistics], _Values]] = {
    "posrf": _plain,
    "oprf": _oprf,
    "saderf": _saderf,
    "aderf": _aderf,
    "sderf": _sderf,
    "optimal": _optimal,
    "trig": _plain,
    "hyperbolic": _plain,
    "poisson": _poisson,
    "geometric": _geometric,
    "relu": _plain,
    "elu": _plain,
}

METHODS: Sequence[str] = tuple(_FITS)
"""The names that `fit` accepts."""

DENSE_EXPONENTIAL = ("posrf", "oprf", "saderf", "aderf", "sderf", "optimal", "hyperbolic")
"""Methods whose features are exp(rows.u + row + column)."""


def is_fitted(method: Method) -> bool:
    """Whether the method reads the data it is fitted to."""
    return isinstance(method, str) and _FITS[method] is not _plain


def _values(g1: Array, g2: Array, a: Array) -> _Values:
    zero = xp_zeros(g1)
    return {"a": a + zero, "g1": g1, "g2": g2, "center_x": zero, "center_y": zero}


def xp_zeros(matrix: Array) -> Array:
    """Zeros of shape (*b, 1, d) for a (*b, d, d) array, in its dtype and on its device."""
    return namespace_of(matrix).zeros_like(matrix[..., :1, :])


def _scaled(data: Moments, scale: float) -> tuple[Array, Array, Array, Array]:
    root = math.sqrt(scale)
    return data.mean_x * root, data.mean_y * root, data.covariance_x * scale, data.covariance_y * scale


def _ridge(ridge: Any, data: Moments) -> float:
    """The relative ridge: the one that the caller gave, or else the default of `_least_ridge`."""
    if ridge is None:
        return _least_ridge(data.covariance_x)
    if isinstance(ridge, bool) or not isinstance(ridge, int | float):
        raise TypeError(f"ridge must be None or a finite number of 0 or more, got {type(ridge).__name__}")
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge must be None or a finite number of 0 or more, got {ridge}")
    return float(ridge)


def _least_ridge(s: Array) -> float:
    """The default relative ridge: 1e-6, or more if 1e-6 would be lost in the rounding of s."""
    eps = float(namespace_of(s).finfo(s.dtype).eps)
    return max(1e-6, 8 * int(s.shape[-1]) * eps)


def _restore(value: Array, data: Moments) -> Array:
    """A fitted value in the dtype of the data."""
    return cast(value, named_dtype(namespace_of(value), data.dtype))


def _log_variance(a: Array, s: Array) -> Array:
    """h(s), the contribution of one axis to the mean log second moment at a given a."""
    xp = namespace_of(s)
    return xp.log(1 - 4 * a) - 0.5 * xp.log(1 - 8 * a) + s / (1 - 8 * a)


def _best_a(s: Array) -> Array:
    """The a that minimises h at a mean square s of u + v (docs: theory, eq. 2)."""
    xp = namespace_of(s)
    # two forms of the same root, used where each is free of cancellation; rounding can leave s slightly below zero
    s = xp.maximum(s, xp.zeros_like(s))
    small, large = xp.where(s < 0.5, s, 0.0), xp.where(s < 0.5, 0.5, s)
    below = -small / (1 - 2 * small + xp.sqrt((2 * small + 1) ** 2 + 8 * small))
    above = (1 - 2 * large - xp.sqrt((2 * large + 1) ** 2 + 8 * large)) / 16
    return xp.where(s < 0.5, below, above)


def _one_a(sums: Array) -> Array:
    """The best a if all axes share one."""
    return _best_a(_sum(sums) / sums.shape[-1])


def _pair_sums(data: _Statistics, g1: Array, g2: Array) -> Array:
    """The mean over pairs of (u_l + v_l)^2, without centring, shape (*b, 1, d)."""
    shift = _apply(g1, data.mean_x) + _apply(g2, data.mean_y)
    sums = _congruence(g1, data.covariance_x) + _congruence(g2, data.covariance_y) + shift * shift
    if data.cross is None:
        return sums
    xp = namespace_of(g1)
    return sums + 2 * xp.matrix_transpose(xp.sum((g1 @ data.cross) * g2, axis=-1, keepdims=True))


def _principal(matrix: Array, ridge: float) -> tuple[Array, Array]:
    """The eigenvalues (*b, 1, d) of a second moment, largest first and at least zero, and its axes as rows."""
    xp = namespace_of(matrix)
    matrix = matrix + _tie_break(matrix, ridge) * (_trace(matrix) / matrix.shape[-1])
    values, axes = xp.linalg.eigh(matrix)
    axes = xp.flip(xp.matrix_transpose(axes), axis=-2)
    values = xp.flip(values, axis=-1)[..., None, :]
    return xp.maximum(values, xp.zeros_like(values)), axes * _signs(axes)


def _balance(s1: Array, s2: Array, ridge: float) -> tuple[Array, Array]:
    """Return g1, g2 with g1^T g2 = I that map both second moments to the same diagonal matrix, largest entry first."""
    xp = namespace_of(s1, s2)
    root1, inverse1 = _square_root(_regular(s1, s2, ridge))
    root2, _ = _square_root(_regular(s2, s1, ridge))
    u, sigma, _ = xp.linalg.svd(root1 @ root2, full_matrices=False)
    g1 = xp.sqrt(sigma)[..., :, None] * (xp.matrix_transpose(u) @ inverse1)
    g1 = g1 * _signs(g1)
    # the formula for g2 gives the same matrix, but with the inverse g1^T g2 = I holds to rounding, and unbiased
    # estimates need that
    return g1, xp.matrix_transpose(xp.linalg.inv(g1))


def _regular(s: Array, other: Array, ridge: float) -> Array:
    """Add a relative ridge to s; if s is zero, the ridge is relative to the other side, or to 1."""
    own, borrowed = _trace(s), _trace(other)
    xp = namespace_of(own, borrowed)
    size = s.shape[-1]
    measure = xp.where(own > 0, own, xp.where(borrowed > 0, borrowed, float(size))) / size
    added = xp.where(own > 0, ridge * measure, (ridge or 1.0) * measure)
    return s + _identity(s, s) * added + _tie_break(s, ridge) * measure


def _tie_break(s: Array, ridge: float) -> Array:
    """A diagonal matrix of different entries, at most half of the default ridge; zeros without a ridge.

    If the points do not span the space, the eigenvalues off their span are all equal to the ridge. Rounding would then
    choose the axes there.
    """
    largest = 0.5 * min(ridge, _least_ridge(s))
    return _identity(s, s) * from_host([largest * ((_GOLDEN * axis) % 1) for axis in range(s.shape[-1])], like=s)


def _square_root(s: Array) -> tuple[Array, Array]:
    """The symmetric square root of a positive definite matrix and its inverse."""
    xp = namespace_of(s)
    values, axes = xp.linalg.eigh(s)
    # rounding can leave an eigenvalue at or below zero; raise it to the smallest that the arithmetic resolves
    floor = values[..., -1:] * float(xp.finfo(s.dtype).eps)
    root = xp.sqrt(xp.maximum(values, floor))[..., None, :]
    transposed = xp.matrix_transpose(axes)
    return (axes * root) @ transposed, (axes / root) @ transposed


_GOLDEN = (math.sqrt(5) - 1) / 2


def _signs(g: Array) -> Array:
    """Signs, shape (*b, d, 1), that make the product of each row with a fixed irrational direction positive.

    The usual choice, the sign of the largest entry, is not used: in a row such as (1, -1) two entries tie, and rounding
    would decide.
    """
    xp = namespace_of(g)
    direction = from_host([[0.5 + (_GOLDEN * (axis + 1)) % 1] for axis in range(g.shape[-1])], like=g)
    ones = xp.ones_like(g[..., :1])
    return xp.where(g @ direction < 0, -ones, ones)


def _identity(s1: Array, s2: Array) -> Array:
    """The identity in the batch shape that the two sides broadcast to."""
    xp = namespace_of(s1, s2)
    like = xp.zeros_like(s1 + s2)
    indices = xp.arange(s1.shape[-1], **on_device_of(like))
    return like + xp.astype(indices[:, None] == indices[None, :], like.dtype)


def _apply(g: Array, x: Array) -> Array:
    """Return g x for points given as rows."""
    return x @ namespace_of(g).matrix_transpose(g)


def _congruence(g: Array, s: Array) -> Array:
    """The diagonal of g s g^T, shape (*b, 1, d)."""
    xp = namespace_of(g)
    return xp.matrix_transpose(xp.sum((g @ s) * g, axis=-1, keepdims=True))


def _diagonal(s: Array) -> Array:
    return namespace_of(s).linalg.diagonal(s)[..., None, :]


def _trace(s: Array) -> Array:
    return _sum(_diagonal(s))


def _outer(x: Array, y: Array) -> Array:
    return namespace_of(x).matrix_transpose(x) @ y


def _sum(x: Array) -> Array:
    return namespace_of(x).sum(x, axis=-1, keepdims=True)


def _sigmoid(t: Array) -> Array:
    return 1 / (1 + namespace_of(t).exp(-t))


def _log_i0(z: Array) -> Array:
    """The log of the modified Bessel function I0, z >= 0."""
    return _bessel(z)[0]


def _bessel(z: Array) -> tuple[Array, Array]:
    """Return log I0(z) and I1(z) / I0(z), z >= 0.

    I0(z) is the mean over t of exp(z cos t), and I1(z) is the mean of cos t exp(z cos t). Up to z = 100 the trapezoid
    rule with 64 nodes is exact to rounding; beyond that the asymptotic series has an error of less than 1e-8.
    """
    xp = namespace_of(z)
    nodes = [math.cos((2 * j + 1) * math.pi / 128) for j in range(64)]
    cosines = from_host(nodes, like=z)
    small, large = xp.where(z < 100, z, 0.0), xp.where(z < 100, 100.0, z)
    weights = xp.exp(small[..., None] * (cosines - 1))
    mean = xp.mean(weights, axis=-1)
    near = xp.log(mean), xp.mean(weights * cosines, axis=-1) / mean
    x = 1 / large
    series = xp.log1p(x / 8 + 9 / 128 * x**2 + 75 / 1024 * x**3) - 0.5 * xp.log(2 * math.pi * large)
    far = series, 1 - x / 2 - x**2 / 8 - x**3 / 8
    return z + xp.where(z < 100, near[0], far[0]), xp.where(z < 100, near[1], far[1])
