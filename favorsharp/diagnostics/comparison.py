"""Measures settings on queries, keys and values: the public functions `compare` and `recommend`."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from favorsharp._arrays import cast, library_of, namespace_of, to_host
from favorsharp._typing import Array
from favorsharp.diagnostics.prediction import (
    mean_of,
    predicted_error,
    relative_error,
)
from favorsharp.diagnostics.suggestion import is_biased
from favorsharp.exact import softmax_attention
from favorsharp.features import FeatureMap, feature_map
from favorsharp.fitting import fit_map, fit_named
from favorsharp.landmarks import landmarks
from favorsharp.landmarks.expected import expected_error
from favorsharp.linear_attention import linear_attention
from favorsharp.methods import (
    DENSE_EXPONENTIAL,
    LANDMARKS,
    POSITIVE_FROM_POINTS,
    TAKES_PROPOSALS,
    check_method,
    method_of,
)
from favorsharp.parameters import Parameters
from favorsharp.second_moments import excess


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

    Examples
    --------
    >>> import numpy as np
    >>> from favorsharp.diagnostics import compare
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 64, 8))
    >>> (row,) = compare(q, k, v, methods=["optimal"], num_features=[16], windows=[0], repeats=1)
    >>> row.method, row.draw, row.num_features, row.biased
    ('optimal', 'orthogonal', 16, False)
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
        """Whether the window alone has no larger error than the features or landmarks with the window."""
        return self.alone is not None and self.num_features > 0 and self.measured >= self.alone

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


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

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

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
    """A method with a number of features: a map, or landmarks, for each seed, and the predicted error."""

    method: Any
    draw: str
    num_features: int
    maps: tuple[Any, ...]
    parameters: Parameters | None = None
    excess: float | None = None


class _Bench:
    """The points on which settings are measured, and the output and the time of exact attention."""

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
        """Measure a trial with a window; the error of the window alone is given."""

        def call(seed: int = 0) -> Array:
            return linear_attention(*self.points, trial.maps[seed], is_causal=self.is_causal, window=window)

        wide = namespace_of(self.exact).float64
        errors = [
            mean_of(relative_error(cast(call(seed), wide)[..., self.half :, :], self.exact))
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
            trial.method == ALONE or is_biased(trial.method),
            alone,
        )

    def _predicted(self, trial: _Trial, window: int) -> float | None:
        if trial.method == LANDMARKS:
            q, k, _ = self.points
            return None if window or self.is_causal else mean_of(expected_error(q, k, trial.maps[0]))
        if trial.method not in DENSE_EXPONENTIAL or trial.parameters is None:
            return None
        m = trial.num_features
        return predicted_error(trial.parameters, *self.points, m, window=window, is_causal=self.is_causal)


def _trials(bench: _Bench, methods: Any, draws: Any, num_features: Any) -> Iterator[_Trial]:
    """The trials of `compare`; each is measured with all windows."""
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
            spread = mean_of(excess(fitted, q[..., bench.half :, :], k)) if known else None
            for draw in draws:
                for m in num_features:
                    maps = tuple(feature_map(fitted, m, draw=draw, rng=seed) for seed in seeds)
                    yield _Trial(method, draw, m, maps, fitted, spread)


def _no_features(q: Array, scale: float | None) -> FeatureMap:
    """A map whose only feature is so small that it adds nothing to any window."""
    import numpy as np

    d = q.shape[-1]
    parameters = fit_named(("q", "q"), q[..., :1, :], q[..., :1, :], method="posrf", kernel="softmax", scale=scale)
    return feature_map(parameters, 1, draw=(np.zeros((1, d), np.float32), np.full(1, -1e30, np.float32)))


def recommend(rows: Iterable[Comparison], target: float) -> Comparison | None:
    """The fastest of the measured settings whose error is at most the target.

    Parameters
    ----------
    rows : iterable of Comparison
        The results of `compare`.
    target : float
        The largest relative error that is accepted.

    Returns
    -------
    Comparison or None
        None if no setting reaches the target.

    Examples
    --------
    >>> import numpy as np
    >>> from favorsharp.diagnostics import compare, recommend
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 64, 8))
    >>> rows = list(compare(q, k, v, methods=["landmarks"], num_features=[8, 64], windows=[0], repeats=1))
    >>> recommend(rows, target=1e-6).num_features  # as many landmarks as keys are exact
    64
    >>> recommend(rows[:1], target=1e-6) is None
    True
    """
    return min((row for row in rows if row.measured <= target), key=lambda row: row.seconds, default=None)


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
