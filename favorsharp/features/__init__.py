"""Feature maps: from parameters and random rows to features whose products estimate the kernel.

The public function `feature_map` is here; each family of maps has its own file.
"""

from collections.abc import Callable, Mapping
from typing import Any

from favorsharp._arrays import cast, from_host, is_array, library_of, namespace_of, under_own_settings
from favorsharp._checks import check_array, check_floats, check_integer
from favorsharp._typing import Array
from favorsharp.features.base import FeatureMap, PositiveFeatureMap
from favorsharp.features.dense_exponential import DenseExponentialMap
from favorsharp.features.discrete import DiscreteMap
from favorsharp.features.elementwise import ElementwiseMap
from favorsharp.features.nystrom import NystromMap
from favorsharp.features.trigonometric import TrigonometricMap
from favorsharp.methods import TAKES_PROPOSALS, method_of
from favorsharp.parameters import Parameters

__all__ = ["MAPS", "FeatureMap", "PositiveFeatureMap", "feature_map"]

MAPS = (DenseExponentialMap, TrigonometricMap, DiscreteMap, ElementwiseMap, NystromMap)
"""The classes of maps; each is a frozen dataclass of arrays, names and numbers."""


@under_own_settings
def feature_map(
    parameters: Parameters,
    num_features: int,
    *,
    draw: str | Array | tuple[Array, Array] = "orthogonal",
    rng: Any = None,
) -> FeatureMap:
    """Draw the random rows of a feature map.

    Parameters
    ----------
    parameters : Parameters
        The result of `fit`.
    num_features : int
        m, 1 or more; even for `trig`.
    draw : str, array, or pair of arrays
        `"iid"`, `"orthogonal"`, `"simplex"`, `"sobol"` (needs SciPy) or `"antithetic"`; or an (m, d) array of rows
        w ~ N(0, I). The dense-exponential methods also take a pair: rows W of shape (m, d) from any proposal nu, in the
        coordinates of u = g1 (x - center_x), and log(p(W) / nu(W)) of shape (m,), with p = N(0, I). Arrays must be
        NumPy's or of the parameters' library. Methods that make two features from each row (`hyperbolic`, `trig`) use
        the first ceil(m / 2) rows.
    rng : None, int, SeedSequence or numpy Generator
        The same seed gives the same rows on every library and device, up to the cast.

    Returns
    -------
    FeatureMap
        Positive maps have `log_query`, `log_key`, `query` and `key`; signed maps (`trig`, `poisson`, `geometric`) have
        `query` and `key`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k = np.random.default_rng(0).standard_normal((2, 64, 8))
    >>> feature_map = fs.feature_map(fs.fit(q, k), 128, rng=0)
    >>> feature_map.query(q).shape
    (64, 128)
    """
    if not isinstance(parameters, Parameters):
        raise TypeError(f"parameters must be favorsharp.Parameters (from fit), got {type(parameters).__name__}")
    m = check_integer("num_features", num_features, 1)
    method = method_of(parameters.method)
    if method.kind == "trigonometric" and m % 2:
        raise ValueError(
            f"num_features must be even for method {method.name!r}, whose features are cosine and sine pairs; got {m}"
        )
    if isinstance(draw, tuple):
        return _proposed(parameters, m, draw)
    num_rows = -(-m // 2) if method.paired else m
    if isinstance(draw, str):
        from favorsharp.draws import draw_rows  # imports NumPy, which `import favorsharp` must not load

        rows: Any = draw_rows(draw, num_rows, parameters.size, rng)
    elif is_array(draw):
        rows = _given("draw", draw, parameters, (m, parameters.size))[:num_rows, :]
    else:
        raise TypeError(
            "draw must be a name, an (m, d) array of rows or a pair (rows, log_weight) of arrays, "
            f"got {type(draw).__name__}"
        )
    return _MAPS[method.kind](parameters, m, rows)


def _dense_exponential(parameters: Parameters, m: int, rows: Any) -> FeatureMap:
    rows = _placed(rows, parameters)
    if method_of(parameters.method).paired:
        rows = namespace_of(rows).concat([rows, -rows[: m - rows.shape[0], :]], axis=0)
    return DenseExponentialMap.from_rows(parameters, m, rows)


def _trigonometric(parameters: Parameters, m: int, rows: Any) -> FeatureMap:
    return TrigonometricMap(parameters, m, _placed(rows, parameters))


def _elementwise(parameters: Parameters, m: int, rows: Any) -> FeatureMap:
    return ElementwiseMap.from_rows(parameters, m, _placed(rows, parameters))


_MAPS: Mapping[str, Callable[[Parameters, int, Any], FeatureMap]] = {
    "dense-exponential": _dense_exponential,
    "trigonometric": _trigonometric,
    "discrete": DiscreteMap.from_rows,
    "elementwise": _elementwise,
}
"""For each kind of method: from parameters, m and rows, as they were drawn or given, to the map."""


def _proposed(parameters: Parameters, m: int, draw: tuple[Any, ...]) -> FeatureMap:
    """A map whose rows the caller drew from a proposal of their own."""
    if not method_of(parameters.method).takes_proposals:
        raise ValueError(
            f"draw=(rows, log_weight) is for the dense-exponential methods ({' '.join(TAKES_PROPOSALS)}), "
            f"got method {parameters.method_name!r}"
        )
    if len(draw) != 2:
        raise ValueError(f"draw must be a pair (rows, log_weight), got {len(draw)} entries")
    rows = _given("draw[0] (rows)", draw[0], parameters, (m, parameters.size))
    log_weight = _given("draw[1] (log_weight)", draw[1], parameters, (m,))
    rows, log_weight = (_placed(x, parameters) for x in (rows, log_weight))
    return DenseExponentialMap(parameters, m, rows, rows, log_weight[..., None, :])


def _given(name: str, x: Any, parameters: Parameters, shape: tuple[int, ...]) -> Array:
    """Check an array of the caller: its shape, a floating dtype, and NumPy or the parameters' library."""
    check_array(name, x)
    if library_of(x) == "numpy":
        check_floats(**{name: x})
    else:
        check_floats(**{name: x, "parameters": parameters.g1})
    if tuple(x.shape) != shape:
        letters = "(m, d)" if len(shape) == 2 else "(m,)"
        raise ValueError(f"{name} has shape {tuple(x.shape)}; accepted: {letters} = {shape}")
    return x


def _placed(x: Array, parameters: Parameters) -> Array:
    like = parameters.g1
    return from_host(x.copy(), like=like) if library_of(x) == "numpy" else cast(x, like.dtype)
