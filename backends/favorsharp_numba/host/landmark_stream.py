"""Prepares the arguments of the kernel of `landmark_stream`, and makes the state after a call."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from favorsharp.backend import (
    CANDIDATES,
    STREAM_RIDGE,
    LandmarkState,
    Moments,
    landmark_stream,
    segments_of,
)
from favorsharp_numba.host.arguments import Held, broadcast, empty, host, name_of, numpy_or_torch, promoted, widened
from favorsharp_numba.host.landmarks import drawn_numbers, places_of
from favorsharp_numba.host.reading import reading_constants, reading_places
from favorsharp_numba.host.threads import share
from favorsharp_numba.kernels.landmark_stream import Stream, Values, stream
from favorsharp_numba.kernels.workspace import items_of
from favorsharp_numba.vectors.compiling import TAGS
from favorsharp_numba.vectors.emitter import BYTES

MOST_KEYS = 1024
"""The largest number of keys that the kernel compresses at once, because it holds the distance of each to each."""


class StreamProblem:
    """A call of `landmark_stream`, with the arguments of its kernel."""

    def __init__(self, q: Any, k: Any, v: Any, state: LandmarkState, key_mask: Any | None, grouped: bool) -> None:
        self.q, self.k, self.v, self.mask, self.state = q, k, v, key_mask, state
        group = (q.shape[-3],) if grouped else ()
        leads = [
            q.shape[: -2 - len(group)],
            k.shape[:-2],
            v.shape[:-2],
            () if key_mask is None else key_mask.shape[:-1],
        ]
        self.batch = broadcast(*leads, state.batch_shape, state.moments.mean_x.shape[:-2])
        self.queries = (*self.batch, *group)
        self.heads, self.n = math.prod(self.batch), k.shape[-2]
        self.dtype = name_of(state.log_weight)
        self.lanes = BYTES // np.dtype(self.dtype).itemsize
        self.segments = list(segments_of(state, self.n))
        self.most = max((x.before - state.window for x in self.segments if x.due), default=1)
        last = self.segments[-1]
        self.kept = last.held + last.stop - last.start
        self.s = self._sizes(math.prod(group))

    def run(self) -> tuple[Any, LandmarkState]:
        """The result, and the state after the call.

        If more keys are compressed at once than the kernel can hold, the reference runs, with the kernels of its steps.
        """
        if self.most > MOST_KEYS:
            options: dict[str, Any] = {"key_mask": self.mask, "grouped": self.queries != self.batch}
            found: tuple[Any, LandmarkState] = landmark_stream.reference(self.q, self.k, self.v, self.state, **options)
            return found
        s, state, place = self.s, self.state, (held := Held()).place
        settings = state.settings
        x = Values(settings.scale_of(s.d), settings.tilt, self._ridge(), 64 * float(np.finfo(self.dtype).eps))
        side = place(reading_constants(s.d_pad, s.e_pad, x.scale, self.dtype))
        moments = self._moments()
        out = empty(state.keys, (*self.queries, self.n, s.e), self.dtype)
        shapes = (*self.batch, self.kept, s.d), (*self.batch, self.kept, 1), (*self.batch, self.kept, s.e)
        new = [empty(state.keys, shape, self.dtype) for shape in shapes]
        given: list[Any] = [held.points(self.q, self.queries)]
        given += [held.points(array, self.batch) for array in (self.k, self.v)]
        given += [held.mask(self.mask, self.batch)]
        given += [held.points(array, self.batch) for array in (state.keys, state.log_weight[..., None], state.values)]
        targets = [held.points(out, self.queries), *(held.points(array, self.batch) for array in new)]
        share(
            stream, self.heads, float(self.heads * self.n * s.held * (s.d + s.e)), items_of(stream, s),
            TAGS[self.dtype], s, x, side, held.keep(self._plan()), len(self.segments), place(self._noise()), *given,
            place(moments), *targets, of_torch=held.of_torch,
        )  # fmt: skip
        keys, weight, values = new
        seen = {"num_seen": state.num_seen + self.n, "moments": self._found(moments)}
        return out, replace(state, keys=keys, log_weight=weight[..., 0], values=values, **seen)

    def _sizes(self, group: int) -> Stream:
        state = self.state
        d, e, m = state.keys.shape[-1], state.v_size, state.settings.num_landmarks
        d_pad, m_pad, e_pad = (self._padded(x) for x in (d, m, e))
        longest = max(1, *(max(x.before, x.held + x.stop - x.start) for x in self.segments))
        slots, wide = min(CANDIDATES * m, self.most), 8 // np.dtype(self.dtype).itemsize
        d_wide = self.lanes // wide * -(-d_pad * wide // self.lanes)
        center, direction, lift, _, zeros, total = places_of(self.lanes, d, d_pad, e_pad)
        read_places = reading_places(self.lanes, d_pad, e_pad)
        return Stream(
            d, d_pad, d_wide, m, m_pad, e, e_pad, wide, group, state.held, longest, self._padded(longest), slots,
            state.window, state.settings.steps, center, direction, lift, zeros, total, *read_places,
        )  # fmt: skip

    def _padded(self, x: int) -> int:
        """The size rounded up to whole vectors, at least one."""
        return max(1, -(-x // self.lanes)) * self.lanes

    def _ridge(self) -> float:
        return max(STREAM_RIDGE, 8 * self.s.d * float(np.finfo(np.float64).eps))

    def _plan(self) -> Any:
        """The plan of the kernel: 0, and four integers for each segment."""
        plan, events = [0], 0
        for x in self.segments:
            plan += [x.start, x.stop, int(x.due), events]
            events += x.due
        return np.array(plan, dtype=np.int64)

    def _noise(self) -> Any:
        """The random numbers of each compression: a direction, the offsets and the noise of the slots."""
        s, settings = self.s, self.state.settings
        due = [x for x in self.segments if x.due]
        numbers = np.zeros((max(1, len(due)), s.d + 2 * s.slots))
        for row, x in zip(numbers, due, strict=False):
            slots = min(s.slots, x.before - s.keep)
            row[: s.d + 2 * slots] = drawn_numbers(settings.seed, x.seen, settings.num_landmarks, s.d, slots)
        return numbers

    def _moments(self) -> Any:
        """The moments of the state, in the form that the kernel continues."""
        s, given = self.s, self.state.moments
        out = np.zeros((*self.batch, 2, 2 + s.d, s.d_wide))
        for side, name in enumerate("xy"):
            out[..., side, 0, :1] = host(getattr(given, f"count_{name}"))[..., 0, :]
            out[..., side, 1, : s.d] = host(getattr(given, f"mean_{name}"))[..., 0, :]
            out[..., side, 2:, : s.d] = host(getattr(given, f"covariance_{name}"))
        return out

    def _found(self, moments: Any) -> Moments:
        """The moments after the call."""
        parts = []
        for side in range(2):
            own = moments[..., side, :, : self.s.d]
            parts += [own[..., :1, :1], own[..., 1:2, :], own[..., 2:, :]]
        count_x, mean_x, cov_x, count_y, mean_y, cov_y = (
            numpy_or_torch(self.k, np.ascontiguousarray(x)) for x in parts
        )
        dtype = max(self.state.moments.dtype, widened(promoted(name_of(self.q), name_of(self.k))))
        return Moments(count_x, mean_x, cov_x, count_y, mean_y, cov_y, dtype=dtype)
