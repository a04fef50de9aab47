"""Products with the estimated kernel are linear in the values, and finite if the exact result is."""

import numpy as np
import pytest
from problems import attention_problem

import favorsharp as fs


def test_intermediate_factors_of_any_size():
    """With large queries and small keys, the features of each side leave float32's range, but their products do not."""
    x, y, v = (a.astype(np.float32) for a in attention_problem(0, n=20, s=30, d=4))
    x, y = x + np.float32([200, 0, 0, 0]), y * np.float32([0, 1, 1, 1])  # x.y is as if x had not moved
    fm = fs.feature_map(fs.fit(x, y), 64, rng=0)
    wide = [a.astype(np.float64) for a in (x, y, v)]
    want = fs.kernel_matvec(*wide, fs.feature_map(fs.fit(*wide[:2]), 64, rng=0))
    got = fs.kernel_matvec(x, y, v, fm)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize("method", ["optimal", "posrf", "trig", "poisson", "relu"])
def test_linear_in_the_values_and_additive_in_the_keys(few_xp, method):
    xp = few_xp
    x, y, v = attention_problem(1, (2,), n=9, s=21, d=3)
    fm = fs.feature_map(fs.fit(xp(x), xp(y), method=method, kernel="gaussian"), 16, rng=0)

    def matvec(y, v):
        return xp.back(fs.kernel_matvec(xp(x), xp(y), xp(v), fm))

    whole = matvec(y, v)
    atol = 1e-12 * max(1, np.abs(whole).max())
    np.testing.assert_allclose(matvec(y, 3 * v - 1), 3 * whole - matvec(y, np.ones_like(v)), atol=8 * atol)
    np.testing.assert_allclose(matvec(y[:, :8], v[:, :8]) + matvec(y[:, 8:], v[:, 8:]), whole, atol=4 * atol)
    shuffled = np.random.default_rng(0).permutation(21)
    np.testing.assert_allclose(matvec(y[:, shuffled], v[:, shuffled]), whole, atol=4 * atol)
