"""Moments whose products are rounded to float32, against those in float64."""

import numpy as np
import pytest

import favorsharp as fs
from favorsharp.moments import point_moments

pytestmark = [pytest.mark.own_backend, pytest.mark.kernels]
pytest.importorskip("numba")

from favorsharp_numba.point_moments import BLOCK  # noqa: E402


def points(heads, n, d):
    """float32 points far from the origin, whose columns have very different scales and are correlated."""
    rng = np.random.default_rng(0)
    common = rng.standard_normal((heads, n, 2)) @ rng.standard_normal((2, d))
    return ((common + rng.standard_normal((heads, n, d)) + 30) * np.logspace(-3, 0, d)).astype(np.float32)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "n", "d"), [(1, 3 * BLOCK + 7, 64), (3, BLOCK + 1, 70)])
def test_rounded_products_change_no_moment_by_more_than_the_contract_says(heads, n, d, masked):
    x = np.repeat(points(heads, n, d), 2, axis=-1)[..., ::2]
    x.flags.writeable = False
    mask = np.random.default_rng(1).random((heads, n)) < 0.6 if masked else None
    with fs.use("numba"):
        (count, mean, covariance), wide = (point_moments(x, mask, narrow=narrow) for narrow in (True, False))
    scale = np.sqrt(np.diagonal(wide[2], axis1=-2, axis2=-1))[:, None, :]
    assert np.array_equal(count, wide[0])
    assert 0 < np.max(np.abs(covariance - wide[2]) / (scale * np.swapaxes(scale, -1, -2))) < 4e-6
    np.testing.assert_allclose(mean, wide[1], rtol=1e-6)


@pytest.mark.parametrize("factor", [1e-30, 1e25, 0.0])
def test_squares_beyond_the_range_of_float32_are_computed_in_float64(factor):
    x = points(2, BLOCK + 1, 64) * np.float32(factor)
    with fs.use("numba"):
        narrow, wide = (point_moments(x, None, narrow=narrow) for narrow in (True, False))
    for one, other in zip(narrow, wide, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_point_that_is_not_finite_is_not_counted(bad):
    x = points(1, BLOCK + 5, 64)
    x[0, BLOCK, 3] = bad
    with fs.use("numba"):
        count, *_ = point_moments(x, None, narrow=True)
    assert count.item() == BLOCK + 4


def test_a_fit_of_points_to_themselves_is_near_that_of_two_copies():
    """The eigenvalues, which `a` shows, and the centres; axes whose eigenvalues are close may turn."""
    x = points(1, 2 * BLOCK, 64)
    one, two = fs.fit(x, x), fs.fit(x, x.copy())
    np.testing.assert_allclose(one.a, two.a, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(one.center_x, two.center_x, rtol=1e-6)
    eye = one.g1[0].astype(np.float64) @ one.g1[0].T
    np.testing.assert_allclose(eye, np.eye(64), atol=1e-6)
