"""Predicted and measured error of approximate attention, time and memory; for `suggest` and the command line."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from favorsharp._arrays import cast, library_of, namespace_of, to_host, under_own_settings
from favorsharp._autodiff import is_traced
from favorsharp._checks import check_choice, check_floats, check_integer, check_points, check_same_size
from favorsharp._typing import Array
from favorsharp._values import astype, map_arrays
from favorsharp.exact import softmax_attention
from favorsharp.features import FeatureMap, feature_map
from favorsharp.fitting import excess, fit_map, fit_named
from favorsharp.landmarks import landmarks
from favorsharp.landmarks.expected import expected_error
from favorsharp.landmarks.settings import GAUSSIAN_TILT
from favorsharp.linear_attention import linear_attention
from favorsharp.methods import (
    DENSE_EXPONENTIAL,
    LANDMARKS,
    POSITIVE_FROM_POINTS,
    TAKES_PROPOSALS,
    check_method,
    method_of,
)
from favorsharp.parameters import Parameters, embed_key, embed_query, log_kernel_of

__all__ = [
    "Comparison",
    "Suggestion",
    "compare",
    "expected_error",
    "load_sample",
    "predicted_error",
    "recommend",
    "relative_error",
    "suggest",
]


@dataclass(frozen=True)
class Comparison:
    """One setting, measured on one set of queries, keys and values.

    Attributes
    ----------
    method, draw : str
        The method is `"window alone"` if all keys outside the window are ignored. Methods without random rows have the
        draw `"none"`.
    num_features, window : int
        Features or landmarks; 0 for a window alone.
    excess : float or None
        Mean over heads; None if the method has no closed form for it.
    predicted, measured : float or None
        Relative error of the attention output, averaged over heads; `measured` is also averaged over seeds. For
        landmarks `predicted` is `expected_error`, the relative error of the kernel of keys, if the call is neither
        causal nor windowed. None if there is no prediction.
    seconds, exact_seconds : float
        Median time of the attention, and of exact attention in the same run.
    memory : int or None
        Peak memory of the call in bytes, including the output; None if the library does not report it.
    biased : bool
        Whether the mean over draws is not the exact kernel, so that more features or draws need not help.
    alone : float or None
        The error of the window alone; None without a window.
    """

    method: str
    draw: str
    num_features: int
    window: int
    excess: float | None
    predicted: float | None
    measured: float
    seconds: float
    exact_seconds: float
    memory: int | None
    biased: bool = False
    alone: float | None = None

    @property
    def adds_nothing(self) -> bool:
        """Whether the features or landmarks have no smaller error than their window has without them."""
        return self.alone is not None and self.num_features > 0 and self.measured >= self.alone

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def load_sample(length: int | None = None) -> tuple[Any, Any, Any]:
    """Queries, keys and values of six heads of a sentence encoder on 512 tokens of English.

    Parameters
    ----------
    length : int, optional
        The number of tokens. The first 512 are the recorded ones. Each further token is drawn, head by head, from the
        normal distribution of a recorded token and the eight tokens with the nearest keys; the recorded tokens take
        turns. Means and covariances of a head stay about the same. None means 512.

    Returns
    -------
    tuple of numpy.ndarray
        q, k and v, each of shape (6, length, 32), in float16, as recorded; data/PROVENANCE.md says where they come
        from.

    Raises
    ------
    TypeError, ValueError
        If length is not a positive integer.

    Examples
    --------
    >>> from favorsharp.diagnostics import load_sample
    >>> [x.shape for x in load_sample()]
    [(6, 512, 32), (6, 512, 32), (6, 512, 32)]
    >>> load_sample(8192)[0].shape
    (6, 8192, 32)
    """
    from importlib.resources import as_file, files  # imported here, to keep the import of this module fast

    import numpy as np

    with as_file(files("favorsharp") / "data" / "attention_sample.npz") as path, np.load(path) as archive:
        q, k, v = archive["q"], archive["k"], archive["v"]
    recorded = k.shape[-2]
    length = recorded if length is None else check_integer("length", length, 1)
    if length > recorded:
        more = _resampled(np.concatenate([q, k, v], axis=-1), k, length - recorded)
        parts = np.split(more, [q.shape[-1], q.shape[-1] + k.shape[-1]], axis=-1)
        q, k, v = (np.concatenate([x, part], axis=-2) for x, part in zip((q, k, v), parts, strict=True))
    return q[:, :length], k[:, :length], v[:, :length]


def _resampled(tokens: Any, keys: Any, count: int, neighbours: int = 8) -> Any:
    """Tokens (heads, count, width), drawn near given ones (heads, n, width); keys (heads, n, d) say what is near."""
    import numpy as np

    rng = np.random.default_rng(0)
    chosen = np.arange(count) % tokens.shape[1]
    drawn = np.empty((tokens.shape[0], count, tokens.shape[2]), tokens.dtype)
    for head, (x, y) in enumerate(zip(tokens.astype(np.float32), keys.astype(np.float32), strict=True)):
        squares = (y * y).sum(-1)
        distances = squares[:, None] + squares - 2 * y @ y.T
        near = np.argpartition(distances, neighbours, axis=-1)[:, : neighbours + 1]  # itself among them
        means = x[near].mean(axis=1)
        weights = rng.standard_normal((count, neighbours + 1), np.float32) / (neighbours + 1) ** 0.5
        spread = x[near] - means[:, None]
        drawn[head] = means[chosen] + np.einsum("tj,tjd->td", weights, spread[chosen])
    return drawn


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
    heads = _heads(parameters, q, k, v, window, is_causal, rows)
    return _relative(heads, num_features)


def _relative(heads: list[tuple[Any, Any, float]], num_features: int) -> float:
    import numpy as np

    return float(
        np.mean([np.sqrt(np.mean(_blunted(first / num_features, ceiling)) / size) for first, ceiling, size in heads])
    )


def _heads(parameters: Parameters, q: Array, k: Array, v: Array, window: int, is_causal: bool, rows: int) -> Any:
    """The result of `_predicted_head` for each leading index; the number of features only divides it later."""
    import numpy as np

    if parameters.method not in DENSE_EXPONENTIAL:
        raise ValueError(
            f"the error is predicted for {', '.join(DENSE_EXPONENTIAL)}, got method {parameters.method_name!r}"
        )
    p = _on_host(parameters)
    x, y, value = (np.asarray(to_host(array), dtype=np.float64) for array in (q, k, v))
    queries = np.unique(np.linspace(0, x.shape[-2] - 1, rows).astype(int))
    # a sample of keys stands for all of them, because the cost is quadratic in their number
    seen = np.unique(np.linspace(0, y.shape[-2] - 1, min(y.shape[-2], _KEYS)).astype(int))
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
    # R_jk = exp(own + side_j + side_k + cross_jk), where cross is a Gram matrix. Half of its diagonal is moved to
    # the sides: then the factor that the rows share is at most 1, and each row has one largest exponent. It is cut at
    # 300 nats, where the error has long reached its ceiling
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


@dataclass(frozen=True)
class Suggestion:
    """What `suggest` found.

    Attributes
    ----------
    method, draw : str
        The arguments for `fit` and `feature_map`. With the method `"landmarks"` the draw is `"none"`, and
        `landmarks(num_features)` is the argument for attention, and `landmarks(num_features, kernel="gaussian",
        scale=scale, tilt=2)` the one for `nadaraya_watson`.
    num_features : int
        Features, or landmarks.
    predicted_error : float
        Relative error of the kernel-weighted means with that many features; with landmarks, `expected_error`.
    target_error : float
    reached : bool
        Whether the prediction is at most the target; False if even the largest number of features misses it.
    exact_is_cheaper : bool
        Whether the exact sums take no more operations: n s is at most (n + s) m.
    biased : bool
        Whether the mean over draws is not the exact kernel; so it is with landmarks.
    """

    method: str
    draw: str
    num_features: int
    predicted_error: float
    target_error: float
    reached: bool
    exact_is_cheaper: bool
    biased: bool = False


@under_own_settings
def suggest(
    x: Array,
    y: Array,
    /,
    v: Array | None = None,
    *,
    target_error: float,
    kernel: str = "softmax",
    scale: float | None = None,
    methods: Iterable[str] | None = None,
    purpose: str = "kernel",
) -> Suggestion:
    """The method that is predicted to reach an error with the fewest features, found without drawing any.

    Each method is fitted from moments. `predicted_error` then predicts its error for each number of features, from a
    sample of 32 queries and at most 512 keys. If several methods need the same number of features, the one with the
    smallest error is chosen. For attention, up to 512 landmarks are considered too; `expected_error` predicts theirs.

    Parameters
    ----------
    x : array, shape (*b, n, d)
        Queries, or the points at which to estimate.
    y : array, shape (*b, s, d)
    v : array, shape (*b, s, e), optional
        The values to average. None means standard normal values; the error is then that of the matrix of normalised
        kernel weights in the Frobenius norm.
    target_error : float
        The relative error that is wanted, between 0 and 1.
    kernel, scale
        As in `fit`.
    methods : iterable of str, optional
        What to choose from: dense-exponential methods, and `"landmarks"`. None means all that suit the purpose.
    purpose : {"kernel", "attention"}
        What the features are for. Kernel sums, and maps that serve many inputs, need a feature map. Attention, and
        other weighted means, may choose landmarks anew in each call, which are sharper but biased.

    Returns
    -------
    Suggestion
        It has at most 65536 features. Its draw is `orthogonal`, which is no worse than the independent rows that the
        prediction assumes.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k = np.random.default_rng(0).standard_normal((2, 256, 8))
    >>> found = fs.suggest(q, k, target_error=0.2)
    >>> found.reached, found.num_features % 8
    (True, 0)
    >>> feature_map = fs.feature_map(fs.fit(q, k, method=found.method), found.num_features, draw=found.draw, rng=0)
    """
    import numpy as np

    if isinstance(target_error, bool) or not isinstance(target_error, int | float):
        raise TypeError(f"target_error must be a number between 0 and 1, got {type(target_error).__name__}")
    if not 0 < target_error < 1:
        raise ValueError(f"target_error must be between 0 and 1, got {target_error}")
    check_floats(x=x, y=y, **({} if v is None else {"v": v}))
    check_points("x", x, "(*b, n, d)")
    check_points("y", y, "(*b, s, d)")
    if v is not None:
        check_points("v", v, "(*b, s, e)")
        check_same_size("s", y=(-2, y.shape[-2]), v=(-2, v.shape[-2]))
    n, s = x.shape[-2], y.shape[-2]
    check_choice("purpose", purpose, ("kernel", "attention"))
    methods = (*TAKES_PROPOSALS, *((LANDMARKS,) if purpose == "attention" else ())) if methods is None else methods
    if not (n and s):
        raise ValueError(f"suggest needs points to look at: x has n={n}, y has s={s}; accepted: 1 or more of each")
    values = np.random.default_rng(0).standard_normal((s, 32)) if v is None else v
    found = []
    for method in methods:
        errors = _errors_of_landmarks(x, y, kernel, scale) if method == LANDMARKS else None
        if errors is None:
            parameters = fit_named(("x", "y"), x, y, method=method, kernel=kernel, scale=scale)
            heads = _heads(parameters, x, y, values, 0, False, 32)
            errors = ((m, _relative(heads, m)) for m in _SIZES)
        m, error = _first(errors, target_error)
        found.append((error > target_error, m, error, method))
    missed, m, error, method = min(found)
    draw = "none" if method == LANDMARKS else "orthogonal"
    cheaper = n * s <= (n + s) * m
    return Suggestion(method, draw, m, error, float(target_error), not missed, cheaper, is_biased(method))


def _errors_of_landmarks(x: Array, y: Array, kernel: str, scale: float | None) -> Iterator[tuple[int, float]]:
    """Numbers of landmarks, and the errors that are expected of them."""
    options: dict[str, Any] = {"kernel": kernel, "scale": scale}
    options |= {"tilt": GAUSSIAN_TILT} if kernel == "gaussian" else {}
    for m in _SIZES:
        if m <= _MOST_LANDMARKS:
            yield m, _mean(expected_error(x, y, landmarks(m, **options)))


def _first(errors: Iterable[tuple[int, float]], target: float) -> tuple[int, float]:
    """The first number with an error of at most the target, or the last number."""
    tried = []
    for found in errors:
        tried.append(found)
        if found[1] <= target:
            break
    return tried[-1]


_SIZES = tuple(int(2 ** (half / 2)) // 8 * 8 for half in range(8, 33))
"""The numbers of features that are considered: from 16 to 65536, two for each doubling, multiples of 8."""

_MOST_LANDMARKS = 512
"""The largest number of landmarks that `suggest` considers; the time of the choice grows with its square."""


COMPARED = (*TAKES_PROPOSALS, *POSITIVE_FROM_POINTS, LANDMARKS)
"""Methods that `compare` measures unless others are named."""

_SLOW = 1.0
"""Seconds; a call that takes longer is timed once."""

ALONE = "window alone"
"""The method of a row of `compare` in which all keys outside the window are ignored."""


def compare(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    methods: Iterable[str] = COMPARED,
    num_features: Iterable[int] = (32, 128, 512),
    windows: Iterable[int] = (0, 16),
    draws: Iterable[str] = ("orthogonal",),
    seeds: int = 3,
    scale: float | None = None,
    is_causal: bool = False,
    repeats: int = 3,
) -> Iterator[Comparison]:
    """Measure settings on given queries, keys and values, one after the other.

    A bidirectional map is fitted to the data it is measured on, as `attention` does. A causal one must not be: it is
    fitted to the first half of the sequence, and its error is measured on the queries of the second half. The time of
    the fit is not measured; that of landmarks includes their choice, because each call chooses its own.

    Parameters
    ----------
    q : array, shape (*b, n, d)
    k : array, shape (*b, s, d)
    v : array, shape (*b, s, e)
    methods, num_features, windows, draws : iterables
        The settings; all combinations are measured. Methods are those of positive features, `"prototypes"` and
        `"landmarks"`; the last two, which draw no rows, are measured once for all draws. Windows need n == s; each is
        also measured alone, without the keys outside it.
    seeds : int
        Number of draws to average over.
    scale : float, optional
        None means d**-0.5.
    is_causal : bool
    repeats : int
        Number of calls that the median time is taken of, after one warm-up call. A call that takes longer than a
        second is timed once.

    Yields
    ------
    Comparison
        First each window alone, then the settings in the order of the methods, draws, numbers of features and windows.

    Examples
    --------
    >>> import numpy as np
    >>> from favorsharp.diagnostics import compare, recommend
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 256, 8))
    >>> rows = list(compare(q, k, v, methods=["optimal", "landmarks"], num_features=[64], windows=[0, 8], repeats=1))
    >>> [(row.method, row.num_features, row.window) for row in rows]
    [('window alone', 0, 8), ('optimal', 64, 0), ('optimal', 64, 8), ('landmarks', 64, 0), ('landmarks', 64, 8)]
    >>> recommend(rows, target=1e-9) is None
    True
    """
    methods, windows, draws, num_features = tuple(methods), tuple(windows), tuple(draws), tuple(num_features)
    for method in methods:
        check_method(method, positive=True, also=(*POSITIVE_FROM_POINTS, LANDMARKS))
    bench = _Bench(q, k, v, seeds, scale, is_causal, repeats)
    alone: dict[int, float] = {}
    for window in windows:
        if window > 0 and window not in alone:
            row = bench.measured(_Trial(ALONE, "none", 0, (_no_features(q, scale),) * seeds), window, None)
            alone[window] = row.measured
            yield row
    for trial in _trials(bench, methods, draws, num_features):
        for window in windows:
            yield bench.measured(trial, window, alone.get(window))


@dataclass(frozen=True)
class _Trial:
    """A method with a number of features: a map, or landmarks, for each seed, and what is predicted of them."""

    method: Any
    draw: str
    num_features: int
    maps: tuple[Any, ...]
    parameters: Parameters | None = None
    excess: float | None = None


class _Bench:
    """The points that settings are measured on, and exact attention's output and time."""

    def __init__(
        self, q: Array, k: Array, v: Array, seeds: int, scale: float | None, is_causal: bool, repeats: int
    ) -> None:
        self.points = q, k, v
        self.seeds, self.scale, self.is_causal, self.repeats = seeds, scale, is_causal, repeats
        self.half = q.shape[-2] // 2 if is_causal else 0
        wide = [cast(x, namespace_of(q).float64) for x in self.points]
        self.exact = softmax_attention(*wide, is_causal=is_causal, scale=scale)[..., self.half :, :]
        self.exact_seconds = _median_time(
            lambda: softmax_attention(q, k, v, is_causal=is_causal, scale=scale), self.repeats
        )

    @property
    def fitted_to(self) -> tuple[Array, Array]:
        """The queries and keys that maps are fitted to."""
        q, k, _ = self.points
        return (q[..., : self.half, :], k[..., : self.half, :]) if self.is_causal else (q, k)

    def measured(self, trial: _Trial, window: int, alone: float | None) -> Comparison:
        """Measure a trial with a window, whose error without the trial's features is given."""

        def call(seed: int = 0) -> Array:
            return linear_attention(*self.points, trial.maps[seed], is_causal=self.is_causal, window=window)

        wide = namespace_of(self.exact).float64
        errors = [
            _mean(relative_error(cast(call(seed), wide)[..., self.half :, :], self.exact))
            for seed in range(len(trial.maps))
        ]
        return Comparison(
            trial.method,
            trial.draw,
            trial.num_features,
            window,
            trial.excess,
            self._predicted(trial, window),
            sum(errors) / len(errors),
            _median_time(call, self.repeats),
            self.exact_seconds,
            _peak_memory(call) if library_of(self.points[0]) == "numpy" else None,
            is_biased(trial.method),
            alone,
        )

    def _predicted(self, trial: _Trial, window: int) -> float | None:
        if trial.method == LANDMARKS:
            q, k, _ = self.points
            return None if window or self.is_causal else _mean(expected_error(q, k, trial.maps[0]))
        if trial.method not in DENSE_EXPONENTIAL or trial.parameters is None:
            return None
        m = trial.num_features
        return predicted_error(trial.parameters, *self.points, m, window=window, is_causal=self.is_causal)


