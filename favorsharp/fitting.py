"""The public functions `fit` and `fit_map`.

They check their arguments, and then call a formula from the record of the method (`favorsharp.methods`; docs: theory).
"""

import math
from dataclasses import fields, replace
from typing import Any

from favorsharp._algebra import least_ridge
from favorsharp._arrays import (
    cast,
    dtype_name,
    is_array,
    named_dtype,
    namespace_of,
    on_device_of,
    statistics_dtype,
    under_own_settings,
)
from favorsharp._autodiff import is_traced, without_gradient
from favorsharp._checks import (
    check_choice,
    check_floats,
    check_in_memory,
    check_integer,
    check_points,
    check_same_size,
    check_scale,
)
from favorsharp._chunks import is_chunked
from favorsharp._typing import Array
from favorsharp._values import astype
from favorsharp.attention_moments import attention_moments
from favorsharp.exact import kernel_scale, times_power
from favorsharp.features import FeatureMap, feature_map
from favorsharp.formulas import Statistics
from favorsharp.methods import FROM_POINTS, MethodLike, check_method, method_of
from favorsharp.moments import Moments, gathered
from favorsharp.nystrom import nystrom_map
from favorsharp.parameters import Parameters
from favorsharp.prototypes import prototype_map, refined
from favorsharp.samples import pooled


