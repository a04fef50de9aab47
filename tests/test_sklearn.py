"""The estimators pass scikit-learn's own checks, and keep the further promises of their docstrings."""

import pickle
import re
import tracemalloc
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest

pytest.importorskip("sklearn")
from scipy.sparse import csr_array
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_digits, load_iris
from sklearn.ensemble import AdaBoostClassifier, AdaBoostRegressor, VotingRegressor
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import favorsharp as fs
from favorsharp import map_choice
from favorsharp.map_choice import smoothing_error
from favorsharp.ops import tiles
from favorsharp.sklearn import FeatureRidge, NadarayaWatsonClassifier, NadarayaWatsonRegressor, RandomFeatures
from favorsharp.sklearn.nadaraya_watson import _exact_leave_one_out

pytestmark = pytest.mark.compiled

ESTIMATORS = [
    RandomFeatures(n_components=32, random_state=0),
    RandomFeatures(method="optimal", n_components=32, random_state=0),
    FeatureRidge(n_components=32, random_state=0),
    NadarayaWatsonRegressor(n_components=64, random_state=0),
    NadarayaWatsonRegressor(method="exact"),
    NadarayaWatsonClassifier(n_components=512, random_state=0),
    NadarayaWatsonClassifier(method="exact"),
    NadarayaWatsonRegressor(method="auto", n_components=32, random_state=0),
    NadarayaWatsonClassifier(method="landmarks", n_components=32, random_state=0),
    NadarayaWatsonClassifier(method="poisson", n_components=512, random_state=0),
]


EVERY = [
    kind(method=method, n_components=size, random_state=0)
    for kind, size, others in (
        (RandomFeatures, 32, ("nystrom",)),
        (FeatureRidge, 32, ("nystrom",)),
        (NadarayaWatsonRegressor, 512, ("landmarks",)),
        (NadarayaWatsonClassifier, 512, ("auto", "landmarks")),
    )
    for method in (*others, *fs.METHODS)
]
"""Every method that an estimator takes, and that `ESTIMATORS` may lack."""


@pytest.mark.compiled(False)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("estimator", [*ESTIMATORS, *(pytest.param(e, marks=pytest.mark.slow) for e in EVERY)], ids=str)
def test_scikit_learn_accepts_it(estimator, monkeypatch):
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")
    # a sample drawn from repeated points differs
    known = {"check_sample_weight_equivalence_on_dense_data": "features of points whatever their weights"}
    expected = known if isinstance(estimator, FeatureRidge) else {}
    results = check_estimator(estimator, on_fail=None, on_skip=None, expected_failed_checks=expected)
    failed = [
        (r["check_name"], r["exception"])
        for r in results
        if r["status"] == "failed" and type(r["exception"]).__name__ != "CUDARuntimeError"  # CuPy without a GPU
    ]
    if estimator.method == "trig":  # some checks ask for one component
        failed = [(name, e) for name, e in failed if "n_components must be even for method 'trig'" not in str(e)]
    assert not failed
    passed = [r["check_name"] for r in results if r["status"] == "passed"]
    assert len(passed) > 45
    found = 3 * bool(find_spec("array_api_strict")) + 2 * bool(find_spec("torch"))  # strict on devices, torch in dtypes
    assert passed.count("check_array_api_input") >= found


def test_nystrom_features_are_nearer_to_the_kernel_than_scikit_learns():
    """Nystroem draws its centres uniformly. Errors are means over three draws."""
    x = np.random.default_rng(0).standard_normal((1500, 8))
    exact = rbf_kernel(x, gamma=1 / 16)
    errors = []
    for make in (partial(RandomFeatures, method="nystrom"), Nystroem, partial(RandomFeatures, method="optimal")):
        found = [make(n_components=128, gamma=1 / 16, random_state=seed).fit_transform(x) for seed in range(3)]
        errors.append(np.mean([np.linalg.norm(f @ f.T - exact) for f in found]))
    assert errors[0] < 0.85 * errors[1]
    assert errors[0] < 0.2 * errors[2]


