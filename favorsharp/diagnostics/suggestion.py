"""The method and number of features for a target error: the public function `suggest`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from favorsharp._arrays import to_host, under_own_settings
from favorsharp._checks import check_choice, check_floats, check_points, check_same_size
from favorsharp._typing import Array
from favorsharp.diagnostics.prediction import (
    mean_of,
    predicted_heads,
    relative_error,
    relative_of_heads,
    sampled,
)
from favorsharp.fitting import fit_named
from favorsharp.landmarks import landmarks
from favorsharp.landmarks.attention import gathered, read_state
from favorsharp.landmarks.settings import GAUSSIAN_TILT, Landmarks
from favorsharp.landmarks.state import no_keys
from favorsharp.methods import (
    LANDMARKS,
    TAKES_PROPOSALS,
    method_of,
)


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
        Relative error of the kernel-weighted means with that many features; with landmarks, measured at 32 queries.
    target_error : float
    reached : bool
        Whether the prediction is at most the target; False if even the largest number of features misses it.
    exact_is_cheaper : bool
        Whether the exact sums take no more operations: n s is at most (n + s) m.
    biased : bool
        Whether the mean over draws is not the exact kernel; True for landmarks.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k = np.random.default_rng(0).standard_normal((2, 256, 8))
    >>> found = fs.suggest(q, k, target_error=0.3)
    >>> found.reached, found.predicted_error <= 0.3, found.biased
    (True, True, False)
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
    smallest error is chosen. For attention, up to 512 landmarks are considered too. Their error is not predicted but
    measured at 32 queries.

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

    _check_suggest(x, y, v, target_error, purpose)
    methods = (*TAKES_PROPOSALS, *((LANDMARKS,) if purpose == "attention" else ())) if methods is None else methods
    n, s = x.shape[-2], y.shape[-2]
    values = np.random.default_rng(0).standard_normal((s, 32)) if v is None else v
    found = []
    for method in methods:
        if method == LANDMARKS:
            errors = _errors_of_landmarks(x, y, values, kernel, scale)
        else:
            errors = _errors_of_features(x, y, values, method, kernel, scale)
        m, error = _first(errors, target_error)
        found.append((error > target_error, m, error, method))
    missed, m, error, method = min(found)
    draw = "none" if method == LANDMARKS else "orthogonal"
    cheaper = n * s <= (n + s) * m
    return Suggestion(method, draw, m, error, float(target_error), not missed, cheaper, is_biased(method))


def _check_suggest(x: Array, y: Array, v: Array | None, target_error: float, purpose: str) -> None:
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
    check_choice("purpose", purpose, ("kernel", "attention"))
    n, s = x.shape[-2], y.shape[-2]
    if not (n and s):
        raise ValueError(f"suggest needs points: x has n={n}, y has s={s}; accepted: 1 or more of each")


def _errors_of_features(
    x: Array, y: Array, values: Array, method: str, kernel: str, scale: float | None
) -> Iterator[tuple[int, float]]:
    """Numbers of features of a method that is fitted to the points, and their predicted errors."""
    parameters = fit_named(("x", "y"), x, y, method=method, kernel=kernel, scale=scale)
    heads = predicted_heads(parameters, x, y, values, 0, False, 32)
    for m in _SIZES:
        yield m, relative_of_heads(heads, m)


def _errors_of_landmarks(
    x: Array, y: Array, values: Array, kernel: str, scale: float | None
) -> Iterator[tuple[int, float]]:
    """Numbers of landmarks and their errors at 32 queries; all queries take part in their choice."""
    import numpy as np

    x, y, values = (np.asarray(to_host(array), dtype=np.float64) for array in (x, y, values))
    batch = np.broadcast_shapes(*(array.shape[:-2] for array in (x, y, values)))
    x, y, values = (np.broadcast_to(array, (*batch, *array.shape[-2:])) for array in (x, y, values))
    some = x[..., sampled(x.shape[-2], 32), :]
    options: dict[str, Any] = {"kernel": kernel, "scale": scale}
    options |= {"tilt": GAUSSIAN_TILT} if kernel == "gaussian" else {}

    def read(settings: Landmarks) -> Array:
        return read_state(gathered(x, y, values, no_keys(settings, x, y, values, None, 0)), some)

    exact = read(landmarks(y.shape[-2], **options))  # as many as keys
    for m in _SIZES:
        if m <= _MOST_LANDMARKS:
            yield m, mean_of(relative_error(read(landmarks(m, **options)), exact))


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


def is_biased(method: Any) -> bool:
    """Whether a method of this library does not estimate the kernel without bias."""
    return method == LANDMARKS or not method_of(method).estimates_kernel
