"""Results of dask arrays are lazy, and equal those of NumPy arrays for all chunks."""

import numpy as np
import pytest
from problems import attention_problem

import favorsharp as fs

da = pytest.importorskip("dask.array")


@pytest.mark.parametrize("method", ["optimal", "trig", "poisson"])
@pytest.mark.parametrize("function", [fs.kernel_matvec, fs.nadaraya_watson])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_chunks_give_the_numbers_of_one_array(function, method, batch):
    x, y, v = attention_problem(0, batch, n=57, s=203, d=3)
    fm = fs.feature_map(fs.fit(x, y, method=method, kernel="gaussian", scale=0.2), 64, rng=0)
    want = function(x, y, v, fm)
    chunks = (*(1,) * len(batch), 11, 2)  # the axis of coordinates is cut, too
    lazy = function(*(da.from_array(a, chunks=chunks) for a in (x, y, v)), fm)
    assert isinstance(lazy, da.Array)
    assert lazy.shape == want.shape
    assert lazy.dtype == want.dtype
    np.testing.assert_allclose(lazy.compute(), want, rtol=1e-8, atol=1e-8 * np.nanmax(np.abs(want)))


def test_moments_and_fits():
    x, y, _ = attention_problem(1, n=57, s=203)
    lazy = fs.moments(da.from_array(x, chunks=(10, 3)), da.from_array(y, chunks=(20, 8)))
    whole = fs.moments(x, y)
    for name in ("count_x", "mean_x", "covariance_x", "count_y", "mean_y", "covariance_y"):
        assert isinstance(getattr(lazy, name), da.Array)
        np.testing.assert_allclose(getattr(lazy, name).compute(), getattr(whole, name), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(fs.fit(lazy).g1, fs.fit(whole).g1, rtol=1e-8)
    np.testing.assert_allclose(fs.fit(da.from_array(x), da.from_array(y)).g1, fs.fit(x, y).g1, rtol=1e-8)


def test_nothing_is_read_before_it_is_asked_for():
    def refuse(block):
        raise AssertionError("computed")

    x, y, v = attention_problem(2, n=20)
    fm = fs.feature_map(fs.fit(x, y), 8, rng=0)
    trap = da.map_blocks(refuse, da.from_array(x, chunks=(5, 8)), dtype=x.dtype, meta=np.empty((0, 0)))
    lazy = fs.nadaraya_watson(trap, trap, da.from_array(v), fm)
    fs.moments(trap, trap)
    with pytest.raises(AssertionError, match="computed"):
        lazy.compute()


def test_values_of_one_axis_and_errors():
    x, y, v = attention_problem(3, n=20)
    fm = fs.feature_map(fs.fit(x, y), 8, rng=0)
    got = fs.kernel_matvec(*(da.from_array(a, chunks=6) for a in (x, y, v[:, 0])), fm)
    np.testing.assert_allclose(got.compute(), fs.kernel_matvec(x, y, v[:, 0], fm), rtol=1e-10)
    with pytest.raises(ValueError, match="agree in s"):
        fs.kernel_matvec(da.from_array(x), da.from_array(y), da.from_array(v[:-1]), fm)
    with pytest.raises(ValueError, match="unknown size"):
        fs.kernel_matvec(da.from_array(x)[da.from_array(x[:, 0] > 0)], y, v, fm)


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_says_what_takes_dask_arrays(is_causal):
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 40, 8))
    lazy = [da.from_array(x, chunks=(1, 20, 8)) for x in (q, k, v)]
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    with pytest.raises(TypeError, match="q, k, v must be in memory, got dask arrays; accepted: "):
        fs.attention(*lazy, is_causal=is_causal, calibration=(q, k))
    for call in (
        lambda: fs.linear_attention(*lazy, fm, is_causal=is_causal),
        lambda: fm.query(lazy[0]),
        lambda: fs.excess(fm.parameters, *lazy[:2]),
    ):
        with pytest.raises(TypeError, match="must be in memory, got dask arrays; accepted: "):
            call()


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
def test_chunks_of_points_become_landmarks_and_join(kernel, batch):
    """As many landmarks as points are exact; with fewer, the error is about that for one array."""
    x, y, v = attention_problem(0, batch, n=57, s=303, d=3)
    lazy = [da.from_array(a, chunks=(*(1,) * len(batch), 50, 2)) for a in (x, y, v)]
    logs = np.log(fs.kernel_matrix(x, y, kernel=kernel, scale=0.5))
    weights = np.exp(logs - logs.max(-1, keepdims=True))
    exact = weights @ v / weights.sum(-1, keepdims=True)
    got = fs.nadaraya_watson(*lazy, fs.landmarks(303, kernel=kernel, scale=0.5))
    assert isinstance(got, da.Array)
    assert got.shape == exact.shape
    np.testing.assert_allclose(got.compute(), exact, atol=1e-9)
    lm = fs.landmarks(32, kernel=kernel, scale=0.5)
    ours, alone = (
        np.linalg.norm(out - exact)
        for out in (fs.nadaraya_watson(*lazy, lm).compute(), fs.nadaraya_watson(x, y, v, lm))
    )
    assert ours < 1.5 * alone < 0.5 * np.linalg.norm(exact)


