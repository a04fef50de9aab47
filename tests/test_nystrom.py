"""Nystrom maps: products of features, what a fit depends on, and calls of the kernel operators with them."""

from functools import partial

import numpy as np
import pytest
from problems import attention_problem

import favorsharp as fs
from favorsharp import nystrom
from favorsharp.samples import sampled

KERNELS = pytest.mark.parametrize("kernel", ["softmax", "gaussian"])


def fitted(x, y, m, **options):
    return fs.fit_map(x, y, m, method="nystrom", rng=0, **options)


def product(fm, x, y):
    return fm.query(x) @ np.swapaxes(fm.key(y), -1, -2)


@KERNELS
def test_as_many_centres_as_points_are_exact(kernel):
    x, y, v = attention_problem(0, n=20, s=30)
    fm = fitted(x, y, 64, kernel=kernel, scale=0.5)  # more centres than points, too
    exact = fs.kernel_matrix(x, y, kernel=kernel, scale=0.5)
    np.testing.assert_allclose(product(fm, x, y), exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(fs.kernel_matvec(x, y, v, fm), exact @ v, rtol=1e-5, atol=1e-4)


def test_centres_are_points_that_differ():
    """Twelve centres of twelve points are the points themselves, even if some are nearly equal."""
    rng = np.random.default_rng(2)
    points = np.repeat(rng.standard_normal((4, 3)), 3, axis=0) + 1e-3 * rng.standard_normal((12, 3))
    seen = np.ones(12, bool)
    for seed in range(5):
        order, wider = nystrom._order(points, seen, 12, 1e-12, np.random.default_rng(seed).gumbel(size=(2, 12)))
        found = nystrom._centres(points[order], seen, wider, 12)
        np.testing.assert_array_equal(np.sort(found, axis=0), np.sort(points, axis=0))


def test_both_draws_of_centres_have_random_numbers_of_their_own():
    points, seen = np.random.default_rng(3).standard_normal((60, 3)), np.ones(60, bool)
    rows = np.random.default_rng(4).gumbel(size=(4, 60))
    found = [set(nystrom._order(points, seen, 8, 1e-12, rows[[i, j]])[0][:8]) for i, j in ((0, 1), (0, 2), (3, 1))]
    assert found[0] != found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_nearer_than_the_usual_map_of_the_same_centres(scale):
    """Wider functions and the regression have a smaller error, on points of the fit and on others, for smooth and rough
    kernels."""
    x, _, _ = attention_problem(1, n=600)
    x, other = x[:300], x[300:]
    fm = fitted(x, x, 12, kernel="gaussian", scale=scale)
    assert fm.projection.shape == (12, x.shape[-1])
    centres = (fm.projection / fm.sharpness**0.5 + fm.parameters.center_x) / scale**0.5
    kernel = partial(fs.kernel_matrix, kernel="gaussian", scale=scale)
    for points in (x, other):
        exact, key = kernel(points, points), kernel(points, centres)
        usual = key @ np.linalg.solve(kernel(centres, centres), key.T)
        assert np.linalg.norm(product(fm, points, points) - exact) < 0.97 * np.linalg.norm(usual - exact)


def test_the_short_way_of_rough_kernels_is_the_long_one(monkeypatch):
    """One Cholesky factor and float32 products, or eigenvectors and float64."""
    x = np.random.default_rng(0).standard_normal((900, 6))
    short = fitted(x, x, 100, kernel="gaussian", scale=0.4)
    monkeypatch.setattr(nystrom, "COARSE", float("inf"))
    long = fitted(x, x, 100, kernel="gaussian", scale=0.4)
    assert (short.sharpness < 1).all()
    np.testing.assert_array_equal(short.projection, long.projection)
    assert not np.array_equal(short.root, long.root)
    wanted = product(long, x, x)
    assert np.linalg.norm(product(short, x, x) - wanted) < 1e-4 * np.linalg.norm(wanted)


def test_smooth_kernels_have_the_usual_map_of_their_centres():
    """For them a regression would cost more than the rest of the fit, and gain little."""
    x = np.random.default_rng(0).standard_normal((700, 3))
    fm = fitted(x, x, 60, kernel="gaussian", scale=0.2)
    centres = (fm.projection + fm.parameters.center_x) / 0.2**0.5
    kernel = partial(fs.kernel_matrix, kernel="gaussian", scale=0.2)
    key = kernel(x, centres)
    usual = key @ np.linalg.pinv(kernel(centres, centres), rcond=1e-14, hermitian=True) @ key.T
    assert (fm.sharpness == 1).all()
    np.testing.assert_allclose(product(fm, x, x), usual, atol=1e-6)


def test_narrow_kernels_have_functions_of_their_own_width():
    """Hardly any two points are near, and wider functions would reach too many."""
    x = np.random.default_rng(0).standard_normal((700, 6))
    wide, narrow = (fitted(x, x, 60, kernel="gaussian", scale=scale) for scale in (0.3, 5.0))
    assert (wide.sharpness < 1).all()
    assert (narrow.sharpness == 1).all()


def test_a_rough_kernel_beside_a_smooth_one():
    """Entries of a batch have the maps that they have alone."""
    x = np.random.default_rng(0).standard_normal((2, 500, 4)) * np.array([0.3, 1.2])[:, None, None]
    both = fitted(x, x, 40, kernel="gaussian", scale=0.5)
    np.testing.assert_array_equal(both.sharpness[:, 0, 0] < 1, [False, True])
    for points, found in zip(x, product(both, x, x), strict=True):
        alone = fitted(points, points, 40, kernel="gaussian", scale=0.5)
        np.testing.assert_allclose(found, product(alone, points, points), atol=3e-4)


def test_groups_far_apart_keep_their_centres():
    """Centres move inwards by less than the width of the kernel."""
    x = np.random.default_rng(0).standard_normal((400, 4)) + 40 * (np.arange(400) % 2)[:, None]
    exact = fs.kernel_matrix(x, x, kernel="gaussian", scale=0.5)
    assert np.linalg.norm(
        product(fitted(x, x, 100, kernel="gaussian", scale=0.5), x, x) - exact
    ) < 0.2 * np.linalg.norm(exact)


@KERNELS
@pytest.mark.parametrize("m", [1, 5, 40])
def test_equal_and_few_points(kernel, m):
    """Copies of three points with a constant column, and a single point."""
    points = np.random.default_rng(0).standard_normal((3, 4))
    points[:, 1] = 2.0
    for x in (np.repeat(points, 50, axis=0), points[:1]):
        fm = fitted(x, x, m, kernel=kernel, scale=0.5)
        found = product(fm, x, x)
        assert found.shape == (len(x), len(x))
        assert np.isfinite(found).all()
        if m >= 5:
            np.testing.assert_allclose(found, fs.kernel_matrix(x, x, kernel=kernel, scale=0.5), rtol=0.05)


def test_smooth_kernels_are_far_more_accurate_than_with_random_features():
    x = np.random.default_rng(0).standard_normal((800, 3))
    v = np.sin(x[:, 0])
    exact = fs.kernel_matrix(x, x, kernel="gaussian", scale=0.5) @ v
    errors = {
        method: np.linalg.norm(
            fs.kernel_matvec(x, x, v, fs.fit_map(x, x, 128, method=method, kernel="gaussian", scale=0.5, rng=0)) - exact
        )
        for method in ("nystrom", "optimal", "trig")
    }
    assert errors["nystrom"] < 1e-2 * min(errors["optimal"], errors["trig"])


def test_a_smoother_leaves_one_out():
    x = np.random.default_rng(0).uniform(-1, 1, (60, 1))
    v = np.sin(5 * x[:, 0])
    fm = fitted(x, x, 60, kernel="gaussian", scale=40.0)
    weights = fs.kernel_matrix(x, x, kernel="gaussian", scale=40.0) * ~np.eye(60, dtype=bool)
    np.testing.assert_allclose(fs.leave_one_out(x, v, fm), weights @ v / weights.sum(1), atol=1e-4)


def test_masked_points_count_for_nothing_and_axes_are_pooled():
    x, y, _ = attention_problem(2, (3, 2), n=10)
    mask = np.random.default_rng(0).random((3, 2, 10)) > 0.3
    seen = np.random.default_rng(1).random((3, 2, 10)) > 0.3
    hidden = [np.where(own[..., None], a, np.nan) for a, own in ((x, mask), (y, seen))]
    together = fitted(*hidden, 6, axis=(0, -2), mask_x=mask, mask_y=seen)
    assert together.batch_shape == (1, 2)
    points, keys, own, known = (np.moveaxis(a, 0, 1).reshape(2, 30, *a.shape[3:]) for a in (x, y, mask, seen))
    wanted = fitted(points, keys, 6, mask_x=own, mask_y=known)
    np.testing.assert_allclose(product(together, x[:1], y[:1])[0], product(wanted, x[0], y[0]), rtol=1e-4)
    for head in range(2):  # the points that count, alone
        alone = fitted(points[head][own[head]], keys[head][known[head]], 6)
        np.testing.assert_allclose(product(alone, x[0, head], y[0, head]), product(wanted, x[0], y[0])[head], rtol=1e-4)


@KERNELS
def test_features_are_no_longer_than_the_kernel_allows(kernel):
    """This holds also between points far out, where the functions of single centres are large."""
    x, asked = np.clip(np.random.default_rng(0).standard_t(2, (2, 600, 4)), -12, 12)
    fm = fitted(x, x, 40, kernel=kernel, scale=0.2)
    exact = np.exp(0.2 * (asked**2).sum(1)) if kernel == "softmax" else np.ones(600)
    assert ((fm.query(asked) * fm.key(asked)).sum(1) <= exact * (1 + 1e-9)).all()


@KERNELS
def test_a_batch_entry_without_points_has_no_features(kernel):
    x, _, _ = attention_problem(2, (3,), n=10)
    mask = np.ones((3, 10), dtype=bool)
    mask[1] = False
    fm = fitted(x, x, 6, kernel=kernel, mask_x=mask, mask_y=mask)
    assert np.isfinite(fm.query(x)).all()
    found, exact = product(fm, x, x), fs.kernel_matrix(x, x, kernel=kernel, scale=fm.parameters.scale)
    assert np.linalg.norm(found[0] - exact[0]) < np.linalg.norm(exact[0])


def test_far_points_and_float32():
    """Results overflow only if the exact kernel does, and an offset of all points changes nothing."""
    x, y, _ = attention_problem(3)
    fm = fitted(x, y, 8, kernel="gaussian")
    assert np.isfinite(fm.query(1e6 * x)).all()
    far = [(a + 100).astype("float32") for a in (x, y)]
    wide = fitted(*(a.astype("float64") for a in far), 8, kernel="gaussian", scale=0.3)
    np.testing.assert_allclose(
        product(fitted(*far, 8, kernel="gaussian", scale=0.3), *far), product(wide, *far), atol=2e-3
    )


def test_float32_features_are_as_accurate_as_float32_is():
    """Directions that float32 can resolve are kept, although the kernel matrix is nearly singular."""
    x = np.random.default_rng(0).standard_normal((300, 1)).astype("float32")
    fm = fitted(x, x, 64, kernel="gaussian", scale=2.0)
    assert fm.query(x).dtype == np.float32
    exact = fs.kernel_matrix(x, x, kernel="gaussian", scale=2.0)
    assert abs(product(fm, x, x) - exact).max() < 2e-5


@KERNELS
def test_libraries_make_the_same_map(few_xp, kernel):
    x, y, v = attention_problem(4, (2,))
    wanted = fs.kernel_matvec(x, y, v, fitted(x, y, 6, kernel=kernel, scale=0.4))
    x, y, v = (few_xp(a) for a in (x, y, v))
    out = fs.kernel_matvec(x, y, v, fitted(x, y, 6, kernel=kernel, scale=0.4))
    assert few_xp.is_like(out, v)
    np.testing.assert_allclose(few_xp.back(out), wanted, rtol=1e-4, atol=1e-5 * abs(wanted).max())


@pytest.mark.jax
def test_maps_are_saved_and_compiled(tmp_path):
    jax = pytest.importorskip("jax")
    import favorsharp.jax

    assert favorsharp.jax
    x, y, v = (a.astype("float32") for a in attention_problem(5))
    fm = fitted(x, y, 6)
    fs.save(tmp_path / "map", fm)
    assert fs.load(tmp_path / "map").fingerprint == fm.fingerprint
    points = [jax.numpy.asarray(a) for a in (x, y, v)]
    out = jax.jit(fs.kernel_matvec)(*points, fs.load(tmp_path / "map", like=points[0]))
    np.testing.assert_allclose(out, fs.kernel_matvec(x, y, v, fm), rtol=1e-2, atol=1e-3)


def test_a_sample_holds_no_point_twice():
    """Every point is drawn with the same probability."""
    x, seen = np.arange(37.0)[:, None], np.arange(37) % 5 > 0
    counts = np.zeros(37)
    for seed in range(400):
        found, filled = sampled(x, seen, np.random.default_rng(seed), 20)
        assert filled.all()
        assert len(set(found[:, 0])) == 20
        counts[found[:, 0].astype(int)] += 1
    assert counts[~seen].sum() == 0
    assert abs(counts[seen] / 400 - 20 / 29).max() < 0.12


@KERNELS
def test_out_receives_the_features_and_is_checked(kernel):
    x, _, _ = attention_problem(7, n=9)
    fm, out = fitted(x, x, 6, kernel=kernel), np.zeros((9, 6))
    for method in (fm.query, fm.key):
        assert method(x, out=out) is out
        np.testing.assert_array_equal(out, method(x))
        for other in (np.zeros((1, 9, 6)), np.zeros((9, 6), np.float32)):
            with pytest.raises(ValueError, match=r"out has shape .*accepted: \(9, 6\) and float64"):
                method(x, out=other)


@KERNELS
@pytest.mark.parametrize("name", ["x", "y"])
def test_points_that_are_not_finite_are_named(kernel, name):
    x, y, _ = attention_problem(6)
    (x if name == "x" else y)[3, 1] = np.nan
    with pytest.raises(ValueError, match=f"^{name} holds values that are not finite"):
        fitted(x, y, 6, kernel=kernel)


def test_errors_name_what_is_wrong():
    x, y, v = attention_problem(6)
    fm = fitted(x, y, 6)
    with pytest.raises(ValueError, match="method 'nystrom' is signed"):
        fs.linear_attention(x, y, v, fm)
    with pytest.raises(ValueError, match=r"fit_map\(x, y, m, method='nystrom'\)"):
        fs.fit(x, y, method="nystrom")
    with pytest.raises(ValueError, match="takes no draw"):
        fs.fit_map(x, y, 6, method="nystrom", draw="iid")
    with pytest.raises(ValueError, match="n=0"):
        fs.fit_map(x[:0], y, 6, method="nystrom")
    with pytest.raises(ValueError, match="d=2"):
        fs.fit_map(x, y[:, :2], 6, method="nystrom", kernel="gaussian")
