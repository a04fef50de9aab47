"""Moments and fits in which pairs are weighted by attention."""

import sys

import numpy as np
import pytest
from problems import attention_problem, key_mask

import favorsharp as fs
from favorsharp.diagnostics import load_sample, relative_error


def by_pairs(x, y, weights):
    """The moments by their definition: sums over every pair, (n, s) weights."""
    weights = weights / weights.sum()
    mean_x, mean_y = np.einsum("ij,id->d", weights, x), np.einsum("ij,jd->d", weights, y)
    u, v = x - mean_x, y - mean_y
    return (
        (mean_x, mean_y),
        np.einsum("ij,id,ie->de", weights, u, u),
        np.einsum("ij,jd,je->de", weights, v, v),
        np.einsum("ij,id,je->de", weights, u, v),
    )


def attention_weights(x, y, power, kernel="softmax", scale=None, visible=None):
    scale = (x.shape[-1] ** -0.5 if kernel == "softmax" else 1.0) if scale is None else scale
    logits = scale * (x @ y.T if kernel == "softmax" else -0.5 * ((x[:, None] - y[None]) ** 2).sum(-1))
    weights = np.exp(logits - logits.max()) * (1.0 if visible is None else visible)
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return np.where(weights > 0, weights, 0) ** power * (1.0 if visible is None else visible)


def same(found, want):
    (mean_x, mean_y), covariance_x, covariance_y, cross = want
    np.testing.assert_allclose(found.mean_x[..., 0, :], mean_x, atol=1e-9)
    np.testing.assert_allclose(found.mean_y[..., 0, :], mean_y, atol=1e-9)
    np.testing.assert_allclose(found.covariance_x, covariance_x, atol=1e-9)
    np.testing.assert_allclose(found.covariance_y, covariance_y, atol=1e-9)
    np.testing.assert_allclose(found.cross, cross, atol=1e-9)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
def test_every_pair_weighs_its_attention(xp, power, kernel):
    x, y, _ = attention_problem(0, n=23, s=31)
    found = fs.attention_moments(xp(x + 5), xp(y), weighting=power, kernel=kernel, scale=0.3)
    found = type(found)(**{n: xp.back(v) if hasattr(v, "shape") else v for n, v in vars(found).items()})
    same(found, by_pairs(x + 5, y, attention_weights(x + 5, y, power, kernel, 0.3)))


def test_causal_masked_and_grouped(monkeypatch):
    """Tiles have only a few queries, so that several tiles are joined."""
    monkeypatch.setattr(sys.modules["favorsharp.attention_moments"], "_TILE_ELEMENTS", 128)
    (x, y, _), (z, _, _) = attention_problem(0, (2,), n=12), attention_problem(1, (2,), n=12)
    mask_x, mask_y = key_mask(1, (2, 12), "padding"), key_mask(2, (2, 12), "holes")
    mask_x[0], mask_y[0] = True, True
    past = np.tril(np.ones((12, 12), bool))
    for causal in (False, True):
        found = fs.attention_moments(x, y, is_causal=causal, mask_x=mask_x, mask_y=mask_y, weighting=0.7)
        grouped = fs.attention_moments(
            np.stack([x[1], z[1]]), y[1:], is_causal=causal, mask_x=mask_x[1], mask_y=mask_y[1:], enable_gqa=True
        )
        for i in range(2):
            visible = mask_x[i][:, None] & mask_y[i][None] & (past if causal else True)
            want = by_pairs(x[i], y[i], attention_weights(x[i], y[i], 0.7, visible=visible))
            same(
                fs.attention_moments(x[i], y[i], is_causal=causal, mask_x=mask_x[i], mask_y=mask_y[i], weighting=0.7),
                want,
            )
            np.testing.assert_allclose(found.cross[i], want[-1], atol=1e-9)
        weights = [attention_weights(a, y[1], 1.0, visible=visible) for a in (x[1], z[1])]
        want = by_pairs(np.concatenate([x[1], z[1]]), y[1], np.concatenate(weights))
        np.testing.assert_allclose(grouped.cross[0], want[-1], atol=1e-9)


def test_averaging_and_combining_agree():
    x, y, _ = attention_problem(3, (2, 3), n=10)
    whole = fs.attention_moments(x, y, axis=(0, -2), weighting=0.5)
    parts = fs.combine(*(fs.attention_moments(x[i], y[i], weighting=0.5) for i in range(2)))
    for name in ("count_x", "mean_x", "mean_y", "covariance_x", "covariance_y", "cross"):
        np.testing.assert_allclose(getattr(whole, name)[0], getattr(parts, name), atol=1e-9)
    with pytest.raises(ValueError, match="one weighting"):
        fs.combine(parts, fs.moments(x[0], y[0]))


