"""Calls of the kernels of sample.cu. As a script, it runs the mistake with a given name, or all correct calls."""

import sys

import numpy as np
from host_module import HERE, SCHEDULES, HostModule, scheduled

NAMES = (
    "sample::row_sums",
    "sample::product<true>",
    "sample::product<false>",
    "sample::product_tf32",
    "sample::hand_over",
    "sample::wrong",
)
WRONG = {
    "a barrier that half of the block does not reach": 0,
    "two barriers in the place of one": 1,
    "a barrier after a return": 2,
    "a shuffle of half a warp": 3,
    "a copy that is never waited for": 4,
    "a copy past the end of shared memory": 5,
    "a matrix row that is not aligned": 6,
    "shared memory that was never written": 7,
    "a write past the end of shared memory": 8,
    "a write past the end of an array": 9,
    "blocks that add to one number": 10,
    "blocks that add to one number by an atomic": 11,
    "a vector that is not aligned": 12,
    "lanes of one warp that wait for different things": 13,
}


def code() -> str:
    return '#line 1 "sample.cu"\n' + (HERE / "sample.cu").read_text()


def module(source: str | None = None) -> HostModule:
    return HostModule(code=source or code(), name_expressions=NAMES)


def row_sums(kernels: HostModule) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).integers(-9, 9, (3, 200)).astype(np.float32)
    sums = np.full(3, np.nan, np.float32)
    kernels.get_function("sample::row_sums")((3,), (96,), (x, sums, 200), shared_mem=4 * 4)
    return sums, x.sum(1)


def product(kernels: HostModule, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-8, 9, shape).astype(np.float16) for shape in ((16, 64), (64, 8)))
    c = np.full((16, 8), np.nan, np.float32)
    bits = [as_bfloat16(x) if dtype == "bfloat16" else x for x in (a, b)]
    name = f"sample::product<{'true' if dtype == 'bfloat16' else 'false'}>"
    kernels.get_function(name)((1,), (32,), (*bits, c, np.int32(64)), shared_mem=2 * 2 * (256 + 128))
    return c, a.astype(np.float32) @ b.astype(np.float32)


def product_tf32(kernels: HostModule) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    a, b = (rng.integers(-999, 999, shape).astype(np.float32) for shape in ((16, 8), (8, 8)))
    c = np.full((16, 8), np.nan, np.float32)
    kernels.get_function("sample::product_tf32")((1,), (32,), (a, b, c))
    return c, a @ b


def hand_over(kernels: HostModule) -> tuple[np.ndarray, np.ndarray]:
    x = np.arange(7 * 32, dtype=np.float32).reshape(7, 32)
    y = np.full_like(x, np.nan)
    kernels.get_function("sample::hand_over")((1,), (96,), (x, y, np.int32(7)), shared_mem=4 * 32)
    return y, 2 * x[:, ::-1]


def wrong(kernels: HostModule, what: int) -> np.ndarray:
    out = np.zeros(1024, np.float32)
    n = out.size if what == 9 else 256  # 1024 bytes of shared memory
    kernels.get_function("sample::wrong")((2,), (64,), (np.int32(what), out, n), shared_mem=1024)
    return out


def as_bfloat16(x: np.ndarray) -> np.ndarray:
    """The upper halves of numbers that bfloat16 holds exactly."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


CALLS = {
    "row_sums": row_sums,
    "product of bfloat16": lambda kernels: product(kernels, "bfloat16"),
    "product of float16": lambda kernels: product(kernels, "float16"),
    "product of tf32": product_tf32,
    "hand_over": hand_over,
}


if __name__ == "__main__":
    kernels = module()
    if sys.argv[1] in WRONG:
        wrong(kernels, WRONG[sys.argv[1]])
    else:
        for schedule in SCHEDULES:
            with scheduled(schedule):
                for call in CALLS.values():
                    np.testing.assert_array_equal(*call(kernels))
