"""Fourier, Poisson and geometric features."""

import numpy as np
import pytest
from problems import attention_problem

import favorsharp as fs


@pytest.mark.parametrize("method", ["trig", "poisson", "geometric"])
def test_signed_maps_have_no_logarithms(method):
    q, k, _ = attention_problem(0)
    fm = fs.feature_map(fs.fit(q, k, method=method), 16, rng=0)
    assert not fm.positive
    assert not hasattr(fm, "log_query")
    assert fm.query(q).shape == (37, 16)
    assert (fm.query(q) < 0).any()


def test_fourier_features_are_bounded_for_the_gaussian_kernel():
    q, k, _ = attention_problem(1)
    fm = fs.feature_map(fs.fit(q, k, method="trig", kernel="gaussian"), 16, rng=0)
    np.testing.assert_allclose((fm.query(100 * q) ** 2).sum(-1), 1, rtol=1e-12)


def test_fourier_needs_pairs():
    q, k, _ = attention_problem(2)
    with pytest.raises(ValueError, match="num_features must be even .* got 7"):
        fs.feature_map(fs.fit(q, k, method="trig"), 7)


@pytest.mark.parametrize("method", ["poisson", "geometric"])
def test_zero_coordinates(method):
    """0 to the power 0 is 1, and 0 to any other power is 0."""
    q, k, _ = attention_problem(3)
    q[:, 2] = 0
    q[4] = 0
    fm = fs.feature_map(fs.fit(q, k, method=method), 64, rng=0)
    counts = np.asarray(fm.projection)
    features = fm.query(q)
    assert np.isfinite(features).all()
    assert (features[:, counts[:, 2] > 0] == 0).all()
    assert (features[4] != 0).tolist() == (counts.sum(-1) == 0).tolist()


def test_counts_are_poisson():
    from scipy import stats

    q, k, _ = attention_problem(4)
    p = fs.fit(q, k, method="poisson")
    counts = np.asarray(fs.feature_map(p, 4000, draw="iid", rng=0).projection).ravel()
    rate = float(p.rate[0, 0])
    expected = stats.poisson.pmf(np.arange(4), rate) * counts.size
    seen = np.array([(counts == value).sum() for value in range(4)])
    assert (np.abs(seen - expected) < 5 * np.sqrt(expected)).all()


def test_large_rates_do_not_underflow():
    from favorsharp.draws import discrete_rows

    counts, _ = discrete_rows("poisson", np.random.default_rng(0).standard_normal((50, 4)), np.full((1, 1), 900.0))
    assert abs(counts.mean() - 900) < 12
