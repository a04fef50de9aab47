"""The base classes of all feature maps."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Self

from favorsharp._arrays import (
    broadcast_shapes,
    cast,
    compute_dtype,
    is_array,
    library_of,
    namespace_of,
    to_host,
    under_own_settings,
)
from favorsharp._autodiff import is_traced
from favorsharp._checks import check_out
from favorsharp._typing import Array
from favorsharp._values import astype, map_arrays
from favorsharp.parameters import Parameters, check_data, log_kernel_of

_TILE = 256
"""Points whose signed features are computed at a time, for NumPy arrays."""


@dataclass(frozen=True, eq=False, repr=False)
class FeatureMap:
    """Features of queries and keys, drawn once: the mean of query(x) @ key(y).T over draws is K(x, y).

    Attributes
    ----------
    parameters : Parameters
    num_features : int
        m.
    projection : array, shape (m, d)
        The random rows w. They are Gaussian, of shape (m, d), for most methods; (m / 2, d) for `trig`; integer counts
        of shape (*b, m, d) for `poisson` and `geometric`.
    positive : bool
        Whether all features are non-negative; attention takes only such maps.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k = np.random.default_rng(0).standard_normal((2, 64, 4))
    >>> feature_map = fs.feature_map(fs.fit(q, k), 4096, rng=0)
    >>> exact = fs.kernel_matrix(q, k)
    >>> estimate = feature_map.query(q) @ feature_map.key(k).T
    >>> bool(np.median(abs(estimate / exact - 1)) < 0.1)
    True
    """

    parameters: Parameters
    num_features: int
    projection: Array

    positive: ClassVar[bool] = False
    family: ClassVar[str] = "signed"
    """The kind of computation: "exponential", "elementwise" or "signed"; kernels accelerate the first."""

    @under_own_settings
    def query(self, x: Array, /, *, out: Array | None = None) -> Array:
        """Features of queries, (*b, n, d) -> (*b, n, m), in the dtype of x; written to `out` if that is given."""
        raise NotImplementedError

    @under_own_settings
    def key(self, y: Array, /, *, out: Array | None = None) -> Array:
        """Features of keys, (*b, s, d) -> (*b, s, m), in the dtype of y; written to `out` if that is given."""
        raise NotImplementedError

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes of the map's own arrays: () for one map that serves every head."""
        arrays = [self.parameters.g1, self.parameters.center_x, self.projection]
        return broadcast_shapes(*(x.shape[:-2] for x in arrays))

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Every array in the map."""
        return tuple(x for _, x in self._entries() if is_array(x))

    known_fingerprint: ClassVar[str | None] = None
    """The cached fingerprint; None until it is first computed."""

    @property
    def fingerprint(self) -> str | None:
        """A digest of all numbers in the map, by which a state recognises the map that made it.

        Traced numbers cannot be read: then it is the digest that was computed before tracing, or None.
        """
        if self.known_fingerprint is None:
            entries = self._entries()
            if not any(is_array(x) and is_traced(x) for _, x in entries):
                object.__setattr__(self, "known_fingerprint", _digest(entries))
        return self.known_fingerprint

    def _entries(self) -> list[tuple[str, Any]]:
        """The fields of the parameters and of the map, with their names."""
        values = (self.parameters, self)
        return [(field.name, getattr(value, field.name)) for value in values for field in fields(value)]

    def expanded(self) -> Self:
        """The same map with an axis of length 1 before the last two of its batched arrays.

        With it, points of shape (*b, groups, n, d) use the map of their leading index in *b.
        """
        value: Self = map_arrays(self, lambda x: x[..., None, :, :] if x.ndim > 2 else x)
        return value

    def __repr__(self) -> str:
        p = self.parameters
        return (
            f"{type(self).__name__}(method={p.method_name!r}, kernel={p.kernel!r}, scale={p.scale:g}, "
            f"num_features={self.num_features}, d={p.size}, batch={self.batch_shape})"
        )

    def _prepared(self, name: str, x: Array) -> tuple[Any, Array]:
        """The map and x in the dtype to compute in."""
        dtype = compute_dtype(check_data(self.parameters, **{name: x}), x)
        return astype(self, dtype), cast(x, dtype)

    def _check_out(self, name: str, x: Array, out: Array | None) -> None:
        """Check the array for the features of x, if there is one."""
        if out is not None:
            check_data(self.parameters, **{name: x})
            batch = broadcast_shapes(x.shape[:-2], self.batch_shape)
            check_out(out, x, (*batch, x.shape[-2], self.num_features), x.dtype)


def written(result: Array, out: Array | None) -> Array:
    """The result itself; or `out`, if that is given, after the result was written to it."""
    if out is None:
        return result
    out[...] = result
    return out


def _digest(entries: list[tuple[str, Any]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, entry in entries:
        if is_array(entry):
            digest.update(f"{name}{tuple(entry.shape)}".encode())
            digest.update(to_host(entry).tobytes())
        elif not isinstance(entry, Parameters):
            label = entry if isinstance(entry, str | int | float) else getattr(entry, "__qualname__", "")
            digest.update(f"{name}={label}".encode())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False, repr=False)
class PositiveFeatureMap(FeatureMap):
    """A feature map whose features are non-negative, so that it can give their logarithms.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k = np.random.default_rng(0).standard_normal((2, 64, 4))
    >>> feature_map = fs.feature_map(fs.fit(q, k), 32, rng=0)
    >>> np.allclose(np.exp(feature_map.log_query(q)), feature_map.query(q))
    True
    """

    positive: ClassVar[bool] = True
    family: ClassVar[str] = "elementwise"

    @under_own_settings
    def log_query(self, x: Array, /, *, out: Array | None = None) -> Array:
        """Logarithms of query features, 1/sqrt(m) included.

        Parameters
        ----------
        x : array, shape (*b, n, d)
            Queries, not scaled.
        out : array, shape (*b, n, m), optional
            The array to write the result to, in the dtype of x; it is also returned. It saves the first access to new
            memory, which takes longer than the computation if the result is large.

        Returns
        -------
        array, shape (*b, n, m)
            In the dtype of x; computed in float32 at least.
        """
        return self._features("x", x, "query", True, out)

    @under_own_settings
    def log_key(self, y: Array, /, *, out: Array | None = None) -> Array:
        """Logarithms of key features, 1/sqrt(m) included, (*b, s, d) -> (*b, s, m), as `log_query`."""
        return self._features("y", y, "key", True, out)

    @under_own_settings
    def query(self, x: Array, /, *, out: Array | None = None) -> Array:
        """Features of queries, exp(log_query(x)), in the dtype of x; written to `out` if that is given."""
        return self._features("x", x, "query", False, out)

    @under_own_settings
    def key(self, y: Array, /, *, out: Array | None = None) -> Array:
        """Features of keys, exp(log_key(y)), in the dtype of y; written to `out` if that is given."""
        return self._features("y", y, "key", False, out)

    @under_own_settings
    def log_kernel(self, x: Array, y: Array) -> Array:
        """The exact log kernel that the features stand for, (*b, n, d), (*b, s, d) -> (*b, n, s)."""
        return log_kernel_of(self.parameters, x, y)

    def log_features(self, side: str, x: Array) -> Array:
        """Logarithms of features, computed by functions of the arrays' library alone, as references of ops must.

        `side` is "query" or "key". The result has the dtype of x.
        """
        prepared, wide = self._prepared(side, x)
        return cast(prepared._log_features(side, wide), x.dtype)

    def _features(self, name: str, x: Array, side: str, logarithms: bool, out: Array | None) -> Array:
        """Features of one side or their logarithms, written to `out` if that is given."""
        self._check_out(name, x, out)
        prepared, wide = self._prepared(name, x)
        result = prepared._log_features(side, wide)
        return written(cast(result if logarithms else namespace_of(wide).exp(result), x.dtype), out)

    def _log_features(self, side: str, x: Array) -> Array:
        """Logarithms of features of points in the dtype of the map; `side` is "query" or "key"."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, repr=False)
