"""The op equals its formula, for all axes and dtypes."""

import numpy as np
import pytest

from favorsharp.ops.exponential_features import exponential_features

SHAPES = {
    "plain": ((7, 3), (5, 3), (7, 1), (1, 5)),
    "batched points": ((2, 4, 7, 3), (5, 3), (2, 4, 7, 1), (1, 5)),
    "rows per head": ((2, 4, 7, 3), (4, 5, 3), (2, 4, 7, 1), (4, 1, 5)),
    "one feature, one coordinate": ((1, 1), (1, 1), (1, 1), (1, 1)),
    "no points": ((2, 0, 3), (5, 3), (2, 0, 1), (1, 5)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_formula(xp, name, rng):
    u, rows, row, column = (rng.standard_normal(shape) for shape in SHAPES[name])
    want = np.exp((u[..., :, None, :] * rows[..., None, :, :]).sum(-1) + row + column)
    got = exponential_features(xp(u), xp(rows), xp(row), xp(column))
    assert xp.is_like(got, xp(u))
    np.testing.assert_allclose(xp.back(got), want, rtol=1e-13)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_inputs_are_summed_wide(dtype):
    """The terms cancel to about 1, but intermediate results are too large for the dtype: 300 * 300 overflows
    float16."""
    torch = pytest.importorskip("torch")
    narrow = getattr(torch, dtype)
    u, rows = torch.full((1, 2), 300.0, dtype=narrow), torch.tensor([[300.0, -300.0]], dtype=narrow)
    zero = torch.zeros((1, 1), dtype=narrow)
    got = exponential_features(u, rows, zero, zero)
    assert got.dtype == narrow
    assert got.item() == 1.0
