"""Prepares the arguments of the kernel of `landmark_keys`."""

import math
from typing import Any

import numpy as np

from favorsharp.backend import CANDIDATES, RIDGE, landmark_keys
from favorsharp_numba.host.arguments import Held, broadcast, empty, host, name_of, promoted, widened
from favorsharp_numba.host.landmarks import drawn_numbers, places_of
from favorsharp_numba.host.threads import pieces_of, share
from favorsharp_numba.kernels.landmark_call import Call, compress_call
from favorsharp_numba.kernels.landmark_stream import Values
from favorsharp_numba.kernels.landmarks import Landmarks
from favorsharp_numba.kernels.workspace import items_of
from favorsharp_numba.vectors.compiling import TAGS
from favorsharp_numba.vectors.emitter import BYTES


class CallProblem:
    """A call of `landmark_keys`, with the arguments of its kernel."""

    def __init__(self, q: Any, k: Any, v: Any, settings: Any, key_mask: Any | None, grouped: bool) -> None:
        self.q, self.k, self.v, self.settings, self.mask = q, k, v, settings, key_mask
        group = (q.shape[-3],) if grouped else ()
        mask_batch = () if key_mask is None else key_mask.shape[:-1]
        self.batch = broadcast(q.shape[: -2 - len(group)], k.shape[:-2], v.shape[:-2], mask_batch)
        self.queries, self.grouped = (*self.batch, *group), grouped
        self.heads, self.n, self.d = math.prod(self.batch), k.shape[-2], k.shape[-1]
        self.dtype = widened(promoted(*(name_of(x) for x in (q, k, v))))
        self.work = float(self.heads * self.n * settings.num_landmarks * self.d)

    def run(self) -> tuple[Any, Any, Any]:
        """The landmarks: keys, log weights and values.

        A head is one task. If there are too few heads for the threads, the reference runs, with the kernels of its
        steps, which cut heads into pieces.
        """
        if pieces_of(self.heads, self.n, self.work) > 1:
            options: dict[str, Any] = {"key_mask": self.mask, "grouped": self.grouped}
            found: tuple[Any, Any, Any] = landmark_keys.reference(self.q, self.k, self.v, self.settings, **options)
            return found
        s, held, m, e = self._sizes(), Held(), self.settings.num_landmarks, self.v.shape[-1]
        settings, place = self.settings, held.place
        ridge = max(RIDGE, 8 * self.d * float(np.finfo(np.float64).eps))
        x = Values(settings.scale_of(self.d), settings.tilt, ridge, 16 * float(np.finfo(np.float64).eps))
        noise = drawn_numbers(settings.seed, 0, m, self.d, s.choosing.slots)
        weight = np.zeros(self.n if self.mask is None else self.mask.shape, self.dtype)
        if self.mask is not None:
            weight[~host(self.mask)] = -np.inf
        given = [held.points(self.q, self.queries), held.points(self.k, self.batch)]
        given += [held.points(weight[..., None], self.batch), held.points(self.v, self.batch)]
        new = [empty(self.k, (*self.batch, m, size), self.dtype) for size in (self.d, 1, e)]
        share(
            compress_call, self.heads, self.work, items_of(compress_call, s), TAGS[self.dtype], s, x, *given,
            held.mask(self.mask, self.batch), held.keep(np.zeros(1, np.int64)), place(noise),
            *(held.points(array, self.batch) for array in new), of_torch=held.of_torch,
        )  # fmt: skip
        return new[0], new[1][..., 0], new[2]

    def _sizes(self) -> Call:
        settings, n, d, e = self.settings, self.n, self.d, self.v.shape[-1]
        lanes = BYTES // np.dtype(self.dtype).itemsize
        wide = 8 // np.dtype(self.dtype).itemsize

        def padded(x: int) -> int:
            return max(1, -(-x // lanes)) * lanes

        m, slots = settings.num_landmarks, min(CANDIDATES * settings.num_landmarks, n)
        d_pad, e_pad = padded(d), padded(e)
        center, direction, lift, matrix, zeros, total = places_of(lanes, d, d_pad, e_pad)

        def sizes(width: int, condensing: int) -> Landmarks:
            return Landmarks(
                n, m, padded(m), d, d_pad, e, width, 1, 0, condensing, 0, slots, padded(slots), center, direction, lift,
                matrix, zeros, padded(total),
            )  # fmt: skip

        d_wide = lanes // wide * -(-d_pad * wide // lanes)
        queries = self.q.shape[-2]
        group = self.queries[-1] if self.grouped else 1
        masked = int(self.mask is not None and queries == n)
        return Call(
            sizes(d_pad, 0), sizes(e_pad, 1), settings.steps, group, queries, masked, padded(n), d_wide, wide
        )  # fmt: skip
