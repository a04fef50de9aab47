"""Kernel operators: unbiased products, and normalised rows."""

import numpy as np
import pytest
from problems import attention_problem

import favorsharp as fs

METHODS = ["optimal", "posrf", "hyperbolic", "trig", "poisson", "geometric", "relu"]


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("method", METHODS)
def test_matvec_is_the_product_of_features(xp, method, kernel):
    x, y, v = attention_problem(0, (2,), n=23, s=17)
    arrays = [xp(a) for a in (x, y, v)]
    fm = fs.feature_map(fs.fit(*arrays[:2], method=method, kernel=kernel), 12, rng=0)
    got = fs.kernel_matvec(*arrays, fm)
    assert xp.is_like(got, arrays[2])
    features = [xp.back(fm.query(arrays[0])), xp.back(fm.key(arrays[1]))]
    want = features[0] @ (np.swapaxes(features[1], -1, -2) @ v)
    np.testing.assert_allclose(xp.back(got), want, rtol=1e-8, atol=1e-8 * np.abs(want).max())


@pytest.mark.parametrize("method", ["optimal", "trig", "poisson"])
def test_nadaraya_watson_normalises_rows(few_xp, method):
    xp = few_xp
    x, y, v = attention_problem(1, n=23, s=170, d=3)
    arrays = [xp(a) for a in (x, y, v)]
    fm = fs.feature_map(fs.fit(*arrays[:2], method=method, kernel="gaussian", scale=0.3), 64, rng=0)
    weights = xp.back(fm.query(arrays[0])) @ xp.back(fm.key(arrays[1])).T
    total = weights.sum(-1, keepdims=True)
    want = np.where(total > 0, weights @ v / np.where(total > 0, total, 1), np.nan)
    np.testing.assert_allclose(xp.back(fs.nadaraya_watson(*arrays, fm)), want, rtol=1e-7, atol=1e-9)


def test_a_row_whose_estimated_denominator_is_not_positive_is_nan():
    x, y, v = attention_problem(2, n=60, s=5, d=3)
    fm = fs.feature_map(fs.fit(x, y, method="trig", kernel="gaussian", scale=4.0), 8, rng=0)
    total = (fm.query(x) @ fm.key(y).T).sum(-1)
    got = fs.nadaraya_watson(x, y, v, fm)
    assert (total <= 0).any()
    np.testing.assert_array_equal(np.isnan(got).any(-1), total <= 0)


def test_it_converges_to_the_exact_estimate():
    x, y, v = attention_problem(3, n=40, s=300, d=2)
    weights = fs.kernel_matrix(x, y, kernel="gaussian")
    exact = weights @ v / weights.sum(-1, keepdims=True)
    parameters = fs.fit(x, y, kernel="gaussian")
    errors = [
        np.linalg.norm(fs.nadaraya_watson(x, y, v, fs.feature_map(parameters, m, rng=0)) - exact) for m in (8, 4096)
    ]
    assert errors[1] < errors[0] / 4


def test_values_of_one_axis(xp):
    x, y, v = (xp(a) for a in attention_problem(4, n=9, s=7))
    fm = fs.feature_map(fs.fit(x, y), 8, rng=0)
    for function in (fs.kernel_matvec, fs.nadaraya_watson):
        got = function(x, y, v[:, 0], fm)
        assert tuple(got.shape) == (9,)
        np.testing.assert_allclose(xp.back(got), xp.back(function(x, y, v, fm))[:, 0], rtol=1e-10)


@pytest.mark.parametrize("method", ["optimal", "trig"])
@pytest.mark.parametrize(("n", "s"), [(0, 3), (3, 0), (1, 1)])
def test_next_to_nothing(few_xp, method, n, s):
    xp = few_xp
    x, y, v = attention_problem(5, n=5)
    fm = fs.feature_map(fs.fit(xp(x), xp(y), method=method, kernel="gaussian"), 8, rng=0)
    for function in (fs.kernel_matvec, fs.nadaraya_watson):
        assert xp.back(function(xp(x[:n]), xp(y[:s]), xp(v[:s]), fm)).shape == (n, 5)


def test_signed_factors_do_not_overflow():
    """Fourier features of the softmax kernel hold exp(|x|^2 / 2): normalised rows never form it."""
    x, y, v = (a.astype(np.float32) for a in attention_problem(6, n=20, d=4))
    fm = fs.feature_map(fs.fit(x, y, method="trig"), 64, rng=0)
    out = fs.nadaraya_watson(30 * x, 30 * y, v, fm)
    assert not np.isinf(out).any()
