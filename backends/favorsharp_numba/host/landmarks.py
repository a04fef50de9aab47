"""Prepares the arguments of the kernels of landmarks: packed constants of a metric, and points in whole vectors."""

import math
from functools import lru_cache
from typing import Any

import numpy as np

from favorsharp.backend import noise_of
from favorsharp_numba.host.arguments import LOG2E, Held, broadcast, host, name_of, promoted, widened
from favorsharp_numba.host.threads import pieces_of, share
from favorsharp_numba.kernels.arguments import HEADER, NEAR_SCALE, ONE
from favorsharp_numba.kernels.landmark_seeds import LISTS, draw
from favorsharp_numba.kernels.landmarks import ROOT, Landmarks, gather_landmarks, merge_landmarks, sums_size
from favorsharp_numba.kernels.workspace import items_of, on_host
from favorsharp_numba.vectors.compiling import TAGS
from favorsharp_numba.vectors.emitter import BYTES, VECTORS


def places_of(lanes: int, d: int, d_pad: int, e_pad: int) -> tuple[int, int, int, int, int, int]:
    """Where the arrays of packed constants are (see `Landmarks`), and the number of constants."""
    panels = -(-d_pad // (VECTORS * lanes)) * d * VECTORS * lanes
    center = lanes * -(-HEADER // lanes)
    direction = center + d_pad
    left = direction + d_pad
    matrix = left + panels
    zeros = matrix + panels
    return center, direction, left, matrix, zeros, zeros + max(d_pad, e_pad)


@lru_cache(maxsize=256)  # the layers of a model share a seed
def drawn_numbers(seed: int, event: int, num_landmarks: int, size: int, slots: int) -> Any:
    """The random numbers of a choice in one list: a direction, the offsets and the noise of the slots."""
    noise = noise_of(seed, event, num_landmarks, size)
    return np.concatenate([noise.direction, noise.offsets[:slots], noise.gumbel[:slots]])


class LandmarkProblem:
    """Keys, and the landmarks that are chosen from them or to which they are added, as arguments of the kernels.

    Values are given if landmarks are to be condensed; without them, keys are added up. `slots` is the number of
    candidates if seeds are to be drawn, and `batches` are the leading axes of further arrays.
    """

    def __init__(
        self,
        k: Any,
        log_weight: Any,
        v: Any,
        metric: Any,
        *,
        num_landmarks: int,
        kernel: str,
        scale: float,
        slots: int = 0,
        conserving: bool = False,
        batches: tuple[Any, ...] = (),
    ) -> None:
        self.dtype = np.dtype(widened(promoted(*(name_of(x) for x in (k, log_weight, metric.lift)))))
        self.one = TAGS[self.dtype.name]
        self.lanes = BYTES // self.dtype.itemsize
        given = [k.shape[:-2], log_weight.shape[:-1], metric.batch_shape, *batches]
        self.batch = broadcast(*given, *([] if v is None else [v.shape[:-2]]))
        self.heads, self.held = math.prod(self.batch), Held()
        n, d = k.shape[-2:]
        self.s, constants = self._packed(metric, n, num_landmarks, d, v, kernel, scale, min(slots, n), conserving)
        self.k = self.held.points(k, self.batch)
        self.v = self.k if v is None else self.held.points(v, self.batch)
        self.weight = self.held.points(log_weight[..., None], self.batch)
        self.sides = self._places(constants)
        self.used = np.full((*self.batch, self.s.m_pad), -np.inf, self.dtype)

    @classmethod
    def around(
        cls, k: Any, log_weight: Any, v: Any, points: Any, used: Any, metric: Any, **options: Any
    ) -> "LandmarkProblem":
        """Keys with values, and landmarks that are given."""
        batches = points.shape[:-2], used.shape[:-2]
        problem = cls(k, log_weight, v, metric, num_landmarks=points.shape[-2], batches=batches, **options)
        problem.points = problem.rows(points, problem.s.m, problem.s.d_pad)
        problem.used[..., : problem.s.m] = np.where(host(used)[..., 0, :], 0.0, -np.inf)
        return problem

    def draw(self, seed: int, event: int) -> None:
        """Draw seeds as landmarks."""
        s, place = self.s, self.held.place
        self.points = np.empty((*self.batch, s.m, s.d_pad), self.dtype)
        numbers = drawn_numbers(seed, event, s.m, s.d, s.slots)
        lists = np.empty((self.heads, LISTS * s.n))
        grain = np.asarray(16 * np.finfo(np.float64).eps, self.dtype)[()]
        work = float(self.heads * s.slots * s.m * s.d)
        share(
            draw, self.heads, work, items_of(draw, s), self.one, s, self.k, self.weight, self.sides, place(numbers),
            place(lists), grain, place(self.points), place(self.used), of_torch=self.held.of_torch,
        )  # fmt: skip

    def _packed(
        self, metric: Any, n: int, m: int, d: int, v: Any, kernel: str, scale: float, slots: int, conserving: bool
    ) -> tuple[Landmarks, Any]:  # fmt: skip
        """The sizes of the call, and the packed constants of each metric."""
        lift, width = host(metric.lift).astype(self.dtype, copy=False), VECTORS * self.lanes
        d_pad, e = self._padded(d), 0 if v is None else v.shape[-1]
        center, direction, left, matrix, zeros, total = places_of(self.lanes, d, d_pad, self._padded(e))
        piece = pieces_of(self.heads, n, float(self.heads * n * m * d))
        s = Landmarks(
            n, m, self._padded(m), d, d_pad, e, d_pad if v is None else self._padded(e), piece,
            int(kernel == "gaussian"), int(v is not None), int(conserving), slots, self._padded(slots), center,
            direction, left, matrix, zeros, total,
        )  # fmt: skip
        out = np.zeros((*metric.batch_shape, total), self.dtype)
        out[..., ROOT], out[..., ONE], out[..., NEAR_SCALE] = scale**0.5, 1, LOG2E
        out[..., center : center + d] = host(metric.center)[..., 0, :]
        out[..., direction : direction + d] = host(metric.direction)[..., 0, :]
        for place, x in ((left, lift), (matrix, lift @ np.swapaxes(lift, -1, -2))):
            count = -(-d_pad // width)
            spread = np.zeros((*lift.shape[:-1], count * width), self.dtype)
            spread[..., :d] = x
            panels = spread.reshape(*lift.shape[:-1], count, width).swapaxes(-2, -3)
            out[..., place : place + count * d * width] = panels.reshape(*lift.shape[:-2], count * d * width)
        return s, out

    def _padded(self, x: int) -> int:
        """The size rounded up to whole vectors, at least one."""
        return max(1, -(-x // self.lanes)) * self.lanes

    def _places(self, constants: Any) -> int:
        """The address of the list of places of each head's part of packed constants."""
        lead = constants.shape[:-1]
        self.held.keep(constants)
        numbers = np.arange(math.prod(lead), dtype=np.int64).reshape(lead) * constants.shape[-1]
        places = np.broadcast_to(numbers + constants.ctypes.data // constants.itemsize, self.batch)
        return self.held.keep(np.ascontiguousarray(places).reshape(-1))

    def rows(self, x: Any, m: int, width: int) -> Any:
        """Rows of each head, padded with zeros to whole vectors; zeros if x is None."""
        out = np.zeros((*self.batch, m, width), self.dtype)
        if x is not None:
            out[..., : x.shape[-1]] = host(x)
        return out

    def run(self, steps: int, results: Any, masses: Any) -> None:
        """Add up all keys `steps` times, and write means to `results` and the logarithms of weights to `masses`."""
        s, place = self.s, self.held.place
        tasks = self.heads * s.per_head
        sums = place(np.empty((tasks, int(on_host(sums_size)(s))), self.dtype))
        logs = place(np.empty(0 if s.condensing else (self.heads, s.n), self.dtype))
        fixed = (self.k, self.weight, self.v, self.sides, place(self.points), place(self.used), sums, logs)
        targets = (place(results), place(masses))
        work = float(self.heads * s.n * s.m * s.d)
        together = max(1, steps) if s.per_head == 1 else 1
        for step in range(0, steps, together):
            items = items_of(gather_landmarks, s)
            share(
                gather_landmarks, tasks, work, items, self.one, s, *fixed, int(step > 0), together, *targets,
                of_torch=self.held.of_torch,
            )  # fmt: skip
            if s.per_head > 1:
                share(merge_landmarks, self.heads, 0.0, items, self.one, s, sums, *targets)

    def uncentred(self, metric: Any, scale: float) -> Any:
        """The landmarks neither scaled nor centred, like keys."""
        return ((self.points[..., : self.s.d] + host(metric.center)) / scale**0.5).astype(self.dtype, copy=False)

    def log_weights(self, masses: Any) -> Any:
        """The log weights of landmarks, from masses that contain the Gaussian kernel's own factor of a key."""
        masses = masses[..., : self.s.m]
        return masses + 0.5 * np.sum(self.points * self.points, axis=-1) if self.s.gaussian else masses
