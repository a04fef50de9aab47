"""Maps of prototypes: the meaning of a feature, what a fit depends on, errors, and calls with such maps."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from problems import attention_problem

import favorsharp as fs
from favorsharp import prototypes
from favorsharp.diagnostics import load_sample, relative_error
from favorsharp.methods import FROM_POINTS


def fitted(x, y, m, **options):
    return fs.fit_map(x, y, m, method="prototypes", rng=0, **options)


def with_few_queries(batch=(), n=40, different=5, seed=0):
    """A problem whose queries are copies of a few."""
    q, k, v = attention_problem(seed, batch, n)
    return q[..., np.arange(n) % different, :], k, v


def weighted_by(log_kernel, v):
    weights = np.exp(log_kernel - log_kernel.max(-1, keepdims=True))
    return weights @ v / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
def test_a_feature_is_exact_attention_from_its_prototype(kernel):
    """With one prototype, every query gets the attention of the mean query."""
    q, k, v = attention_problem(0)
    fm = fitted(q, k, 1, kernel=kernel, scale=0.4)
    exact = weighted_by(np.log(fs.kernel_matrix(q.mean(0, keepdims=True), k, kernel=kernel, scale=0.4)), v)
    np.testing.assert_allclose(fs.nadaraya_watson(q, k, v, fm), np.repeat(exact, len(q), 0), atol=1e-9)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
def test_equal_queries_get_exact_results(kernel, window):
    """Then far keys also have the scale of those in the window."""
    q, k, v = with_few_queries(different=1)
    fm = fitted(q, k, 8, kernel=kernel, scale=0.4)
    exact = weighted_by(np.log(fs.kernel_matrix(q, k, kernel=kernel, scale=0.4)), v)
    np.testing.assert_allclose(fs.linear_attention(q, k, v, fm, window=window), exact, atol=1e-9)


def test_more_prototypes_than_different_queries_change_nothing():
    q, k, v = with_few_queries()
    outs = [fs.linear_attention(q, k, v, fitted(q, k, m)) for m in (5, 16)]
    np.testing.assert_allclose(*outs, atol=1e-9)


def test_products_of_features_are_on_the_scale_of_the_kernel():
    """The mean over queries of the log ratio of the denominators is 0, which windows need."""
    q, k, _ = attention_problem(3, n=200)
    fm = fitted(q, k, 32)
    sums = fm.query(q) @ fm.key(k).sum(0)
    ratio = np.log(sums / fs.kernel_matrix(q, k).sum(-1))
    assert abs(ratio.mean()) < 1e-9


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_the_scale_of_products_is_a_ridge_regression(rng, spread):
    """A hundredth of the mean variance, and 1e-6, keep its slope small; wherever the points lie, their mean is met."""
    u, wanted, seen = 2 + spread * rng.standard_normal((50, 3)), rng.standard_normal((50, 1)), np.arange(50) < 40
    slope, constant = prototypes._linear(u, wanted, seen)
    u, wanted = u[seen], wanted[seen]
    covariance = np.cov(u.T, bias=True)
    ridge = 0.01 * np.trace(covariance) / 3 + 1e-6
    along = np.cov(u.T, wanted.T, bias=True)[:3, 3]
    np.testing.assert_allclose(slope[0], np.linalg.solve(covariance + ridge * np.eye(3), along), rtol=1e-6)
    np.testing.assert_allclose((u @ slope.T + constant).mean(), wanted.mean(), rtol=1e-9)


@pytest.mark.parametrize(("window", "most"), [(0, 0.27), (16, 0.25)])
def test_errors_on_the_attention_sample(window, most):
    q, k, v = (x.astype("float32") for x in load_sample())
    exact = fs.softmax_attention(q, k, v)
    maps = [fs.fit_map(q, k, 128, method=method, rng=0) for method in ("prototypes", "optimal")]
    ours, best = (relative_error(fs.linear_attention(q, k, v, fm, window=window), exact) for fm in maps)
    assert np.mean(ours) < most
    assert np.all(ours < best)


def test_masked_points_count_for_nothing():
    q, k, v = attention_problem(1, (2,), n=30)
    seen_q, seen_k = np.arange(30) % 3 != 0, np.arange(30) % 4 != 1
    wanted = fitted(q[:, seen_q], k[:, seen_k], 6)
    q[:, ~seen_q], k[:, ~seen_k] = np.nan, np.nan
    found = fitted(q, k, 6, mask_x=seen_q, mask_y=seen_k)
    points = q[:, seen_q], k[:, seen_k], v[:, seen_k]
    np.testing.assert_allclose(*(fs.linear_attention(*points, fm) for fm in (found, wanted)), atol=1e-9)


def divergence(fm, q, k, seen_q, seen_k):
    """The mean Kullback-Leibler divergence of a map's attention weights from the exact ones, up to a constant."""
    exact, own = fs.kernel_matrix(q, k) * seen_k, fm.query(q) @ fm.key(k).T * seen_k
    own = np.where(seen_k, own, 1) / own.sum(-1, keepdims=True)
    return -(exact / exact.sum(-1, keepdims=True) * np.log(own)).sum(-1)[seen_q].mean()


