"""Linear algebra of small matrices for the closed formulas of the methods, and Bessel functions."""

import math

from favorsharp._arrays import from_host, namespace_of, on_device_of
from favorsharp._autodiff import is_traced
from favorsharp._typing import Array


def apply(g: Array, x: Array) -> Array:
    """Return g x for points given as rows."""
    return x @ namespace_of(g).matrix_transpose(g)


def congruence(g: Array, s: Array) -> Array:
    """The diagonal of g s g^T, shape (*b, 1, d)."""
    xp = namespace_of(g)
    return xp.matrix_transpose(xp.sum((g @ s) * g, axis=-1, keepdims=True))


def diagonal(s: Array) -> Array:
    """The diagonal as a row, shape (*b, 1, d)."""
    return namespace_of(s).linalg.diagonal(s)[..., None, :]


def trace(s: Array) -> Array:
    """The trace, shape (*b, 1, 1)."""
    return row_sum(diagonal(s))


def outer(x: Array, y: Array) -> Array:
    """x^T y, shape (*b, d, d) for rows of shape (*b, n, d)."""
    return namespace_of(x).matrix_transpose(x) @ y


def row_sum(x: Array) -> Array:
    """Sums along the last axis, which stays with length 1."""
    return namespace_of(x).sum(x, axis=-1, keepdims=True)


def identity(s1: Array, s2: Array) -> Array:
    """Identity matrices, in the shape that s1 and s2 broadcast to."""
    return on_diagonal(namespace_of(s1, s2).zeros_like(s1 + s2), 1.0)


def on_diagonal(s: Array, row: Array | float) -> Array:
    """Return s with a row, shape (*b, 1, d), or a number added to the diagonal."""
    xp = namespace_of(s)
    indices = xp.arange(s.shape[-1], **on_device_of(s))
    return s + xp.astype(indices[:, None] == indices[None, :], s.dtype) * row


def zeros_row(matrix: Array) -> Array:
    """Zeros of shape (*b, 1, d) for a (*b, d, d) array, in its dtype and on its device."""
    return namespace_of(matrix).zeros_like(matrix[..., :1, :])


def least_ridge(s: Array) -> float:
    """The default relative ridge: 1e-6, or more if 1e-6 would be lost in the rounding of s."""
    eps = float(namespace_of(s).finfo(s.dtype).eps)
    return max(1e-6, 8 * int(s.shape[-1]) * eps)


def regular(s: Array, other: Array, ridge: float) -> Array:
    """Add a ridge to s, relative to its trace; if s is zero, relative to the trace of `other`, or to 1."""
    return on_diagonal(s, _ridge_row(s, other, ridge))


def _ridge_row(s: Array, other: Array, ridge: float) -> Array:
    """What `regular` adds to the diagonal, shape (*b, 1, d)."""
    own, borrowed = trace(s), trace(other)
    xp = namespace_of(own, borrowed)
    size = s.shape[-1]
    measure = xp.where(own > 0, own, xp.where(borrowed > 0, borrowed, float(size))) / size
    added = xp.where(own > 0, ridge * measure, (ridge or 1.0) * measure)
    return added + tie_break(s, ridge) * measure


def tie_break(s: Array, ridge: float) -> Array:
    """Different entries for a diagonal, shape (d,), at most half of the default ridge; zeros without a ridge.

    If the points do not span the space, all eigenvalues outside their span are equal to the ridge. Then the axes there
    would be determined by rounding errors alone.
    """
    largest = 0.5 * min(ridge, least_ridge(s))
    return from_host([largest * ((_GOLDEN * axis) % 1) for axis in range(s.shape[-1])], like=s)


def principal(matrix: Array, ridge: float) -> tuple[Array, Array]:
    """The eigenvalues (*b, 1, d) of a second moment, largest first and at least zero, and its axes as rows."""
    xp = namespace_of(matrix)
    values, axes = eigen(on_diagonal(matrix, tie_break(matrix, ridge) * (trace(matrix) / matrix.shape[-1])))
    return xp.maximum(values, xp.zeros_like(values)), axes * signs(axes)


def eigen(s: Array) -> tuple[Array, Array]:
    """The eigenvalues (*b, 1, d) of a symmetric matrix, largest first, and the eigenvectors as rows."""
    xp = namespace_of(s)
    values, axes = xp.linalg.eigh(s)
    return xp.flip(values, axis=-1)[..., None, :], xp.flip(xp.matrix_transpose(axes), axis=-2)


def common_axes(s: Array, ridge: float) -> tuple[Array, Array]:
    """The balance of a second moment with itself: the diagonal of g s g^T, shape (*b, 1, d), and g."""
    added = _ridge_row(s, s, ridge)
    values, axes = eigen(on_diagonal(s, added))
    transposed = namespace_of(s).matrix_transpose
    return values - transposed((axes * axes) @ transposed(added)), axes * signs(axes)


