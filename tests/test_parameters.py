"""The fits, compared with numbers computed elsewhere and with numerical minimisers; and the laws of the family."""

import json
import pickle
from pathlib import Path

import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import attention_problem, rotated
from scipy import optimize

import favorsharp as fs
from favorsharp.methods import DENSE_EXPONENTIAL

EXPECTED = json.loads((Path(__file__).parent / "data" / "expected_excess.json").read_text())["excess"]
FITTED = ("oprf", "saderf", "aderf", "sderf", "optimal")


def sample():
    with np.load(Path(fs.__file__).parent / "data" / "attention_sample.npz") as file:
        return file["q"], file["k"]


def transformed(p, q, k):
    root = p.scale**0.5
    return (q * root - p.center_x) @ p.g1.T, (k * root - p.center_y) @ p.g2.T


def mean_h(s, a):
    return np.sum(np.log(1 - 4 * a) - 0.5 * np.log(1 - 8 * a) + s / (1 - 8 * a))


@pytest.mark.parametrize("method", EXPECTED)
def test_excess_on_real_heads(xp, method):
    """The excess equals that of an independent computation on six heads of a sentence encoder (tests/data)."""
    q, k = (xp(x.astype(np.float64)) for x in sample())
    got = xp.back(fs.excess(fs.fit(q, k, method=method), q, k))
    np.testing.assert_allclose(got, EXPECTED[method], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_excess_on_real_heads_in_narrow_types(dtype):
    q, k = (x.astype(dtype) for x in sample())
    parameters = fs.fit(q, k)
    assert parameters.g1.dtype == np.float32
    np.testing.assert_allclose(fs.excess(parameters, q, k), EXPECTED["optimal"], rtol=1e-5)


@pytest.mark.parametrize("method", FITTED)
def test_points_that_are_queries_and_keys_alike_are_balanced_by_a_rotation(xp, method):
    """One decomposition serves both sides, so they are the same to the last bit."""
    x = xp(sample()[0].astype(np.float64))
    fitted = fs.fit(x, x, method=method)
    g1, g2 = xp.back(fitted.g1), xp.back(fitted.g2)
    np.testing.assert_array_equal(g1, g2)
    np.testing.assert_allclose(g1 @ np.swapaxes(g1, -1, -2), np.broadcast_to(np.eye(g1.shape[-1]), g1.shape), atol=1e-9)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**31), n=st.integers(1, 40), s=st.integers(1, 40), d=st.integers(1, 9), zeros=st.integers(0, 3)
)
def test_optimal_is_never_above_another(seed, n, s, d, zeros):
    rng = np.random.default_rng(seed)
    spread = np.diag(np.exp(rng.normal(0, 1, d)))
    spread[: min(zeros, d - 1)] = 0
    q = rng.standard_normal((n, d)) @ spread @ rotated(d, rng) + rng.normal(0, 1, d)
    k = rng.standard_normal((s, d)) @ np.diag(np.exp(rng.normal(0, 1, d))) + rng.normal(0, 1, d)
    best = float(fs.excess(fs.fit(q, k), q, k))
    for method in DENSE_EXPONENTIAL:
        other = float(fs.excess(fs.fit(q, k, method=method), q, k))
        assert best <= other + 1e-3 * (zeros > 0 or min(n, s) <= d) + 1e-7 * abs(other), method


@pytest.mark.parametrize("method", DENSE_EXPONENTIAL)
def test_family_laws(method):
    """G1'G2 = I, a at most 0, and the reported excess is the mean over all pairs."""
    q, k, _ = attention_problem(0, n=40, s=30)
    p = fs.fit(q, k, method=method)
    np.testing.assert_allclose(p.g1.T @ p.g2, np.eye(8), atol=1e-12)
    assert (p.a <= 0).all()
    u, v = transformed(p, q, k)
    np.testing.assert_allclose(fs.excess(p, q, k), oracle.excess(p.a[0], u, v), rtol=1e-10)