@pytest.mark.parametrize("method", ["oprf", "saderf", "aderf", "sderf", "optimal"])
def test_weighing_all_alike_is_the_plain_fit(method):
    x, y, _ = attention_problem(4, (2,), n=40, s=30)
    plain, weighted = fs.fit(x, y, method=method), fs.fit(x, y, method=method, weighting=0)
    np.testing.assert_allclose(fs.excess(weighted, x, y), fs.excess(plain, x, y), rtol=1e-9)


def weighted_objective(p, x, y, weights):
    """Mean over weighted pairs of log E[(f1 f2)^2] - 2 log K."""
    gap = fs.log_second_moment(p, x, y) - 2 * np.log(fs.kernel_matrix(x, y))
    return (weights * gap).sum() / weights.sum()


def test_fits_are_best_for_the_weighted_pairs():
    """Their excess over weighted pairs is smaller than that of plain fits, and no change of `a`, rotation or center
    lowers it."""
    x, y, _ = attention_problem(5, n=60, d=4)
    weights = attention_weights(x, y, 1.0)
    for method in ("oprf", "sderf", "optimal"):
        p = fs.fit(x, y, method=method, weighting=1)
        assert weighted_objective(p, x, y, weights) < weighted_objective(fs.fit(x, y, method=method), x, y, weights)
        np.testing.assert_allclose(p.g1.T @ p.g2, np.eye(4), atol=1e-9)
    from dataclasses import replace

    best, rng = weighted_objective(p, x, y, weights), np.random.default_rng(0)
    for _ in range(10):
        skew = 0.05 * rng.standard_normal((4, 4))
        turn = np.linalg.qr(np.eye(4) + skew - skew.T)[0]
        turn = turn * np.sign(np.diag(turn))
        for changed in (
            replace(p, a=np.minimum(p.a + 0.02 * rng.standard_normal((1, 4)), 0)),
            replace(p, g1=turn @ p.g1, g2=turn @ p.g2),
            replace(p, center_x=p.center_x + 0.05 * rng.standard_normal((1, 4))),
        ):
            assert weighted_objective(changed, x, y, weights) >= best - 1e-9


def test_weighting_helps_on_real_heads():
    q, k, v = (x.astype(np.float64) for x in load_sample())
    exact = fs.softmax_attention(q, k, v)
    errors = [
        np.mean(
            [
                relative_error(fs.linear_attention(q, k, v, fs.feature_map(p, 64, rng=seed)), exact).mean()
                for seed in range(3)
            ]
        )
        for p in (fs.fit(q, k), fs.fit(q, k, weighting=1.0))
    ]
    assert errors[1] < 0.98 * errors[0]


def test_refusals():
    x, y, _ = attention_problem(0, n=6, s=7)
    for call, error, message in (
        (lambda: fs.fit(x, y, weighting=-1), ValueError, "weighting must be a finite number of 0 or more, got -1"),
        (lambda: fs.fit(x, y, weighting="1"), TypeError, "weighting must be a finite number of 0 or more, got str"),
        (lambda: fs.fit(x, y, is_causal=True), ValueError, "is_causal=True selects the pairs that a weighting counts"),
        (lambda: fs.fit(x, y, weighting=1, is_causal=True), ValueError, "is_causal needs .* x has n=6, y has s=7"),
        (lambda: fs.fit(fs.moments(x, y), weighting=1), TypeError, r"fit\(moments\) takes no weighting"),
        (lambda: fs.attention_moments(x, y[:, :3]), ValueError, "must agree in d"),
    ):
        with pytest.raises(error, match=message):
            call()


def weighted_second_moments(p, x, y, weights):
    """Mean over weighted pairs of (u + v)(u + v)^T, by every pair."""
    root = p.scale**0.5
    u, v = (root * x - p.center_x) @ p.g1.T, (root * y - p.center_y) @ p.g2.T
    sums = u[:, None] + v[None]
    return np.einsum("ij,ijd,ije->de", weights, sums, sums) / weights.sum()


@pytest.mark.parametrize("method", ["sderf", "optimal"])
def test_the_axes_of_weighted_pairs_are_their_own(method):
    """The coordinates of u + v are uncorrelated, although queries are correlated with the keys that they attend to."""
    x, y, _ = attention_problem(6, n=60, d=4)
    p = fs.fit(x, y, method=method, weighting=1, ridge=0)
    moment = weighted_second_moments(p, x, y, attention_weights(x, y, 1.0))
    np.testing.assert_allclose(moment, np.diag(np.diag(moment)), atol=1e-9)


@pytest.mark.parametrize("method", ["oprf", "saderf", "aderf"])
def test_one_a_is_the_best_for_weighted_pairs(method):
    from dataclasses import replace

    x, y, _ = attention_problem(7, n=60, d=4)
    weights = attention_weights(x, y, 1.0)
    p = fs.fit(x, y, method=method, weighting=1)
    best = weighted_objective(p, x, y, weights)
    for factor in (0.98, 1.02):
        assert weighted_objective(replace(p, a=factor * p.a), x, y, weights) > best
