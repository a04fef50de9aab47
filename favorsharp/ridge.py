"""Ridge regression from sums over blocks of features, with an intercept, for many penalties at once.

`favorsharp.sklearn.FeatureRidge` calls this module. Features are (n, m), values (n, e), weights (n,), all float64
where the device has it.
"""

from dataclasses import dataclass

from favorsharp._arrays import from_host, namespace_of
from favorsharp._typing import Array


@dataclass(frozen=True)
class RidgeSums:
    """The sums from which a regression is computed: the sum of weights, means, and sums of centred products.

    Attributes
    ----------
    weight : array, shape (1, 1)
    mean, value : array, shape (1, m) and (1, e)
    square : array, shape (m, m)
    cross : array, shape (m, e)
    size : array, shape (1, e)
        Sums of squares of the values.
    """

    weight: Array
    mean: Array
    value: Array
    square: Array
    cross: Array
    size: Array


def sums_of(features: Array, values: Array, weight: Array) -> RidgeSums:
    """The sums of one block. The weights are not all 0."""
    xp = namespace_of(features)
    w = weight[:, None]
    total = xp.sum(w, axis=0, keepdims=True)
    mean, value = (xp.sum(w * a, axis=0, keepdims=True) / total for a in (features, values))
    centred, own = features - mean, values - value
    weighted = xp.matrix_transpose(w * centred)
    return RidgeSums(
        total, mean, value, weighted @ centred, weighted @ own, xp.sum(w * own * own, axis=0, keepdims=True)
    )


def joined(a: RidgeSums, b: RidgeSums) -> RidgeSums:
    """The sums of two blocks together."""
    transpose = namespace_of(a.mean).matrix_transpose
    total = a.weight + b.weight
    share, gap, value = b.weight / total, b.mean - a.mean, b.value - a.value
    both = a.weight * share
    return RidgeSums(
        total,
        a.mean + share * gap,
        a.value + share * value,
        a.square + b.square + both * (transpose(gap) @ gap),
        a.cross + b.cross + both * (transpose(gap) @ value),
        a.size + b.size + both * value * value,
    )


@dataclass(frozen=True)
class RidgePath:
    """The regressions for all penalties, from one eigendecomposition.

    Attributes
    ----------
    sums : RidgeSums
    axes : array, shape (m, m)
        Eigenvectors of the centred second moment as columns.
    inverse : array, shape (m, a)
        1 / (eigenvalue + penalty), for a penalties; 0 where both are 0.
    target : array, shape (m, e)
        The sums of products with the values along these axes.
    """

    sums: RidgeSums
    axes: Array
    inverse: Array
    target: Array

    def coefficients(self, index: int) -> tuple[Array, Array]:
        """Coefficients (m, e) and intercept (1, e) for one penalty."""
        coefficients = self.axes @ (self.inverse[:, index : index + 1] * self.target)
        return coefficients, self.sums.value - self.sums.mean @ coefficients

    def left_out(self, features: Array, values: Array, weight: Array) -> Array:
        """The weighted sums of square leave-one-out errors of a block of the points, (a, e).

        A point is left out with all its weight. No regression without the point is computed: the error is the residual
        divided by one minus the point's own influence on its estimate.
        """
        xp = namespace_of(features)
        along = (features - self.sums.mean) @ self.axes
        share = weight[:, None] / self.sums.weight
        influence = share + weight[:, None] * ((along * along) @ self.inverse)
        least = float(xp.finfo(along.dtype).eps) ** 0.5
        rest = xp.clip(1 - influence, least, None)
        out = []
        for i in range(self.inverse.shape[1]):
            residual = values - self.sums.value - along @ (self.inverse[:, i : i + 1] * self.target)
            out.append(xp.sum(weight[:, None] * (residual / rest[:, i : i + 1]) ** 2, axis=0))
        return xp.stack(out)

    def generalised(self) -> Array:
        """The same sums by generalised cross-validation, (a, e), which replaces each influence by the mean influence.

        It needs no points. The number of points is taken to be the sum of the weights.
        """
        xp = namespace_of(self.axes)
        values = xp.sum(self.axes * (self.sums.square @ self.axes), axis=0)[:, None]
        out = []
        for i in range(self.inverse.shape[1]):
            inverse = self.inverse[:, i : i + 1]
            residual = self.sums.size - xp.sum((2 - values * inverse) * inverse * self.target**2, axis=0, keepdims=True)
            freedom = 1 + xp.sum(values * inverse)
            rest = xp.clip(1 - freedom / self.sums.weight, 1e-6, None)
            out.append((residual / rest**2)[0, :])
        return xp.stack(out)


def ridge_path(sums: RidgeSums, penalties: list[float]) -> RidgePath:
    """The regressions for the penalties, each 0 or more."""
    xp = namespace_of(sums.square)
    values, axes = xp.linalg.eigh(sums.square)
    least = float(xp.finfo(values.dtype).eps) * values.shape[0]
    values = xp.where(values > least * values[-1:], values, 0.0)
    total = values[:, None] + from_host(penalties, values)[None, :]
    inverse = xp.where(total > 0, 1 / xp.where(total > 0, total, 1.0), 0.0)
    return RidgePath(sums, axes, inverse, xp.matrix_transpose(axes) @ sums.cross)
