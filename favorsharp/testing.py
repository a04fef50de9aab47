"""Checks for authors of backends: test cases for each op, and the comparison of a backend with the references.

The tests of the bundled backends use the same cases.
"""

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from favorsharp._arrays import dtype_name, from_host, namespace_of, to_host
from favorsharp._cases import MAKERS, Case, cases, gradient_cases
from favorsharp._typing import Array
from favorsharp.dispatch import OPS, Backend, Implementation, Kernel, backends, request_of, use, watch
from favorsharp.landmarks.state import LandmarkState
from favorsharp.ops.attention import attention
from favorsharp.ops.causal_attention import causal_attention
from favorsharp.ops.exponential_features import exponential_features
from favorsharp.ops.kernel_matvec import kernel_matvec
from favorsharp.ops.state import State

__all__ = ["Case", "Row", "cases", "check_backend", "make_array"]

TOLERANCES = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 2e-5, "float64": 1e-10}
"""Largest error allowed for each dtype, relative to the largest entry of the float64 reference."""


MOST_POINTS = 200
"""Cases with more queries are compared once: not with `out`, nor as packed sequences."""


@dataclass(frozen=True)
class Row:
    """One comparison: the op, the case, the library and dtype, the implementation, and its largest relative error.

    Examples
    --------
    >>> from favorsharp.testing import Row
    >>> Row("read", "one, window 0", "numpy", "float32", "mine", 1e-7).error < 2e-5
    True
    """

    op: str
    case: str
    library: str
    dtype: str
    implementation: str
    error: float


def check_backend(
    backend: str | Backend, *, ops: Iterable[str] | None = None, libraries: Iterable[str] | None = None
) -> list[Row]:
    """Compare every kernel of a backend with the references, which run in float64.

    Each case runs under `use(backend)`, and the check fails if another implementation is chosen. If a kernel declares
    `packed`, `plan` or `takes_out`, these are compared too. Gradients are compared with finite differences of the
    reference.

    Parameters
    ----------
    backend : str or Backend
        An installed backend.
    ops, libraries : iterable of str, optional
        Restrict the check. By default it covers all ops of the backend on all libraries that the backend declares and
        that are installed.

    Returns
    -------
    list of Row
        One row for each comparison.

    Raises
    ------
    AssertionError
        If a result is wrong (the message names op, case and error), or if another implementation ran.
    ValueError
        If the backend is unknown or cannot be used here, or if there is nothing to compare.

    Examples
    --------
    >>> from favorsharp.testing import check_backend
    >>> rows = check_backend("numba", ops=["read"], libraries=["numpy"])  # doctest: +SKIP
    >>> max(row.error for row in rows) < 3e-2  # doctest: +SKIP
    True
    """
    name = backend if isinstance(backend, str) else backend.name
    known = backends()
    if name not in known:
        raise ValueError(f"backend {name!r} is unknown; known: {', '.join(known)}")
    fault = known[name].why_not()
    if fault is not None:
        raise ValueError(f"backend {name!r} cannot be used here: {fault}")
    rows: list[Row] = []
    for kernel in known[name].kernels:
        if ops is not None and kernel.op not in tuple(ops):
            continue
        for library, dtype in itertools.product(sorted(kernel.libraries), sorted(kernel.dtypes)):
            make = None if libraries is not None and library not in tuple(libraries) else make_array(library, dtype)
            if make is not None:
                rows += _rows(name, kernel, library, dtype, make)
    if not rows:
        raise ValueError(f"backend {name!r}: nothing to compare for ops={ops!r}, libraries={libraries!r}")
    return rows


def make_array(library: str, dtype: str) -> Callable[[Any], Array] | None:
    """A function that turns NumPy arrays into arrays of a library; None if it is not installed or lacks the dtype.

    Parameters
    ----------
    library, dtype : str
        Such as "torch" and "float32".

    Returns
    -------
    callable or None

    Examples
    --------
    >>> from favorsharp.testing import make_array
    >>> make_array("numpy", "float32")([1, 2]).dtype
    dtype('float32')
    >>> make_array("numpy", "bfloat16") is None
    True
    """
    try:
        namespace = importlib.import_module({"jax": "jax.numpy"}.get(library, library))
        target = getattr(namespace, dtype)
        namespace.asarray(np.zeros(1), dtype=target)
    except (ImportError, AttributeError, RuntimeError):  # RuntimeError: CuPy without a GPU
        return None
    if library == "jax" and dtype == "float64" and dtype_name(namespace.zeros(1)) != "float64":
        return None  # JAX would warn and give float32

    def make(host: Any) -> Array:
        host = np.array(host)
        return namespace.asarray(host) if host.dtype == bool else namespace.asarray(host, dtype=target)

    return make