@pytest.mark.parametrize("method", ["auto", "nystrom", "trig"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_inner_products_of_a_thousand_features(method, dtype):
    """The same test as scikit-learn's for RBFSampler: gamma 10 and 1,000 features, on rows with sum 1 and on others."""
    rng = np.random.default_rng(0)
    for x, y in (rng.random((2, 300, 50)), rng.random((2, 1500, 3))):
        x, y = ((a / a.sum(axis=1, keepdims=True)).astype(dtype) for a in (x, y))
        features = RandomFeatures(method, n_components=1000, gamma=10.0, random_state=42)
        left = features.fit_transform(x)
        error = left @ features.transform(y).T - rbf_kernel(x, y, gamma=10.0)
        assert left.dtype == dtype
        assert abs(error.mean()) < 0.01
        assert abs(error).max() < (0.1 if method == "trig" else 0.02)


@pytest.mark.parametrize("copies", [2, 100])
def test_a_singular_kernel(copies):
    """The same test as scikit-learn's for Nystroem: repeated rows, and more features than distinct rows."""
    x = np.tile(np.random.default_rng(0).random((10, 20)), (copies, 1))
    for gamma in (0.01, 100.0):
        features = RandomFeatures("nystrom", n_components=20, gamma=gamma, random_state=0).fit_transform(x)
        assert np.isfinite(features).all()
        np.testing.assert_allclose(features @ features.T, rbf_kernel(x, gamma=gamma), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_many_rows_of_few_values(dtype):
    """All copies of a point share one centre."""
    x = np.random.default_rng(0).integers(0, 4, (4000, 3)).astype(dtype)
    for gamma, bound in ((0.05, 1e-2), (0.5, 0.1)):
        features = RandomFeatures("nystrom", n_components=60, gamma=gamma, random_state=0).fit(x)
        made, exact = features.transform(x[:300]), rbf_kernel(x[:300], gamma=gamma)
        assert np.linalg.norm(made @ made.T - exact) < bound * np.linalg.norm(exact)


def test_centres_come_from_all_points_of_a_sorted_table():
    x = np.sort(np.random.default_rng(0).uniform(-5, 5, (2000, 1)), axis=0)
    features = RandomFeatures("nystrom", n_components=64, gamma=1.0, random_state=0).fit_transform(x)
    kept = (features**2).sum(axis=1)  # of the kernels of points with themselves, which are 1
    assert min(part.mean() for part in np.split(kept, 20)) > 0.8


def test_nystrom_features_of_every_point_are_exact():
    x = np.random.default_rng(0).standard_normal((40, 3))
    features = RandomFeatures(method="nystrom", n_components=40, gamma=0.5, random_state=0).fit_transform(x)
    np.testing.assert_allclose(features @ features.T, rbf_kernel(x, gamma=0.5), atol=1e-7)
    with pytest.raises(ValueError, match="method='nystrom' takes no draw"):
        RandomFeatures(method="nystrom", draw="iid").fit(x)


@pytest.mark.parametrize(
    ("gamma", "purpose", "expected"),
    [(0.02, "inner product", "nystrom"), (30.0, "inner product", "nystrom"), (1.0, "smoothing", "nystrom")],
)
def test_auto_is_never_far_behind_the_best(gamma, purpose, expected):
    x = np.random.default_rng(0).standard_normal((600, 4))
    exact = rbf_kernel(x, gamma=gamma)
    if purpose == "smoothing":
        exact /= exact.sum(1, keepdims=True)

    def error(method):
        features = RandomFeatures(method, n_components=64, gamma=gamma, random_state=0, purpose=purpose).fit(x)
        made = features.transform(x) @ features.transform(x).T
        if purpose == "smoothing":
            made /= np.where(made.sum(1, keepdims=True) > 0, made.sum(1, keepdims=True), np.inf)
        return np.linalg.norm(made - exact), features

    chosen, features = error("auto")
    assert chosen <= 1.02 * min(error(method)[0] for method in ("nystrom", "trig", "optimal"))
    assert features.method_ in features.reason_
    assert features.method_ == expected


@pytest.mark.parametrize("purpose", ["inner product", "smoothing"])
def test_auto_compares_by_the_error_of_its_purpose(purpose, monkeypatch):
    x = np.random.default_rng(0).standard_normal((80, 2))
    for name, error in (("product_error", 0.25), ("smoothing_error", 0.125)):
        monkeypatch.setattr(map_choice, name, lambda *given, error=error: error)
    features = RandomFeatures(n_components=8, purpose=purpose, random_state=0).fit(x)
    assert f"nystrom {0.125 if purpose == 'smoothing' else 0.25}" in features.reason_


def test_auto_compares_at_points_that_were_not_fitted():
    """Nystrom features of every point are exact at these points, but a narrow kernel is not exact at others."""
    x = np.random.default_rng(0).standard_normal((150, 13))
    features = RandomFeatures(n_components=256, gamma=8 / 13, random_state=0).fit(x)
    assert features.method_ == "trig"
    assert float(re.search(r"nystrom (\S+),", features.reason_)[1]) > 0.8
    smooth = RandomFeatures(n_components=150, gamma=0.01, random_state=0).fit(x)  # the points asked are fitted then
    made = smooth.transform(x)
    np.testing.assert_allclose(made @ made.T, rbf_kernel(x, gamma=0.01), atol=1e-6)


def test_rows_count_alike_for_smoothing():
    """A row far out has most of the squares, and is one of many."""
    exact = np.eye(101)
    exact[:100, :100] = 1.0
    found = exact.copy()
    found[100, 100] = 0.0
    assert smoothing_error(found, exact, 101) == pytest.approx((1 / 101) ** 0.5)
    half = np.where(np.arange(101) < 50, 1.0, 0.0)[:, None] * exact + 0.0  # the other rows have no sum
    assert smoothing_error(half, exact, 101) == pytest.approx((51 / 101) ** 0.5)


def test_auto_knows_the_error_of_fourier_features():
    """The error that it states for independent features is their error over draws."""
    x = np.random.default_rng(0).standard_normal((300, 4))
    options, exact = {"n_components": 64, "gamma": 0.1}, rbf_kernel(x, gamma=0.1)
    reason = RandomFeatures(random_state=0, **options).fit(x).reason_
    expected = float(re.search(r"about (\S+) is expected of trig", reason)[1])
    errors = []
    for seed in range(10):
        features = RandomFeatures("trig", draw="iid", random_state=seed, **options).fit_transform(x)
        errors.append(np.linalg.norm(features @ features.T - exact) / np.linalg.norm(exact))
    assert expected == pytest.approx(np.mean(np.square(errors)) ** 0.5, rel=0.15)


def test_auto_does_not_fit_transforms_of_many_columns():
    x = np.random.default_rng(0).standard_normal((40, 257))
    for columns, tried in ((256, True), (257, False)):
        features = RandomFeatures(n_components=8, purpose="smoothing", random_state=0).fit(x[:, :columns])
        assert ("optimal" in features.reason_) == tried


def test_gamma_none_is_that_of_scikit_learn():
    x = np.random.default_rng(0).standard_normal((30, 5))
    assert RandomFeatures().fit(x).gamma_ == 1 / 5
    with pytest.raises(ValueError, match="purpose 'ridge' is unknown; accepted: .*smoothing"):
        RandomFeatures(purpose="ridge").fit(x)


def test_features_estimate_the_rbf_kernel():
    x = np.random.default_rng(0).standard_normal((40, 3)) + 2
    options = {"method": "optimal", "gamma": 0.2, "random_state": 0}
    got = [RandomFeatures(n_components=m, **options).fit_transform(x) for m in (64, 8192)]
    errors = [np.abs(f @ f.T - rbf_kernel(x, gamma=0.2)).max() for f in got]
    assert errors[1] < 0.1
    assert errors[1] < errors[0]


def test_float32_pipelines_grids_pickles_and_names():
    x, y = load_diabetes(return_X_y=True, as_frame=True)
    assert RandomFeatures(n_components=8).fit_transform(x.to_numpy(np.float32)).dtype == np.float32
    frame = RandomFeatures(n_components=8).set_output(transform="pandas").fit_transform(x)
    assert list(frame.columns)[:2] == ["randomfeatures0", "randomfeatures1"]
    pipe = make_pipeline(StandardScaler(), RandomFeatures(n_components=64, random_state=0), Ridge(alpha=1e-3))
    search = GridSearchCV(pipe, {"randomfeatures__gamma": [0.002, 0.02]}, cv=3).fit(x, y)
    assert search.best_score_ > 0.4
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(again.predict(x), search.predict(x))


@pytest.mark.parametrize("method", ["optimal", "exact", "trig"])
def test_blocks_equal_the_whole(method):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 2))
    y = (x[:, 0] > 0) + (x[:, 1] > 0) * 2
    options = {"method": method, "n_components": 256, "gamma": 1.0, "random_state": 0}
    blocks = NadarayaWatsonClassifier(**options)
    for start in range(0, 300, 100):
        blocks.partial_fit(x[start : start + 100], y[start : start + 100], classes=[0, 1, 2, 3])
    two = NadarayaWatsonClassifier(**options).partial_fit(x[:100], y[:100], classes=[0, 1, 2, 3])
    two.partial_fit(x[100:], y[100:])  # the first block chose the features
    np.testing.assert_array_equal(blocks.predict(x), two.predict(x))
    if method != "trig":
        np.testing.assert_allclose(blocks.predict_proba(x), two.predict_proba(x), rtol=1e-10)
    if method == "exact":
        whole = NadarayaWatsonClassifier(**options).fit(x, y)
        np.testing.assert_allclose(blocks.predict_proba(x), whole.predict_proba(x), rtol=1e-10)
        np.testing.assert_allclose(whole.predict_proba(x).sum(1), 1)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("method", ["trig", "landmarks", "optimal", "poisson"])
def test_classifiers_score_every_row(method, classes):
    """This holds also far from all points, where the estimates of signed maps may be 0 or negative."""
    rng = np.random.default_rng(11)
    x = rng.standard_normal((200, 2))
    y = np.digitize(x[:, 0], [0.0, 1.0][: classes - 1])
    model = NadarayaWatsonClassifier(method=method, n_components=64, gamma=2.0, random_state=0).fit(x, y)
    rows = np.concatenate([x, 5 * x])
    shares, scores = model.predict_proba(rows), model.decision_function(rows)
    np.testing.assert_allclose(shares.sum(1), 1)
    assert (shares >= 0).all()
    if method == "trig":  # rows without an estimate above 0 are scored too
        assert (np.ptp(shares, axis=1) > 0).all()
    found = (scores > 0).astype(int) if classes == 2 else scores.argmax(1)
    assert (found == model.predict(rows))[np.ptp(shares, axis=1) > 0].all()
    assert roc_auc_score(y, scores[:200] if classes == 2 else shares[:200], multi_class="ovr") > 0.8


def test_auto_takes_landmarks_for_continuous_and_features_for_one_hot_tables():
    x, y = table(800)
    options = {"n_components": 64, "gamma": 1.0, "random_state": 0}
    model = NadarayaWatsonRegressor(method="auto", **options).fit(x, y)
    assert model.method_ == "landmarks"
    np.testing.assert_array_equal(
        model.predict(x), NadarayaWatsonRegressor(method="landmarks", **options).fit(x, y).predict(x)
    )
    levels = np.random.default_rng(0).integers(0, 4, (1500, 7))
    hot = (levels[:, :, None] == np.arange(4)).reshape(1500, -1).astype(float)
    linear = levels @ np.arange(1.0, 8)
    model = NadarayaWatsonRegressor(method="auto", n_components=32, gamma=0.1, random_state=0).fit(hot, linear)
    assert model.method_ == "optimal"


def test_auto_finds_the_bandwidth_of_digits():
    """Features of a narrow kernel are poor there; landmarks reach the accuracy of the exact smoother, 0.96 to 0.99."""
    x, y = load_digits(return_X_y=True)
    model = NadarayaWatsonClassifier(method="auto", gamma="auto_cv", random_state=0).fit(x[::2], y[::2])
    assert model.method_ == "landmarks"
    assert model.score(x[1::2], y[1::2]) > 0.93


def test_the_exact_estimate_far_from_everything_is_the_nearest_point():
    x = np.array([[0.0], [1.0], [2.0]])
    model = NadarayaWatsonRegressor(method="exact", n_components=0, gamma=5.0).fit(x, [1.0, 2.0, 3.0])
    np.testing.assert_allclose(model.predict([[100.0]]), [3.0])


@pytest.mark.parametrize(
    ("method", "kernel"),
    [
        ("optimal", "gaussian"),
        ("trig", "gaussian"),
        ("poisson", "gaussian"),
        ("trig", "softmax"),
        ("optimal", "softmax"),
    ],
)
def test_leave_one_out_leaves_one_out(method, kernel):
    """Only Gaussian Fourier features have constant log factors; other signed features have not."""
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((30, 2)), rng.standard_normal(30)
    fm = fs.feature_map(fs.fit(x, x, method=method, kernel=kernel, scale=0.1), 64, rng=0)
    want = [fs.nadaraya_watson(x[i : i + 1], np.delete(x, i, 0), np.delete(v, i), fm)[0] for i in range(len(x))]
    np.testing.assert_allclose(fs.leave_one_out(x, v, fm), want, rtol=1e-8)


@pytest.mark.parametrize("method", ["optimal", "exact"])
def test_auto_cv_finds_a_better_bandwidth(method):
    """The bandwidth is better on points that were not fitted, with noisy values."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-3, 3, (900, 1))
    truth = np.sin(4 * x[:, 0])
    y = truth + 0.3 * rng.standard_normal(900)
    scores = [
        NadarayaWatsonRegressor(method=method, gamma=gamma, n_components=512, random_state=0)
        .fit(x[:600], y[:600])
        .score(x[600:], truth[600:])
        for gamma in ("scale", "auto_cv")
    ]
    assert scores[1] > max(scores[0], 0.8)


@pytest.mark.parametrize("estimator", [RandomFeatures, NadarayaWatsonRegressor, NadarayaWatsonClassifier])
def test_bad_parameters_and_sparse_input_are_named(estimator):
    x, y = np.random.default_rng(0).standard_normal((20, 3)), np.arange(20) % 2
    for bad, error, message in (
        ({"gamma": -1.0}, ValueError, "gamma must be 'scale'.* or a positive finite number, got -1.0"),
        ({"gamma": float("nan")}, ValueError, "gamma must be"),
        ({"gamma": [1.0]}, TypeError, "gamma must be .* got list"),
        ({"gamma": "auto"}, ValueError, "gamma 'auto' is unknown"),
        ({"n_components": 0}, ValueError, "n_components must be an integer of 1 or more, got 0"),
        ({"n_components": 2.5}, TypeError, "n_components must be an integer"),
        ({"n_components": 3, "method": "trig"}, ValueError, "n_components must be even for method 'trig'.*; got 3"),
        ({"method": "rbf"}, ValueError, "method 'rbf' is unknown; accepted: .*optimal"),
        ({"draw": "grid"}, ValueError, "draw 'grid' is unknown"),
    ):
        with pytest.raises(error, match=message):
            estimator(**bad).fit(x, y)
    with pytest.raises(TypeError, match="dense"):
        estimator().fit(csr_array(x), y)


def test_iris():
    x, y = load_iris(return_X_y=True, as_frame=False)
    names = np.array(["a", "b", "c"])[y]
    assert NadarayaWatsonClassifier(gamma="auto_cv", random_state=0).fit(x, names).score(x, names) > 0.9


def exact_means(x, y, v, gamma, weight=1.0):
    """From differences, in float64, relative to the largest of each row."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    logs = -gamma * ((x[:, None] - y[None]) ** 2).sum(-1)
    weights = weight * np.exp(logs - logs.max(1, keepdims=True))
    return weights @ v / weights.sum(1)


@pytest.mark.parametrize("unit", [1e-30, 1e-23, 1.0, 1e30])
def test_exact_smoothing_in_any_unit(unit):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((200, 4)) * unit).astype(np.float32)
    y = np.sin(x[:, 0] / np.float32(unit))
    model = NadarayaWatsonRegressor(method="exact").fit(x, y)
    assert model.predict(x).dtype == np.float32
    np.testing.assert_allclose(model.predict(x), exact_means(x, x, y, model.gamma_), atol=2e-6)
    signs = NadarayaWatsonRegressor(method="exact", gamma="auto_cv").fit(x, y)
    assert signs.gamma_ * unit**2 == pytest.approx(
        NadarayaWatsonRegressor(method="exact", gamma="auto_cv").fit(x / np.float32(unit), y).gamma_, rel=1e-4
    )


