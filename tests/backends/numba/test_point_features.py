"""Features of points as a caller has them: the kernel against the array functions of the map."""

import numpy as np
import pytest

import favorsharp as fs
from favorsharp.backend import fold, to_host
from favorsharp.dispatch import watch
from favorsharp.methods import DENSE_EXPONENTIAL

pytestmark = [pytest.mark.own_backend, pytest.mark.kernels]
pytest.importorskip("numba")

SHAPES = {
    "plain": ((), (), 37, 8, 12),
    "a map for each head": ((2, 3), (3,), 131, 7, 13),
    "maps for points without heads": ((), (2,), 70, 16, 64),
    "one": ((2,), (), 1, 3, 1),
    "many columns": ((2,), (), 67, 75, 20),
    "none": ((2,), (2,), 0, 5, 8),
}
TOLERANCE = {"float16": 4e-3, "float32": 2e-5, "float64": 1e-11}


def problem(shape, method="optimal", kernel="softmax"):
    batch, map_batch, n, d, m = SHAPES[shape]
    rng = np.random.default_rng(0)
    x, y = (spread * rng.standard_normal((*map_batch, 60, d)) + 0.2 for spread in (1.0, 1.3))
    return fs.feature_map(fs.fit(x, y, method=method, kernel=kernel), m, rng=0), rng.standard_normal((*batch, n, d))


def compare(fm, x, log, side):
    with fs.use("numba"), watch() as calls:
        got = getattr(fm, f"log_{side}" if log else side)(x)
    assert calls == [("exponential_features", "numba")]
    assert got.dtype == x.dtype
    want = fm.log_features(side, x.astype(np.float64))
    want = want if log else np.exp(want)
    error = TOLERANCE[x.dtype.name] * max(1.0, np.abs(want).max(initial=0))
    np.testing.assert_allclose(got, want, rtol=0, atol=error)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_dtype(shape, dtype, log):
    fm, x = problem(shape)
    x = x.astype(dtype)
    x.flags.writeable = False
    strided = np.repeat(x, 2, axis=-1)[..., ::2]
    for side in ("query", "key"):
        compare(fm, x, log, side)
        compare(fm, strided, log, side)


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("method", DENSE_EXPONENTIAL)
def test_every_method(method, kernel):
    fm, x = problem("plain", method, kernel)
    for side in ("query", "key"):
        compare(fm, x, True, side)


@pytest.mark.parametrize("log", [False, True])
def test_results_that_are_stored_past_the_caches(log):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9001, 4)).astype(np.float32)  # 18 tasks of unequal lengths
    for m in (128, 120):
        compare(fs.feature_map(fs.fit(x, x), m, rng=0), x, log, "query")


def test_a_point_that_is_not_finite_is_the_only_one_without_features():
    fm, x = problem("plain")
    x[3, 2], x[20, 1] = np.inf, np.nan
    with fs.use("numba"):
        for features in (fm.query(x), fm.log_key(x)):
            assert np.isnan(features[[3, 20]]).all()
            assert np.isfinite(np.delete(features, [3, 20], axis=0)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", ["optimal", "aderf", "sderf", "posrf"])
def test_a_form_of_an_orthogonal_matrix_is_left_out(method, dtype):
    """|g z|^2 is |z|^2 if both sides have the same moments, whatever their spread along the axes."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((500, 16)) * np.logspace(0, -3, 16)).astype(dtype)
    same = fs.feature_map(fs.fit(x, x, method=method), 8, rng=0)
    assert not any(side.dense.any() for side in fold(same, to_host, dtype=dtype))
    other = fs.feature_map(fs.fit(x, x[:, ::-1] * 2, method=method), 8, rng=0)
    left_out = method in ("sderf", "posrf")
    assert any(side.dense.any() for side in fold(other, to_host, dtype=dtype)) != left_out
