"""Tests of the shim on small kernels: it computes what a GPU would, and reports mistakes that a GPU would not."""

import re
from pathlib import Path

import numpy as np
import pytest
import sample_calls
import sanitized
from host_module import SCHEDULES, HostModule, LaunchError, TruncatingModule, scheduled
from sample_calls import CALLS, WRONG

pytestmark = pytest.mark.own_backend
SCRIPT = Path(sample_calls.__file__)


@pytest.fixture(scope="module")
def kernels():
    return sample_calls.module()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.threads)
def test_results_in_every_order(kernels, call, schedule):
    with scheduled(schedule):
        np.testing.assert_array_equal(*CALLS[call](kernels))


MESSAGES = {
    "a barrier that half of the block does not reach": "(deadlock|__syncthreads after).* 32 threads .*returned",
    "two barriers in the place of one": "sample.cu:.*__syncthreads .* others of them came to __syncthreads",
    "a barrier after a return": "__syncthreads after 1 threads of the block returned",
    "a shuffle of half a warp": "deadlock|__shfl_xor_sync after",
    "a copy that is never waited for": "1 cp.async were never waited for",
    "a copy past the end of shared memory": "cp.async of 16 bytes at offset 1024 of 1024 bytes",
    "a matrix row that is not aligned": "ldmatrix at offset 4, not a multiple of 16",
    "lanes of one warp that wait for different things": "(__syncwarp|__shfl_sync) .* others of them came to (__s)",
}


@pytest.mark.parametrize("mistake", MESSAGES)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.threads)
def test_threads_that_wait_wrongly_are_named(kernels, mistake, schedule):
    with scheduled(schedule), pytest.raises(LaunchError, match=MESSAGES[mistake]):
        sample_calls.wrong(kernels, WRONG[mistake])
    np.testing.assert_array_equal(*CALLS["row_sums"](kernels))  # after this the shim still works


def test_shared_memory_that_was_never_written_is_nan(kernels):
    assert np.isnan(sample_calls.wrong(kernels, WRONG["shared memory that was never written"])[:64]).all()


REPORTS = {
    ("thread", "shared memory that was never written"): None,
    ("thread", "blocks that add to one number"): "data race",
    ("thread", "blocks that add to one number by an atomic"): None,
    ("address", "a write past the end of shared memory"): "AddressSanitizer",
    ("address", "a write past the end of an array"): "heap-buffer-overflow",
    ("address", "a vector that is not aligned"): "misaligned address",
}


@pytest.mark.parametrize(("sanitizer", "mistake"), [*REPORTS, ("thread", "none"), ("address", "none")])
def test_sanitizers_report_what_is_wrong_and_nothing_else(sanitizer, mistake):
    done = sanitized.run(sanitizer, SCRIPT, mistake)
    report = REPORTS.get((sanitizer, mistake))
    if report is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == sanitized.REPORTED
        assert re.search(report, done.stderr), done.stderr
        assert "sample.cu" in done.stderr


def test_a_launch_that_a_gpu_refuses_is_refused(kernels):
    kernel = kernels.get_function("sample::product_tf32")
    x = np.zeros(256, np.float32)
    for grid, block, options, message in (
        ((0,), (32,), {}, "grid"),
        ((1, 65536), (32,), {}, "grid"),
        ((1,), (48,), {}, "whole warps"),
        ((1,), (2048,), {}, "at most 1024"),
        ((1,), (32,), {"shared_mem": 49153}, "max_dynamic_shared_size_bytes 49152"),
    ):
        with pytest.raises(LaunchError, match=message):
            kernel(grid, block, (x, x, x), **options)
    with pytest.raises(LaunchError, match="takes 3 arguments, got 2"):
        kernel((1,), (32,), (x, x))
    with pytest.raises(LaunchError, match="argument 1 has 4 bytes, takes 8"):
        kernel((1,), (32,), (x, np.float32(1), x))
    with pytest.raises(LaunchError, match=f"{227 * 1024 + 1} bytes of shared memory; a block has {227 * 1024}"):
        kernel.max_dynamic_shared_size_bytes = 227 * 1024 + 1
    kernel.max_dynamic_shared_size_bytes = 100_000
    kernel((1,), (32,), (x, x, x), shared_mem=100_000)


def test_what_does_not_compile_says_why():
    with pytest.raises(LaunchError, match="nothing_of_the_kind"):
        HostModule(code="__global__ void f() { nothing_of_the_kind(); }", name_expressions=["f"]).get_function("f")
    with pytest.raises(LaunchError, match="'g' is not among the 1 name_expressions"):
        HostModule(code="", name_expressions=["f"]).get_function("g")


