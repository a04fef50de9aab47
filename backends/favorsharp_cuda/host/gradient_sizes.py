"""How the backward kernels cut a call: the widths they are compiled for, columns of values, segments, shared memory."""

from typing import Any

from favorsharp_cuda.host import arrays
from favorsharp_cuda.host.declarations import GRADIENT_ROWS, PART
from favorsharp_cuda.host.launch import shared_room
from favorsharp_cuda.host.occupancy import MULTIPROCESSORS, cut
from favorsharp_cuda.host.source import SWEEPS, Sweep

WIDEST = 128
"""The most entries that a point can have. Kernels other than `gradient_sweep` are compiled for widths 64 and 128."""
BLOCKS = 2 * MULTIPROCESSORS
"""The number of blocks that a large GPU runs at the same time."""
SHORTEST_SEGMENT = 256
"""The fewest points of a segment: its sums cost as much as reading some hundred points."""


def sweep_of(like: Any, d: int, e: int) -> Sweep:
    """The instance of `gradient_sweep` to use for points of size d and values of size e, on the device of `like`.

    Among the instances that fit into shared memory, it processes values in the fewest parts. Among those, it pads
    points the least, and then has the most features at a time.

    It is an error if points are too wide or nothing fits. Callers ask before the forward pass, so that the error comes
    early.
    """
    width_of(d)
    dtype, device = arrays.name_of(like), arrays.device_number(like)
    room = shared_room(device)
    if wide_enough := sweeps_for(dtype, d, room):
        return min(wide_enough, key=lambda x: (-(-e // x.values), x.points, -x.features, x.values))
    item = arrays.computed_item(dtype)
    needed = min(shared_of(sweep, item) for sweep in SWEEPS[arrays.WIDER[dtype]] if sweep.points >= d)
    fitting = sweeps_for(dtype, 0, room)
    served = [f"d of at most {max(sweep.points for sweep in fitting)}"] if fitting else []
    served += ["float32"] if dtype == "float64" else []
    raise ValueError(
        f"gradients in {dtype} of d={d} need {needed} bytes of shared memory for a block, and device {device} has "
        f"{room}; accepted there: {', or '.join(served) or 'none'}"
    )


def sweeps_for(dtype: str, d: int, room: int) -> list[Sweep]:
    """The instances of `gradient_sweep` that serve points of size d and need at most `room` bytes of shared memory."""
    item = arrays.computed_item(dtype)
    return [x for x in SWEEPS[arrays.WIDER[dtype]] if x.points >= d and shared_of(x, item) <= room]


def width_of(d: int) -> int:
    """The width, 64 or 128, to which kernels other than `gradient_sweep` pad points of size d."""
    if d > WIDEST:
        raise ValueError(
            f"gradients on a GPU need d of at most {WIDEST}, got d={d}; use('reference') takes any d, "
            "but keeps all features in memory"
        )
    return wider_of(d)


def columns_of(e: int, widest: int) -> list[slice]:
    """The parts in which values are processed, as slices of at most `widest` columns.

    Gradients of points are linear in dout.v and dout.out, so those of the parts add up.
    """
    parts = max(1, -(-e // widest))
    size = -(-e // parts)
    return [slice(i * size, min(e, (i + 1) * size)) for i in range(parts)]


def shared_of(sweep: Sweep, item: int) -> int:
    """Bytes of shared memory for a block of a backward pass: the most that any of its kernels takes."""
    wider = wider_of(sweep.points)
    return max(shared_of_sweep(sweep, item), shared_of_factors(wider, item), shared_of_near(wider, item))


def shared_of_sweep(sweep: Sweep, item: int) -> int:
    """Bytes of shared memory for a block of `gradient_sweep`."""
    size = sweep.features
    points, values, features, pairs = sweep.points + 4, sweep.values + 4, size + 4, GRADIENT_ROWS + 4
    items = (
        GRADIENT_ROWS * (points + 2 * values)
        + 2 * sweep.points * features
        + 3 * GRADIENT_ROWS * features
        + 2 * GRADIENT_ROWS * pairs
    )
    return item * (items + size * values + 5 * size + 4 * GRADIENT_ROWS + 2)


def shared_of_factors(wider: int, item: int) -> int:
    """Bytes of shared memory for a block of `gradient_factors` or `gradient_points`.

    The matrix of a map's quadratic form is in shared memory in float32; in float64 it stays in global memory.
    """
    return item * ((wider if item == 4 else 0) + 2 * GRADIENT_ROWS) * (wider + 4)


def shared_of_near(wider: int, item: int) -> int:
    """Bytes of shared memory for a block of `near_gradients`."""
    return item * (4 * GRADIENT_ROWS * (wider + 4) + 2 * GRADIENT_ROWS * (GRADIENT_ROWS + 4) + 6 * GRADIENT_ROWS)


def wider_of(width: int) -> int:
    """The given width rounded up to a multiple of 64, as kernels other than `gradient_sweep` need it."""
    return max(64, -(-width // 64) * 64)


def segments_of(heads: int, points: int, block: int) -> tuple[int, int]:
    """How many segments to cut the points of a head into, and the points of a segment, a multiple of `block`."""
    _, span = cut(heads, points, block, BLOCKS, SHORTEST_SEGMENT)
    span = min(span, PART // block * block)
    return max(1, -(-points // span)), span