def test_best_a_is_the_minimum_of_h():
    """Every fitted a equals SciPy's minimum: one for each axis for sderf and optimal, a common one for the others."""
    q, k, _ = attention_problem(1, n=60, d=4)
    for method in FITTED:
        p = fs.fit(q, k, method=method, ridge=0)
        u, v = transformed(p, q, k)
        s = ((u[:, None] + v[None]) ** 2).mean((0, 1))
        if method in ("sderf", "optimal"):
            for axis in range(4):
                found = optimize.minimize_scalar(
                    lambda a, value=s[axis]: mean_h(value, a),
                    bounds=(-20, 0.12),
                    method="bounded",
                    options={"xatol": 1e-10},
                )
                np.testing.assert_allclose(p.a[0, axis], found.x, atol=1e-6)
        else:
            found = optimize.minimize_scalar(
                lambda a, s=s: sum(mean_h(value, a) for value in s),
                bounds=(-20, 0.12),
                method="bounded",
                options={"xatol": 1e-10},
            )
            np.testing.assert_allclose(p.a, found.x, atol=1e-6)


def test_published_transforms_are_minima_of_their_classes():
    """No neighbour is better: among diagonal pairs for saderf, all pairs with one a for aderf, and rotations for
    sderf."""
    q, k, _ = attention_problem(2, n=50, d=3)
    root = 3**-0.25
    x, y = q * root, k * root
    rng = np.random.default_rng(0)

    def value(g1, a):
        return oracle.excess(a, x @ g1.T, y @ np.linalg.inv(g1))

    for method in ("saderf", "aderf", "sderf"):
        p = fs.fit(q, k, method=method, ridge=0)
        here = value(p.g1, p.a[0])
        for size in (1e-1, 1e-2, 1e-3):
            for _ in range(60):
                step = size * rng.standard_normal((3, 3))
                if method == "saderf":
                    g = p.g1 * np.exp(np.diag(step))
                elif method == "aderf":
                    g = p.g1 @ (np.eye(3) + step)
                else:
                    g = np.linalg.qr(np.eye(3) + step - step.T)[0] @ p.g1
                pull = np.exp(size * rng.standard_normal(3 if method == "sderf" else 1))
                assert value(g, p.a[0] * pull) >= here - 1e-9


def test_optimal_is_the_minimum_over_all_free_parameters():
    """BFGS over G, a and both centres, from several starts at d = 2, finds no smaller excess (theory: `optimal`)."""
    q, k, _ = attention_problem(3, n=30, d=2)
    root = 2**-0.25
    x, y = q * root, k * root

    def objective(z):
        g, a = z[:4].reshape(2, 2), -np.exp(z[4:6])
        if abs(np.linalg.det(g)) < 1e-6:
            return 1e6
        return oracle.excess(a, (x - z[6:8]) @ g.T, (y - z[8:10]) @ np.linalg.inv(g))

    rng = np.random.default_rng(0)
    starts = [
        np.concatenate([np.eye(2).ravel(), rng.standard_normal(6)]) + 0.3 * rng.standard_normal(10) for _ in range(8)
    ]
    found = min(optimize.minimize(objective, start, method="BFGS").fun for start in starts)
    best = float(fs.excess(fs.fit(q, k, ridge=0), q, k))
    np.testing.assert_allclose(best, found, atol=1e-6)


def test_optimal_balances():
    q, k, _ = attention_problem(4, n=60)
    p = fs.fit(q, k, ridge=0)
    u, v = transformed(p, q, k)
    sigma_u, sigma_v = np.cov(u.T, bias=True), np.cov(v.T, bias=True)
    np.testing.assert_allclose(sigma_u, np.diag(np.diag(sigma_u)), atol=1e-12)
    np.testing.assert_allclose(sigma_u, sigma_v, atol=1e-12)
    assert (np.diff(np.diag(sigma_u)) <= 0).all()


def test_saderf_scales_queries_up_where_keys_are_larger():
    """The inverse of Psi is unbiased too, but has far more variance (an error in public code)."""
    q, k, _ = attention_problem(5, n=200)
    k = k * np.geomspace(0.1, 10, 8)
    p = fs.fit(q, k, method="saderf", ridge=0)
    m1, m2 = (q**2).mean(0), (k**2).mean(0)
    np.testing.assert_allclose(np.diag(p.g1), (m2 / m1) ** 0.25, rtol=1e-10)
    assert fs.excess(p, q, k) < fs.excess(fs.fit(q, k, method="oprf"), q, k)


