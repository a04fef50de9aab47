"""The gradients of a map's arrays, computed from sums over points that the backward kernels of the backends make.

Log features depend on a map through few numbers. With points z = sqrt(scale) x - center, a side's log features are

    z (W g)^T + log_weight / 2 + f,    f = other.z + own.other / 2 - |g z|^2 / 2                             (softmax)
                                       f = gap.z - |gap|^2 / 4 - |g z|^2 / 2 - |z|^2 / 2, gap = other - own  (gaussian)

so the gradients of W, log_weight, g and both centers follow from five sums for each side, whatever the number of
points.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from favorsharp._arrays import namespace_of
from favorsharp._typing import Array

MAP_ARRAYS = ("rows", "log_weight", "g1", "g2", "center_x", "center_y")
"""The arrays that the features of a dense-exponential map depend on, in the order of `map_gradients`."""


def arrays_of(feature_map: Any) -> list[Array]:
    """The arrays of a map that its features depend on (`MAP_ARRAYS`)."""
    p = feature_map.parameters
    return [feature_map.rows, feature_map.log_weight, p.g1, p.g2, p.center_x, p.center_y]


def with_arrays(
    feature_map: Any, rows: Array, log_weight: Array, g1: Array, g2: Array, center_x: Array, center_y: Array
) -> Any:
    """The map with other arrays in place of its own."""
    parameters = replace(feature_map.parameters, g1=g1, g2=g2, center_x=center_x, center_y=center_y)
    return replace(feature_map, parameters=parameters, rows=rows, log_weight=log_weight)


def map_gradients(feature_map: Any, sums: Mapping[str, Array]) -> tuple[Array, ...]:
    """The gradients of rows, log_weight, g1, g2, center_x and center_y of a dense-exponential map.

    Parameters
    ----------
    feature_map : DenseExponentialMap
        A map whose arrays have the dtype of the sums.
    sums : mapping of str to array
        Five sums over points for each side, "query" and "key". Of the gradients of the log features: `*_points`
        (*b, m, d), the sum of gradient times point, and `*_column` (*b, 1, m), the sum of gradients. Of the gradients
        of f: `*_factor` (*b, 1, 1), their sum, `*_factor_points` (*b, 1, d), that of gradient times point, and
        `*_factor_products` (*b, d, d), that of gradient times the outer product of the point with itself.

    Returns
    -------
    tuple of arrays
        Each in the shape of the array that it belongs to.
    """
    xp = namespace_of(*sums.values())
    p = feature_map.parameters
    rows, half = feature_map.rows, 0.5
    of_rows: Any = 0.0
    of_weight: Any = 0.0
    of_g, of_centers = [], [0.0, 0.0]
    sides = (("query", p.g1, p.center_x, p.center_y), ("key", p.g2, p.center_y, p.center_x))
    for index, (side, g, own, other) in enumerate(sides):
        points, column = sums[f"{side}_points"], sums[f"{side}_column"]
        factor, first, second = (sums[f"{side}_{name}"] for name in ("factor", "factor_points", "factor_products"))
        of_rows = of_rows + points @ xp.matrix_transpose(g)
        of_weight = of_weight + half * column
        of_g.append(xp.matrix_transpose(rows) @ points - g @ second)
        of_own = (first @ xp.matrix_transpose(g)) @ g - (column @ rows) @ g  # the points move when their center does
        if p.kernel == "gaussian":
            of_own, of_other = of_own - half * factor * (other - own), first - half * factor * (other - own)
        else:
            of_own, of_other = of_own - half * factor * other, first + half * factor * own
        of_centers[index] = of_centers[index] + of_own
        of_centers[1 - index] = of_centers[1 - index] + of_other
    found = (of_rows, of_weight, *of_g, *of_centers)
    return tuple(summed_to(x, tuple(like.shape)) for x, like in zip(found, arrays_of(feature_map), strict=True))


def summed_to(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sum a gradient over the axes along which an array of the given shape was broadcast."""
    xp = namespace_of(gradient)
    lead = gradient.ndim - len(shape)
    axes = tuple(i for i in range(gradient.ndim) if i < lead or (shape[i - lead] == 1 and gradient.shape[i] != 1))
    return xp.reshape(xp.sum(gradient, axis=axes), shape) if axes else gradient
