"""Calls need memory for tiles, not for a whole feature matrix."""

import tracemalloc

import numpy as np
import pytest

import favorsharp as fs

N, D, M = 16384, 64, 256
MIB = 2**20


def peak(call):
    call()  # a compiler's memory does not count
    tracemalloc.start()
    call()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most / MIB


CALLS = [
    {},
    {"is_causal": True},
    {"window": 64},
    {"is_causal": True, "window": 64},
    {"is_causal": True, "window": 1000},
]


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        *(pytest.param(options, "numba", marks=pytest.mark.kernels) for options in CALLS),
        *((CALLS[i], "reference") for i in (0, 3)),
    ],
)
def test_attention_never_holds_all_features(options, backend):
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, N, D)).astype(np.float32)
    fm = fs.feature_map(fs.fit(q, k), M, rng=0)
    output = N * D * 4 / MIB  # 4 MiB; the feature matrix of one side would be 16 MiB, the scores 1 GiB
    # the tiles of the output are joined at the end, and a window keeps the numerators of one pass during the other, or
    # the sums of the blocks of one head for each thread
    with fs.use(backend):
        assert peak(lambda: fs.linear_attention(q, k, v, fm, **options)) < 3 * output + 14


@pytest.mark.parametrize("backend", [pytest.param("numba", marks=pytest.mark.kernels), "reference"])
def test_longer_sequences_take_no_more_scratch(backend):
    def scratch(n):
        q, k, v = np.random.default_rng(0).standard_normal((3, 1, n, 16)).astype(np.float32)
        fm = fs.feature_map(fs.fit(q, k), 64, rng=0)
        return peak(lambda: fs.linear_attention(q, k, v, fm)) - 2 * n * 16 * 4 / MIB

    with fs.use(backend):
        assert scratch(1 << 17) < scratch(1 << 15) + 1


def test_fits_are_gathered_in_tiles():
    x = np.random.default_rng(0).standard_normal((200_000, 8)).astype(np.float32)
    assert peak(lambda: fs.fit(x, x)) < x.nbytes / MIB


def test_yardstick_holds_a_tile_of_scores():
    q, k, v = np.random.default_rng(0).standard_normal((3, 4096, 8)).astype(np.float32)
    assert peak(lambda: fs.softmax_attention(q, k, v)) < 32  # all scores: 64 MiB
