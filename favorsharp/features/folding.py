"""A dense-exponential map as few numbers a side, on the host: what kernels pack into their own layouts.

With z = root x - center, the log features of a point x are

    z rows^T + column + f(z),    f(z) = offset + linear.z - beta |z|^2 - |z dense|^2

so that g, both centers and the scale have gone into the constants, in float64.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from favorsharp._arrays import to_host

__all__ = ["FoldedSide", "fold"]


@dataclass(frozen=True, eq=False)
class FoldedSide:
    """The constants of queries or of keys; the first axis counts the maps of a batch.

    Attributes
    ----------
    root : float
        Of the scale.
    center, linear, near_center : array, shape (count, d)
        `near_center` is what exact scores are centred by: z.z' of both sides, less half their squares for the Gaussian
        kernel.
    offset, beta : array, shape (count,)
    column : array, shape (count, m)
    rows : array, shape (count, m, d)
    dense : array, shape (count, d, d), or None
        None where the quadratic form is a multiple of |z|^2, which beta then has.
    """

    root: float
    center: Any
    linear: Any
    near_center: Any
    offset: Any
    beta: Any
    column: Any
    rows: Any
    dense: Any


def fold(feature_map: Any) -> tuple[FoldedSide, FoldedSide]:
    """The constants of a dense-exponential map's queries and keys.

    Parameters
    ----------
    feature_map : DenseExponentialMap
        Its leading axes are flattened.
    """
    p = feature_map.parameters
    batch = tuple(feature_map.batch_shape)
    g1, g2, center_x, center_y = (_flat(getattr(p, name), batch) for name in ("g1", "g2", "center_x", "center_y"))
    rows, column = _flat(feature_map.rows, batch), _flat(feature_map.column, batch)[:, 0]
    center_x, center_y = center_x[:, 0], center_y[:, 0]
    root, gaussian = math.sqrt(p.scale), p.kernel == "gaussian"
    return (
        _side(root, g1, center_x, center_y, center_y, rows, column, gaussian),
        _side(root, g2, center_y, center_x, center_y, rows, column, gaussian),
    )


def _side(
    root: float, g: Any, own: Any, other: Any, near_center: Any, rows: Any, column: Any, gaussian: bool
) -> FoldedSide:
    if gaussian:
        linear = other - own
        offset, beta = -0.25 * np.sum(linear * linear, axis=-1), np.full(len(g), 0.5)
    else:
        linear, offset, beta = other, 0.5 * np.sum(own * other, axis=-1), np.zeros(len(g))
        near_center = np.zeros_like(own)
    square = g[:, 0, 0] ** 2
    if np.all(g == g[:, :1, :1] * np.eye(g.shape[-1])):
        beta, dense = beta + 0.5 * square, None
    else:
        dense = math.sqrt(0.5) * np.swapaxes(g, -1, -2)
    return FoldedSide(root, own, linear, near_center, offset, beta, column, rows @ g, dense)


def _flat(x: Any, batch: tuple[int, ...]) -> Any:
    """An array of a map in float64, its leading axes those of the batch in one."""
    wide = np.asarray(to_host(x), dtype=np.float64)
    return np.broadcast_to(wide, (*batch, *wide.shape[-2:])).reshape(math.prod(batch), *wide.shape[-2:])