@pytest.mark.parametrize("method", ["exact", "optimal", "trig"])
@pytest.mark.parametrize("dtypes", [("float16", "float64"), ("float16", "float32"), ("float32", "float64")])
def test_targets_keep_their_range(method, dtypes):
    """If the dtype of the targets is wider than that of the points, it decides."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((500, 2)).astype(dtypes[0])
    top = 1e300 if dtypes[1] == "float64" else 1e30
    y = ((5 + np.cos(x[:, 0].astype(float))) * top).astype(dtypes[1])
    model = NadarayaWatsonRegressor(method=method, gamma=0.5, n_components=2048, random_state=0)
    got = model.fit(x[:250], y[:250]).partial_fit(x[250:], y[250:]).predict(x[:20])
    assert got.dtype == np.float64
    want = exact_means(x[:20], x, y.astype(float) / top, 0.5)
    np.testing.assert_allclose(got / top, want, rtol=1e-12 if method == "exact" else 0.1)


def test_half_precision_points_are_taken_as_float64():
    rng = np.random.default_rng(2)
    x = np.rint(255 * rng.random((60, 300))).astype(np.float16)
    labels = np.arange(60) % 3
    for model in (
        RandomFeatures(n_components=16, random_state=0),
        NadarayaWatsonRegressor(method="exact", gamma=1e-6),
        NadarayaWatsonClassifier(method="exact", gamma=1e-6),
        NadarayaWatsonClassifier(method="optimal", gamma="auto_cv", random_state=0),
    ):
        narrow, wide = (clone(model).fit(z, labels) for z in (x, x.astype(np.float64)))
        names = [name for name in ("transform", "predict", "predict_proba") if hasattr(narrow, name)]
        for name in names:
            got = getattr(narrow, name)(x)
            np.testing.assert_array_equal(got, getattr(wide, name)(x.astype(np.float64)))
            assert got.dtype in (np.float64, labels.dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_tensors(dtype, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")
    x = torch.asarray(np.random.default_rng(3).standard_normal((50, 2))).to(getattr(torch, dtype))
    y = 1e5 * x[:, 0].double()
    with config_context(array_api_dispatch=True):
        got = NadarayaWatsonRegressor(method="exact", gamma=0.5).fit(x, y).predict(x)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got, exact_means(x.double(), x.double(), y.numpy(), 0.5), rtol=1e-9)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.compiled(False)), "float64"])
@pytest.mark.parametrize("method", ["exact", "optimal", "posrf", "trig"])
def test_weights_are_repetitions(method, dtype):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((300, 2)).astype(dtype)
    y = np.stack([np.sin(x[:, 0]), x[:, 1] ** 2], axis=1)
    labels, weight = (x[:, 0] > 0.3).astype(int), rng.integers(0, 4, 300)
    options = {"method": method, "n_components": 128, "random_state": 0}
    halves = np.arange(300) < 150
    tolerance = {"rtol": 1e-7, "atol": 1e-9} if dtype == "float64" else {"rtol": 2e-3, "atol": 2e-4}
    for estimator, values, read in (
        (NadarayaWatsonRegressor, y, "predict"),
        (NadarayaWatsonClassifier, labels, "predict" if method == "trig" else "predict_proba"),
    ):
        repeated = [np.repeat(a, weight, axis=0) for a in (x, values)]
        want = getattr(estimator(**options).fit(*repeated), read)(x[:40])
        got = getattr(estimator(**options).fit(x, values, sample_weight=weight), read)(x[:40])
        np.testing.assert_allclose(got, want, **tolerance)
        ours, theirs = estimator(**options), estimator(**options)
        for half in (halves, ~halves):
            ours.partial_fit(x[half], values[half], sample_weight=weight[half] * 0.5)
            theirs.partial_fit(*(np.repeat(a[half], weight[half], axis=0) for a in (x, values)))
        np.testing.assert_allclose(getattr(ours, read)(x[:40]), getattr(theirs, read)(x[:40]), **tolerance)


def test_rows_without_an_estimate_get_that_of_landmarks():
    """Signed features can give a row a denominator that is not positive; the function has NaN there."""
    rng = np.random.default_rng(12)
    x, weight = rng.standard_normal((200, 2)), rng.integers(1, 4, 200)
    y = np.stack([x[:, 0] + 5, x[:, 1]], axis=1)
    model = NadarayaWatsonRegressor(method="trig", n_components=16, gamma=4.0, random_state=0)
    for part in (slice(0, 120), slice(120, 200)):
        model.partial_fit(x[part], y[part], sample_weight=weight[part])
    repeated = (np.repeat(a, weight, axis=0) for a in (x, y))
    wanted = fs.nadaraya_watson(4 * x, *repeated, model.feature_map_)
    lost = np.isnan(wanted[:, 0])
    assert 20 < lost.sum() < 180
    found = model.predict(4 * x)
    np.testing.assert_allclose(found[~lost], wanted[~lost])
    nearby = NadarayaWatsonRegressor(method="landmarks", n_components=16, gamma=4.0, random_state=0)
    for part in (slice(0, 120), slice(120, 200)):
        nearby.partial_fit(x[part], y[part], sample_weight=weight[part])
    np.testing.assert_allclose(found[lost], nearby.predict(4 * x)[lost])


def test_rows_far_from_all_points_get_the_value_of_the_nearest_landmark():
    x, far = np.arange(8.0)[:, None], np.linspace(50, 60, 40)[:, None]
    options = {"method": "trig", "n_components": 64, "gamma": 4.0, "random_state": 0}
    regressor = NadarayaWatsonRegressor(**options).fit(x, x[:, 0])
    lost = np.isnan(fs.nadaraya_watson(far, x, x, regressor.feature_map_)[:, 0])
    assert lost.any()
    np.testing.assert_allclose(regressor.predict(far)[lost], 7.0)
    classifier = NadarayaWatsonClassifier(**options).fit(x, x[:, 0] > 3)
    shares = np.eye(2)[(x[:, 0] > 3).astype(int)]
    lost = (fs.kernel_matvec(far, x, shares, classifier.feature_map_) <= 0).all(axis=1)
    assert lost.any()
    np.testing.assert_allclose(classifier.predict_proba(far)[lost], np.broadcast_to([0.0, 1.0], (lost.sum(), 2)))


@pytest.mark.parametrize("method", ["exact", "optimal"])
def test_blocks_with_and_without_weights(method):
    x = np.random.default_rng(5).standard_normal((90, 2))
    y, options = x[:, 0], {"method": method, "gamma": 1.0, "random_state": 0}
    plain, mixed = NadarayaWatsonRegressor(**options), NadarayaWatsonRegressor(**options)
    for start in (0, 30, 60):
        part = slice(start, start + 30)
        plain.partial_fit(x[part], y[part])
        mixed.partial_fit(x[part], y[part], sample_weight=np.ones(30) if start == 30 else None)
    mixed.partial_fit(x, y, sample_weight=np.zeros(90))
    np.testing.assert_allclose(mixed.predict(x), plain.predict(x), rtol=1e-10)


@pytest.mark.parametrize("method", ["exact", "optimal", "trig"])
def test_a_weighted_point_is_left_out_as_a_whole(method):
    """As in RidgeCV, all repetitions of a point are left out together, and its error counts as often."""
    rng = np.random.default_rng(6)
    x, weight = rng.standard_normal((40, 1)), rng.integers(0, 4, 40)
    y = np.sin(2 * x[:, 0]) + 0.1 * rng.standard_normal(40)
    options = {"method": method, "n_components": 32, "random_state": 0}
    whole = NadarayaWatsonRegressor(gamma="scale", **options).fit(x, y, sample_weight=weight)
    found, kept = {}, weight > 0
    for power in range(-4, 7):
        gamma = whole.gamma_ * 2.0**power
        model = NadarayaWatsonRegressor(gamma=gamma, **options).fit(x, y, sample_weight=weight)
        errors, outs = np.zeros(40), []
        for i in np.flatnonzero(kept):
            others = (np.arange(40) != i) & kept
            if method == "exact":
                out = exact_means(x[i : i + 1], x[others], y[others], gamma, weight[others])[0]
            else:
                repeated = (np.repeat(a[others], weight[others], axis=0) for a in (x, y))
                out = fs.nadaraya_watson(x[i : i + 1], *repeated, model.feature_map_)[0]
                out = np.average(y[others], weights=weight[others]) if np.isnan(out) else out
            errors[i] = (out - y[i]) ** 2
            outs.append(out)
        if method == "exact":
            got = _exact_leave_one_out(x[kept], y[kept, None], gamma, weight[kept].astype(float))
            np.testing.assert_allclose(got[:, 0], outs, rtol=1e-9)
        found[gamma] = np.average(errors, weights=weight)
    tuned = NadarayaWatsonRegressor(gamma="auto_cv", **options).fit(x, y, sample_weight=weight)
    assert tuned.gamma_ == pytest.approx(min(found, key=found.get))


def test_a_point_without_neighbours_is_judged_by_the_mean_of_the_others(monkeypatch):
    """Not by a mean that contains it, which would be nearer to it."""
    v, weight = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([1.0, 2.0, 1.0, 1.0])
    others = [np.average(np.delete(v[:, 0], i), weights=np.delete(weight, i)) for i in range(4)]
    alone = np.average((others - v[:, 0]) ** 2, weights=weight)
    model = NadarayaWatsonRegressor()
    for share, best in ((0.99, 2.0), (1.01, 1.0)):
        outs = {1.0: np.full((4, 1), np.nan), 2.0: v + np.sqrt(share * alone)}
        monkeypatch.setattr(model, "_left_out", lambda x, v, gamma, *rest, outs=outs: outs[gamma])
        assert model._tuned(v, v, 0, weight, ("exact",), [1.0, 2.0]) == ("exact", best)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.r_[-1.0, np.ones(19)], "[Nn]egative"),
        (np.r_[np.nan, np.ones(19)], "sample_weight contains NaN"),
        (np.ones(19), r"sample_weight.shape == \(19,\), expected \(20,\)"),
        (np.zeros(20), "at least one non-zero"),
        (np.full(20, 1e-60), "sample_weight exceeds the range of float32"),
    ],
)
@pytest.mark.parametrize("estimator", [NadarayaWatsonRegressor, NadarayaWatsonClassifier])
def test_bad_weights_are_refused(estimator, weight, message):
    x = np.random.default_rng(7).standard_normal((20, 3)).astype(np.float32)
    with pytest.raises(ValueError, match=message):
        estimator().fit(x, (np.arange(20) % 2).astype(np.float32), sample_weight=weight)


def test_weights_reach_the_estimators_of_ensembles_and_searches():
    x, y = load_diabetes(return_X_y=True)
    weight = np.random.default_rng(8).integers(0, 3, len(y)).astype(float)
    model = NadarayaWatsonRegressor(method="exact", gamma=50.0)
    direct = model.fit(x, y, sample_weight=weight)
    voted = VotingRegressor([("a", clone(model)), ("b", clone(model))]).fit(x, y, sample_weight=weight)
    np.testing.assert_allclose(voted.predict(x), direct.predict(x))
    assert direct.score(x, y, sample_weight=weight) > direct.score(x, y)
    search = GridSearchCV(clone(model), {"gamma": [50.0]}, cv=3).fit(x, y, sample_weight=weight)
    np.testing.assert_allclose(search.predict(x), direct.predict(x))
    assert AdaBoostRegressor(clone(model), n_estimators=3, random_state=0).fit(x, y).score(x, y) > 0.3
    boosted = AdaBoostClassifier(NadarayaWatsonClassifier(method="exact", gamma=50.0), n_estimators=3, random_state=0)
    assert boosted.fit(x, y > 100).score(x, y > 100) > 0.7
    with config_context(enable_metadata_routing=True):
        routed = clone(model).set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        assert len(cross_validate(routed, x, y, params={"sample_weight": weight}, cv=3)["test_score"]) == 3


@pytest.mark.parametrize("method", ["optimal", "exact", "trig"])
def test_later_blocks_change_neither_bandwidth_nor_features(method):
    """The first block determines both; a later block with another spread is added to the same sums."""
    rng = np.random.default_rng(0)
    near, far = rng.standard_normal((200, 2)), 3 * rng.standard_normal((100, 2)) + 5
    model = NadarayaWatsonRegressor(method=method, n_components=512, random_state=0)
    model.partial_fit(near, near[:, 0])
    gamma = model.gamma_
    model.partial_fit(far, far[:, 0])
    assert model.gamma_ == gamma == pytest.approx(1 / (2 * near.var()))
    whole = NadarayaWatsonRegressor(method="exact", gamma=gamma).fit(
        np.concatenate([near, far]), np.r_[near, far][:, 0]
    )
    if method == "exact":
        np.testing.assert_allclose(model.predict(far), whole.predict(far), rtol=1e-10)
    else:
        alone = NadarayaWatsonRegressor(method=method, n_components=512, random_state=0, gamma=gamma).fit(
            near, near[:, 0]
        )
        np.testing.assert_array_equal(model.feature_map_.projection, alone.feature_map_.projection)


def test_classes_may_be_named_in_any_order():
    x = np.array([[0.0], [0.1], [5.0], [5.1]])
    model = NadarayaWatsonClassifier(method="exact", gamma=1.0).partial_fit(
        x, np.array(["a", "a", "b", "b"]), classes=["b", "a"]
    )
    assert list(model.classes_) == ["a", "b"]
    assert list(model.predict(x)) == ["a", "a", "b", "b"]
    for label in ("c", "0", "ab"):  # above all classes, below all, between
        with pytest.raises(ValueError, match=f"y has labels .*{label}.*; accepted: those of the first block or of cl"):
            model.partial_fit(x[:1], np.array([label]))


def test_the_exact_choice_of_bandwidth_leaves_the_point_itself_out():
    """For pure noise, the chosen bandwidth must not be small.

    If a point were not left out, the smallest would fit best.
    """
    rng = np.random.default_rng(0)
    x, noise = rng.uniform(-3, 3, (200, 1)), rng.standard_normal(200)
    gammas = {
        method: NadarayaWatsonRegressor(method=method, gamma="auto_cv", n_components=512, random_state=0)
        .fit(x, noise)
        .gamma_
        for method in ("exact", "optimal")
    }
    assert gammas["exact"] < 4 / x.var()
    assert gammas["optimal"] < 4 / x.var()


def table(n=1500):
    """Continuous columns of unequal scales, with correlation, and a smooth function of them."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 4)) @ rng.standard_normal((4, 4))
    return x, np.sin(2 * x[:, 0]) + x[:, 1] ** 2


