"""Kernel operators: products are unbiased, and rows are normalised."""

import numpy as np
import pytest
from problems import attention_problem

import favorsharp as fs
from favorsharp._values import astype
from favorsharp.regression import left_out

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


@pytest.mark.parametrize(("dtype", "least"), [("float32", 1e-4), ("float64", 1e-10)])
def test_an_estimate_without_a_point_is_nan_where_rounding_errors_are_left(dtype, least):
    """Nearly all of the weight at the first point is its own."""
    for share, is_lost in ((least / 10, True), (least * 10, False)):
        x, v = np.array([[1.0, 0.0], [share, 1.0], [0.0, 1.0]], dtype), np.array([5.0, 7.0, 9.0], dtype)
        fm = fs.feature_map(fs.fit(x, x, method="relu"), 2, draw=np.eye(2, dtype=dtype))
        found = fs.leave_one_out(x, v, fm)
        assert np.isnan(found[0]) == is_lost
        np.testing.assert_allclose(found[1:], [9, 7], rtol=1e-2)


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
        out = xp.back(function(xp(x[:n]), xp(y[:s]), xp(v[:s]), fm))
        assert out.shape == (n, 5)
        assert s > 0 or (out == 0).all()


def test_signed_factors_do_not_overflow():
    """Fourier features of the softmax kernel contain exp(|x|^2 / 2), which normalised rows never compute."""
    x, y, v = (a.astype(np.float32) for a in attention_problem(6, n=20, d=4))
    fm = fs.feature_map(fs.fit(x, y, method="trig"), 64, rng=0)
    out = fs.nadaraya_watson(30 * x, 30 * y, v, fm)
    assert not np.isinf(out).any()


@pytest.mark.parametrize("method", ["optimal", "trig"])
def test_weighted_points_are_left_out_as_a_whole(few_xp, method):
    x, _, v = attention_problem(10, n=15, d=2)
    weight = 1 + np.arange(15) % 3
    parameters = fs.fit(few_xp(x), few_xp(x), method=method, kernel="gaussian", scale=0.1)
    fm = fs.feature_map(parameters, 64, rng=0)
    got = few_xp.back(left_out(few_xp(x), few_xp(v), fm, few_xp(weight.astype(float))))
    for i in range(15):
        others = (few_xp(np.repeat(np.delete(a, i, 0), np.delete(weight, i), axis=0)) for a in (x, v))
        want = few_xp.back(fs.nadaraya_watson(few_xp(x[i : i + 1]), *others, fm))
        np.testing.assert_allclose(got[i : i + 1], want, rtol=1e-8)


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize(("offset", "spread", "scale"), [(2010.0, 6.0, 0.1), (1e3, 1.0, 0.5)])
def test_gaussian_features_far_from_the_origin(offset, spread, scale, window, rng):
    """They are as accurate as float32 inputs allow, compared with the same map in float64."""
    x = (offset + spread * rng.standard_normal((200, 3))).astype(np.float32)
    v = rng.standard_normal((200, 2)).astype(np.float32)
    fm = fs.feature_map(fs.fit(x, x, kernel="gaussian", scale=scale), 512, rng=0)
    got = fs.linear_attention(x, x, v, fm, window=window)
    wide = fs.linear_attention(*(z.astype(float) for z in (x, x, v)), astype(fm, np.float64), window=window)
    np.testing.assert_allclose(got, wide, atol=5 * np.spacing(np.float32(offset)) * scale**0.5)


@pytest.mark.parametrize("method", ["posrf", "optimal"])
def test_exact_scores_far_from_the_origin(method, rng):
    """Scores of the reference: with a window as long as the sequence, all scores are exact."""
    x = (1e3 + rng.standard_normal((20, 3))).astype(np.float32)
    v = rng.standard_normal((20, 2)).astype(np.float32)
    fm = fs.feature_map(fs.fit(x, x, method=method, kernel="gaussian", scale=0.5), 8, rng=0)
    weights = fs.kernel_matrix(x.astype(float), x.astype(float), kernel="gaussian", scale=0.5)
    with fs.use("reference"):
        got = fs.linear_attention(x, x, v, fm, window=20)
    np.testing.assert_allclose(got, weights @ v / weights.sum(1, keepdims=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "unit"), [("optimal", 1e-30), ("optimal", 1e30), ("trig", 1e-30)])
@pytest.mark.parametrize("library", ["numpy", "jax without float64"])
@pytest.mark.jax
def test_estimates_and_diagnoses_in_any_unit(method, unit, library):
    jax = pytest.importorskip("jax")
    asarray = np.asarray if library == "numpy" else jax.numpy.asarray
    x, _, v = (a.astype(np.float32) for a in attention_problem(8, n=40, d=3))

    def numbers(unit):
        with jax.enable_x64(False):
            points, scale = asarray(x * np.float32(unit)), 0.3 / unit**2
            options = {"method": method, "kernel": "gaussian", "scale": scale}
            p, values = fs.fit(points, points, **options), asarray(v)
            fm = fs.feature_map(p, 64, rng=0)
            out = [fs.nadaraya_watson(points, points, values, fm), fs.leave_one_out(points, values, fm)]
            out += [fs.log_second_moment(p, points, points), fs.fit(points, points, weighting=0.5, **options).g1]
            out += [] if method == "trig" else [fs.excess(p, points, points)]
            return [np.asarray(a) for a in out]

    for got, want in zip(numbers(unit), numbers(1.0), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["optimal", "trig"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_half_precision_points_with_wide_values(method, dtype):
    x, y, v = attention_problem(9, n=20, s=30, d=3)
    x, y, v = x.astype(np.float16), y.astype(np.float16), (1e6 + 1e6 * v).astype(dtype)
    fm = fs.feature_map(fs.fit(x, y, method=method, kernel="gaussian", scale=0.3), 64, rng=0)
    got = fs.nadaraya_watson(x, y, v, fm)
    want = fs.nadaraya_watson(*(a.astype(float) for a in (x, y, v)), fm)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, want, rtol=1e-3 if dtype == "float32" else 1e-12)