def fit(
    x: Array | Moments,
    y: Array | None = None,
    /,
    *,
    method: MethodLike = "optimal",
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
    axis, mask_x, mask_y
        As in `moments`.
    ridge : float, optional
        Makes it possible to fit constant columns, one-hot data, or fewer points than coordinates. The diagonal of a
        second moment S is increased by ridge * tr(S) / d, and by up to half as much again, differently for each
        coordinate. None means 1e-6, or more if only float32 is available; 0 means no ridge.
    enable_gqa : bool
        As in `moments`.
    weighting : float, optional
        If given, each pair of a query and a key is weighted by its attention to this power. So the fit is best where
        attention is large; 0.5 to 1 are good choices. Without it, all pairs have equal weight. The weights take time
        O(n s d), so pass a calibration sample. The result is that of
        `fit(attention_moments(x, y, weighting=...))`.
    is_causal : bool
        With a weighting: pairs in which the key comes after the query have weight 0.

    Returns
    -------
    favorsharp.Parameters
        In the dtype of the data, widened to at least float32; computed in float64 if the device has it. If x and y are
        the same float32 array, CPU kernels may multiply some thousand points at a time in float32.

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


def fit_map(
    x: Array,
    y: Array,
    /,
    num_features: int,
    *,
    method: MethodLike = "optimal",
    draw: str | Array | tuple[Array, Array] = "orthogonal",
    kernel: str = "softmax",
    scale: float | None = None,
    axis: int | tuple[int, ...] = -2,
    mask_x: Array | None = None,
    mask_y: Array | None = None,
    enable_gqa: bool = False,
    rng: Any = None,
    refine: int = 0,
) -> FeatureMap:
    """Fit and draw a feature map in one call: `feature_map(fit(x, y, ...), num_features, ...)`.

    It also makes the maps that need the points themselves, for which moments are not enough. **They are biased**. With
    `method="prototypes"`, for attention, a feature is exact attention from a mean of queries. More features do not lead
    to the exact kernel; but for queries and keys like those of the fit, the error is less than half of that of as many
    random features. With `method="nystrom"`, for sums of kernels, features are made of kernels with m centres. They
    can be negative. The errors of smooth kernels in few dimensions are far below those of random features.

    Parameters
    ----------
    x : array, shape (*b, n, d)
        Queries, not scaled.
    y : array, shape (*b, s, d)
        Keys, not scaled.
    num_features : int
        m, 1 or more; even for `trig`.
    method : str or callable
        As in `fit`, or `"prototypes"` or `"nystrom"`.
    draw : str, array, or pair of arrays
        As in `feature_map`. Prototypes and Nystrom maps take none.
    kernel : {"softmax", "gaussian"}
        exp(scale x.y), or exp(-scale |x - y|^2 / 2).
    scale : float, optional
        Positive and finite. None means d**-0.5 for softmax and 1 for Gaussian.
    axis, mask_x, mask_y, enable_gqa
        As in `moments`.
    rng : None, int, SeedSequence or numpy Generator
        As in `feature_map`. For prototypes it chooses 1,024 of the queries, if there are more, and the starting points.
        For Nystrom maps it chooses the centres, and before that a sample of 512 queries and 512 keys; with more than
        512 features, the sample has a query and a key for each feature.
    refine : int
        For prototypes, the number of steps of gradient descent that bring attention weights nearer to the exact ones on
        the points of the fit; 40 are enough. With a thousand tokens or more, errors are about a tenth smaller on other
        texts, and a fifth smaller on the points of the fit. With a few hundred tokens, errors on other texts do not
        become smaller.

    Returns
    -------
    FeatureMap
        No gradient flows from prototypes or Nystrom maps to the points that they are made from.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 64, 8))
    >>> feature_map = fs.fit_map(q, k, 128, rng=0)
    >>> fs.linear_attention(q, k, v, feature_map).shape
    (2, 64, 8)
    >>> fs.fit_map(q, k, 16, method="prototypes", rng=0)
    DenseExponentialMap(method='prototypes', kernel='softmax', scale=0.353553, num_features=16, d=8, batch=(2,))
    """
    if check_integer("refine", refine, 0) and method != "prototypes":
        raise ValueError(f"refine={refine} with method={method!r}: accepted: 0, or method='prototypes'")
    if isinstance(method, str) and method in FROM_POINTS:
        if not isinstance(draw, str) or draw != "orthogonal":
            raise ValueError(f"method={method!r} takes no draw: it draws no random rows")
        fitting = {"kernel": kernel, "scale": scale, "axis": axis, "mask_x": mask_x, "mask_y": mask_y}
        return _map_from_points(method, x, y, num_features, rng, refine, enable_gqa=enable_gqa, **fitting)
    check_method(method, also=FROM_POINTS)
    fitted = fit(
        x,
        y,
        method=method,
        kernel=kernel,
        scale=scale,
        axis=axis,
        mask_x=mask_x,
        mask_y=mask_y,
        enable_gqa=enable_gqa,
    )
    return feature_map(fitted, num_features, draw=draw, rng=rng)


@under_own_settings
def _map_from_points(
    method: str, x: Array, y: Array, num_features: int, rng: Any, refine: int, **fitting: Any
) -> FeatureMap:  # fmt: skip
    """A map of prototypes, or of Nystrom's method; `fitting` holds further arguments of `fit`."""
    from favorsharp.draws import generator  # imports NumPy, which `import favorsharp` must not load

    m, own = check_integer("num_features", num_features, 1), generator(rng)
    check_in_memory(x=x, y=y)
    check_floats(x=x, y=y)
    same = y is x and fitting["mask_y"] is fitting["mask_x"]
    x, y = without_gradient(x), without_gradient(y)
    if method == "nystrom" and fitting["kernel"] == "gaussian":
        fitted = _without_transform(x, y, **fitting)
    else:
        fitted = fit_named(("x", "y"), x, y, method="optimal", **fitting)
    if x.shape[-2] == 0:
        raise ValueError(f"method {method!r} makes a map from queries: x has n=0; accepted: 1 or more")
    group = x.shape[-3] // y.shape[-3] if fitting["enable_gqa"] else 1
    wide = statistics_dtype(x)
    points = pooled(cast(x, wide), fitting["mask_x"], fitting["axis"], group)
    keys = points if same else pooled(cast(y, wide), fitting["mask_y"], fitting["axis"], 1)
    make = prototype_map if method == "prototypes" else nystrom_map
    made: Any = make(fitted, *points, *keys, m, own)
    if refine:
        made = refined(made, *points, *keys, refine, own)
    result: FeatureMap = astype(made, fitted.g1.dtype)
    return result


def _without_transform(x: Array, y: Array, **fitting: Any) -> Parameters:
    """The parameters of a map in the coordinates of the points. Without masks, no moments are computed."""
    check_points("x", x, "(*b, n, d)")
    check_points("y", y, "(*b, s, d)")
    if fitting["mask_x"] is not None or fitting["mask_y"] is not None:
        return fit_named(("x", "y"), x, y, method="posrf", **fitting)
    size = x.shape[-1]
    check_same_size("d", x=(-1, size), y=(-1, y.shape[-1]))
    for name, data in (("x", x),) if y is x else (("x", x), ("y", y)):
        xp = namespace_of(data)
        if not is_traced(data) and not bool(xp.all(xp.isfinite(data))):
            raise ValueError(f"{name} holds values that are not finite: cannot fit to them")
    # one point and one column have the same axes, dtype and scale as all points
    p = fit_named(("x", "y"), x[..., :1, :1], y[..., :1, :1], method="posrf", **fitting)
    xp = namespace_of(p.a)
    eye = xp.eye(size, dtype=p.a.dtype, **on_device_of(p.a))
    eye = xp.broadcast_to(eye, (*p.g1.shape[:-2], size, size)) if p.g1.ndim > 2 else eye
    zeros = xp.zeros_like(eye[..., :1, :])
    return replace(p, a=zeros, g1=eye, g2=eye, center_x=zeros, center_y=zeros)


@under_own_settings
def fit_named(
    names: tuple[str, str],
    x: Array | Moments,
    y: Array | None,
    *,
    method: MethodLike,
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
    data, near = _moments_of(x, y, kernel, scale, {**gathering, "weighting": weighting, "is_causal": is_causal})
    _check_finite(names, data)
    scale, near = kernel_scale(kernel, scale, data.size), kernel_scale(kernel, near, data.size)
    cross = None if data.cross is None else data.cross * near
    statistics = Statistics(*_scaled(data, near), ridge=_ridge(ridge, data), cross=cross)
    formula = method_of(method).fit
    assert formula is not None  # check_method refuses the others
    values = {name: _restore(value, data) for name, value in formula(statistics).items()}
    return Parameters(method=method, kernel=kernel, scale=scale, **values)


_UNGIVEN = {"axis": -2, "mask_x": None, "mask_y": None, "enable_gqa": False, "weighting": None, "is_causal": False}


def _moments_of(
    x: Array | Moments, y: Array | None, kernel: str, scale: float | None, options: dict[str, Any]
) -> tuple[Moments, float | None]:
    """The moments that a fit reads, and the scale of the points that they are of."""
    if isinstance(x, Moments):
        given = [name for name, value in options.items() if is_array(value) or value != _UNGIVEN[name]]
        given = given if y is None else ["y", *given]
        if given:
            raise TypeError(f"fit(moments) takes no {', '.join(given)}: pass these to moments(...) instead")
        return _known(x), scale
    if y is None:
        raise TypeError("fit takes queries and keys, or one Moments: y is missing")
    x, y, near = in_range(x, y, scale)
    if options["weighting"] is not None:
        return attention_moments(x, y, kernel=kernel, scale=near, **options), near
    if options["is_causal"]:
        raise ValueError("is_causal=True selects the pairs that a weighting counts; accepted: with weighting=...")
    gathering = {name: value for name, value in options.items() if name not in ("weighting", "is_causal")}
    # a fit to the same points on both sides takes no inverse, so rounding errors stay small
    return _known(gathered(x, y, narrow=True, **gathering)), near


def _check_finite(names: tuple[str, str], data: Moments) -> None:
    """Raise an error if moments are not finite, by the names of the points."""
    sides = (data.mean_x, data.covariance_x), (data.mean_y, data.covariance_y)
    for name, (mean, covariance) in zip(names, sides, strict=True):
        if is_traced(covariance):
            continue
        xp = namespace_of(covariance)
        if not bool(xp.all(xp.isfinite(mean)) & xp.all(xp.isfinite(covariance))):
            raise ValueError(f"{name} holds values that are not finite (or whose squares are not): cannot fit to them")


def in_range(x: Array, y: Array, scale: float | None) -> tuple[Array, Array, float | None]:
    """The points and the scale; if only float32 is available, rescaled so that squares stay in its range."""
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
    """The moments as numbers; lazy moments of dask arrays are computed, because a fit needs their values."""
    if not is_chunked(data.mean_x):
        return data
    import dask

    names = [field.name for field in fields(data) if field.name != "dtype"]
    return replace(data, **dict(zip(names, dask.compute(*(getattr(data, name) for name in names)), strict=True)))


def _scaled(data: Moments, scale: float) -> tuple[Array, Array, Array, Array]:
    root = math.sqrt(scale)
    mean, covariance = data.mean_x * root, data.covariance_x * scale
    # what is the same on both sides stays so: a balance of equal sides costs less
    mean_y = mean if data.mean_y is data.mean_x else data.mean_y * root
    return mean, mean_y, covariance, covariance if data.covariance_y is data.covariance_x else data.covariance_y * scale


def _ridge(ridge: Any, data: Moments) -> float:
    """The relative ridge: the one that the caller gave, or else the default of `least_ridge`."""
    if ridge is None:
        return least_ridge(data.covariance_x)
    if isinstance(ridge, bool) or not isinstance(ridge, int | float):
        raise TypeError(f"ridge must be None or a finite number of 0 or more, got {type(ridge).__name__}")
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge must be None or a finite number of 0 or more, got {ridge}")
    return float(ridge)


def _restore(value: Array, data: Moments) -> Array:
    """A fitted value in the dtype of the data."""
    return cast(value, named_dtype(namespace_of(value), data.dtype))
