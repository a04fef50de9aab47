"""How many blocks a multiprocessor holds at the benchmark's shapes, and how a length is cut to fill a GPU.

Computed from the table of registers, the bytes of shared memory, and the limits of sm_90; nothing was measured.
"""

import pytest
import resources
from host_module import SHARED_LIMITS

pytestmark = pytest.mark.own_backend
pytest.importorskip("favorsharp_cuda")
from segments import short_segments  # noqa: E402

from favorsharp_cuda.host import occupancy, tile_sizes, tiles  # noqa: E402
from favorsharp_cuda.host.declarations import THREADS  # noqa: E402
from favorsharp_cuda.host.source import TILE_TYPES, VALUE_SIZES, WALKED_SIZES, expression  # noqa: E402

ROOM = SHARED_LIMITS["sm_90"]
REGISTERS, MOST_THREADS = 65_536, 2_048

SHAPES = (
    *(("bfloat16", d, m) for d, m in ((64, 64), (64, 256), (128, 128), (128, 256))),
    *(("float32", d, m) for d, m in ((64, 64), (64, 256), (128, 128))),
)
"""What the benchmark times: a dtype, the size of points and values, and the number of features."""

TABLE = {
    ("bfloat16", 64, 64): {"walk": (2, 2), "read": (1, 4), "absorb": (1, 3)},
    ("bfloat16", 64, 256): {"walk": (2, 2), "read": (2, 3), "absorb": (1, 3)},
    ("bfloat16", 128, 128): {"walk": (1, 2), "read": (1, 3), "absorb": (1, 3)},
    ("bfloat16", 128, 256): {"walk": (1, 2), "read": (1, 3), "absorb": (1, 3)},
    ("float32", 64, 64): {"walk": (1, 2), "read": (1, 3), "absorb": (1, 3)},
    ("float32", 64, 256): {"walk": (1, 2), "read": (1, 3), "absorb": (1, 3)},
    ("float32", 128, 128): {"walk": (2, 1), "read": (1, 2), "absorb": (1, 2)},
}
"""Stages, and blocks that a multiprocessor holds."""


def blocks_by_registers(name):
    per_warp = -(-resources.read_table()["sm_90"][name]["registers"] * 32 // 256) * 256
    warps = THREADS // 32
    return min(REGISTERS // (per_warp * warps), MOST_THREADS // THREADS)


def launches(dtype, d, m):
    """For each kernel: its instance, the stages that are chosen, and the shared memory with one stage and with
    these."""
    part = tile_sizes.walked_size(dtype, d, d, ROOM)
    e, walked = tile_sizes.value_size(d), tile_sizes.walked_value_size(d, part)
    walk = [tile_sizes.shared_of_walk(dtype, d, part, stages, near=False) for stages in (1, 2)]
    read = [tile_sizes.shared_of_read(dtype, d, e, stages) for stages in (1, 2)]
    absorb = tile_sizes.shared_of_absorb(dtype, d, walked)
    stages = occupancy.stages_of("walk", part, *walk, ROOM)
    yield "walk", part, stages, walk[0], walk[stages - 1]
    stages = occupancy.stages_of("read", e, *read, ROOM) if m > 64 else 1
    yield "read", e, stages, read[0], read[stages - 1]
    yield "absorb", walked, 1, absorb, absorb


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_at_the_shapes_of_the_benchmark(shape):
    """A multiprocessor holds two blocks if one stage leaves room for two; a second stage never costs a block."""
    for kernel, e, stages, least, shared in launches(*shape):
        blocks = min(blocks_by_registers(expression(kernel, shape[0], e)), occupancy.shared_blocks(shared, ROOM))
        assert (stages, blocks) == TABLE[shape][kernel], kernel
        assert blocks >= 2 or occupancy.shared_blocks(least, ROOM) < 2, kernel


def test_registers_allow_the_blocks_that_are_counted_on():
    sizes = {"walk": WALKED_SIZES, "read": VALUE_SIZES, "absorb": VALUE_SIZES}
    for kernel, each in sizes.items():
        for e in each:
            for dtype in TILE_TYPES:
                name = expression(kernel, dtype, e)
                assert blocks_by_registers(name) >= occupancy.register_blocks(kernel, e), name


def used(blocks, segments, slots):
    """The share of slots, over all rounds, that are occupied by a block."""
    rounds = -(-blocks * segments // slots)
    return blocks * segments / (rounds * slots)


def test_segments_fill_whole_rounds():
    """64 heads of 16,384 tokens: 9 segments would be 576 blocks in three rounds of 264."""
    segments, span = occupancy.cut(64, 16_384, 64, 264, tiles.SHORTEST, occupancy.ABSORBED)
    assert segments * span >= 16_384
    assert used(64, segments, 264) > 0.95
    assert used(64, 9, 264) < 0.75
    for heads in (8, 16, 24, 32, 40, 48, 64, 96, 128):
        segments, _ = occupancy.cut(heads, 65_536, 64, 264, tiles.SHORTEST, occupancy.ABSORBED)
        assert used(heads, segments, 264) > 0.85, heads


def test_short_sequences_have_blocks_enough():
    """64 heads of 1,024 tokens would make only 64 blocks without segments."""
    segments, span = occupancy.cut(64, 1_024, 64, 264, tiles.SHORTEST, occupancy.ABSORBED)
    assert (segments, span) == (4, 256)


def test_heads_that_fill_the_gpu_are_not_cut():
    for heads in (200, 264, 528, 4_096):
        assert occupancy.cut(heads, 16_384, 64, 264, tiles.SHORTEST, occupancy.ABSORBED)[0] == 1, heads


def test_every_position_is_in_one_segment():
    for blocks in (0, 1, 3, 100):
        for length in (0, 1, 63, 64, 129, 1_000, 100_000):
            for unit in (60, 64, 500):
                segments, span = occupancy.cut(blocks, length, unit, 264, 128)
                assert span % unit == 0
                assert (segments - 1) * span < max(1, length) <= segments * span
                assert segments == 1 or span >= 128


def test_lengths_of_tests_have_several_segments():
    with short_segments():
        assert occupancy.cut(6, 201, 64, 264, tiles.SHORTEST, tiles.ABSORBED)[0] > 1