def _trials(bench: _Bench, methods: Any, draws: Any, num_features: Any) -> Iterator[_Trial]:
    """What `compare` measures, with all windows each."""
    q, k, _ = bench.points
    seeds, scale = range(bench.seeds), bench.scale
    for method in methods:
        if method == LANDMARKS:
            for m in num_features:
                yield _Trial(method, "none", m, tuple(landmarks(m, scale=scale, rng=seed) for seed in seeds))
        elif method in POSITIVE_FROM_POINTS:
            for m in num_features:
                options = {"method": method, "scale": scale}
                yield _Trial(method, "none", m, tuple(fit_map(*bench.fitted_to, m, rng=i, **options) for i in seeds))
        else:
            fitted = fit_named(("q", "k"), *bench.fitted_to, method=method, kernel="softmax", scale=scale)
            known = method_of(method).excess is not None
            spread = _mean(excess(fitted, q[..., bench.half :, :], k)) if known else None
            for draw in draws:
                for m in num_features:
                    maps = tuple(feature_map(fitted, m, draw=draw, rng=seed) for seed in seeds)
                    yield _Trial(method, draw, m, maps, fitted, spread)


def is_biased(method: Any) -> bool:
    """Whether a method of `compare` or `suggest` does not estimate the kernel without bias."""
    return method in (LANDMARKS, ALONE) or not method_of(method).estimates_kernel


