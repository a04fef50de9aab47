"""The primitives one by one: every lane's result, by the shim on the CPU and by PTX on a GPU (`make gpu-check`)."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from host_module import HostModule
from sample_calls import as_bfloat16

pytestmark = pytest.mark.own_backend
pytest.importorskip("favorsharp_cuda")

CHECKS = Path(__file__).with_name("primitives_check.cu")
NAMES = [
    *(f"favorsharp::check_mma<favorsharp::{dtype}>" for dtype in ("half", "bfloat16")),
    *(f"favorsharp::check_{what}" for what in ("matrices", "copies", "numbers", "pieces", "warp")),
]


def code():
    primitives = (files("favorsharp_cuda") / "kernels" / "primitives.cuh").read_text()
    return f'#line 1 "primitives.cuh"\n{primitives}\n#line 1 "{CHECKS.name}"\n{CHECKS.read_text()}'


@pytest.fixture(scope="module", params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def launch(request):
    """Run a check kernel on NumPy arrays; it writes to them."""
    if request.param == "host":
        module = HostModule(code=code(), name_expressions=NAMES)

        def run(name, *arguments, shared=0):
            module.get_function(f"favorsharp::{name}")((1,), (32,), arguments, shared_mem=shared)

    else:
        import cupy

        module = cupy.RawModule(code=code(), options=("-std=c++17",), name_expressions=NAMES)

        def run(name, *arguments, shared=0):
            given = [cupy.asarray(x) if isinstance(x, np.ndarray) else x for x in arguments]
            module.get_function(f"favorsharp::{name}")((1,), (32,), tuple(given), shared_mem=shared)
            for host, device in zip(arguments, given, strict=True):
                if isinstance(host, np.ndarray):
                    host[...] = cupy.asnumpy(device)

    return run


LANE = np.arange(32)
GROUP, QUARTER = LANE // 4, LANE % 4


def as_words(x):
    """Pairs of 16-bit numbers as words, the first in the low half."""
    x = np.ascontiguousarray(x).view(np.uint16).astype(np.uint32)
    return x[..., 0] | x[..., 1] << 16


def pairs(x, rows, columns):
    """Entries (row, column) and (row, column + 1) of a matrix, as words."""
    return as_words(np.stack([x[rows, columns], x[rows, columns + 1]], axis=-1))


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_fragments_of_a_product(launch, dtype):
    """Lane l has rows l / 4 and l / 4 + 8, and columns 2 (l % 4) and the next, of A, and of B the transpose."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(-9, 10, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    bits_a, bits_b = (x.astype(np.float16).view(np.uint16) if dtype == "half" else as_bfloat16(x) for x in (a, b))
    left = [pairs(bits_a, GROUP + 8 * (i % 2), 2 * QUARTER + 8 * (i // 2)) for i in range(4)]
    right = [pairs(bits_b.T, GROUP, 2 * QUARTER + 8 * i) for i in range(2)]
    rows, columns = GROUP[:, None] + 8 * np.array([0, 0, 1, 1]), 2 * QUARTER[:, None] + np.array([0, 1, 0, 1])
    d = np.ascontiguousarray(c[rows, columns])
    launch(f"check_mma<favorsharp::{dtype}>", np.stack(left, 1), np.stack(right, 1), d)
    np.testing.assert_array_equal(d, (a @ b + c)[rows, columns])


def test_matrices_from_shared_memory(launch):
    x = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((2, 32, 4), np.uint32)
    launch("check_matrices", x, out, shared=512)
    for matrix in range(4):
        np.testing.assert_array_equal(out[0, :, matrix], pairs(x[matrix], GROUP, 2 * QUARTER))
        np.testing.assert_array_equal(out[1, :, matrix], pairs(x[matrix].T, GROUP, 2 * QUARTER))


def test_copies_land_by_groups(launch):
    x = np.arange(1, 513, dtype=np.uint16).reshape(2, 32, 8)
    out = np.zeros_like(x)
    launch("check_copies", x, out, shared=1024)
    want = x.copy()
    want[0, 1::2] = 0
    np.testing.assert_array_equal(out, want)


def test_conversions_round_to_nearest(launch):
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.standard_normal(500), [0, -0.0, 1e-6, 6e-8, 65519, 65520, -1e9], rng.integers(-9, 9, 50)])
    ties = (np.arange(1024, 1124) + 0.5) / 1024  # between two numbers of float16
    x = np.concatenate([x, ties]).astype(np.float32)
    halves, bfloats = (np.zeros(x.size, np.uint16) for _ in range(2))
    back, powers = np.zeros((x.size, 2), np.float32), np.zeros(x.size, np.float32)
    pairs = np.zeros((x.size, 2), np.uint32)
    launch("check_numbers", x, halves, bfloats, pairs, back, powers, np.int32(x.size))
    for both, single in ((pairs[:, 0], halves), (pairs[:, 1], bfloats)):  # counted from the other end
        np.testing.assert_array_equal(both, as_words(np.stack([single, single[::-1]], axis=-1)))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(halves.view(np.float16), x.astype(np.float16))
        np.testing.assert_array_equal(back[:, 0], x.astype(np.float16).astype(np.float32))
        bits = x.view(np.uint32)
        np.testing.assert_array_equal(bfloats, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
        np.testing.assert_allclose(powers, np.exp2(x.astype(np.float64)).astype(np.float32), rtol=3e-7)


def test_pieces_of_16_bytes(launch):
    x, out = np.arange(128, dtype=np.uint32).reshape(32, 4), np.zeros((32, 4), np.uint32)
    launch("check_pieces", x, out)
    np.testing.assert_array_equal(out, x[::-1])


def test_sums_and_maxima_of_a_warp(launch):
    x = np.random.default_rng(2).integers(-99, 99, 32).astype(np.float32)
    out = np.zeros((2, 32), np.float32)
    launch("check_warp", x, out)
    np.testing.assert_array_equal(out[0], np.full(32, x.sum()))
    np.testing.assert_array_equal(out[1], np.full(32, x.max()))
