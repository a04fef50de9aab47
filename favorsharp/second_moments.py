"""The public functions `excess` and `log_second_moment`: the predicted variance of the features of a fit.

Each calls a formula from the record of the method (`favorsharp.methods`; docs: theory).
"""

from dataclasses import replace

from favorsharp._arrays import cast, compute_dtype, statistics_dtype, under_own_settings
from favorsharp._checks import check_scale
from favorsharp._typing import Array
from favorsharp._values import astype
from favorsharp.fitting import in_range
from favorsharp.methods import TABLE, method_of
from favorsharp.moments import moments
from favorsharp.parameters import Parameters, check_data


@under_own_settings
def excess(parameters: Parameters, x: Array, y: Array, /) -> Array:
    """The mean over all pairs of log E[(f1 f2)^2] - 2 log K; it is 0 for features without variance.

    f1 and f2 are one feature of the query and of the key, E is the mean over draws, and K is the kernel. The excess is
    computed from moments in time O((n + s) d^2), without a loop over pairs.

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
    near_x, near_y, near = in_range(x, y, parameters.scale)
    data = moments(near_x, near_y)
    p = replace(astype(parameters, data.mean_x.dtype), scale=check_scale(near, 1.0))
    formula = method_of(p.method).excess
    if formula is None:
        known = [name for name, record in TABLE.items() if record.excess is not None]
        raise ValueError(
            f"excess is known in closed form for {', '.join(known)}, got method {p.method_name!r}; for trig and "
            "geometric average log_second_moment over a sample"
        )
    value = formula(p, data)
    return cast(value[..., 0, 0], compute_dtype(xp, x, y))


@under_own_settings
def log_second_moment(parameters: Parameters, x: Array, y: Array, /) -> Array:
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
    formula = method_of(p.method).log_second_moment
    if formula is None:
        raise ValueError(
            f"method {p.method_name!r} does not estimate the kernel: its features have no second moment to give"
        )
    dtype = compute_dtype(xp, x, y)
    value = formula(p, cast(x, p.g1.dtype), cast(y, p.g1.dtype))
    return cast(value, dtype)
