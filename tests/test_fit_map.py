"""`fit_map` is `fit` and `feature_map` in one call."""

import numpy as np
import pytest

import favorsharp as fs

X, Y = np.random.default_rng(0).standard_normal((2, 3, 30, 4))


@pytest.mark.parametrize("method", fs.METHODS)
@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
def test_the_map_of_two_calls(method, kernel):
    mask = np.arange(30) < 20
    options = {"method": method, "kernel": kernel, "scale": 0.3, "axis": (0, -2), "mask_x": mask, "mask_y": mask}
    found = fs.fit_map(X, Y, 8, draw="iid", rng=5, **options)
    wanted = fs.feature_map(fs.fit(X, Y, **options), 8, draw="iid", rng=5)
    assert found.fingerprint == wanted.fingerprint


def test_defaults_are_those_of_both():
    assert fs.fit_map(X, Y, 8, rng=1).fingerprint == fs.feature_map(fs.fit(X, Y), 8, rng=1).fingerprint


def test_grouped_heads():
    keys = Y[:1]
    wanted = fs.feature_map(fs.fit(X, keys, enable_gqa=True), 8, rng=0)
    assert fs.fit_map(X, keys, 8, enable_gqa=True, rng=0).fingerprint == wanted.fingerprint


def test_one_array_is_refused():
    with pytest.raises(TypeError, match="y is missing"):
        fs.fit_map(X, None, 8)
