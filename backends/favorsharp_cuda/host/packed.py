"""Packed sequences: sequences of similar length are padded to the longest of them and processed in one call.

The lengths in a group differ by less than a factor of two. So padding at most doubles the work, and there are no more
calls than the longest length has binary digits. If all sequences have the same length and follow each other, they are
not copied.

`attention`, `causal_attention`, `torch_ops` and `vjp` make their functions for packed sequences with this module.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np

from favorsharp.backend import namespace_of
from favorsharp_cuda.host import arrays
from favorsharp_cuda.host.maps import expanded_map


class Placed:
    """A NumPy array, and its copies on devices, which are made when they are first needed and then kept."""

    def __init__(self, host: Any) -> None:
        self.host = host
        self.copies: dict[tuple[str, str], Any] = {}

    def beside(self, like: Any) -> Any:
        """The array in the library of `like`, on its device."""
        place = type(like).__module__.partition(".")[0], str(getattr(like, "device", ""))
        if place not in self.copies:
            self.copies[place] = arrays.upload(like, self.host)
        return self.copies[place]


class Group:
    """Sequences that are processed in one call, as an array (*b, sequences, length, .) cut out of (*b, n, .).

    Parameters
    ----------
    spans : sequence of (start, stop)
        The first position of each sequence, and the position after its last. No sequence is empty.
    """

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        self.spans = tuple(spans)
        self.lengths = [stop - start for start, stop in spans]
        self.length = max(self.lengths)
        self.ragged = min(self.lengths) < self.length
        self.adjacent = not self.ragged and all(a[1] == b[0] for a, b in pairwise(spans))
        # padding repeats the last row of the same sequence, so that NaN and infinities do not reach other sequences
        own = np.arange(self.length)
        self.rows = Placed(np.concatenate([start + np.minimum(own, stop - start - 1) for start, stop in spans]))
        self.there = Placed(own < np.array(self.lengths)[:, None])
        """True where there is no padding, (sequences, length)."""

    def taken(self, x: Any, axis: int = -2) -> Any:
        """The sequences of an array of points, or of a mask if the axis is -1, each padded by its own last row."""
        shape = (*x.shape[:axis], len(self.spans), self.length, *(x.shape[axis + 1 :] if axis != -1 else ()))
        if self.adjacent:
            start, stop = self.spans[0][0], self.spans[-1][1]
            rows = x[..., start:stop, :] if axis == -2 else x[..., start:stop]
        else:
            rows = namespace_of(x).take(x, self.rows.beside(x), axis=axis % x.ndim)
        return rows.reshape(shape)

    def mask(self, key_mask: Any, like: Any) -> Any:
        """True for keys that `key_mask` shows and that are not padding; None if there is neither mask nor padding."""
        given = None if key_mask is None else self.taken(key_mask, -1)
        if not self.ragged:
            return given
        there = self.there.beside(like)
        return there if given is None else there & given


class Packing:
    """The groups into which sequences are sorted, and the positions from which results return to their order."""

    def __init__(self, bounds: Sequence[int]) -> None:
        spans = sorted(((a, b) for a, b in pairwise(bounds) if a < b), key=lambda span: span[0] - span[1])
        groups: list[list[tuple[int, int]]] = []
        for span in spans:
            if not groups or 2 * (span[1] - span[0]) <= groups[-1][0][1] - groups[-1][0][0]:
                groups.append([])
            groups[-1].append(span)
        self.groups = [Group(sorted(group)) for group in groups]
        back, before = np.empty(bounds[-1], np.int64), 0
        for group in self.groups:
            for number, (start, stop) in enumerate(group.spans):
                back[start:stop] = before + number * group.length + np.arange(stop - start)
            before += len(group.spans) * group.length
        self.back = Placed(back)
        self.in_order = len(self.groups) == 1 and self.groups[0].adjacent

    def together(self, parts: Sequence[Any]) -> Any:
        """Join arrays (*b, sequences, length, .) of all groups into one array (*b, n, .), without padding."""
        flat = [x.reshape((*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])) for x in parts]
        if self.in_order:
            return flat[0]
        whole = flat[0] if len(flat) == 1 else namespace_of(*flat).concat(flat, axis=-2)
        return namespace_of(whole).take(whole, self.back.beside(whole), axis=whole.ndim - 2)


@lru_cache(maxsize=8)
def packing_of(bounds: tuple[int, ...]) -> Packing:
    """The packing for bounds. It is cached, because the layers of a model ask for the same bounds."""
    return Packing(bounds)


def packed(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` as a function for packed sequences, which takes their bounds after the map (see `Kernel.packed`)."""
    return partial(_run, op)


def _run(
    op: Callable[..., Any], q: Any, k: Any, v: Any, feature_map: Any, bounds: Sequence[int], *, key_mask: Any = None,
    out: Any = None, **options: Any,
) -> Any:  # fmt: skip
    packing, own = packing_of(tuple(bounds)), expanded_map(feature_map)
    parts = []
    place = None
    if out is not None and packing.in_order:  # otherwise results are gathered
        place = options["out"] = packing.groups[0].taken(out)
    for group in packing.groups:
        points = (group.taken(x) for x in (q, k, v))
        result = op(*points, own, key_mask=group.mask(key_mask, q), **options)
        parts.append(result[0] if isinstance(result, tuple) else result)
    return out if place is not None and parts[0] is place else packing.together(parts)


def packed_vjp(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op`, which returns a result and its pullback, as a function for packed sequences."""
    return partial(_run_vjp, op)


def _run_vjp(
    op: Callable[..., Any], q: Any, k: Any, v: Any, feature_map: Any, bounds: Sequence[int], *, key_mask: Any = None,
    of_map: bool = False, **options: Any,
) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:  # fmt: skip
    packing, own = packing_of(tuple(bounds)), expanded_map(feature_map)
    parts, pullbacks = [], []
    for group in packing.groups:
        points = (group.taken(x) for x in (q, k, v))
        out, back = op(*points, own, key_mask=group.mask(key_mask, q), of_map=of_map, **options)
        parts.append(out)
        pullbacks.append(back)

    def pullback(gradient: Any) -> tuple[Any, ...]:
        found = []
        for group, back in zip(packing.groups, pullbacks, strict=True):
            own_gradient = group.taken(gradient)
            if group.ragged:  # rows of padding are not part of the result, so their gradient is 0
                xp = namespace_of(own_gradient)
                there = group.there.beside(gradient)[..., None]
                own_gradient = xp.where(there, own_gradient, xp.zeros_like(own_gradient))
            found.append(back(own_gradient))
        points = [packing.together([each[i] for each in found]) for i in range(3)]
        like = (feature_map.rows, feature_map.log_weight) if of_map else ()
        of_arrays = (
            sum(each[i] for each in found).reshape(tuple(x.shape)) for i, x in enumerate(like, start=3)
        )  # fmt: skip
        return (*points, *of_arrays)

    return packing.together(parts), pullback