@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_landmarks_are_several_times_closer_than_features_on_continuous_tables(gamma):
    x, y = table()
    apart = x[:300] + 0.1 * np.random.default_rng(1).standard_normal((300, 4))
    exact = NadarayaWatsonRegressor(method="exact", gamma=gamma).fit(x, y).predict(apart)
    options = {"n_components": 256, "gamma": gamma, "random_state": 0}
    models = [NadarayaWatsonRegressor(method=method, **options).fit(x, y) for method in ("optimal", "landmarks")]
    blocks = NadarayaWatsonRegressor(method="landmarks", **options)
    for part in np.split(np.arange(1500), 5):
        blocks.partial_fit(x[part], y[part], sample_weight=None)
    assert blocks._sums.held <= 512
    features, whole, joined = (np.linalg.norm(model.predict(apart) - exact) for model in (*models, blocks))
    assert whole < features / 3
    assert joined < features / 2


@pytest.mark.parametrize("gamma", [0.5, "auto_cv"])
@pytest.mark.parametrize("weighted", [False, True])
def test_as_many_landmarks_as_points_are_exact(gamma, weighted):
    """This holds also far from all points, where the nearest one counts, and if each point is left out to choose
    gamma."""
    rng = np.random.default_rng(9)
    x, weight = rng.standard_normal((120, 2)), rng.integers(0, 4, 120)
    y = np.sin(3 * x) + 0.1 * rng.standard_normal((120, 2))
    asked = np.concatenate([x[:30] + 0.1, 100 * x[:10]])
    found = []
    for method in ("exact", "landmarks"):
        model = NadarayaWatsonRegressor(method=method, gamma=gamma, n_components=120, random_state=0)
        for part in (slice(0, 70), slice(70, 120)):
            model.partial_fit(x[part], y[part], sample_weight=weight[part] if weighted else None)
        found.append((model.gamma_, model.predict(asked)))
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[1][1], found[0][1], atol=1e-9)


