"""The ops that choose landmarks (m weighted keys in place of n) and replace keys by them (docs: theory, landmarks).

Keys are passed as they are, with log weights; the functions here scale and centre them. All arrays of a metric, the
assignment of keys to landmarks, and seeds are constants in differentiation.
"""

from favorsharp._arrays import broadcast_shapes, cast, namespace_of, on_device_of
from favorsharp._autodiff import without_gradient
from favorsharp._nonfinite import hide
from favorsharp._typing import Array
from favorsharp.dispatch import Op
from favorsharp.ops.landmark_metric import Metric, centred, uncentred
from favorsharp.ops.landmark_seeds import Draw, choose_seeds, noise_of
from favorsharp.ops.partials import Partial, finish, merge
from favorsharp.ops.tiles import tiles_of


def nearness(points: Array, used: Array, metric: Metric, y: Array) -> tuple[Array, Array]:
    """u.u_c - |u_c|^2 / 2 of keys and landmarks, and a mask of the landmark nearest to each key, both (*b, s, m).

    The first is largest for the nearest landmark, and -inf for unused ones.
    """
    xp = namespace_of(points)
    lifted = points @ metric.lift
    toward = lifted @ xp.matrix_transpose(metric.lift)
    squares = xp.matrix_transpose(xp.sum(lifted * lifted, axis=-1, keepdims=True))
    scores = y @ xp.matrix_transpose(toward) + xp.where(used, -0.5 * squares, -xp.inf)
    nearest = xp.argmax(without_gradient(scores), axis=-1, keepdims=True)
    slots = xp.arange(points.shape[-2], dtype=nearest.dtype, **on_device_of(points))
    return scores, nearest == slots


def weights_of(
    points: Array, used: Array, metric: Metric, y: Array, log_mass: Array, *, conserving: bool = False
) -> Array:
    """The log weight of each key at its own landmark, -inf at the others, (*b, s, m).

    Keys are scaled and centred, and have log masses (*b, s, 1). For `conserving` see `condense`.
    """
    xp = namespace_of(y)
    scores, own = nearness(points, used, metric, y)
    if conserving:
        logs = xp.matrix_transpose(-metric.log_means(points))
    else:
        logs = scores - xp.matrix_transpose(metric.coordinates(points)[1])
    return xp.where(own, logs + metric.log_means(y) + log_mass, -xp.inf)


def gather(logs: Array, v: Array, total: Partial | None = None) -> Partial:
    """Weighted sums of values, one row for each landmark, added to a total.

    `logs` (*b, s, m) holds the log weight of each key at each landmark, `v` (*b, s, e) the values.
    """
    xp = namespace_of(logs, v)
    ref = xp.max(logs, axis=-2, keepdims=True)
    p = xp.matrix_transpose(xp.exp(logs - xp.where(ref == -xp.inf, 0.0, ref)))
    sums = p @ xp.concat([v, xp.ones_like(v[..., :1])], axis=-1)
    part = Partial(sums[..., :-1], sums[..., -1:], xp.matrix_transpose(ref))
    return part if total is None else merge(total, part)