def _no_features(q: Array, scale: float | None) -> FeatureMap:
    """A map whose only feature is so small that it adds nothing to any window."""
    import numpy as np

    d = q.shape[-1]
    parameters = fit_named(("q", "q"), q[..., :1, :], q[..., :1, :], method="posrf", kernel="softmax", scale=scale)
    return feature_map(parameters, 1, draw=(np.zeros((1, d), np.float32), np.full(1, -1e30, np.float32)))


def recommend(rows: Iterable[Comparison], target: float) -> Comparison | None:
    """The fastest of the measured settings whose error is at most the target; None if there is none."""
    return min((row for row in rows if row.measured <= target), key=lambda row: row.seconds, default=None)


def _on_host(parameters: Parameters) -> Parameters:
    """The parameters as float64 NumPy arrays."""
    import numpy as np

    if is_traced(parameters.g1):
        raise ValueError("errors are predicted from values: parameters must not be tracers")
    host: Parameters = astype(map_arrays(parameters, to_host), np.float64)
    return host


def _mean(values: Array) -> float:
    return float(to_host(values).astype(float).mean())


def _median_time(call: Callable[[], Array], repeats: int) -> float:
    """Median seconds of a call, measured until its first number is on the host."""

    def once() -> float:
        start = time.perf_counter()
        out = call()
        to_host(out[..., :1, :1])
        return time.perf_counter() - start

    if once() > _SLOW and (second := once()) > _SLOW:  # the first call may compile
        return second
    times = sorted(once() for _ in range(repeats))
    return times[len(times) // 2]


def _peak_memory(call: Callable[[], Array]) -> int:
    """Peak memory of a call in bytes, as NumPy reports it."""
    import tracemalloc

    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