def test_refinement_brings_weights_nearer_to_the_exact_ones():
    """This holds on the points of the fit, of which masked ones may hold anything.

    Denominators keep the kernel's scale.
    """
    q, k, _ = attention_problem(7, n=60)
    seen_q, seen_k = np.arange(60) % 5 != 0, np.arange(60) % 7 != 1
    before = divergence(fitted(q, k, 6, mask_x=seen_q, mask_y=seen_k), q, k, seen_q, seen_k)
    hidden_q, hidden_k = np.where(seen_q[:, None], q, np.nan), np.where(seen_k[:, None], k, np.inf)
    fm = fitted(hidden_q, hidden_k, 6, mask_x=seen_q, mask_y=seen_k, refine=40)
    assert divergence(fm, q, k, seen_q, seen_k) < before - 0.01
    sums = fm.query(q[seen_q]) @ fm.key(k[seen_k]).sum(0)
    assert abs(np.log(sums / fs.kernel_matrix(q[seen_q], k[seen_k]).sum(-1)).mean()) < 1e-9


def test_refinement_follows_the_gradient():
    q, k, _ = attention_problem(8, n=20)
    seen_q, seen_k = np.arange(20) % 5 != 0, np.arange(20) % 7 != 1
    fm = fitted(q, k, 4)
    rows, weights = prototypes._slopes(fm, q, seen_q, k, seen_k)
    rng = np.random.default_rng(0)
    way, other = rng.standard_normal(rows.shape) / prototypes.TINY, rng.standard_normal(weights.shape)
    ends = [
        divergence(replace(fm, rows=fm.rows + h * way, log_weight=fm.log_weight + h * other), q, k, seen_q, seen_k)
        for h in (1e-5, -1e-5)
    ]
    along = (rows * way).sum() * prototypes.TINY + (weights * other).sum()
    np.testing.assert_allclose(along, (ends[0] - ends[1]) / 2e-5, rtol=1e-6)


def test_pooled_axes_are_one_set_of_points():
    q, k, _ = attention_problem(2, (3, 2), n=10)
    mask = np.random.default_rng(0).random((3, 2, 10)) > 0.3
    together = fitted(q, k, 6, axis=(0, -2), mask_x=mask)
    assert together.batch_shape == (1, 2)
    joined = (np.moveaxis(a, 0, 1).reshape(2, 30, *a.shape[3:]) for a in (q, k, mask))
    x, y, own = joined
    np.testing.assert_allclose(together.log_key(k[:1])[0], fitted(x, y, 6, mask_x=own).log_key(k[0]), atol=1e-9)


def test_grouped_heads_are_pooled():
    q, _, _ = attention_problem(2, (4,), n=10)
    _, k, v = attention_problem(3, (2,), n=10)
    fm = fitted(q, k, 6, enable_gqa=True)
    wanted = fitted(q.reshape(2, 20, 8), k, 6)
    np.testing.assert_allclose(fm.log_key(k), wanted.log_key(k), atol=1e-9)
    assert fs.linear_attention(q, k, v, fm, enable_gqa=True).shape == (4, 10, 5)


def test_the_seed_decides_which_of_many_queries_are_taken():
    q, k, _ = attention_problem(4, n=2000)
    same, again = fitted(q, k, 8), fitted(q, k, 8)
    assert same.fingerprint == again.fingerprint
    assert fs.fit_map(q, k, 8, method="prototypes", rng=1).fingerprint != same.fingerprint


@pytest.mark.parametrize("batch", [(), (2,)])
def test_libraries_make_the_same_map(few_xp, batch):
    q, k, _ = attention_problem(5, batch)
    wanted = fitted(q, k, 6, refine=3)
    x, y = few_xp(q), few_xp(k)
    fm = fitted(x, y, 6, refine=3)
    assert few_xp.is_like(fm.log_query(x), x)
    np.testing.assert_allclose(few_xp.back(fm.log_query(x)), wanted.log_query(q), rtol=1e-9, atol=1e-9)


def test_float16_and_far_points_in_float32():
    q, k, v = attention_problem(6)
    wanted = fs.linear_attention(q, k, v, fitted(q, k, 8))
    for dtype, offset, atol in (("float32", 40.0, 0.02), ("float16", 0.0, 0.05)):
        points = [x.astype(dtype) for x in (q, k - offset, v)]
        fm = fitted(*points[:2], 8)
        assert fm.rows.dtype == np.float32
        np.testing.assert_allclose(fs.linear_attention(*points, fm), wanted, atol=atol)


