"""The seeds of landmarks: keys drawn one after the other, in proportion to the errors that earlier seeds leave.

A seed here is a key at which a landmark starts. There are 4 m candidates. The next seed is drawn from these about in
proportion to exp(2 s) (1 - exp(-D^2)), where D is the distance to the nearest seed so far: it is the candidate with the
largest sum of the logarithm of that and its Gumbel noise. Each candidate has one number of noise for all draws. All
shapes are static. Nothing depends on hidden keys or on the order of the keys, because keys are sorted by their
projection on a random direction. The sort also puts equal keys next to each other, so that only one of them becomes a
candidate. See docs: design, seeds need one random number for each candidate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from favorsharp._arrays import (
    broadcast_shapes,
    cast,
    from_host,
    is_on_gpu,
    namespace_of,
    on_device_of,
    statistics_dtype,
    stream_label,
)
from favorsharp._autodiff import constant_while_compiling, is_capturing, is_compiling, is_traced
from favorsharp._nonfinite import hide
from favorsharp._typing import Array, DType
from favorsharp.ops.landmark_metric import Metric, centred
from favorsharp.ops.tiles import tiles_of

CANDIDATES = 4
"""Candidates for each landmark."""


KEPT = 4096
"""Arrays of random numbers that stay on GPUs: three for each choice, some kilobytes each."""

_of_graphs: dict[int, Array] = {}
"""Arrays of random numbers that CUDA graphs read.

