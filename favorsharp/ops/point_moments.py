"""Count, mean and covariance of points: what the metric of landmarks needs to know of queries and keys."""

from favorsharp._arrays import namespace_of
from favorsharp._typing import Array
from favorsharp.dispatch import Op
from favorsharp.moments import side_of


@Op
def point_moments(x: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    """The moments of the visible points; points that are not finite count as hidden.

    Parameters
    ----------
    x : array, shape (*b, n, d)
    mask : array of bool, shape (*b, n), or None
        True where a point is visible.

    Returns
    -------
    count : array, shape (*b, 1, 1)
    mean : array, shape (*b, 1, d)
    covariance : array, shape (*b, d, d)
        Centred second moments, divided by the count. All three are float64 wherever the device has it, and 0 if no
        point is visible.
    """
    xp = namespace_of(x)
    finite = xp.all(xp.isfinite(x), axis=-1)
    return side_of(x, finite if mask is None else finite & mask)