def test_landmarks_classify_by_shares():
    x, _ = table(600)
    labels = np.where(x[:, 0] > 0, "up", "down")
    model = NadarayaWatsonClassifier(method="landmarks", n_components=64, gamma=1.0, random_state=0).fit(x, labels)
    exact = NadarayaWatsonClassifier(method="exact", gamma=1.0).fit(x, labels)
    assert model.score(x, exact.predict(x)) > 0.9
    np.testing.assert_allclose(model.predict_proba(x).sum(1), 1)
    assert np.isfinite(model.predict_proba(1e4 * x)).all()


def ridge_table():
    rng = np.random.default_rng(10)
    x = rng.standard_normal((60, 3))
    y = np.stack([np.sin(2 * x[:, 0]), x[:, 1] ** 2], axis=1) + 0.3 * rng.standard_normal((60, 2))
    return x, y, rng.integers(0, 3, 60).astype(float)


def test_a_ridge_path_leaves_each_point_out():
    """Against a regression of scikit-learn without each point, from features that are held fixed."""
    x, y, weight = ridge_table()
    alphas = [1e-3, 1e-1, 10.0]
    model = FeatureRidge(alpha=alphas, n_components=20, random_state=0).fit(x, y, sample_weight=weight)
    features = model.features_.transform(x)
    errors = np.zeros((3, 60))
    for i, alpha in enumerate(alphas):
        for j in np.flatnonzero(weight):
            others = np.arange(60) != j
            fitted = Ridge(alpha=alpha).fit(features[others], y[others], sample_weight=weight[others])
            errors[i, j] = ((fitted.predict(features[j : j + 1]) - y[j]) ** 2).mean()
    wanted = np.average(errors, axis=1, weights=weight)
    np.testing.assert_allclose(model.alpha_errors_, wanted, rtol=1e-6)
    assert model.alpha_ == alphas[np.argmin(wanted)]
    whole = Ridge(alpha=model.alpha_).fit(features, y, sample_weight=weight)
    np.testing.assert_allclose(model.predict(x), whole.predict(features), rtol=1e-6)