They are never freed, because nothing shows when a graph is deleted.
"""


@dataclass(frozen=True, eq=False)
class Noise:
    """The random numbers of one choice, in NumPy: a direction (d,); offsets and Gumbel noise of candidates, (P,).

    `drawn` holds the arguments that they were drawn with, if they are known.
    """

    direction: Any
    offsets: Any
    gumbel: Any
    drawn: tuple[int, int, int, int] | None = None

    def beside(self, like: Array, name: str, dtype: DType, count: int) -> Array:
        """The first numbers of an array, in the library and on the device of `like`.

        Numbers are copied to a GPU only once, because the host waits for a copy, and a graph cannot capture it.
        """
        if self.drawn is None or not is_on_gpu(like) or is_traced(like):
            return from_host(getattr(self, name)[:count], like, dtype=dtype)
        place = on_device_of(like)["device"], stream_label(like)
        kept: Array = _copied(self.drawn, name, namespace_of(like), dtype, count, place)
        if is_capturing(like):
            _of_graphs[id(kept)] = kept
        return kept


@lru_cache(maxsize=KEPT)
def _copied(
    drawn: tuple[int, int, int, int], name: str, xp: Any, dtype: DType, count: int, place: tuple[Any, int]
) -> Array:
    return xp.asarray(getattr(noise_of(*drawn), name)[:count], dtype=dtype, device=place[0])


def noise_of(seed: int, event: int, num_landmarks: int, size: int) -> Noise:
    """The random numbers for a choice. `event` is 0 in a whole call, and in a stream the number of keys seen."""
    import numpy as np

    slots = CANDIDATES * num_landmarks
    if is_compiling():
        direction, offsets, gumbel = (np.asarray(numbers) for numbers in _drawn(seed, event, slots, size))
        return Noise(direction, offsets, gumbel)
    return Noise(*_arrays_of(seed, event, slots, size), (seed, event, num_landmarks, size))


def _arrays_of(seed: int, event: int, slots: int, size: int) -> tuple[Any, Any, Any]:
    import numpy as np

    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(event,)))
    return rng.standard_normal(size), rng.random(slots), rng.gumbel(size=slots)


@constant_while_compiling
def _drawn(seed: int, event: int, slots: int, size: int) -> tuple[tuple[float, ...], ...]:
    """The random numbers of `noise_of` as Python numbers, which a compiled graph can hold."""
    return tuple(tuple(array.tolist()) for array in _arrays_of(seed, event, slots, size))


def choose_seeds(
    k: Array,
    log_weight: Array,
    metric: Metric,
    num_landmarks: int,
    noise: Noise,
    *,
    kernel: str,
    scale: float,
    draw: "Draw | None" = None,
) -> tuple[Array, Array]:
    """Positions of the seeds among the keys, and whether each is used, both (*b, m).

    A seed is not used if no candidate is left, for example because there are fewer different keys than landmarks.

    Parameters
    ----------
    k : array, shape (*b, s, d)
        Keys, not scaled; equal ones are recognised.
    log_weight : array, shape (*b, s)
        -inf for hidden keys.
    metric : Metric
    num_landmarks : int
    noise : Noise
    kernel : {"softmax", "gaussian"}
    scale : float
    draw : callable, optional
        A function that is called in place of `draw_seeds`; None means `draw_seeds`.
    """
    xp = namespace_of(k)
    visible = log_weight != -xp.inf
    batch = broadcast_shapes(k.shape[:-2], log_weight.shape[:-1], metric.batch_shape)
    slots = min(noise.offsets.shape[0], k.shape[-2])
    index, filled = _candidates(k, visible, slots, noise)
    index, filled = (xp.broadcast_to(x, (*batch, slots)) for x in (index, filled))
    points = xp.take_along_axis(xp.broadcast_to(k, (*batch, *k.shape[-2:])), index[..., None], axis=-2)
    weight = xp.take_along_axis(xp.broadcast_to(log_weight, (*batch, k.shape[-2])), index, axis=-1)
    points, log_mass = centred(hide(points, filled), xp.where(filled, weight, 0.0), metric, kernel, scale)
    u, log_norm = metric.coordinates(points)
    logs = 2 * (log_norm + log_mass)[..., 0] + noise.beside(u, "gumbel", u.dtype, slots)
    picks, used = (draw or draw_seeds)(u, xp.where(filled, logs, -xp.inf), num_seeds=num_landmarks)
    return xp.take_along_axis(index, picks, axis=-1), used


def _candidates(y: Array, visible: Array, slots: int, noise: Noise) -> tuple[Array, Array]:
    """Positions of up to `slots` different visible keys, and a mask of the slots that are filled, both (*b, slots).

    If there are no more different keys than slots, these are all keys; otherwise, one key from each of as many strata
    along the random direction as there are slots.
    """
    xp = namespace_of(y)
    wide = statistics_dtype(y)
    direction = noise.beside(y, "direction", wide, y.shape[-1])
    tiles = tiles_of(y.shape[-2], y.shape[-1], y.shape[:-2], like=y)
    parts = [xp.sum(cast(y[..., a:b, :], wide) * direction, axis=-1) for a, b in tiles]  # equal keys have equal sums
    along = xp.where(visible, parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1), xp.inf)
    order = xp.argsort(along, axis=-1, stable=True)
    along = xp.take_along_axis(along, order, axis=-1)
    first = xp.concat([xp.ones_like(along[..., :1], dtype=xp.bool), along[..., 1:] != along[..., :-1]], axis=-1)
    first = first & (along < xp.inf)
    count = xp.sum(cast(first, wide), axis=-1, keepdims=True)
    different = xp.argsort(cast(~first, xp.int8), axis=-1, stable=True)
    slot = xp.arange(slots, dtype=wide, **on_device_of(y))
    offset = noise.beside(y, "offsets", wide, slots)  # this has no effect if there is a slot for each key
    rank = xp.floor((slot + offset) * xp.maximum(count / slots, xp.ones_like(count)))
    filled = rank < count
    rank = cast(xp.minimum(rank, xp.zeros_like(rank) + (y.shape[-2] - 1)), order.dtype)
    return xp.take_along_axis(order, xp.take_along_axis(different, rank, axis=-1), axis=-1), filled


Draw = Callable[..., tuple[Array, Array]]
"""A function like `draw_seeds`."""


def draw_seeds(points: Array, logs: Array, *, num_seeds: int) -> tuple[Array, Array]:
    """Draw seeds among candidates; the next one has the largest sum of its entry in `logs` and of log(1 - exp(-D^2)).

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
