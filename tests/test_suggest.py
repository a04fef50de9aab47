"""Suggestions: the smallest sufficient number of features, compared with measured errors."""

import numpy as np
import pytest

import favorsharp as fs
from favorsharp.diagnostics import load_sample, predicted_error, relative_error
from favorsharp.landmarks.settings import GAUSSIAN_TILT


@pytest.mark.parametrize("target", [0.6, 0.4])
def test_the_suggested_features_do_what_is_predicted_on_real_heads(target):
    q, k, v = (x[::2].astype(np.float64) for x in load_sample())
    found = fs.suggest(q, k, v, target_error=target)
    assert found.reached
    assert found.predicted_error <= target
    fm = fs.feature_map(fs.fit(q, k, method=found.method), found.num_features, draw=found.draw, rng=0)
    exact = fs.softmax_attention(q, k, v)
    measured = relative_error(fs.linear_attention(q, k, v, fm), exact).mean()
    assert 0.6 < measured / found.predicted_error < 1.5
    parameters = fs.fit(q, k, method=found.method)
    assert predicted_error(parameters, q, k, v, found.num_features) == pytest.approx(found.predicted_error)


def test_gaussian_kernel():
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((800, 3)), rng.standard_normal((800, 2))
    found = fs.suggest(x, x, v, target_error=0.3, kernel="gaussian", scale=0.5)
    fm = fs.feature_map(fs.fit(x, x, method=found.method, kernel="gaussian", scale=0.5), found.num_features, rng=0)
    weights = fs.kernel_matrix(x, x, kernel="gaussian", scale=0.5)
    measured = float(relative_error(fs.nadaraya_watson(x, x, v, fm), weights @ v / weights.sum(1, keepdims=True)))
    assert 0.4 < measured / found.predicted_error < 2


def test_exact_is_named_cheaper_for_few_points_and_only_then():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 4))
    assert fs.suggest(x, x, target_error=0.1).exact_is_cheaper
    many = rng.standard_normal((200_000, 4)).astype(np.float32)
    assert not fs.suggest(many, many, target_error=0.3).exact_is_cheaper
    assert not fs.suggest(40 * x, 40 * x, target_error=0.001).reached


def test_bad_targets():
    x = np.zeros((3, 2))
    for bad, error in ((0.0, ValueError), (1.5, ValueError), (float("nan"), ValueError), ("small", TypeError)):
        with pytest.raises(error, match="target_error"):
            fs.suggest(x, x, target_error=bad)


def test_no_points_are_refused():
    none, some = np.zeros((0, 3)), np.zeros((4, 3))
    for x, y in ((none, some), (some, none), (none, none)):
        with pytest.raises(ValueError, match="suggest needs points"):
            fs.suggest(x, y, target_error=0.5)


def test_exact_is_cheaper_until_the_products_of_features_are_fewer(monkeypatch):
    """Exact sums need n s products of points, features (n + s) m products of points and rows."""
    monkeypatch.setattr("favorsharp.diagnostics.suggestion._SIZES", (64,))
    rng = np.random.default_rng(0)
    for n, s, cheaper in ((128, 128, True), (129, 128, False), (64, 10_000, True), (65, 10_000, False)):
        x, y = rng.standard_normal((n, 4)), rng.standard_normal((s, 4))
        assert fs.suggest(x, y, target_error=0.3).exact_is_cheaper == cheaper


def test_landmarks_are_considered_for_attention():
    q, k, v = (x.astype(np.float32) for x in load_sample())
    assert fs.suggest(q, k, v, target_error=0.3).method != "landmarks"  # a map is needed for kernels
    found = fs.suggest(q, k, v, target_error=0.3, purpose="attention")
    assert (found.method, found.draw, found.biased, found.reached) == ("landmarks", "none", True, True)
    out = fs.linear_attention(q, k, v, fs.landmarks(found.num_features))
    assert 0.5 < relative_error(out, fs.softmax_attention(q, k, v)).mean() / found.predicted_error < 2
    assert not fs.suggest(q, k, v, target_error=0.3, purpose="attention", methods=["optimal"]).biased


def test_landmarks_are_not_suggested_where_features_need_fewer():
    """On a wide Gaussian kernel, few features are accurate."""
    x = np.random.default_rng(0).standard_normal((400, 6))
    found = fs.suggest(x, x, target_error=0.2, kernel="gaussian", scale=0.001, purpose="attention")
    assert found.num_features == 16


def test_landmarks_for_a_gaussian_kernel_have_its_tilt():
    x = np.random.default_rng(0).standard_normal((60, 3))
    found = fs.suggest(x, x, target_error=0.3, kernel="gaussian", purpose="attention", methods=["landmarks"])
    settings = fs.landmarks(found.num_features, kernel="gaussian", tilt=GAUSSIAN_TILT)
    v = np.random.default_rng(0).standard_normal((60, 32))  # `suggest` draws the same if no values are given
    logs = -0.5 * ((x[:, None] - x) ** 2).sum(-1)
    want = np.exp(logs) @ v / np.exp(logs).sum(-1, keepdims=True)
    some = np.unique(np.linspace(0, 59, 32).astype(int))
    got = fs.nadaraya_watson(x, x, v, settings)
    assert found.predicted_error == pytest.approx(float(relative_error(got[some], want[some])))


def test_the_error_of_landmarks_is_not_far_off_where_the_model_of_queries_does_not_hold():
    """In sharp clusters, which no normal distribution of queries describes, `expected_error` is 5 times too small."""
    rng = np.random.default_rng(11)
    centres = 2 * rng.standard_normal((12, 16))
    q, k = (centres[rng.integers(12, size=(2, 150))] + 0.3 * rng.standard_normal((2, 150, 16)) for _ in range(2))
    v = k @ rng.standard_normal((16, 5))
    found = fs.suggest(q, k, v, target_error=0.2, purpose="attention", methods=["landmarks"])
    assert found.reached
    out = fs.linear_attention(q, k, v, fs.landmarks(found.num_features))
    assert relative_error(out, fs.softmax_attention(q, k, v)).mean() < 1.5 * found.target_error


def test_the_purpose_is_checked():
    x = np.zeros((3, 2))
    with pytest.raises(ValueError, match="purpose 'fun' is unknown; accepted: kernel, attention"):
        fs.suggest(x, x, target_error=0.5, purpose="fun")
