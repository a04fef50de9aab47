"""Computes how many blocks a multiprocessor holds, and into how many segments a length is cut to fill a GPU.

`tiles` and `attention_gradients` call it. Nothing here has been measured: the counts follow from registers and shared
memory, and the costs below are estimates.
"""

from functools import lru_cache

MULTIPROCESSORS = 132
"""Of an H100 or H200; stands for GPUs that cannot be asked."""

RESERVED = 1024
"""Bytes of shared memory that a multiprocessor takes for each block. What it has in total is what one block may use
and this."""

START, SCAN, ABSORBED = 128, 8, 0.5
"""Estimated costs, in positions of a segment: to start a block; to scan one more segment; and to absorb a position
before `walk` reads it, which is done if there are several segments."""

WAVES = 4
"""The most rounds of blocks that are considered."""


def register_blocks(kernel: str, e: int) -> int:
    """How many blocks of a tensor-core kernel, for values of (padded) size e, fit into a multiprocessor's registers.

    The tests compare this with the table of registers that the compiler reports.
    """
    return {"walk": 2, "read": 3 if e < 96 else 2, "absorb": 3 if e <= 64 else 2}[kernel]


def shared_blocks(shared: int, room: int) -> int:
    """How many blocks with so many bytes of shared memory fit into a multiprocessor.

    `room` is the limit of one block.
    """
    return (room + RESERVED) // (shared + RESERVED)


def resident(kernel: str, e: int, shared: int, room: int) -> int:
    """How many blocks of a tensor-core kernel a multiprocessor holds at the same time; at least 1."""
    return max(1, min(register_blocks(kernel, e), shared_blocks(shared, room)))


def stages_of(kernel: str, e: int, one: int, two: int, room: int) -> int:
    """The number of stages of a pipeline that copies ahead: 2 if they fit and do not cost a resident block.

    `one` and `two` are the bytes of shared memory with so many stages.
    """
    return 2 if two <= room and resident(kernel, e, two, room) >= resident(kernel, e, one, room) else 1


@lru_cache(maxsize=4096)
def cut(blocks: int, length: int, unit: int, slots: int, shortest: int, absorbed: float = 0.0) -> tuple[int, int]:
    """The number of segments into which to cut a length, and their span.

    The candidates are the largest numbers of segments whose blocks fill a GPU once, twice and so on; the cheapest wins.

    Parameters
    ----------
    blocks : int
        Number of blocks for each segment.
    length, unit : int
        Number of positions; the span is a multiple of `unit`.
    slots : int
        Number of blocks that the GPU runs at the same time.
    shortest : int
        The fewest positions of a segment.
    absorbed : float
        The additional cost of a position if there are several segments.
    """
    most, blocks = max(1, length // max(shortest, unit)), max(1, blocks)
    wanted = {1} | {max(1, min(most, waves * slots // blocks)) for waves in range(1, WAVES + 1)}

    def plan(segments: int) -> tuple[float, int, int]:
        span = -(-max(1, length) // (segments * unit)) * unit
        segments = max(1, -(-length // span))
        waves = -(-blocks * segments // slots)
        position = 1 + absorbed * (segments > 1)
        return waves * (position * span + START) + SCAN * segments, segments, span

    _, segments, span = min(map(plan, wanted))
    return segments, span