def test_moments_are_scaled_and_each_side_has_its_own_count():
    q, k, _ = attention_problem(6, n=90, s=10)
    p = fs.fit(q, k, method="oprf", scale=0.7)
    s = 0.7 * ((q**2).sum(-1).mean() + (k**2).sum(-1).mean() + 2 * q.mean(0) @ k.mean(0)) / 8
    np.testing.assert_allclose(p.a, (1 - 2 * s - np.sqrt((2 * s + 1) ** 2 + 8 * s)) / 16, rtol=1e-10)


def test_scale_in_the_kernel_is_scale_in_the_data():
    q, k, _ = attention_problem(7)
    a, b = fs.fit(q, k, scale=0.25), fs.fit(q / 2, k / 2, scale=1.0)
    np.testing.assert_allclose(a.g1, b.g1, rtol=1e-9)
    assert fs.fit(q, k).scale == 8**-0.5
    assert fs.fit(q, k, kernel="gaussian").scale == 1.0


def test_kernel_does_not_change_the_excess():
    q, k, _ = attention_problem(8)
    for method in DENSE_EXPONENTIAL:
        values = [
            fs.excess(fs.fit(q, k, method=method, kernel=kernel, scale=0.5), q, k) for kernel in ("softmax", "gaussian")
        ]
        np.testing.assert_allclose(*values, rtol=1e-10)


def one_hot(n, d, seed):
    return np.eye(d)[np.random.default_rng(seed).integers(0, d, n)]


