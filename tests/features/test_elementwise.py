"""relu, elu + 1 and a caller's own function."""

import numpy as np
import pytest
from problems import attention_problem

import favorsharp as fs


def features_of(method, q, k, m=12):
    fm = fs.feature_map(fs.fit(q, k, method=method, scale=0.5), m, rng=0)
    return fm, (q * 0.5**0.5) @ np.asarray(fm.projection).T


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_relu_and_elu():
    q, k, _ = attention_problem(0)
    for method, function in (
        ("relu", lambda z: np.maximum(z, 0)),
        ("elu", lambda z: np.where(z > 0, z + 1, np.exp(z))),
    ):
        fm, z = features_of(method, q, k)
        np.testing.assert_allclose(fm.query(q), function(z) / 12**0.5, rtol=1e-12)
        np.testing.assert_allclose(fm.log_query(q), np.log(function(z) / 12**0.5), rtol=1e-9)


def test_callable():
    q, k, _ = attention_problem(1)
    fm, z = features_of(np.square, q, k)
    np.testing.assert_allclose(fm.query(q), z**2 / 12**0.5, rtol=1e-12)


def test_callable_may_change_the_number_of_features():
    q, k, _ = attention_problem(2)
    fm, z = features_of(lambda z: np.exp(np.concatenate([z, -z], axis=-1)), q, k)
    assert fm.num_features == 24
    assert fm.query(q).shape == (37, 24)
    np.testing.assert_allclose(fm.query(q)[:, :12], np.exp(z) / 24**0.5, rtol=1e-12)


def test_negative_features_are_refused():
    q, k, _ = attention_problem(3)
    fm, _ = features_of(np.sin, q, k)
    with pytest.raises(ValueError, match="non-negative"):
        fm.log_query(q)
