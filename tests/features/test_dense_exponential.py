"""The exponential maps: their log features are the formula, on every library."""

import numpy as np
import oracle
import pytest
from problems import attention_problem

import favorsharp as fs
from favorsharp.methods import DENSE_EXPONENTIAL


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("method", DENSE_EXPONENTIAL)
def test_log_features_are_the_formula(method, kernel):
    q, k, _ = attention_problem(0, n=9)
    p = fs.fit(q, k, method=method, kernel=kernel, scale=0.6)
    w = np.random.default_rng(0).standard_normal((6, 8))
    fm = fs.feature_map(p, 6, draw=w)
    rows = np.concatenate([w[:3], -w[:3]]) if method == "hyperbolic" else w
    root = p.scale**0.5
    query = oracle.log_feature(rows, q * root, p.a, p.g1, p.center_x, p.center_y, kernel) - 0.5 * np.log(6)
    key = oracle.log_feature(rows, k * root, p.a, p.g2, p.center_y, p.center_x, kernel) - 0.5 * np.log(6)
    # the split of the constant of the centres between the two sides does not matter, because it cancels
    split = fm.log_query(q)[:1, :1] - query[:1, :1] if method == "optimal" and kernel == "gaussian" else 0
    np.testing.assert_allclose(fm.log_query(q), query + split, atol=1e-11)
    np.testing.assert_allclose(fm.log_key(k), key - split, atol=1e-11)
    np.testing.assert_allclose(fm.query(q), np.exp(fm.log_query(q)), rtol=1e-12)
    np.testing.assert_allclose(fm.projection, rows)


@pytest.mark.parametrize("method", fs.METHODS)
def test_one_seed_one_map_on_every_library(xp, method):
    """This includes the fit, because the axes have canonical signs and a canonical order."""
    q, k, _ = attention_problem(1, (2,), n=30)
    want = fs.feature_map(fs.fit(q, k, method=method), 12, rng=7)
    got = fs.feature_map(fs.fit(xp(q), xp(k), method=method), 12, rng=7)
    for points, name in ((q, "query"), (k, "key")):
        features = getattr(got, name)(xp(points))
        assert xp.is_like(features, xp(q))
        np.testing.assert_allclose(xp.back(features), getattr(want, name)(points), rtol=1e-8, atol=1e-10)


def test_order_of_the_data_does_not_turn_the_axes():
    q, k, _ = attention_problem(2, n=40)
    a, b = (fs.feature_map(fs.fit(q[::step], k[::step]), 12, rng=0) for step in (1, -1))
    np.testing.assert_allclose(a.log_query(q), b.log_query(q), atol=1e-8)


def test_tied_signs_are_settled():
    """Plain data have axes such as (1, -1), whose two largest entries are equally large."""
    q = np.array([[1.0, -1.0], [-1.0, 1.0], [2.0, -2.0], [0.5, 0.5], [-0.5, -0.5]])
    jitter = 1e-13 * np.random.default_rng(0).standard_normal((20, *q.shape))
    maps = [fs.fit(q + noise, q + noise, method="sderf") for noise in jitter]
    for p in maps[1:]:
        np.testing.assert_allclose(p.g1, maps[0].g1, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_narrow_types(dtype):
    torch = pytest.importorskip("torch")
    q, k, _ = (torch.asarray(x) for x in attention_problem(3, n=9))
    narrow = [x.to(getattr(torch, dtype)) for x in (q, k)]
    fm = fs.feature_map(fs.fit(*narrow), 16, rng=0)
    wide = fs.feature_map(fs.fit(*(x.double() for x in narrow)), 16, rng=0)
    got = fm.log_query(narrow[0])
    assert got.dtype == narrow[0].dtype
    tolerance = {"float16": 5e-3, "bfloat16": 5e-2, "float32": 1e-5}[dtype]
    torch.testing.assert_close(got.double(), wide.log_query(narrow[0].double()), rtol=tolerance, atol=tolerance)


def test_values_out_of_range_are_nan_not_minus_infinity():
    q, k, _ = (x.astype(np.float32) for x in attention_problem(4, n=5))
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    with np.errstate(all="ignore"):
        assert np.isnan(fm.log_key(k * np.float32(1e25))).all()


def test_inputs_are_not_modified():
    q, k, _ = attention_problem(5)
    before = q.copy(), k.copy()
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    fm.query(q)
    fm.log_key(k)
    np.testing.assert_array_equal(q, before[0])
    np.testing.assert_array_equal(k, before[1])