def relative_error(got: Any, want: Any) -> float:
    """The largest deviation from `want`, relative to its largest entry; for tuples and states, over all arrays."""
    errors = []
    for a, b in zip(_arrays_of(got), _arrays_of(want), strict=True):
        left, right = np.asarray(to_host(a), dtype=np.float64), np.asarray(to_host(b), dtype=np.float64)
        if left.shape != right.shape:
            raise AssertionError(f"shape {left.shape} instead of {right.shape}")
        if left.size:
            differ = left != right  # equal infinities, such as the -inf of an empty state, do not differ
            size = np.max(np.abs(right[np.isfinite(right)]), initial=1e-30)
            errors.append(float(np.max(np.abs(left[differ] - right[differ]), initial=0.0) / size))
    return max(errors, default=0.0)


def wanted(op: str, case: Case) -> Any:
    """The result of the op's reference in float64 NumPy."""
    args, kwargs = case.make(_wide)
    return OPS[op].reference(*args, **kwargs)


@cache
def _results(op: str) -> list[tuple[Case, Any]]:
    """The cases of an op and their results, which are the same for every library and dtype."""
    return [(case, wanted(op, case)) for case in cases(op)]


def _rows(name: str, kernel: Kernel, library: str, dtype: str, make: Callable[[Any], Array]) -> Iterator[Row]:
    """Compare everything that a kernel offers, on all cases, for one library and dtype."""
    if kernel.op in MAKERS:
        compared = ((case, partial(_forward, kernel.op, case=case, want=want)) for case, want in _results(kernel.op))
    else:
        compared = ((case, partial(_backward, kernel.op, case=case)) for case in gradient_cases(kernel.op))
    for case, compare in compared:
        arguments, options = case.make(make)
        if kernel.why_not(request_of(kernel.op, *arguments, *options.values())) is not None:
            continue  # the kernel declares another device, or does not declare the family
        with use(name), watch() as calls:
            chosen = OPS[kernel.op].implementation(*arguments, **options)
        place = f"{kernel.op}, case {case.name!r}, {library} {dtype}"
        if calls[:1] != [(kernel.op, name)]:
            raise AssertionError(f"{place}: {calls[:1]} ran instead of {name!r}")
        for part, got, want in compare(chosen, arguments, options):
            limit = max(TOLERANCES[dtype], _DIFFERENCES if part == _GRADIENTS else 0.0)
            error = _error(f"{place}{part}", got, want)
            if not error <= limit:
                raise AssertionError(f"{place}{part}: error {error:.2g} is above {limit:.2g}")
            yield Row(kernel.op, f"{case.name}{part}", library, dtype, name, error)


def _error(place: str, got: Any, want: Any) -> float:
    try:
        return relative_error(got, want)
    except AssertionError as wrong:
        raise AssertionError(f"{place}: {wrong}") from None


_GRADIENTS = " (gradients)"
_DIFFERENCES = 1e-8
"""Largest error allowed for gradients in float64: finite differences of the reference are not more accurate."""

_Compared = Iterator[tuple[str, Any, Any]]
"""For each comparison: what is added to the name of the case, the result, and the result that is wanted."""


def _forward(op: str, chosen: Implementation, arguments: Any, options: Any, *, case: Case, want: Any) -> _Compared:
    """The result of an op: as returned, as written to `out`, of packed sequences, and of a plan for one token."""
    result = chosen.run(*arguments, **options)
    yield "", result, want
    whole = result[0] if isinstance(result, tuple) else result
    if chosen.takes_out and whole.shape[-2] <= MOST_POINTS:
        place = namespace_of(whole).empty_like(whole)
        again = chosen.run(*arguments, **options, out=place)
        again = again[0] if isinstance(again, tuple) else again
        yield " (out)", again, want[0] if isinstance(want, tuple) else want
    if chosen.packed is not None and MOST_POINTS >= arguments[0].shape[-2] == arguments[1].shape[-2] > 0:
        bounds = _bounds(arguments[0].shape[-2])
        yield " (packed)", chosen.packed(*arguments, bounds, **options), _of_pieces(op, case, bounds)
    planned = None if chosen.plan is None else chosen.plan(*arguments, **options)
    if planned is not None:
        yield " (plan)", planned(*arguments, **options), want