def balance(s1: Array, s2: Array, ridge: float) -> tuple[Array, Array]:
    """Return g1, g2 with g1^T g2 = I that map both second moments to the same diagonal matrix, largest entry first."""
    xp = namespace_of(s1, s2)
    if s2 is s1:
        _, axes = common_axes(s1, ridge)
        return axes, axes
    # a Cholesky factor costs much less than a square root, but needs the default ridge, which exceeds rounding errors
    factor = triangular if ridge >= min(least_ridge(s1), least_ridge(s2)) else square_root
    s1, s2 = regular(s1, s2, ridge), regular(s2, s1, ridge)
    if factor is triangular and not is_traced(s1):
        transposed = xp.matrix_transpose(xp.linalg.cholesky(s1))
        squares, axes = eigen(transposed @ s2 @ xp.matrix_transpose(transposed))
        # squares lose digits of small eigenvalues, so eigenvalues that come from the ridge alone would lose their order
        least = max(1e-6, 1e4 * float(xp.finfo(squares.dtype).eps))
        if bool(xp.all(squares[..., -1:] > least * squares[..., :1])):
            roots, axes = xp.matrix_transpose(squares) ** 0.25, axes @ transposed
            g1 = (axes @ s2) / roots**3  # for the eigenvectors this is roots * axes @ inv(transposed).T
            sign = signs(g1)
            return g1 * sign, axes * (sign / roots)
    root1, inverse1 = factor(s1)
    transposed = xp.matrix_transpose(root1)
    u, sigma, _ = xp.linalg.svd(transposed @ factor(s2)[0], full_matrices=False)
    g1 = xp.sqrt(sigma)[..., :, None] * (xp.matrix_transpose(u) @ inverse1)
    g1 = g1 * signs(g1)
    # the closed formula for g2 gives the same matrix; but with the inverse, g1^T g2 = I holds up to rounding, and
    # without that estimates would be biased
    return g1, xp.matrix_transpose(xp.linalg.inv(g1))


def triangular(s: Array) -> tuple[Array, Array]:
    """The Cholesky factor of a positive definite matrix and its inverse."""
    xp = namespace_of(s)
    root = xp.linalg.cholesky(s)
    return root, xp.linalg.inv(root)


def inverse_of_lower(lower: Array) -> Array:
    """The inverse of a lower triangular matrix, by halves."""
    xp, half = namespace_of(lower), lower.shape[-1] // 2
    if half < 32:
        return xp.linalg.inv(lower)
    first, last = (inverse_of_lower(part) for part in (lower[..., :half, :half], lower[..., half:, half:]))
    below = -last @ (lower[..., half:, :half] @ first)
    above = xp.zeros_like(xp.matrix_transpose(below))
    return xp.concat([xp.concat([first, above], axis=-1), xp.concat([below, last], axis=-1)], axis=-2)


def square_root(s: Array) -> tuple[Array, Array]:
    """The symmetric square root of a positive definite matrix and its inverse."""
    xp = namespace_of(s)
    values, axes = xp.linalg.eigh(s)
    # rounding can leave an eigenvalue at or below zero; raise it to the smallest one that the dtype resolves
    floor = values[..., -1:] * float(xp.finfo(s.dtype).eps)
    root = xp.sqrt(xp.maximum(values, floor))[..., None, :]
    transposed = xp.matrix_transpose(axes)
    return (axes * root) @ transposed, (axes / root) @ transposed


_GOLDEN = (math.sqrt(5) - 1) / 2


def signs(g: Array) -> Array:
    """Signs, shape (*b, d, 1), that make the product of each row with a fixed irrational direction positive.

    The usual choice is the sign of the largest entry. It is not used here: in a row such as (1, -1) two entries are
    equally large, and rounding would decide between them.
    """
    xp = namespace_of(g)
    direction = from_host([[0.5 + (_GOLDEN * (axis + 1)) % 1] for axis in range(g.shape[-1])], like=g)
    ones = xp.ones_like(g[..., :1])
    return xp.where(g @ direction < 0, -ones, ones)


def bessel(z: Array) -> tuple[Array, Array]:
    """Return log I0(z) and I1(z) / I0(z), z >= 0.

    I0(z) is the mean over t of exp(z cos t), and I1(z) is the mean of cos t exp(z cos t). Up to z = 100 the trapezoid
    rule with 64 nodes is exact to rounding; beyond that the asymptotic series has an error of less than 1e-8.
    """
    xp = namespace_of(z)
    nodes = [math.cos((2 * j + 1) * math.pi / 128) for j in range(64)]
    cosines = from_host(nodes, like=z)
    small, large = xp.where(z < 100, z, 0.0), xp.where(z < 100, 100.0, z)
    weights = xp.exp(small[..., None] * (cosines - 1))
    mean = xp.mean(weights, axis=-1)
    near = xp.log(mean), xp.mean(weights * cosines, axis=-1) / mean
    x = 1 / large
    series = xp.log1p(x / 8 + 9 / 128 * x**2 + 75 / 1024 * x**3) - 0.5 * xp.log(2 * math.pi * large)
    far = series, 1 - x / 2 - x**2 / 8 - x**3 / 8
    return z + xp.where(z < 100, near[0], far[0]), xp.where(z < 100, near[1], far[1])
