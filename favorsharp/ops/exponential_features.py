"""exp(u W^T + row + column): the features behind FAVOR+, FAVOR++, FAVOR# and `optimal`; their maps call this op."""

from favorsharp._arrays import cast, compute_dtype, namespace_of, result_dtype
from favorsharp._typing import Array
from favorsharp.dispatch import Op


@Op
def exponential_features(u: Array, rows: Array, row: Array, column: Array, *, out: Array | None = None) -> Array:
    """Exponential features of transformed points.

    Parameters
    ----------
    u : array, shape (*b, n, d)
    rows : array, shape (*b, m, d)
        W.
    row : array, shape (*b, n, 1)
    column : array, shape (*b, 1, m)
    out : array, shape (*b, n, m), optional
        The array to write the result to, in its dtype; it is also returned. It saves the first access to new memory,
        which takes longer than the computation if the result is large.

    Returns
    -------
    array, shape (*b, n, m)
        exp(u W^T + row + column), computed in float32 at least, in the dtype to which the arguments promote. It is not
        stabilised: attention uses logarithms instead.
    """
    xp = namespace_of(u, rows, row, column)
    out_dtype = result_dtype(xp, u, rows, row, column)
    u, rows, row, column = (cast(x, compute_dtype(xp, u, rows, row, column)) for x in (u, rows, row, column))
    result = cast(xp.exp(u @ xp.matrix_transpose(rows) + (row + column)), out_dtype)
    if out is None:
        return result
    out[...] = result
    return out