@pytest.mark.own_backend
@pytest.mark.parametrize("window", [0, 4])
def test_streams_and_kernels_agree_with_the_reference(window):
    q, k, v = attention_problem(7, (2,))
    fm = fitted(q, k, 6)
    with fs.use("reference"):
        whole = fs.linear_attention(q, k, v, fm, window=window)
        causal = fs.linear_attention(q, k, v, fm, is_causal=True, window=window)
    np.testing.assert_allclose(fs.linear_attention(q, k, v, fm, window=window), whole, atol=1e-9)
    np.testing.assert_allclose(fs.linear_attention(q, k, v, fm, is_causal=True, window=window), causal, atol=1e-9)
    state = fs.init_state(fm, 5, like=k, window=window)
    for t in range(q.shape[-2]):
        out, state = fs.decode_step(*(x[:, t : t + 1] for x in (q, k, v)), state, fm)
        np.testing.assert_allclose(out, causal[:, t : t + 1], atol=1e-9)


@pytest.mark.own_backend
def test_gradients_of_kernels_are_those_of_the_reference():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.asarray(x) for x in attention_problem(8))
    fm = fitted(q.requires_grad_(), k, 6)
    assert not fm.rows.requires_grad
    found = []
    for name in (None, "reference"):
        points = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        with fs.use(name) if name else torch.enable_grad():
            fs.linear_attention(*points, fm, window=4).square().sum().backward()
        found.append([x.grad for x in points])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


def test_saved_and_pickled_maps_come_back(tmp_path):
    q, k, _ = attention_problem(9)
    fm = fitted(q, k, 6)
    fs.save(tmp_path / "map", fm)
    assert fs.load(tmp_path / "map").fingerprint == fm.fingerprint
    assert pickle.loads(pickle.dumps(fm)).fingerprint == fm.fingerprint


@pytest.mark.jax
def test_jit_takes_maps(tmp_path):
    jax = pytest.importorskip("jax")
    import favorsharp.jax

    assert favorsharp.jax
    points = [x.astype("float32") for x in attention_problem(9)]
    fm = fitted(*points[:2], 6)
    fs.save(tmp_path / "map", fm)
    lazy = [jax.numpy.asarray(x) for x in points]
    out = jax.jit(fs.linear_attention)(*lazy, fs.load(tmp_path / "map", like=lazy[0]))
    np.testing.assert_allclose(out, fs.linear_attention(*points, fm), atol=1e-4)


@pytest.mark.slow
@pytest.mark.jax
def test_jit_makes_maps():
    jax = pytest.importorskip("jax")
    import favorsharp.jax

    assert favorsharp.jax
    points = [x.astype("float32") for x in attention_problem(9)[:2]]
    q, k = (jax.numpy.asarray(x) for x in points)
    made = jax.jit(lambda q, k: fitted(q, k, 6))(q, k)
    np.testing.assert_allclose(made.log_key(k), fitted(*points, 6).log_key(points[1]), atol=1e-3)


def test_fit_names_what_makes_the_methods_that_it_does_not_make():
    q, k, _ = attention_problem(10)
    with pytest.raises(ValueError, match=r"fit_map\(x, y, m, method='prototypes'\)"):
        fs.fit(q, k, method="prototypes")
    with pytest.raises(ValueError, match=r"landmarks\(m\)"):
        fs.fit(q, k, method="landmarks")
    with pytest.raises(ValueError, match="elsewhere: nystrom, prototypes, landmarks"):
        fs.fit(q, k, method="prototype")
    with pytest.raises(ValueError, match=r"accepted: .*prototypes.*elsewhere: landmarks"):
        fs.fit_map(q, k, 8, method="prototype")
    with pytest.raises(ValueError, match="refine=3 with method='optimal': accepted: 0, or method='prototypes'"):
        fs.fit_map(q, k, 8, refine=3)
    assert "prototypes" in FROM_POINTS
    assert "prototypes" not in fs.METHODS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draw": "iid"}, "takes no draw"),
        ({"num_features": 0}, "num_features"),
        ({"refine": -1}, "refine"),
        ({"kernel": "cosine"}, "kernel"),
        ({"x": np.ones((0, 8))}, "n=0"),
        ({"x": np.full((3, 8), np.nan)}, "x holds values that are not finite"),
    ],
)
def test_errors_name_the_argument(change, message):
    q, k, _ = attention_problem(11)
    given = {"x": q, "num_features": 8} | change
    with pytest.raises(ValueError, match=message):
        fs.fit_map(given.pop("x"), k, given.pop("num_features"), method="prototypes", **given)
