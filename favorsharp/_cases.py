"""The calls of each op on which a kernel is compared with the reference; public as `favorsharp.testing.cases`."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from favorsharp._arrays import dtype_name, from_host, named_dtype, namespace_of
from favorsharp._typing import Array
from favorsharp._values import map_arrays
from favorsharp.dispatch import OPS
from favorsharp.features import feature_map
from favorsharp.fitting import fit
from favorsharp.landmarks import landmarks as make_landmarks
from favorsharp.landmarks.attention import landmark_keys, landmark_stream, landmark_window  # noqa: F401  fills OPS
from favorsharp.landmarks.state import empty_landmarks
from favorsharp.moments import point_moments  # noqa: F401  fills OPS
from favorsharp.ops import (  # noqa: F401  fill OPS
    attention,
    causal_attention,
    exponential_features,
    kernel_matvec,
    landmarks,
    state,
    vjp,
    weighted_attention,
)
from favorsharp.ops.landmark_metric import Metric
from favorsharp.ops.state import State, empty_state


@dataclass(frozen=True)
class Case:
    """One call of an op: a name, and a function that makes the arguments.

    `make(to)` returns (args, kwargs) for the op. `to` turns a NumPy array into an array of the library and dtype under
    test; masks keep their dtype.

    Examples
    --------
    >>> import numpy as np
    >>> from favorsharp.testing import cases
    >>> case = cases("attention")[0]
    >>> case.name
    'plain, window 0'
    >>> (q, k, v, feature_map), options = case.make(np.asarray)
    >>> q.shape, v.shape, options
    ((37, 8), (37, 5), {})
    """

    name: str
    make: Callable[[Callable[[Any], Array]], tuple[tuple[Any, ...], dict[str, Any]]]


SHAPES = {
    "plain": ((), 37, 8, 5, 12),
    "tiles": ((2, 3), 300, 16, 16, 64),
    "multiples": ((1, 2), 128, 32, 32, 32),
    "one": ((2,), 1, 3, 1, 1),
    "none": ((2,), 0, 8, 5, 16),
    "primes": ((2,), 131, 7, 3, 13),
}
"""For each name: the leading axes, the number of points n, and the sizes d, e and m."""


def cases(op: str) -> tuple[Case, ...]:
    """The calls on which an implementation of an op is compared with its reference.

    Parameters
    ----------
    op : str
        The op's name.

    Returns
    -------
    tuple of Case

    Examples
    --------
    >>> from favorsharp.testing import cases
    >>> [case.name for case in cases("kernel_matvec")]
    ['plain', 'tiles', 'multiples', 'one', 'none', 'primes']
    """
    if op not in MAKERS:
        raise ValueError(f"op {op!r} has no cases; known: {', '.join(MAKERS)}")
    return tuple(MAKERS[op]())


def _problem(shape: str) -> tuple[Any, Any, Any]:
    batch, n, d, e, _ = SHAPES[shape]
    rng = np.random.default_rng(list(SHAPES).index(shape))
    # these values are exact in float16 and bfloat16, so that every dtype gets the same problem
    q, k = (np.round(16 * rng.standard_normal((*batch, n, d)) + 5) / 16 for _ in range(2))
    return q, k, np.round(16 * rng.standard_normal((*batch, n, e))) / 16


def _map(shape: str, to: Callable[[Any], Array]) -> Any:
    """A map for the problem, in the dtype of the computation.

    It is fitted in NumPy, so that all libraries get the same map.
    """
    like = to(np.zeros(1))
    wide = named_dtype(namespace_of(like), _wide_name(like))
    return map_arrays(_fitted(shape), lambda x: from_host(np.array(x), like, wide))


@cache
def _fitted(shape: str) -> Any:
    q, k, _ = _problem(shape)
    return feature_map(fit(q, k), SHAPES[shape][-1], rng=0)


def _mask(shape: tuple[int, ...]) -> Any:
    mask = np.random.default_rng(1).random(shape) > 0.3
    if mask.ndim > 1 and mask.shape[0] > 1:
        mask[0] = False  # then some rows see no key
    return mask


def _strided(host: Any) -> Any:
    """The same values in a strided, read-only array."""
    spread = np.zeros((*host.shape[:-1], 2 * host.shape[-1]))
    spread[..., ::2] = host
    view = spread[..., ::2]
    view.flags.writeable = False
    return view


def _exponential_features() -> Iterator[Case]:
    for shape in SHAPES:

        def make(to: Callable[[Any], Array], shape: str = shape) -> Any:
            batch, n, d, _, m = SHAPES[shape]
            rng = np.random.default_rng(0)
            sizes = ((*batch, n, d), (m, d), (*batch, n, 1), (1, m))
            return tuple(to(rng.integers(-8, 9, size) / 16) for size in sizes), {}  # exact in every dtype

        yield Case(shape, make)


def _attention(masked: bool, windows: tuple[int, ...]) -> Iterator[Case]:
    for shape, window, hidden in itertools.product(SHAPES, windows, (False, True) if masked else (False,)):

        def make(to: Callable[[Any], Array], shape: str = shape, window: int = window, hidden: bool = hidden) -> Any:
            q, k, v = _problem(shape)
            options: dict[str, Any] = {"window": window} if window else {}
            if hidden:
                options["key_mask"] = to(_mask(k.shape[:-1]))
            return (to(_strided(q)), to(k), to(_strided(v)), _map(shape, to)), options

        yield Case(f"{shape}, window {window}{', masked' if hidden else ''}", make)

    def grouped(to: Callable[[Any], Array]) -> Any:
        q, k, v = _problem("tiles")
        queries = np.stack([q, q + 0.25], axis=-3)
        return (to(queries), to(k[..., None, :, :]), to(v[..., None, :, :]), _map("tiles", to).expanded()), {}

    yield Case("grouped heads", grouped)


def _unequal() -> Iterator[Case]:
    def make(to: Callable[[Any], Array]) -> Any:
        q, k, v = _problem("primes")
        return (to(q[..., :40, :]), to(k), to(v), _map("primes", to)), {}

    yield Case("unequal lengths", make)


def _state(fm: Any, k: Array, v: Array, window: int) -> State:
    empty = empty_state(fm, tuple(k.shape[:-2]), k.shape[-1], v.shape[-1], window, k)
    return OPS["update"].reference(empty, k, v, fm)  # type: ignore[no-any-return]


def _update() -> Iterator[Case]:
    for shape, window in itertools.product(SHAPES, (0, 5)):

        def make(to: Callable[[Any], Array], shape: str = shape, window: int = window) -> Any:
            _, k, v = _problem(shape)
            fm, keys, values = _map(shape, to), to(k), to(v)
            return (_state(fm, keys, values, window), keys, values, fm), {"key_mask": to(_mask(k.shape[:-1]))}

        yield Case(f"{shape}, window {window}", make)


def _read() -> Iterator[Case]:
    for shape, window in itertools.product(SHAPES, (0, 5)):

        def make(to: Callable[[Any], Array], shape: str = shape, window: int = window) -> Any:
            q, k, v = _problem(shape)
            fm = _map(shape, to)
            return (_state(fm, to(k), to(v), window), to(q), fm), {}

        yield Case(f"{shape}, window {window}", make)


def _decode_step() -> Iterator[Case]:
    for shape, window in itertools.product(("plain", "tiles", "one"), (0, 5)):

        def make(to: Callable[[Any], Array], shape: str = shape, window: int = window) -> Any:
            q, k, v = _problem(shape)
            fm = _map(shape, to)
            token = tuple(to(x[..., :1, :]) for x in (q, k, v))
            return (*token, _state(fm, to(k), to(v), window), fm), {}

        yield Case(f"{shape}, window {window}", make)


def _kernel_matvec() -> Iterator[Case]:
    for shape in SHAPES:

        def make(to: Callable[[Any], Array], shape: str = shape) -> Any:
            q, k, v = _problem(shape)
            return (to(q / 2), to(k / 2), to(v), _map(shape, to)), {}

        yield Case(shape, make)


def _wide(host: Any, to: Callable[[Any], Array]) -> Array:
    """A NumPy array in the dtype of the computation, which is at least float32."""
    like = to(np.zeros(1))
    return from_host(np.array(host), like, named_dtype(namespace_of(like), _wide_name(like)))


def _wide_name(like: Array) -> str:
    return "float64" if dtype_name(like) == "float64" else "float32"


def _weights(shape: tuple[int, ...], masked: bool) -> Any:
    """Log weights, -inf for hidden keys."""
    weights = np.random.default_rng(2).integers(-32, 33, shape) / 16
    return np.where(_mask(shape), weights, -np.inf) if masked else weights


def _landmark_case(shape: str, masked: bool, to: Callable[[Any], Array]) -> tuple[Array, Array, Metric]:
    """Keys, their log weights, and a metric."""
    _, k, _ = _problem(shape)
    d = SHAPES[shape][2]
    center, direction = k.mean(axis=-2, keepdims=True) / 2, k[..., :1, :] / 8
    lift = np.random.default_rng(3).standard_normal((d, d)) / d
    weights = _wide(_weights(k.shape[:-1], masked), to)
    return to(_strided(k)), weights, Metric(*(_wide(x, to) for x in (center, lift, direction)))


def _of_keys() -> Iterator[tuple[str, str, bool]]:
    shapes = [shape for shape in SHAPES if SHAPES[shape][1] > 0]
    return itertools.product(shapes, ("softmax", "gaussian"), (False, True))


def _choose_landmarks() -> Iterator[Case]:
    for shape, kernel, masked in _of_keys():

        def make(to: Callable[[Any], Array], shape: str = shape, kernel: str = kernel, masked: bool = masked) -> Any:
            options = {"kernel": kernel, "scale": 0.5, "steps": 2, "seed": 0, "event": 7}
            return _landmark_case(shape, masked, to), options | {"num_landmarks": SHAPES[shape][-1]}

        yield Case(f"{shape}, {kernel}{', masked' if masked else ''}", make)


def _given_landmarks(shape: str, to: Callable[[Any], Array]) -> tuple[Array, Array]:
    """Landmarks, and which of them are used."""
    batch, _, d, _, m = SHAPES[shape]
    points, used = np.random.default_rng(4).standard_normal((*batch, m, d)), np.ones((*batch, 1, m), bool)
    used[..., 1::5] = False
    return _wide(points, to), to(used)


def _condense() -> Iterator[Case]:
    for shape, kernel, masked in _of_keys():

        def make(to: Callable[[Any], Array], shape: str = shape, kernel: str = kernel, masked: bool = masked) -> Any:
            k, weights, metric = _landmark_case(shape, masked, to)
            given = (k, weights, to(_strided(_problem(shape)[2])), *_given_landmarks(shape, to), metric)
            return given, {"kernel": kernel, "scale": 0.5, "conserving": masked}

        yield Case(f"{shape}, {kernel}{', masked, conserving' if masked else ''}", make)


def _landmark_window() -> Iterator[Case]:
    kinds = ("softmax", False, 1), ("softmax", True, 64), ("gaussian", True, 5)
    for shape, (kernel, masked, window) in itertools.product([s for s in SHAPES if SHAPES[s][1] > 0], kinds):

        def make(
            to: Callable[[Any], Array],
            shape: str = shape,
            kernel: str = kernel,
            masked: bool = masked,
            window: int = window,
        ) -> Any:
            q, _, v = _problem(shape)
            k, _, metric = _landmark_case(shape, masked, to)
            hidden = ~_mask(k.shape[:-1]) if masked else np.zeros(k.shape[:-1], bool)
            weights = _wide(np.where(hidden, -np.inf, 0.0), to)
            given = (to(_strided(q)), k, weights, to(_strided(v)), *_given_landmarks(shape, to), metric)
            return given, {"window": window, "kernel": kernel, "scale": 0.5}

        yield Case(f"{shape}, {kernel}, window {window}{', masked' if masked else ''}", make)


def _point_moments() -> Iterator[Case]:
    for shape, masked in itertools.product(SHAPES, (False, True)):

        def make(to: Callable[[Any], Array], shape: str = shape, masked: bool = masked) -> Any:
            x = np.array(_problem(shape)[0])
            if x.size:
                x[..., -1, 0] = np.nan
            return (to(_strided(x)), to(_mask(x.shape[:-1])) if masked else None), {}

        yield Case(f"{shape}{', masked' if masked else ''}", make)


def _weighted_attention() -> Iterator[Case]:
    for shape, kind in itertools.product(SHAPES, ("", ", masked", ", causal", ", few queries, causal")):

        def make(to: Callable[[Any], Array], shape: str = shape, kind: str = kind) -> Any:
            q, k, v = _problem(shape)
            options: dict[str, Any] = {"scale": 0.25}
            if "causal" in kind:
                q = q[..., k.shape[-2] // 2 :, :] if "few" in kind else q
                options["causal_from"] = k.shape[-2] - q.shape[-2]
            weights = _wide(_weights(k.shape[:-1], kind == ", masked"), to)
            return (to(_strided(q)), to(k), weights, to(_strided(v))), options

        yield Case(f"{shape}{kind}", make)


def _landmark_stream() -> Iterator[Case]:
    """Streams with no more different keys than landmarks, so that results do not depend on which seeds are drawn."""
    for shape, window, grouped in itertools.product(("plain", "one", "none", "primes"), (0, 5), (False, True)):

        def make(
            to: Callable[[Any], Array], shape: str = shape, window: int = window, grouped: bool = grouped
        ) -> Any:  # fmt: skip
            q, k, v = _problem(shape)
            m = SHAPES[shape][-1]
            k = k[..., np.arange(k.shape[-2]) % m, :]
            x = np.stack([q, q + 0.25], axis=-3) if grouped else q
            keys = to(_strided(k))
            empty = empty_landmarks(
                make_landmarks(m, room=3, scale=0.25), tuple(k.shape[:-2]), k.shape[-1], v.shape[-1], window, keys
            )
            return (to(x), keys, to(v), empty), {"key_mask": to(_mask(k.shape[:-1])), "grouped": grouped}

        yield Case(f"{shape}, window {window}{', grouped' if grouped else ''}", make)


def _landmark_keys() -> Iterator[Case]:
    """Calls with no more different keys than landmarks, as for streams."""
    for shape, masked, grouped in itertools.product(("plain", "one", "primes"), (False, True), (False, True)):

        def make(
            to: Callable[[Any], Array], shape: str = shape, masked: bool = masked, grouped: bool = grouped
        ) -> Any:  # fmt: skip
            q, k, v = _problem(shape)
            m = SHAPES[shape][-1]
            k = k[..., np.arange(k.shape[-2]) % m, :]
            x = np.stack([q, q + 0.25], axis=-3) if grouped else q
            mask = to(_mask(k.shape[:-1])) if masked else None
            return (to(x), to(_strided(k)), to(v), make_landmarks(m, scale=0.25)), {
                "key_mask": mask,
                "grouped": grouped,
            }

        yield Case(f"{shape}{', masked' if masked else ''}{', grouped' if grouped else ''}", make)


MAKERS: dict[str, Callable[[], Iterator[Case]]] = {
    "exponential_features": _exponential_features,
    "attention": lambda: itertools.chain(_attention(True, (0, 1, 5, 64)), _unequal()),
    "causal_attention": lambda: _attention(True, (0, 1, 5, 64)),
    "update": _update,
    "read": _read,
    "decode_step": _decode_step,
    "kernel_matvec": _kernel_matvec,
    "choose_landmarks": _choose_landmarks,
    "condense": _condense,
    "point_moments": _point_moments,
    "weighted_attention": _weighted_attention,
    "landmark_keys": _landmark_keys,
    "landmark_stream": _landmark_stream,
    "landmark_window": _landmark_window,
}


def gradient_cases(op: str) -> tuple[Case, ...]:
    """The calls of an op that returns a pullback."""
    return tuple(_GRADIENTS[op]())


def _attention_vjp() -> Iterator[Case]:
    for base in (*_attention(True, (0, 5)), *_unequal()):
        if base.name.startswith("tiles, window 5"):
            continue  # finite differences of the reference are slow
        for is_causal in (False, True):
            if is_causal and ("unequal" in base.name or "grouped" in base.name):
                continue

            def make(to: Callable[[Any], Array], base: Case = base, is_causal: bool = is_causal) -> Any:
                arguments, options = base.make(to)
                return arguments, {**options, "is_causal": is_causal}

            yield Case(f"{base.name}, causal" if is_causal else base.name, make)


_GRADIENTS: dict[str, Callable[[], Iterator[Case]]] = {
    "attention_vjp": _attention_vjp,
    "kernel_matvec_vjp": _kernel_matvec,
    "exponential_features_vjp": _exponential_features,
}