class SignedFeatureMap(FeatureMap):
    """A feature map with features of both signs; the features of a point share an exponential factor."""

    def query_parts(self, x: Array) -> tuple[Array, Array]:
        """Features of queries without their common factor, and its logarithm, (*b, n, m) and (*b, n, 1)."""
        raise NotImplementedError

    def key_parts(self, y: Array) -> tuple[Array, Array]:
        """Features of keys without their common factor, and its logarithm, (*b, s, m) and (*b, s, 1)."""
        return self.query_parts(y)

    @under_own_settings
    def query(self, x: Array, /, *, out: Array | None = None) -> Array:
        """Features of queries, (*b, n, d) -> (*b, n, m), in the dtype of x; written to `out` if that is given."""
        return self._features("x", x, "query_parts", out)

    @under_own_settings
    def key(self, y: Array, /, *, out: Array | None = None) -> Array:
        """Features of keys, (*b, s, d) -> (*b, s, m), in the dtype of y; written to `out` if that is given."""
        return self._features("y", y, "key_parts", out)

    def _features(self, name: str, x: Array, parts: str, out: Array | None) -> Array:
        """Features of one side, with their common factor, written to `out` if that is given."""
        self._check_out(name, x, out)
        prepared, wide = self._prepared(name, x)

        def of(points: Array) -> Array:
            features, log_factor = getattr(prepared, parts)(points)
            return cast(features * namespace_of(points).exp(log_factor), x.dtype)

        return self._by_tiles(of, wide, x, out) if library_of(x) == "numpy" else written(of(wide), out)

    def _by_tiles(self, features: Callable[[Array], Array], points: Array, x: Array, out: Array | None) -> Array:
        """Features of points, computed in tiles that stay in the cache; for NumPy arrays.

        `points` is x in the dtype to compute in. The result is `out`, or a new array in the dtype of x.
        """
        xp = namespace_of(x)
        if out is None:
            batch = broadcast_shapes(x.shape[:-2], self.batch_shape)
            out = xp.empty((*batch, x.shape[-2], self.num_features), dtype=x.dtype)
        elif xp.may_share_memory(out, points):
            points = xp.asarray(points, copy=True)
        for start in range(0, x.shape[-2], _TILE):
            out[..., start : start + _TILE, :] = features(points[..., start : start + _TILE, :])
        return out