def cut(x, last):
    """Numbers truncated towards zero to multiples of 2**last."""
    return np.ldexp(np.trunc(np.ldexp(x, -last)), last)


def test_tensor_cores_that_cut():
    """Terms are truncated two bits below the last place of the largest, and the sum to 24 bits, always towards zero."""
    rng = np.random.default_rng(3)
    a = np.ldexp(rng.integers(-2047, 2048, (16, 16)), -rng.integers(0, 25, (16, 16))).astype(np.float16)
    b = np.ldexp(rng.integers(-2047, 2048, (16, 8)), -rng.integers(0, 25, (16, 8))).astype(np.float16)
    a[0], b[:, 0] = 0, 0
    a[1], b[:, 1] = 1 / 64, 1 / 64  # 1 + 2^-24 + 2^-24 ...
    a[1, 0], b[0, 1] = 1, 1
    a[1, 1:], b[1:, 1] = 2.0**-12, 2.0**-12
    results = []
    for module in (TruncatingModule, HostModule):
        kernels = module(code=sample_calls.code(), name_expressions=["sample::product<false>"])
        c = np.empty((16, 8), np.float32)
        kernels.get_function("sample::product<false>")((1,), (32,), (a, b, c, np.int32(16)), shared_mem=1536)
        results.append(c)
    terms = a.astype(np.float64)[:, :, None] * b.astype(np.float64)
    top = np.frexp(np.abs(terms).max(1))[1] - 1
    sums = cut(terms, top[:, None] - 25).sum(1)
    want = cut(sums, np.frexp(sums)[1] - 24)
    np.testing.assert_array_equal(results[0], want)
    assert results[0][1, 1] == 1 + 7 * 2.0**-23  # fifteen times half of the last place, cut
    assert results[1][1, 1] == 1  # where each addition rounds to even
    np.testing.assert_allclose(results[0], results[1], rtol=0, atol=1e-5 * np.abs(results[1]).max())


NUMBERS = """
__global__ void halves(float *out, unsigned short *back) {
  for (unsigned i = threadIdx.x; i < 65536; i += 32) {
    out[i] = host::half_to_float(i);
    back[i] = host::float_to_half(out[i]);
  }
}
__global__ void roundings(const float *x, unsigned short *half, unsigned short *bf16, float *tf32, int n) {
  for (int i = threadIdx.x; i < n; i += 32) {
    half[i] = host::float_to_half(x[i]);
    bf16[i] = host::float_to_bf16(x[i]);
    tf32[i] = host::tf32_seen(host::float_to_tf32(x[i]));
  }
}
"""


def test_numbers_are_those_of_the_formats():
    kernels = HostModule(code=NUMBERS, name_expressions=["halves", "roundings"])
    wide, back = np.empty(65536, np.float32), np.empty(65536, np.uint16)
    kernels.get_function("halves")((1,), (32,), (wide, back))
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(wide, halves.astype(np.float32))
    finite = ~np.isnan(halves)
    np.testing.assert_array_equal(back[finite], halves.view(np.uint16)[finite])

    rng = np.random.default_rng(0)
    ordered = np.sort(wide[np.isfinite(wide)]).astype(np.float64)
    between = (ordered[:-1] + ordered[1:]) / 2  # ties
    x = np.concatenate([between, np.nextafter(between, np.inf), rng.standard_normal(9999), [65519, 65520, 1e30, -1e-9]])
    x = x.astype(np.float32)
    half, bf16, tf32 = np.empty(x.size, np.uint16), np.empty(x.size, np.uint16), np.empty(x.size, np.float32)
    kernels.get_function("roundings")((1,), (32,), (x, half, bf16, tf32, np.int32(x.size)))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(half.view(np.float16), x.astype(np.float16))
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(bf16.view(np.int16), torch.tensor(x).bfloat16().view(torch.int16).numpy())
    assert (np.abs(tf32 - x) <= np.abs(x) * 2.0**-11).all()
    assert (tf32.view(np.uint32) % 2**13 == 0).all()


def test_the_other_way_to_switch_fibers():
    """Processors other than x86-64 use it."""
    code = sample_calls.code()
    kernels = HostModule(code=code, options=["-DHOST_UCONTEXT"], name_expressions=["sample::row_sums"])
    np.testing.assert_array_equal(*sample_calls.row_sums(kernels))
