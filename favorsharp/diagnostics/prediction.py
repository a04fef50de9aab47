"""Predicts the error of attention through features without drawing any: the public function `predicted_error`."""

from dataclasses import replace
from typing import Any

from favorsharp._arrays import namespace_of, to_host, under_own_settings
from favorsharp._autodiff import is_traced
from favorsharp._typing import Array
from favorsharp._values import astype, map_arrays
from favorsharp.methods import (
    DENSE_EXPONENTIAL,
)
from favorsharp.parameters import Parameters, embed_key, embed_query, log_kernel_of


@under_own_settings
def relative_error(approximate: Array, exact: Array, /) -> Array:
    """Frobenius norm of the difference relative to that of the exact output, for each leading index.

    Parameters
    ----------
    approximate, exact : array, shape (*b, n, e)

    Returns
    -------
    array, shape (*b)

    Examples
    --------
    >>> import numpy as np
    >>> from favorsharp.diagnostics import relative_error
    >>> exact = np.ones((2, 8, 4))
    >>> relative_error(1.5 * exact, exact)
    array([0.5, 0.5])
    """
    xp = namespace_of(approximate, exact)
    difference = xp.sum((approximate - exact) ** 2, axis=(-2, -1))
    return xp.sqrt(difference / xp.sum(exact**2, axis=(-2, -1)))


@under_own_settings
def predicted_error(
    parameters: Parameters,
    q: Array,
    k: Array,
    v: Array,
    /,
    num_features: int,
    *,
    window: int = 0,
    is_causal: bool = False,
    rows: int = 32,
) -> float:
    """The expected relative error of attention with a map of independent rows, computed without drawing one.

    To first order, the error of an output row is sum_j p_j delta_j (v_j - out). Here delta_j is the relative error of
    the kernel value of key j; it is 0 for keys that are scored exactly. The covariance of the delta_j is (R_jk - 1) /
    m, where R_jk = E[f1(x)^2 f2(y_j) f2(y_k)] / (K(x, y_j) K(x, y_k)) is a Gaussian integral, so the mean square V of
    the sum is known in closed form. Where V is not small, the first order is too large: the weights stay convex, and
    the error of a row levels off near C, the mean square of what is lost when its far keys are averaged evenly. In
    between, the function f(z) = z / (1 + sqrt z)^2 of z = V / C, which has slope 1 at 0 and limit 1 at infinity,
    describes the measurements. The value returned is the square root of the mean of C f(V / C) over the mean of
    |out|^2. On the shipped sample, for the six fitted and published methods, 16 to 2048 features and windows of 0, 16
    and 64, it was 0.71 to 1.32 times the measured error. On other data, use it as a guide.

    Parameters
    ----------
    parameters : Parameters
        The parameters of a dense-exponential method.
    q : array, shape (*b, n, d)
    k : array, shape (*b, s, d)
    v : array, shape (*b, s, e)
    num_features : int
        m.
    window : int
        As in `linear_attention`.
    is_causal : bool
    rows : int
        Number of evenly spaced queries that the mean is taken over. If there are more than 512 keys, 512 of them are
        used.

    Returns
    -------
    float
        Mean over the leading axes.

    Raises
    ------
    ValueError
        If the method is not a dense-exponential one.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> from favorsharp.diagnostics import predicted_error
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 256, 8))
    >>> few, many = (predicted_error(fs.fit(q, k), q, k, v, m) for m in (64, 1024))
    >>> many < few
    True
    """
    heads = predicted_heads(parameters, q, k, v, window, is_causal, rows)
    return relative_of_heads(heads, num_features)


def relative_of_heads(heads: list[tuple[Any, Any, float]], num_features: int) -> float:
    """The error that is predicted from the results of `predicted_heads`, averaged over heads."""
    import numpy as np

    return float(
        np.mean([np.sqrt(np.mean(_blunted(first / num_features, ceiling)) / size) for first, ceiling, size in heads])
    )


