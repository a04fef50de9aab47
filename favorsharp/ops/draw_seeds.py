"""Seeds of landmarks: candidates drawn one after the other, in proportion to what earlier ones leave unexplained."""

from favorsharp._arrays import broadcast_shapes, cast, namespace_of, statistics_dtype
from favorsharp._typing import Array
from favorsharp.dispatch import Op


@Op
def draw_seeds(points: Array, logs: Array, *, num_seeds: int) -> tuple[Array, Array]:
    """Draw seeds among candidates: the next has the largest sum of logs and of log(1 - exp(-D^2)).

    D is its distance to the nearest seed so far. Distances that rounding errors could make count as 0.

    Parameters
    ----------
    points : array, shape (*b, p, d)
        One or more candidates.
    logs : array, shape (*b, p)
        Log weights, with noise that makes the choice random; -inf for slots without a candidate.
    num_seeds : int

    Returns
    -------
    picks : array of integers, shape (*b, num_seeds)
        Positions among the candidates.
    used : array of bool, shape (*b, num_seeds)
        False where no candidate was left.
    """
    xp = namespace_of(points)
    wide = statistics_dtype(points)
    batch = broadcast_shapes(points.shape[:-2], logs.shape[:-1])
    points, logs = cast(points, wide), cast(logs, wide)
    points, logs = (
        xp.broadcast_to(x, (*batch, *rest)) for x, rest in ((points, points.shape[-2:]), (logs, logs.shape[-1:]))
    )
    own = xp.sum(points * points, axis=-1)
    grain = 16 * float(xp.finfo(wide).eps)  # smaller squared distances are rounding errors
    left = xp.zeros_like(own) + xp.inf
    picks, used = [], []
    for _ in range(num_seeds):
        scores = logs + _log_unexplained(left)
        pick = xp.argmax(scores, axis=-1, keepdims=True)
        chosen = xp.take_along_axis(points, pick[..., None], axis=-2)
        size = xp.take_along_axis(own, pick, axis=-1)
        squares = own + size - 2 * (points @ xp.matrix_transpose(chosen))[..., 0]
        left = xp.minimum(left, xp.where(squares > grain * (own + size), squares, 0.0))
        picks.append(pick)
        used.append(xp.take_along_axis(scores, pick, axis=-1) > -xp.inf)
    return xp.concat(picks, axis=-1), xp.concat(used, axis=-1)


def _log_unexplained(squares: Array) -> Array:
    """log(1 - exp(-D^2)); -inf where D is 0."""
    xp = namespace_of(squares)
    apart = squares > 0
    return xp.where(apart, xp.log(-xp.expm1(-xp.where(apart, squares, 1.0))), -xp.inf)
