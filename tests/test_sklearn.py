"""The estimators: scikit-learn's own checks, and what they promise beyond them."""

import pickle
from importlib.util import find_spec

import numpy as np
import pytest

pytest.importorskip("sklearn")
from scipy.sparse import csr_array
from sklearn.datasets import load_diabetes, load_iris
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import favorsharp as fs
from favorsharp.sklearn import NadarayaWatsonClassifier, NadarayaWatsonRegressor, RandomFeatures

pytestmark = pytest.mark.own_backend

ESTIMATORS = [
    RandomFeatures(n_components=32, random_state=0),
    NadarayaWatsonRegressor(n_components=64, random_state=0),
    NadarayaWatsonRegressor(method="exact"),
    NadarayaWatsonClassifier(n_components=512, random_state=0),
    NadarayaWatsonClassifier(method="exact"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_scikit_learn_accepts_it(estimator, monkeypatch):
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")
    results = check_estimator(estimator, on_fail=None, on_skip=None)
    failed = [
        (r["check_name"], r["exception"])
        for r in results
        if r["status"] == "failed" and type(r["exception"]).__name__ != "CUDARuntimeError"  # CuPy without a GPU
    ]
    assert not failed
    passed = [r["check_name"] for r in results if r["status"] == "passed"]
    assert len(passed) > 45
    found = 3 * bool(find_spec("array_api_strict")) + 2 * bool(find_spec("torch"))  # strict on devices, torch in dtypes
    assert passed.count("check_array_api_input") >= found


def test_features_estimate_the_rbf_kernel():
    x = np.random.default_rng(0).standard_normal((40, 3)) + 2
    got = [RandomFeatures(n_components=m, gamma=0.2, random_state=0).fit_transform(x) for m in (64, 8192)]
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
    two.partial_fit(x[100:], y[100:])  # the first block chose the features: where later ones are cut is of no account
    np.testing.assert_array_equal(blocks.predict(x), two.predict(x))
    if method != "trig":
        np.testing.assert_allclose(blocks.predict_proba(x), two.predict_proba(x), rtol=1e-10)
    if method == "exact":
        whole = NadarayaWatsonClassifier(**options).fit(x, y)
        np.testing.assert_allclose(blocks.predict_proba(x), whole.predict_proba(x), rtol=1e-10)
        np.testing.assert_allclose(whole.predict_proba(x).sum(1), 1)
    if method == "trig":
        assert not hasattr(blocks, "predict_proba")


def test_the_exact_estimate_far_from_everything_is_the_nearest_point():
    x = np.array([[0.0], [1.0], [2.0]])
    model = NadarayaWatsonRegressor(method="exact", gamma=5.0).fit(x, [1.0, 2.0, 3.0])
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
    """Log factors of signed features are constant for Gaussian Fourier features alone."""
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((30, 2)), rng.standard_normal(30)
    fm = fs.feature_map(fs.fit(x, x, method=method, kernel=kernel, scale=0.1), 64, rng=0)
    want = [fs.nadaraya_watson(x[i : i + 1], np.delete(x, i, 0), np.delete(v, i), fm)[0] for i in range(len(x))]
    np.testing.assert_allclose(fs.leave_one_out(x, v, fm), want, rtol=1e-8)


@pytest.mark.parametrize("method", ["optimal", "exact"])
def test_auto_cv_finds_a_better_bandwidth(method):
    """On points that were not fitted, of noisy values."""
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
        ({"gamma": None}, TypeError, "gamma must be .* got NoneType"),
        ({"gamma": "auto"}, ValueError, "gamma 'auto' is unknown"),
        ({"n_components": 0}, ValueError, "n_components must be an integer of 1 or more, got 0"),
        ({"n_components": 2.5}, TypeError, "n_components must be an integer"),
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


@pytest.mark.parametrize("method", ["optimal", "exact", "trig"])
def test_later_blocks_change_neither_bandwidth_nor_features(method):
    """The first block chooses both; a later one of another spread enters the same sums."""
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
    """On noise alone no bandwidth should be small; with the point itself the smallest would fit best."""
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