def test_landmarks_of_one_chunk_of_values_of_one_axis_and_errors():
    x, y, v = attention_problem(3, n=20)
    lm = fs.landmarks(8)
    got = fs.nadaraya_watson(*(da.from_array(a, chunks=20) for a in (x, y, v)), lm)
    np.testing.assert_allclose(got.compute(), fs.nadaraya_watson(x, y, v, lm), rtol=1e-10)
    x, y, v = (da.from_array(a, chunks=6) for a in (x, y, v))
    got, want = (fs.nadaraya_watson(x, y, values, lm).compute() for values in (v[:, 0], v[:, :1]))
    np.testing.assert_array_equal(got, want[:, 0])
    with pytest.raises(ValueError, match="agree in s"):
        fs.nadaraya_watson(x, y, v[:-1], lm)


@pytest.mark.parametrize(("method", "values", "scheduler"), [("nystrom", 1, "processes"), ("trig", 2, "synchronous")])
def test_a_ridge_of_chunks_is_that_of_one_array(method, values, scheduler):
    """This holds also with chunks on several processes, and with weights that are 0 in a whole chunk."""
    dask, FeatureRidge = pytest.importorskip("dask"), pytest.importorskip("favorsharp.sklearn").FeatureRidge
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((300, 3)), rng.integers(0, 3, 300) + 1.0
    y = np.sin(2 * x[:, :values]) + 0.1 * rng.standard_normal((300, values))
    if method == "trig":  # its features do not depend on points
        weight[:50] = 0
    y = y[:, 0] if values == 1 else y
    model = FeatureRidge(method=method, n_components=16, gamma=0.3, random_state=0)
    wanted = model.fit(x, y, sample_weight=weight)
    errors, out = wanted.alpha_errors_, wanted.predict(x)
    lazy = da.from_array(x, chunks=(50, 2))
    with dask.config.set(scheduler=scheduler, num_workers=2):
        found = model.fit(lazy, da.from_array(y, chunks=70), sample_weight=weight)
        estimate = found.predict(lazy)
        assert isinstance(estimate, da.Array)
        assert estimate.shape == out.shape
        np.testing.assert_allclose(estimate.compute(), out, rtol=1e-7)
    np.testing.assert_allclose(found.alpha_errors_, errors, rtol=1e-7)


def test_features_of_chunks_and_what_a_ridge_refuses():
    sklearn = pytest.importorskip("favorsharp.sklearn")
    x = np.random.default_rng(0).standard_normal((60, 3))
    lazy, y = da.from_array(x, chunks=(25, 2)), x[:, 0]
    features = sklearn.RandomFeatures("nystrom", n_components=8, random_state=0)
    wanted = features.fit_transform(x)
    found = features.fit(lazy).transform(lazy)
    assert isinstance(found, da.Array)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found.compute(), wanted, rtol=1e-8)
    ridge = sklearn.FeatureRidge(n_components=8, random_state=0)
    with pytest.raises(ValueError, match="y has 59 rows, and X has 60"):
        ridge.fit(lazy, y[:-1])
    with pytest.raises(ValueError, match="at least one non-zero"):
        ridge.fit(lazy, y, sample_weight=np.zeros(60))
    smooth = sklearn.NadarayaWatsonRegressor(n_components=8, random_state=0)
    with pytest.raises(TypeError, match="X must be in memory, got dask arrays"):
        ridge.partial_fit(lazy, y)
    for call in (smooth.fit, smooth.partial_fit):
        with pytest.raises(TypeError, match="X must be in memory, got dask arrays; accepted: one block .* partial_fit"):
            call(lazy, y)
    with pytest.raises(TypeError, match="^X must be in memory"):
        smooth.fit(x, y).predict(lazy)