@Op
def choose_landmarks(
    k: Array,
    log_weight: Array,
    metric: Metric,
    *,
    num_landmarks: int,
    steps: int,
    kernel: str,
    scale: float,
    seed: int,
    event: int,
    draw: Draw | None = None,
) -> tuple[Array, Array]:
    """Choose landmarks for keys: seeds, then Lloyd steps.

    In a step, every landmark moves to the mean of the keys that are nearest to it; keys count with the weights exp(s)
    times exp(log_weight). Seeds and the assignment of keys are constants in differentiation, and so are all steps but
    the last.

    Parameters
    ----------
    k : array, shape (*b, s, d)
        One or more keys, not scaled.
    log_weight : array, shape (*b, s)
        -inf for hidden keys, which may hold anything.
    metric : Metric
    num_landmarks : int
        m.
    steps : int
    kernel : {"softmax", "gaussian"}
    scale : float
    seed, event : int
        One seed gives different random numbers for each event.
    draw : callable, optional
        As in `choose_seeds`; for backends with a kernel for this step alone, which call the reference.

    Returns
    -------
    points : array, shape (*b, m, d)
        Landmarks, scaled and centred.
    used : array of bool, shape (*b, 1, m)
        False if no key was left to draw; no key belongs to such a landmark.
    """
    xp = namespace_of(k)
    noise = noise_of(seed, event, num_landmarks, k.shape[-1])
    fixed = without_gradient(k), without_gradient(log_weight)
    index, needed = choose_seeds(*fixed, metric, num_landmarks, noise, kernel=kernel, scale=scale, draw=draw)
    keys = xp.take_along_axis(xp.broadcast_to(k, (*index.shape[:-1], *k.shape[-2:])), index[..., None], axis=-2)
    points, used = centred(hide(keys, needed), None, metric, kernel, scale)[0], needed[..., None, :]
    if steps == 0:
        return points, used
    visible = log_weight != -xp.inf
    y, log_mass = centred(hide(k, visible), xp.where(visible, log_weight, 0.0), metric, kernel, scale)
    points = without_gradient(points)
    for _ in range(steps - 1):
        points = lloyd_step(without_gradient(y), without_gradient(log_mass), visible, points, used, metric)
    return lloyd_step(y, log_mass, visible, points, used, metric), used


def lloyd_step(y: Array, log_mass: Array, visible: Array, points: Array, used: Array, metric: Metric) -> Array:
    """The mean of the keys of each landmark, with weights exp(s); the landmark itself if it has no key."""
    xp = namespace_of(y)
    m = points.shape[-2]
    batch = broadcast_shapes(points.shape[:-2], y.shape[:-2], log_mass.shape[:-2])
    total = None
    for start, stop in tiles_of(y.shape[-2], m, batch, like=y):
        tile = y[..., start:stop, :]
        _, own = nearness(points, used, metric, tile)
        logs = metric.coordinates(tile)[1] + log_mass[..., start:stop, :]
        total = gather(xp.where(own & visible[..., start:stop, None], logs, -xp.inf), tile, total)
    return points if total is None else xp.where(total.den > 0, finish(total), points)


@Op
def condense(
    k: Array,
    log_weight: Array,
    v: Array,
    points: Array,
    used: Array,
    metric: Metric,
    *,
    kernel: str,
    scale: float,
    conserving: bool = False,
) -> tuple[Array, Array, Array]:
    """Replace keys by landmarks: every key adds its weight and its value to its nearest landmark.

    Parameters
    ----------
    k : array, shape (*b, s, d)
        One or more keys, not scaled.
    log_weight : array, shape (*b, s)
        -inf for hidden keys, whose points and values may hold anything.
    v : array, shape (*b, s, e)
    points : array, shape (*b, m, d)
        Landmarks, scaled and centred.
    used : array of bool, shape (*b, 1, m)
    metric : Metric
    kernel : {"softmax", "gaussian"}
    scale : float
    conserving : bool
        Whether the weight of a key conserves the mean of its kernel over queries; otherwise it minimises the squared
        error.

    Returns
    -------
    points : array, shape (*b, m, d)
        The landmarks, neither scaled nor centred.
    log_weight : array, shape (*b, m)
        -inf for landmarks without keys.
    values : array, shape (*b, m, e)
        Weighted means, in the dtype of `points`.
    """
    xp = namespace_of(k, v)
    visible = log_weight != -xp.inf
    k, v, log_weight = hide(k, visible), hide(cast(v, points.dtype), visible), xp.where(visible, log_weight, 0.0)
    batch = broadcast_shapes(points.shape[:-2], k.shape[:-2], v.shape[:-2], log_weight.shape[:-1])
    total = None
    for start, stop in tiles_of(k.shape[-2], points.shape[-2], batch, like=k):
        y, mass = centred(k[..., start:stop, :], log_weight[..., start:stop], metric, kernel, scale)
        logs = weights_of(points, used, metric, y, mass, conserving=conserving)
        logs = xp.where(visible[..., start:stop, None], logs, -xp.inf)
        total = gather(logs, v[..., start:stop, :], total)
    assert total is not None  # there is at least one key
    log_mass = (total.ref + xp.log(xp.where(total.den > 0, total.den, 1.0)))[..., 0]
    return *uncentred(points, log_mass, metric, kernel, scale), finish(total)