def test_ridge_blocks_and_weights():
    x, y, weight = ridge_table()
    y, parts = y[:, 0], (slice(0, 25), slice(25, 60))
    options = {"n_components": 16, "method": "trig", "gamma": 0.3, "random_state": 0}
    whole = FeatureRidge(alpha=0.1, **options).fit(x, y, sample_weight=weight)
    blocks, several = FeatureRidge(alpha=0.1, **options), FeatureRidge(**options)
    for part in parts:
        for model in (blocks, several):
            model.partial_fit(x[part], y[part], sample_weight=weight[part])
    np.testing.assert_allclose(blocks.predict(x), whole.predict(x), rtol=1e-8)
    repeated = (np.repeat(a, weight.astype(int), axis=0) for a in (x, y))
    np.testing.assert_allclose(
        FeatureRidge(alpha=0.1, **options).fit(*repeated).predict(x), whole.predict(x), rtol=1e-8
    )
    assert several.alpha_errors_.shape == (19,)
    assert several.alpha_errors_.argmin() not in (0, 18)
    assert whole.fit(x.astype(np.float32), y).predict(x.astype(np.float32)).dtype == np.float32


def test_a_ridge_holds_the_sums_of_two_blocks_at_most(monkeypatch):
    """The documented memory does not grow with the points; here 250 blocks have sums of 32 KiB."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 1)
    x, y = np.random.default_rng(0).standard_normal((2, 4000, 3))
    model = FeatureRidge("trig", n_components=64, random_state=0).partial_fit(x, y[:, 0])
    tracemalloc.start()
    model.partial_fit(x, y[:, 0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 64 * 64 * 8


def test_the_errors_of_ridge_blocks_are_those_of_generalised_cross_validation():
    """The errors are compared with those from the matrix that maps values to estimates."""
    x, y, _ = ridge_table()
    alphas, model = [1e-3, 1e-1, 10.0], FeatureRidge(n_components=20, gamma=0.3, random_state=0)
    model.set_params(alpha=alphas)
    for part in (slice(0, 25), slice(25, 60)):
        model.partial_fit(x[part], y[part] + 7.0)
    assert model.gamma_ == model.features_.gamma_ == 0.3
    features = model.features_.transform(x)
    features -= features.mean(axis=0)
    for alpha, found in zip(alphas, model.alpha_errors_, strict=True):
        hat = features @ np.linalg.solve(features.T @ features + alpha * np.eye(20), features.T) + 1 / 60
        wanted = ((y - hat @ y) ** 2).mean() / (1 - np.trace(hat) / 60) ** 2
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_points_of_no_weight_count_for_nothing_in_a_ridge():
    x, y, weight = ridge_table()
    model, kept = FeatureRidge(method="nystrom", n_components=16, random_state=0), weight > 0
    found = model.fit(x, y, sample_weight=weight).predict(x)
    wanted = model.fit(x[kept], y[kept], sample_weight=weight[kept]).predict(x)
    np.testing.assert_allclose(found, wanted, rtol=1e-8)


def test_a_ridge_without_a_penalty_has_the_shortest_coefficients():
    """There are more features than points, so many coefficients fit the values exactly."""
    x, y, _ = ridge_table()
    model = FeatureRidge(method="trig", alpha=0.0, n_components=100, gamma=10.0, random_state=0).fit(x, y)
    features = model.features_.transform(x)
    wanted = np.linalg.lstsq(features - features.mean(axis=0), y - y.mean(axis=0), rcond=1e-9)[0]
    np.testing.assert_allclose(model.coef_, wanted.T, atol=1e-8)


@pytest.mark.parametrize("alpha", [-1.0, np.nan, [], "one", [[1.0]]])
def test_bad_penalties_are_named(alpha):
    x, y, _ = ridge_table()
    with pytest.raises((TypeError, ValueError), match="alpha must be"):
        FeatureRidge(alpha=alpha).fit(x, y)
