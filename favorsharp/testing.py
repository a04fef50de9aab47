"""Checks for authors of backends: test cases for each op, and the comparison of a backend with the references.

The tests of the bundled backends use the same cases.
"""

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from favorsharp._arrays import dtype_name, from_host, named_dtype, namespace_of, to_host
from favorsharp._typing import Array
from favorsharp._values import map_arrays
from favorsharp.dispatch import OPS, Backend, Kernel, backends, request_of, use, watch
from favorsharp.features import feature_map
from favorsharp.fitting import fit
from favorsharp.ops import attention, causal_attention, exponential_features, kernel_matvec, state  # noqa: F401  fill OPS
from favorsharp.ops.state import State, empty_state

__all__ = ["Case", "Row", "cases", "check_backend", "make_array"]

TOLERANCES = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 2e-5, "float64": 1e-10}
"""Largest error allowed for each dtype, relative to the largest entry of the float64 reference."""


@dataclass(frozen=True)
class Case:
    """One call of an op: a name, and a function that makes the arguments.

    `make(to)` returns (args, kwargs). `to` turns a NumPy array into an array of the library and dtype under test; masks
    keep their dtype.

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


@dataclass(frozen=True)
class Row:
    """One comparison: the op, the case, the library and dtype, what ran, and its largest relative error.

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
    if op not in _MAKERS:
        raise ValueError(f"op {op!r} has no cases; known: {', '.join(_MAKERS)}")
    return tuple(_MAKERS[op]())


def check_backend(
    backend: str | Backend, *, ops: Iterable[str] | None = None, libraries: Iterable[str] | None = None
) -> list[Row]:
    """Compare every kernel of a backend with the references, which run in float64.

    Each case runs under `use(backend)`; it is also checked that the backend's own implementation ran. The ops that
    return functions (`attention_vjp`, `kernel_matvec_vjp`, `exponential_features_vjp`) have no cases.

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
    cases_of, want = cache(cases), cache(wanted)  # the same for every library and dtype
    for kernel in known[name].kernels:
        if kernel.op not in _MAKERS or (ops is not None and kernel.op not in tuple(ops)):
            continue
        for library, dtype in itertools.product(sorted(kernel.libraries), sorted(kernel.dtypes)):
            if libraries is not None and library not in tuple(libraries):
                continue
            make = make_array(library, dtype)
            if make is not None:
                for case in cases_of(kernel.op):
                    rows += _compare(name, kernel, case, library, dtype, make, want)
    if not rows:
        raise ValueError(f"backend {name!r}: nothing to compare for ops={ops!r}, libraries={libraries!r}")
    return rows


def make_array(library: str, dtype: str) -> Callable[[Any], Array] | None:
    """A function that turns NumPy arrays into arrays of a library; None if it is not installed or lacks the dtype.

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
    """The largest deviation, relative to the largest entry of `want`; for tuples and states, over all arrays."""
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
    args, kwargs = case.make(
        lambda host: np.asarray(host) if np.asarray(host).dtype == bool else np.asarray(host, float)
    )
    return OPS[op].reference(*args, **kwargs)


def _compare(
    name: str,
    kernel: Kernel,
    case: Case,
    library: str,
    dtype: str,
    make: Callable[[Any], Array],
    want: Callable[[str, Case], Any],
) -> Iterator[Row]:
    args, kwargs = case.make(make)
    if kernel.why_not(request_of(kernel.op, *args, *kwargs.values())) is not None:
        return  # another device, or a family that the kernel does not declare
    with use(name), watch() as calls:
        got = OPS[kernel.op](*args, **kwargs)
    place = f"{kernel.op}, case {case.name!r}, {library} {dtype}"
    if not calls or calls[0] != (kernel.op, name):
        raise AssertionError(f"{place}: {calls[:1]} ran instead of {name!r}")
    try:
        error = relative_error(got, want(kernel.op, case))
    except AssertionError as wrong:
        raise AssertionError(f"{place}: {wrong}") from None
    if not error <= TOLERANCES[dtype]:
        raise AssertionError(f"{place}: error {error:.2g} is above {TOLERANCES[dtype]:.2g}")
    yield Row(kernel.op, case.name, library, dtype, name, error)


def _arrays_of(result: Any) -> list[Array]:
    if isinstance(result, tuple):
        return [array for part in result for array in _arrays_of(part)]
    if isinstance(result, State):
        return [result.kv, result.z, result.c, result.recent_k, result.recent_v]
    return [result]


def _problem(shape: str) -> tuple[Any, Any, Any]:
    batch, n, d, e, _ = SHAPES[shape]
    rng = np.random.default_rng(list(SHAPES).index(shape))
    # these values are exact in float16 and bfloat16, so that every dtype gets the same problem
    q, k = (np.round(16 * rng.standard_normal((*batch, n, d)) + 5) / 16 for _ in range(2))
    return q, k, np.round(16 * rng.standard_normal((*batch, n, e))) / 16


def _map(shape: str, to: Callable[[Any], Array]) -> Any:
    """A map for the problem, in the dtype to compute in; fitted on the host, so that all libraries get the same map."""
    like = to(np.zeros(1))
    wide = named_dtype(namespace_of(like), "float64" if dtype_name(like) == "float64" else "float32")
    return map_arrays(_fitted(shape), lambda x: from_host(np.array(x), like, wide))


@cache
def _fitted(shape: str) -> Any:
    q, k, _ = _problem(shape)
    return feature_map(fit(q, k), SHAPES[shape][-1], rng=0)


def _mask(shape: tuple[int, ...]) -> Any:
    mask = np.random.default_rng(1).random(shape) > 0.3
    if mask.ndim > 1 and mask.shape[0] > 1:
        mask[0] = False  # rows that see nothing
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


_MAKERS: dict[str, Callable[[], Iterator[Case]]] = {
    "exponential_features": _exponential_features,
    "attention": lambda: itertools.chain(_attention(True, (0, 1, 5, 64)), _unequal()),
    "causal_attention": lambda: _attention(True, (0, 1, 5, 64)),
    "update": _update,
    "read": _read,
    "decode_step": _decode_step,
    "kernel_matvec": _kernel_matvec,
}