def predicted_heads(
    parameters: Parameters, q: Array, k: Array, v: Array, window: int, is_causal: bool, rows: int
) -> Any:
    """The result of `_predicted_head` for each leading index; the number of features only divides it later."""
    import numpy as np

    if parameters.method not in DENSE_EXPONENTIAL:
        raise ValueError(
            f"the error is predicted for {', '.join(DENSE_EXPONENTIAL)}, got method {parameters.method_name!r}"
        )
    p = _on_host(parameters)
    x, y, value = (np.asarray(to_host(array), dtype=np.float64) for array in (q, k, v))
    queries = sampled(x.shape[-2], rows)
    # a sample of keys stands for all of them, because the cost is quadratic in their number
    seen = sampled(y.shape[-2], min(y.shape[-2], _KEYS))
    pairs = _visible_and_far(queries, seen, window, is_causal)
    x, y, value = x[..., queries, :], y[..., seen, :], value[..., seen, :]
    batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2], value.shape[:-2])
    x, y, value = (np.broadcast_to(array, (*batch, *array.shape[-2:])) for array in (x, y, value))
    by_head = {name: np.broadcast_to(getattr(p, name), (*batch, *getattr(p, name).shape[-2:])) for name in _HEAD}
    heads = []
    for head in np.ndindex(batch):
        own: dict[str, Any] = {name: values[head] for name, values in by_head.items()}
        heads.append(_predicted_head(replace(p, rate=None, **own), x[head], y[head], value[head], *pairs))
    return heads


def sampled(length: int, count: int) -> Any:
    """Up to `count` evenly spaced positions."""
    import numpy as np

    return np.unique(np.linspace(0, length - 1, count).astype(int))


_KEYS = 512
_HEAD = ("a", "g1", "g2", "center_x", "center_y")


def _visible_and_far(queries: Any, keys: Any, window: int, is_causal: bool) -> tuple[Any, Any]:
    """Which of the sampled queries see which keys, and which of those pairs are read through features."""
    import numpy as np

    visible = keys <= queries[:, None] if is_causal else np.ones((len(queries), len(keys)), dtype=bool)
    if not window:
        return visible, visible
    apart = queries[:, None] // window - keys // window
    return visible, visible & ((apart > 1) | (apart < -1))


def _predicted_head(p: Parameters, x: Any, y: Any, values: Any, visible: Any, far: Any) -> tuple[Any, Any, float]:
    """For each query the first-order mean square error times m, and its ceiling; and the mean square of the output."""
    import numpy as np

    u, v = embed_query(p, x)[0], embed_key(p, y)[0]
    grow = (1 - 4 * p.a) / (1 - 8 * p.a)
    own = np.sum(np.log(1 - 4 * p.a) - 0.5 * np.log(1 - 8 * p.a)) + np.sum((2 * grow - 1) * u * u, axis=-1)
    side = 0.5 * np.sum((grow - 1) * v * v, axis=-1) + ((2 * grow - 1) * u) @ v.T
    cross = (grow * v) @ v.T
    logits = np.where(visible, log_kernel_of(p, x, y), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ values
    weights = weights * far
    even = far / np.maximum(far.sum(-1, keepdims=True), 1)
    lost = (weights - weights.sum(-1, keepdims=True) * even) @ values
    # R_jk = exp(own + side_j + side_k + cross_jk), where cross is a Gram matrix. Half of its diagonal is moved to the
    # sides. Then the factor that the rows share is at most 1, and each row has one largest exponent. Exponents are cut
    # at 300 nats, far beyond the point where the error reaches its ceiling
    half = 0.5 * np.diagonal(cross)
    shared = np.exp(cross - half[:, None] - half[None, :])
    side = side + half
    top = side.max(-1, keepdims=True)
    pull = weights[:, :, None] * (values - out[:, None, :])
    lifted = np.exp(side - top)[:, :, None] * pull
    products = (shared @ lifted.transpose(1, 0, 2).reshape(len(y), -1)).reshape(len(y), *pull.shape[::2])
    grown = np.exp(np.minimum(own + 2 * top[:, 0], 300)) * np.sum(lifted * products.transpose(1, 0, 2), axis=(1, 2))
    first_order = grown - np.sum(pull.sum(axis=1) ** 2, axis=-1)
    return np.maximum(first_order, 0.0), np.sum(lost * lost, axis=-1), float(np.mean(np.sum(out * out, axis=-1)))


def _blunted(first_order: Any, ceiling: Any) -> Any:
    """C f(V / C) with f(z) = z / (1 + sqrt z)^2."""
    import numpy as np

    ratio = np.where(ceiling > 0, np.sqrt(first_order / np.where(ceiling > 0, ceiling, 1.0)), 0.0)
    return first_order / (1 + ratio) ** 2


def _on_host(parameters: Parameters) -> Parameters:
    """The parameters as float64 NumPy arrays."""
    import numpy as np

    if is_traced(parameters.g1):
        raise ValueError("errors are predicted from values: parameters must not be tracers")
    host: Parameters = astype(map_arrays(parameters, to_host), np.float64)
    return host


def mean_of(values: Array) -> float:
    """The mean of an array, as a float."""
    return float(to_host(values).astype(float).mean())
