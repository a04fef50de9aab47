"""Later calls repeat the launches of an earlier call with the same layout, and compute only new addresses.

The kernels that a call launches, and all their arguments except addresses, follow from the map and from the shapes,
strides and dtypes of its tensors. So the first call of a kind is recorded. Later calls allocate the same tensors, put
addresses into copies of the same structures, and launch. `tiles` and `plain` mark the functions for which that holds.
See docs/design/repeated-launches.md.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import numpy as np

from favorsharp.backend import derived
from favorsharp_cuda.host import arrays, launch
from favorsharp_cuda.host.declarations import PROBLEM
from favorsharp_cuda.host.recording import Launch, Recording, active

MOST = 64
"""The most kinds of calls that are kept for a map."""

ALIGNED = 256
"""Bytes to which the parts of a workspace are aligned."""

_epoch = 0


class _Known(NamedTuple):
    """The recorded work of one kind of calls.

    Attributes
    ----------
    made : tuple of (shape, dtype, offset)
        The tensors that they allocate. Tensors that are not results are in one workspace, at an offset in bytes.
    workspace : int
        The bytes of the workspace.
    launches : tuple of Launch
    results : nested tuple of int or None
        The positions of the results among the arguments and the tensors in `made`.
    constants : tuple of tensors
        Kept alive, because the launches hold their addresses.
    """

    made: tuple[tuple[tuple[int, ...], str, int | None], ...]
    workspace: int
    launches: tuple[Launch, ...]
    results: Any
    constants: tuple[Any, ...]


def forget() -> None:
    """Forget all recorded calls. Tests call this after they have changed how calls are cut into blocks."""
    global _epoch
    _epoch += 1


def epoch() -> int:
    """A number that changes when recorded calls are forgotten."""
    return _epoch


def repeated(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors and a map, whose arrays decide only by their layout what it launches, with a memory.

    Results of the function are its arguments, tensors that it allocates by `arrays.empty`, and tuples of these. A call
    with the keyword `out` is not repeated, because its addresses decide whether a kernel may write there.

    Its attribute `recorded` is a function of the same arguments: what `repeat` needs for such a call, or None.
    """

    def described(given: Any, options: Any = ()) -> tuple[Any, list[Any], list[Any]]:
        tensors: list[Any] = []
        key: list[Any] = [function, _epoch]
        return _described((*given, *options), tensors, key), tensors, key

    @wraps(function)
    def run(*given: Any, **options: Any) -> Any:
        if options.get("out") is not None:
            return function(*given, **options)
        feature_map, tensors, key = described(given, options.items())
        if not _is_repeatable(feature_map, tensors):
            return function(*given, **options)
        stream, is_capturing = launch.stream_of(tensors[0])
        if is_capturing:
            return function(*given, **options)
        key += _place_of(stream, tensors)
        kept = derived(feature_map, "launches", dict)
        found = kept.get(kind := tuple(key), run)
        if found is run:
            if len(kept) >= MOST:
                kept.clear()
            result, kept[kind] = _recorded(function, given, options, tensors)
            return result
        return function(*given, **options) if found is None else repeat(found, tensors)

    def recorded(*given: Any) -> _Known | None:
        feature_map, tensors, key = described(given)
        key += _place_of(launch.stream_of(tensors[0])[0], tensors)
        found: _Known | None = derived(feature_map, "launches", dict).get(tuple(key))
        return found

    run.recorded = recorded  # type: ignore[attr-defined]
    return run


def _place_of(stream: int, tensors: list[Any]) -> tuple[Any, ...]:
    """The part of a key that says where a call runs."""
    return stream, tensors[0].device, launch.shared_room(arrays.device_number(tensors[0]))


def _described(values: Any, tensors: list[Any], key: list[Any]) -> Any:
    """Describe the arguments in a key, and collect their tensors; the result is the map among them."""
    feature_map = None
    for x in values:
        if hasattr(x, "data_ptr"):
            tensors.append(x)
            key += (x.shape, x.stride(), x.dtype, x.is_neg())
        elif isinstance(x, tuple):
            key.append(len(x))
            feature_map = _described(x, tensors, key) or feature_map
        elif hasattr(x, "parameters"):
            feature_map = x
            key.append("map")
        else:
            key.append(x)
    return feature_map


def _is_repeatable(feature_map: Any, tensors: list[Any]) -> bool:
    """Whether there are tensors, and no other arrays; and no call around this one is recorded."""
    if active.recording is not None or not tensors:
        return False
    return all(hasattr(x, "data_ptr") and not x.requires_grad for x in feature_map.arrays)


def _recorded(
    function: Callable[..., Any], given: Any, options: dict[str, Any], tensors: list[Any]
) -> tuple[Any, _Known | None]:
    """The result of a call, and what later calls of its kind repeat; None if they cannot."""
    recording = active.recording = Recording(tensors)
    try:
        result = function(*given, **options)
    finally:
        active.recording = None
    where = {id(x): i for i, x in enumerate((*tensors, *(x for x, _, _ in recording.made)))}
    if not (recording.is_whole and all(id(x) in where for x in _leaves(result))):
        return result, None
    returned = {id(x) for x in _leaves(result)}
    made: list[tuple[tuple[int, ...], str, int | None]] = []
    size = 0
    for x, shape, dtype in recording.made:
        made.append((shape, dtype, None if id(x) in returned else size))
        if id(x) not in returned:
            size += -(-x.numel() * x.element_size() // ALIGNED) * ALIGNED
    constants = tuple(recording.constants)
    return result, _Known(tuple(made), size, tuple(recording.launches), _located(result, where), constants)


def _leaves(result: Any) -> list[Any]:
    """The tensors of a result."""
    if isinstance(result, tuple):
        return [leaf for x in result for leaf in _leaves(x)]
    return [] if result is None else [result]


def _located(result: Any, where: dict[int, int]) -> Any:
    """The result with the number of each tensor in its place."""
    if isinstance(result, tuple):
        return tuple(_located(x, where) for x in result)
    return None if result is None else where[id(result)]


def recorded(function: Any, *given: Any) -> _Known | None:
    """What is known of a call of a function that `repeated` has made, or None."""
    found: _Known | None = function.recorded(*given)
    return found


def repeat(known: _Known, tensors: list[Any]) -> Any:
    """The results of a recorded call with other tensors, in the order in which its arguments hold them."""
    return _placed(known.results, launched(known, tensors))


def launched(known: _Known, tensors: list[Any]) -> list[Any]:
    """The arguments and the new tensors of such a call, among which `known.results` gives the places of results."""
    like = tensors[0]
    device = arrays.device_number(like)
    every, addresses, start = [*tensors], [x.data_ptr() for x in tensors], 0
    if 0 in addresses:  # of an empty tensor, or of one without memory, which is an error
        addresses = [arrays.address_of(x) for x in tensors]
    if known.workspace:
        workspace = arrays.empty(like, (known.workspace,), "uint8")
        start = workspace.data_ptr()
    for shape, dtype, offset in known.made:
        if offset is None:
            every.append(arrays.empty(like, shape, dtype))
            addresses.append(every[-1].data_ptr())
        else:
            every.append(None)
            addresses.append(start + offset)
    with launch.on_stream_of(like):
        for each in known.launches:
            numbers = each.numbers[:]
            for place, source in each.places:
                numbers[place] = addresses[source]
            launch.start(each.expression, device, each.grid, each.threads, np.frombuffer(numbers, PROBLEM), each.shared)
    return every


def _placed(results: Any, every: list[Any]) -> Any:
    if isinstance(results, int):
        return every[results]
    return None if results is None else tuple([_placed(x, every) for x in results])