DEGENERATE = {
    "one-hot": (one_hot(40, 7, 0), one_hot(30, 7, 1)),
    "constant column": tuple(np.c_[x, np.ones(len(x))] for x in attention_problem(9, n=30)[:2]),
    "fewer points than axes": tuple(x[:5] for x in attention_problem(10, d=12)[:2]),
    "one point": tuple(x[:1] for x in attention_problem(11)[:2]),
    "zeros": (np.zeros((4, 6)), np.zeros((3, 6))),
    "one side zeros": (np.zeros((4, 8)), attention_problem(12)[1]),
    "no queries": (np.zeros((0, 8)), attention_problem(13)[1]),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("method", [*FITTED, "poisson", "geometric"])
def test_degenerate_data_can_be_fitted(few_xp, method, name):
    xp = few_xp
    q, k = DEGENERATE[name]
    p = fs.fit(xp(q), xp(k), method=method)
    g1, g2 = xp.back(p.g1), xp.back(p.g2)
    np.testing.assert_allclose(g1.T @ g2, np.eye(q.shape[-1]), atol=1e-10)
    features = xp.back(fs.feature_map(p, 16, rng=0).query(xp(q)))
    assert np.isfinite(features).all()


def test_ridge_is_relative():
    q, k = DEGENERATE["one-hot"]
    a, b = fs.fit(q, k, ridge=1e-3), fs.fit(100 * q, 100 * k, ridge=1e-3, scale=7**-0.5 * 1e-4)
    np.testing.assert_allclose(a.a, b.a, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("method", [m for m in fs.METHODS if m not in ("relu", "elu")])
def test_second_moment_is_monte_carlo(method, kernel):
    q, k, _ = attention_problem(14, n=6, d=3)
    q, k = 0.3 * q, 0.3 * k
    p = fs.fit(q, k, method=method, kernel=kernel, scale=0.6)
    m = 300_000
    fm = fs.feature_map(p, m, draw="iid", rng=0)
    products = fm.query(q) * fm.key(k) * m
    if method == "trig":
        products = 0.5 * (products[:, : m // 2] + products[:, m // 2 :])
    if method == "hyperbolic":
        products = products[:, : m // 2]
    np.testing.assert_allclose(np.log((products**2).mean(-1)), np.diag(fs.log_second_moment(p, q, k)), atol=0.12)


@pytest.mark.parametrize("method", [*DENSE_EXPONENTIAL, "poisson"])
def test_excess_is_the_mean_log_second_moment(xp, method):
    q, k, _ = attention_problem(15, (2,), n=12, s=9)
    p = fs.fit(xp(q), xp(k), method=method, kernel="gaussian")
    pairs = xp.back(fs.log_second_moment(p, xp(q), xp(k)))
    exact = oracle.log_kernel(q, k, "gaussian", 1.0)
    np.testing.assert_allclose(xp.back(fs.excess(p, xp(q), xp(k))), (pairs - 2 * exact).mean((-1, -2)), rtol=1e-9)


@pytest.mark.parametrize("size", [1.0, 0.3, 0.05])
def test_geometric_rate_minimises_its_bound(size):
    from scipy.special import i0e

    q, k, _ = (size * x for x in attention_problem(16, n=50, d=4))
    rate = float(fs.fit(q, k, method="geometric").rate[0, 0])
    size = np.sqrt((q**2).mean(0) * (k**2).mean(0)) * 0.5

    def bound(p):
        z = 2 * size / np.sqrt(1 - p)
        return -4 * np.log(p) + np.sum(np.log(i0e(z)) + z)

    found = optimize.minimize_scalar(bound, bounds=(1e-6, 1 - 1e-6), method="bounded", options={"xatol": 1e-12})
    np.testing.assert_allclose(rate, found.x, rtol=1e-5)


def test_poisson_rate_formula():
    q, k, _ = attention_problem(17, n=50)
    rate = fs.fit(q, k, method="poisson", scale=0.5).rate
    np.testing.assert_allclose(rate[0, 0], 0.5 * np.sqrt(((q**2).mean(0) * (k**2).mean(0)).mean()), rtol=1e-10)


def test_values_are_frozen_short_and_picklable():
    q, k, _ = attention_problem(18, (2,))
    p = fs.fit(q, k)
    with pytest.raises(AttributeError):
        p.a = 0
    assert len(repr(p)) < 200
    assert len(repr(fs.moments(q, k))) < 200
    fm = fs.feature_map(p, 16, rng=0)
    assert len(repr(fm)) < 200
    again = pickle.loads(pickle.dumps(fm))
    np.testing.assert_array_equal(again.log_query(q), fm.log_query(q))
    assert again.fingerprint == fm.fingerprint


@pytest.mark.jax
def test_gradients_stay_finite_where_a_is_flat():
    jax = pytest.importorskip("jax")
    q, k, _ = attention_problem(19, n=9, d=3)
    gradient = jax.grad(lambda x: fs.excess(fs.fit(x, jax.numpy.asarray(k)), x, jax.numpy.asarray(k)))(
        jax.numpy.asarray(q)
    )
    assert np.isfinite(np.asarray(gradient)).all()


@pytest.mark.parametrize("method", ["aderf", "sderf", "optimal"])
def test_axes_off_the_span_of_the_points_follow_from_the_data(rng, method):
    """The same points in another order have other rounding errors, which must not change features elsewhere."""
    x = rng.standard_normal((6, 10))
    maps = [
        fs.feature_map(fs.fit(z, z, method=method, kernel="gaussian", scale=0.1), 16, rng=0)
        for z in (x, x[::-1], np.concatenate([x, x, x]))
    ]
    elsewhere = rng.standard_normal((5, 10))
    for fm in maps[1:]:
        np.testing.assert_allclose(fm.log_query(elsewhere), maps[0].log_query(elsewhere), rtol=1e-6, atol=1e-6)


def test_both_ways_to_balance_find_the_same_axes(monkeypatch):
    """Data that span the space use eigenvalues of squares; traced arrays and other data use singular values."""
    q, k = (x.astype(np.float64) for x in sample())
    quick = fs.fit(q, k)
    monkeypatch.setattr("favorsharp._algebra.is_traced", lambda x: True)
    careful = fs.fit(q, k)
    for name in ("g1", "g2"):
        np.testing.assert_allclose(getattr(quick, name), getattr(careful, name), rtol=1e-9, atol=1e-9)
    product = np.swapaxes(quick.g1, -1, -2) @ quick.g2
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(q.shape[-1]), product.shape), atol=1e-12)


@pytest.mark.parametrize("method", ["saderf", "aderf", "optimal"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_side_without_spread_takes_the_measure_of_the_other(side, method):
    """Its ridge is relative to the second moment of the other side, so the balance does not depend on the common
    unit."""
    q, k, _ = attention_problem(17, n=40)
    flat = np.zeros((5, 8))
    x, y = (flat, k) if side == 0 else (q, flat)
    here, there = (fs.fit(unit * x, unit * y, method=method, scale=0.5, ridge=1e-2) for unit in (1.0, 1e3))
    np.testing.assert_allclose(there.g1, here.g1, rtol=1e-8, atol=1e-12)
