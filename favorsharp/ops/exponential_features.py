"""exp(u W^T + row + column): the features behind FAVOR+, FAVOR++, FAVOR# and `optimal`."""

from favorsharp._arrays import namespace_of
from favorsharp._typing import Array
from favorsharp.dispatch import Op


@Op
def exponential_features(u: Array, rows: Array, row: Array, column: Array) -> Array:
    """Exponential features of transformed points.

    Parameters
    ----------
    u : array, shape (*b, n, d)
    rows : array, shape (*b, m, d)
        W.
    row : array, shape (*b, n, 1)
    column : array, shape (*b, 1, m)

    Returns
    -------
    array, shape (*b, n, m)
        exp(u W^T + row + column). Not stabilised: attention uses logarithms.
    """
    xp = namespace_of(u, rows, row, column)
    return xp.exp(u @ xp.matrix_transpose(rows) + (row + column))
