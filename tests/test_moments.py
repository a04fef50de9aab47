"""Moments: their values, masks, grouped heads, and merging."""

import sys

import numpy as np
import pytest
from problems import attention_problem

import favorsharp as fs
from favorsharp.moments import weighted_moments


def assert_moments(a, b, to_host=np.asarray, rtol=1e-10):
    def back(x):
        return x if isinstance(x, np.ndarray) else to_host(x)

    for name in ("count_x", "mean_x", "covariance_x", "second_x", "count_y", "mean_y", "covariance_y", "second_y"):
        np.testing.assert_allclose(back(getattr(a, name)), back(getattr(b, name)), rtol=rtol, atol=1e-10, err_msg=name)


def test_values(xp):
    q, k, _ = attention_problem(0, (2, 3), n=31, s=17)
    got = fs.moments(xp(q), xp(k))
    assert xp.back(got.count_x).ravel()[0] == 31
    assert xp.back(got.count_y).ravel()[0] == 17
    np.testing.assert_allclose(xp.back(got.mean_x), q.mean(-2, keepdims=True), atol=1e-12)
    np.testing.assert_allclose(xp.back(got.second_y), np.swapaxes(k, -1, -2) @ k / 17, atol=1e-12)
    centred = q - q.mean(-2, keepdims=True)
    np.testing.assert_allclose(xp.back(got.covariance_x), np.swapaxes(centred, -1, -2) @ centred / 31, atol=1e-12)


def test_mask_is_dropping_rows(xp, rng):
    q, k, _ = attention_problem(1, n=20, s=15)
    mask_x, mask_y = rng.random(20) > 0.5, rng.random(15) > 0.5
    hidden = q.copy()
    hidden[~mask_x] = np.nan
    got = fs.moments(xp(hidden), xp(k), mask_x=xp(mask_x), mask_y=xp(mask_y))
    assert_moments(got, fs.moments(xp(q[mask_x]), xp(k[mask_y])), xp.back)


def test_axis_pools_a_batch(xp):
    q, k, _ = attention_problem(2, (4, 3), n=11, s=9)
    got = fs.moments(xp(q), xp(k), axis=(0, -2))
    assert tuple(got.mean_x.shape) == (1, 3, 1, 8)
    assert tuple(got.second_y.shape) == (1, 3, 8, 8)
    by_head = fs.moments(*(np.swapaxes(x, 0, 1).reshape(1, 3, -1, 8) for x in (q, k)))
    assert_moments(got, by_head, xp.back)


def test_grouped_heads_are_pooled(xp, rng):
    q, k, _ = attention_problem(3, (2, 6), n=7)
    k = k[:, :2]
    mask = rng.random((2, 1, 7)) > 0.3
    got = fs.moments(xp(q), xp(k), enable_gqa=True, mask_x=xp(mask))
    pooled = q.reshape(2, 2, 21, 8)
    pooled_mask = np.broadcast_to(mask[:, :, None], (2, 2, 3, 7)).reshape(2, 2, 21)
    assert_moments(got, fs.moments(pooled, k, mask_x=pooled_mask), xp.back)


def test_combine_is_associative_and_equals_one_pass():
    q, k, _ = attention_problem(4, (2,), n=50, s=40)
    parts = [fs.moments(q[:, a:b], k[:, c:d]) for a, b, c, d in [(0, 7, 0, 0), (7, 8, 0, 30), (8, 50, 30, 40)]]
    left = fs.combine(fs.combine(parts[0], parts[1]), parts[2])
    right = fs.combine(parts[0], fs.combine(parts[1], parts[2]))
    assert_moments(left, right)
    assert_moments(left, fs.moments(q, k))


def test_empty_is_the_identity_of_combine():
    q, k, _ = attention_problem(5, n=10)
    full, empty = fs.moments(q, k), fs.moments(q[:0], k[:0])
    for joined in (fs.combine(full, empty), fs.combine(empty, full)):
        np.testing.assert_array_equal(joined.mean_x, full.mean_x)
        np.testing.assert_array_equal(joined.covariance_y, full.covariance_y)


def test_far_offsets_do_not_cancel():
    q, k, _ = attention_problem(6, n=30000, d=3)
    near, far = fs.moments(q, k), fs.moments(q + 1e6, k - 1e6)
    np.testing.assert_allclose(far.covariance_x, near.covariance_x, rtol=1e-8, atol=1e-8)


def test_float32_is_gathered_in_float64():
    q, k, _ = attention_problem(7, n=100)
    narrow = [x.astype(np.float32) for x in (q, k)]
    got, want = fs.moments(*narrow), fs.moments(*(x.astype(np.float64) for x in narrow))
    for name in ("mean_x", "covariance_x", "mean_y", "covariance_y"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), strict=True)
    assert fs.fit(got).g1.dtype == np.float32


@pytest.mark.parametrize("axis", [0, (0,), -1, (-1, -2), 5, "points"])
def test_axis_must_hold_the_point_axis(axis):
    q, k, _ = attention_problem(8, (2,), n=4)
    with pytest.raises((TypeError, ValueError), match="axis"):
        fs.moments(q, k, axis=axis)


@pytest.mark.parametrize("total", [1e-3, 1.0, 1e3])
def test_weighted_moments_are_those_of_repeated_points(few_xp, monkeypatch, total):
    monkeypatch.setitem(weighted_moments.__globals__, "_TILE", 7)
    x, _, _ = attention_problem(5, n=20)
    weight = 1 + np.arange(20) % 3
    got = weighted_moments(few_xp(x), few_xp(weight * total))
    repeated = np.repeat(x, weight, axis=0)
    want = fs.moments(repeated, repeated)
    for name in ("mean_x", "covariance_x", "mean_y", "covariance_y"):
        np.testing.assert_allclose(few_xp.back(getattr(got, name)), getattr(want, name), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(few_xp.back(got.count_x), total * want.count_x)


def test_joined_moments_are_given_back_in_the_wider_dtype():
    x = np.random.default_rng(0).standard_normal((20, 3))
    narrow, wide = fs.moments(x.astype(np.float32), x.astype(np.float32)), fs.moments(x, x)
    assert (narrow.dtype, wide.dtype) == ("float32", "float64")
    for pair in ((narrow, wide), (wide, narrow)):
        joined = fs.combine(*pair)
        assert joined.dtype == "float64"
        assert fs.fit(joined).g1.dtype == np.float64
    assert fs.combine(narrow, narrow).dtype == "float32"


@pytest.mark.parametrize("method", ["optimal", "aderf", "oprf"])
@pytest.mark.parametrize("d", [1, 6])
def test_one_array_on_both_sides_is_summed_once(method, d, monkeypatch):
    """The fit is the same as for two arrays."""
    x = np.random.default_rng(0).standard_normal((2, 50, d)) * np.arange(1, d + 1) + 1
    mask = np.arange(50) % 3 > 0
    module, calls = sys.modules["favorsharp.moments"], []
    summed = module._strict_moments
    monkeypatch.setattr(module, "_strict_moments", lambda *given, **how: (calls.append(1), summed(*given, **how))[1])
    fitted = fs.fit(x, x, method=method, mask_x=mask, mask_y=mask)
    assert len(calls) == 1
    want = fs.fit(x, x.copy(), method=method, mask_x=mask, mask_y=mask)
    for name in ("a", "g1", "g2", "center_y"):
        np.testing.assert_allclose(getattr(fitted, name), getattr(want, name), rtol=1e-8, atol=1e-8, err_msg=name)
    other = fs.moments(x, x, mask_x=mask)
    assert other.count_x[0, 0, 0] != other.count_y[0, 0, 0]