def _bounds(n: int) -> list[int]:
    """Bounds of packed sequences: an empty one, and lengths that differ."""
    return [0, n // 3, n // 3, n // 2, n]


def _of_pieces(op: str, case: Case, bounds: list[int]) -> Any:
    """The results of the op's reference for each packed sequence alone, in float64 NumPy, joined."""
    (q, k, v, own_map), options = case.make(_wide)
    mask = options.pop("key_mask", None)
    pieces = []
    for a, b in itertools.pairwise(bounds):
        masked = {} if mask is None else {"key_mask": mask[..., a:b]}
        piece = OPS[op].reference(q[..., a:b, :], k[..., a:b, :], v[..., a:b, :], own_map, **options, **masked)
        pieces.append(piece[0] if isinstance(piece, tuple) else piece)
    return np.concatenate(pieces, axis=-2)


def _wide(host: Any) -> Any:
    """A NumPy array in float64; masks keep their dtype."""
    host = np.asarray(host)
    return host if host.dtype == bool else host.astype(np.float64)


@dataclass(frozen=True)
class _Slopes:
    """The derivatives that gradients are compared with, along one random direction for each array argument."""

    want: Any
    weight: Any
    directions: list[Any]
    differences: Any


@cache
def _slopes(op: str, name: str) -> _Slopes:
    """The derivatives of the case of that name, by finite differences; they serve every library and dtype."""
    case = next(case for case in gradient_cases(op) if case.name == name)
    wide, options = case.make(_wide)
    reference = _REFERENCES[op]
    want = reference(*wide, **options)
    rng = np.random.default_rng(0)
    weight = rng.integers(-16, 17, want.shape) / 16  # exact in every dtype
    directions, differences = [], []
    for place in [i for i, x in enumerate(wide) if isinstance(x, np.ndarray)]:
        direction = rng.standard_normal(wide[place].shape)
        direction = direction / max(1.0, np.linalg.norm(direction))

        def along(t: float, place: int = place, direction: Any = direction) -> Any:
            moved = (*wide[:place], wide[place] + t * direction, *wide[place + 1 :])
            return np.sum(weight * reference(*moved, **options))

        directions.append(direction)
        differences.append((8 * (along(1e-3) - along(-1e-3)) - (along(2e-3) - along(-2e-3))) / 12e-3)
    return _Slopes(want, weight, directions, np.array(differences))


def _backward(op: str, chosen: Implementation, arguments: Any, options: Any, *, case: Case) -> _Compared:
    """The result of an op that returns a pullback, and the gradients along random directions."""
    result, pullback = chosen.run(*arguments, **options)
    wanted = _slopes(op, case.name)
    yield "", result, wanted.want
    gradients = pullback(from_host(wanted.weight, like=result))
    found = [
        np.sum(direction * np.asarray(to_host(gradient), dtype=np.float64))
        for direction, gradient in zip(wanted.directions, gradients, strict=True)
    ]
    yield _GRADIENTS, np.array(found), wanted.differences


def _attention(q: Any, k: Any, v: Any, own_map: Any, *, is_causal: bool, **options: Any) -> Any:
    if is_causal:
        return causal_attention.reference(q, k, v, own_map, **options)[0]
    return attention.reference(q, k, v, own_map, **options)


_REFERENCES: dict[str, Callable[..., Any]] = {
    "attention_vjp": _attention,
    "kernel_matvec_vjp": kernel_matvec.reference,
    "exponential_features_vjp": exponential_features.reference,
}
"""What the ops that return a pullback differentiate."""


def _arrays_of(result: Any) -> list[Array]:
    if isinstance(result, tuple):
        return [array for part in result for array in _arrays_of(part)]
    if isinstance(result, LandmarkState):  # the order of these keys depends on the draw
        seen = result.moments
        return [seen.mean_x, seen.covariance_x, seen.mean_y, seen.covariance_y]
    if isinstance(result, State):
        return [result.kv, result.z, result.c, result.recent_k, result.recent_v, result.recent_mask]
    return [result]
