"""Measures how the tensor cores round, and the effect on sums over long sequences.

Tensor cores may truncate instead of rounding when they add a product to an accumulator. Then sums of thousands of
products are all too small, by some millionths for every hundred additions, which short tests do not show.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import turns
from records import DRY, record, with_tests
from turns import Step

with_tests()

ULP = 2.0**-23
ADDITIONS = {
    "1 + 3/4 ulp (rounded: 1, cut: 0)": (1.0, [0.75 * ULP]),
    "-1 - 3/4 ulp (rounded: -1, cut: 0)": (-1.0, [-0.75 * ULP]),
    "1 + 16 times 1/2 ulp (exact: 8)": (1.0, [ULP / 2] * 16),
    "1 + 16 times 1/4 ulp (exact: 4)": (1.0, [ULP / 4] * 16),
    "1 + 16 times 1/8 ulp (exact: 2)": (1.0, [ULP / 8] * 16),
}
"""Products that one mma adds to an accumulator; the answer is by how many ulps that changes."""

LENGTHS = (256,) if DRY else (256, 4096, 16_384, 131_072)
MANY_HEADS = 272
"""So many that no head is cut into segments, so that sums go on over the whole sequence."""

Product = Callable[[Any, Any, Any], Any]


def probe(multiply: Product) -> dict[str, Any]:
    """The rounding of one mma: `multiply(a (16, 16), b (16, 8), c (16, 8))` with float16 factors."""
    found = {}
    for name, (start, products) in ADDITIONS.items():
        a, b = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
        for i, product in enumerate(products):  # 2^-12 times the rest: both are exact in float16
            a[:, i], b[i] = 2.0**-12 * np.sign(product), abs(product) * 2.0**12
        total = multiply(a, b, np.full((16, 8), start, np.float32))
        found[name] = (float(total[0, 0]) - start) / ULP
    return {"sums": found, "additions are": "cut" if next(iter(found.values())) == 0 else "rounded"}


def by_the_kernels() -> Product:
    """One mma.m16n8k16 of the kernels' own primitives, on the GPU or through the shim."""
    from test_primitives import GROUP, NAMES, QUARTER, code, pairs

    def multiply(a: Any, b: Any, c: Any) -> Any:
        bits_a, bits_b = (np.ascontiguousarray(x.astype(np.float16)).view(np.uint16) for x in (a, b))
        left = np.stack([pairs(bits_a, GROUP + 8 * (i % 2), 2 * QUARTER + 8 * (i // 2)) for i in range(4)], 1)
        columns_of_b = np.ascontiguousarray(bits_b.T)
        right = np.stack([pairs(columns_of_b, GROUP, 2 * QUARTER + 8 * i) for i in range(2)], 1)
        rows, columns = GROUP[:, None] + 8 * np.array([0, 0, 1, 1]), 2 * QUARTER[:, None] + np.array([0, 1, 0, 1])
        out = np.zeros((16, 8), np.float32)
        out[rows, columns] = launch(left, right, np.ascontiguousarray(c[rows, columns]))
        return out

    def launch(left: Any, right: Any, d: Any) -> Any:
        if DRY:
            from host_module import HostModule as Module

            xp: Any = np
        else:
            import cupy as xp
            from cupy import RawModule as Module
        module = Module(code=code(), options=("-std=c++17",), name_expressions=NAMES)
        d = xp.asarray(d)
        kernel = module.get_function("favorsharp::check_mma<favorsharp::half>")
        kernel((1,), (32,), (xp.asarray(left), xp.asarray(right), d))
        return d if DRY else d.get()

    return multiply


def long_sum(dtype: str, mean: float, heads: int, n: int, is_causal: bool, fields: dict[str, Any]) -> None:
    """Record the error of a whole result, and the slope of the last results as a function of the exact ones."""
    import torch

    import favorsharp as fs
    from favorsharp._values import astype, map_arrays

    device = "cpu" if DRY else "cuda"
    sample = np.random.default_rng(0).standard_normal((2, 256, 64))
    host = astype(fs.feature_map(fs.fit(*sample, method="posrf"), 64, rng=0), np.float32)
    own = map_arrays(host, lambda x: torch.from_numpy(np.array(x)).to(device))
    generator = torch.Generator(device).manual_seed(n)
    q, k, v = (torch.randn(heads, n, 64, generator=generator, device=device) for _ in range(3))
    q, k, v = (x.to(getattr(torch, dtype)) for x in (q / 2, k / 2, v + mean))
    with torch.no_grad():
        got = fs.linear_attention(q, k, v, own, is_causal=is_causal)[:2].double()
        with fs.use("reference"):
            wide, exact = (x[:2].double() for x in (q, k, v)), map_arrays(own, lambda x: x.double())
            want = fs.linear_attention(*wide, exact, is_causal=is_causal)
    last = slice(-min(n, 512), None)
    a, b = got[:, last].flatten(), want[:, last].flatten()
    error = float((got - want).abs().max() / want.abs().max())
    of_norms, slope = float((got - want).norm() / want.norm()), float((a @ b) / (b @ b)) - 1
    record("long sum", **fields, error=error, error_of_norms=of_norms, slope_less_one=slope)


def steps() -> list[Step]:
    """The probe, and then sums: of values around 0, of values of one sign, and with many heads."""
    found = [Step("probe", {}, lambda: record("probe", **probe(by_the_kernels())))]
    kinds = [(2, 0.0, LENGTHS), (2, 1.0, LENGTHS), (MANY_HEADS, 0.0, (1024, 16_384, 65_536))]
    for heads, mean, lengths in kinds[:1] if DRY else kinds:
        for dtype in ("float32", "bfloat16"):
            for n in lengths:
                for is_causal in (False, True):
                    fields = {"n": n, "dtype": dtype, "causal": is_causal, "mean": mean, "heads": heads}
                    do = partial(long_sum, dtype, mean, heads, n, is_causal, fields)
                    found.append(Step("long sum", fields, do))
    return found


if __name__ == "__main__":
    sys.exit(turns.main(steps))
