"""The ops of landmarks, checked key by key: assignment, means, weights, seeds, moments and reading."""

import numpy as np
import pytest

from favorsharp.dispatch import watch
from favorsharp.moments import point_moments
from favorsharp.ops import landmark_seeds
from favorsharp.ops.landmark_metric import Metric
from favorsharp.ops.landmark_seeds import Noise, choose_seeds, draw_seeds, noise_of
from favorsharp.ops.landmarks import condense
from favorsharp.ops.weighted_attention import weighted_attention

KERNELS = ["softmax", "gaussian"]


def problem(rng, s=70, d=5, e=3, m=6):
    """Keys, some of them hidden and not finite, their values, landmarks, and a metric."""
    k, v = rng.standard_normal((s, d)), rng.standard_normal((s, e))
    weight = rng.standard_normal(s)
    weight[5], k[5], v[5] = -np.inf, np.nan, np.inf
    points, used = rng.standard_normal((m, d)), np.ones((1, m), bool)
    used[0, 1] = False
    metric = k[7:8] / 2, rng.standard_normal((d, d)) / 2, rng.standard_normal((1, d)) / 2
    return k, weight, v, points, used, metric


def by_key(k, weight, points, used, metric, kernel, scale, condensing):
    """The landmark of each visible key, its point y and its log weight there."""
    center, lift, direction = metric
    norm = lambda y: float(direction[0] @ y + (y @ lift) @ (y @ lift))  # noqa: E731
    for i in np.flatnonzero(weight > -np.inf):
        y = k[i] * scale**0.5 - center[0]
        squares = [np.sum(((y - c) @ lift) ** 2) if used[0, j] else np.inf for j, c in enumerate(points)]
        c = int(np.argmin(squares))
        log = weight[i] + norm(y) - (0.5 * y @ y if kernel == "gaussian" else 0)
        yield i, c, y, log - (squares[c] / 2 + norm(points[c]) if condensing else 0)


@pytest.mark.parametrize(("kernel", "conserving"), [("softmax", False), ("gaussian", False), ("gaussian", True)])
def test_landmarks_take_the_weights_and_values_of_their_keys(few_xp, rng, kernel, conserving):
    k, weight, v, points, used, metric = problem(rng)
    masses, means = np.zeros(6), np.zeros((6, 3))
    mean = lambda z: float(metric[2][0] @ z + (z @ metric[1]) @ (z @ metric[1]) / 2)  # noqa: E731
    for i, c, y, log in by_key(k, weight, points, used, metric, kernel, 0.7, True):
        if conserving:
            log = weight[i] + mean(y) - mean(points[c]) - (0.5 * y @ y if kernel == "gaussian" else 0)
        masses[c] += np.exp(log)
        means[c] += np.exp(log) * v[i]
    given = (few_xp(x) for x in (k, weight, v, points, used))
    options = {"kernel": kernel, "scale": 0.7, "conserving": conserving}
    got = [few_xp.back(x) for x in condense(*given, Metric(*map(few_xp, metric)), **options)]
    assert masses[1] == 0
    own = 0.5 * (points**2).sum(-1) if kernel == "gaussian" else 0
    np.testing.assert_allclose(got[0], (points + metric[0]) / 0.7**0.5, rtol=1e-12)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(got[1], np.log(masses) + own, rtol=1e-9)
    np.testing.assert_allclose(got[2], means / np.where(masses > 0, masses, 1)[:, None], rtol=1e-9)


@pytest.mark.own_backend
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_over_many_keys_do_not_drift(dtype):
    """Two landmarks take 200,000 keys each.

    A float32 sum that adds them one after the other would lose three digits.
    """
    rng = np.random.default_rng(0)
    k = np.where(rng.random((400_000, 1)) < 0.5, -2, 2) + rng.random((400_000, 2))
    v = 1 + rng.random((400_000, 1))
    given = [x.astype(dtype) for x in (k, np.zeros(400_000), v, np.array([[-1.5, 0], [2.5, 0]]))]
    metric = Metric(*(x.astype(dtype) for x in (np.zeros((1, 2)), np.eye(2) / 100, np.zeros((1, 2)))))
    used = np.ones((1, 2), bool)
    got = condense(*given, used, metric, kernel="softmax", scale=1.0)
    wide = [x.astype(np.float64) for x in given]
    want = condense(*wide, used, Metric(*(x.astype(float) for x in vars(metric).values())), kernel="softmax", scale=1.0)
    for a, b in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_log_weights_of_any_size(few_xp, rng):
    """Weights differ very much in size, also within a landmark, so those of a landmark must be relative to its
    largest."""
    k, _, v, points, used, metric = problem(rng)
    k[5], v[5] = 0, 0
    weight = rng.uniform(-3000, 3000, 70)
    want = [np.full(6, -np.inf), np.zeros((6, 3))]
    for i, c, _, log in sorted(by_key(k, weight, points, used, metric, "softmax", 1.0, True), key=lambda x: x[3]):
        share = np.exp(want[0][c] - np.logaddexp(want[0][c], log))
        want[1][c] = share * want[1][c] + (1 - share) * v[i]
        want[0][c] = np.logaddexp(want[0][c], log)
    given = (few_xp(x) for x in (k, weight, v, points, used))
    got = condense(*given, Metric(*map(few_xp, metric)), kernel="softmax", scale=1.0)
    for a, b in zip(got[1:], want, strict=True):
        np.testing.assert_allclose(few_xp.back(a), b, rtol=1e-9, atol=1e-12)


def test_seeds_are_the_largest_scores(few_xp, rng):
    points, logs = rng.standard_normal((2, 30, 4)), rng.gumbel(size=(2, 30))
    logs[0, 3] = -np.inf
    points[:, 7] = points[:, 8]
    picks, used = (few_xp.back(x) for x in draw_seeds(few_xp(points), few_xp(logs), num_seeds=30))
    for x, log, pick, needed in zip(points, logs, picks, used, strict=True):
        for j in range(30):
            squares = ((x[:, None] - x[pick[:j]]) ** 2).sum(-1).min(axis=1, initial=np.inf)
            scores = log + np.log(-np.expm1(-squares), where=squares > 0, out=np.full(30, -np.inf))
            assert needed[j] == (scores.max() > -np.inf)
            assert not needed[j] or pick[j] == np.argmax(scores)
    assert used.sum(-1).tolist() == [28, 29]  # one slot of the first has no candidate, and two points are equal


def test_moments_of_visible_and_finite_points(xp, rng):
    x, mask = rng.standard_normal((2, 300, 5)) + 1e6, rng.random((2, 300)) < 0.7
    mask[1] = False
    x[0, 9], mask[0, 9] = np.nan, True
    seen = x[0][mask[0] & np.isfinite(x[0]).all(-1)]
    count, mean, covariance = (xp.back(z) for z in point_moments(xp(x), xp(mask)))
    assert count.ravel().tolist() == [len(seen), 0]
    np.testing.assert_allclose(mean[0, 0], seen.mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance[0], np.cov(seen.T, bias=True), rtol=1e-8, atol=1e-9)
    assert not mean[1].any()
    assert not covariance[1].any()


def test_weights_multiply_the_kernel_and_later_keys_are_not_seen(xp, rng):
    q, k, v, weight = (rng.standard_normal(shape) for shape in ((2, 90, 4), (1, 130, 4), (2, 130, 3), (2, 130)))
    weight[:, ::9] = -np.inf
    for causal_from in (None, 40):
        logs = 0.5 * q @ k.swapaxes(-1, -2) + weight[:, None]
        if causal_from is not None:
            logs = np.where(np.arange(130) <= causal_from + np.arange(90)[:, None], logs, -np.inf)
        share = np.exp(logs - logs.max(-1, keepdims=True))
        want = share @ v / share.sum(-1, keepdims=True)
        got = weighted_attention(*(xp(x) for x in (q, k, weight, v)), scale=0.5, causal_from=causal_from)
        np.testing.assert_allclose(xp.back(got), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_value_reaches_only_who_sees_it(few_xp, rng, poison):
    q, k, v = (rng.standard_normal((100, size)) for size in (4, 4, 3))
    v[60, 1], weight = poison, np.zeros(100)
    weight[80], v[80], k[80] = -np.inf, np.nan, np.nan  # hidden from all
    got = few_xp.back(weighted_attention(*(few_xp(x) for x in (q, k, weight, v)), scale=0.5, causal_from=0))
    assert np.isfinite(got[:60]).all()
    assert np.isfinite(got[60:, ::2]).all()
    assert not np.isfinite(got[60:, 1]).any()


@pytest.mark.own_backend
def test_what_records_gradients_runs_the_references(rng):
    torch = pytest.importorskip("torch")
    k, weight, v, points, used, metric = (torch.asarray(x) if isinstance(x, np.ndarray) else x for x in problem(rng))
    metric = Metric(*(torch.asarray(x) for x in metric))
    for gradient in (False, True):
        with watch() as calls:
            condense(k.clone().requires_grad_(gradient), weight, v, points, used, metric, kernel="softmax", scale=1.0)
        assert calls[0][1] == "reference" or not gradient


def test_candidates_lie_anywhere_in_their_strata():
    """There is one candidate in each stratum along the direction; hidden keys and copies of keys do not count."""
    y = np.repeat(np.arange(51.0), 2)[:, None]
    visible = y[:, 0] < 50
    for offset in (0.0, 0.5, 0.999):
        noise = Noise(np.ones(1), np.full(5, offset), np.zeros(5))
        index, filled = landmark_seeds._candidates(y, visible, 5, noise)
        assert filled.all()
        np.testing.assert_array_equal(y[index, 0], np.floor(10 * (np.arange(5) + offset)))


def test_the_first_seed_is_drawn_by_squared_weights():
    k, weight = np.eye(3)[:, :2], np.log([1.0, 2.0, 3.0])
    flat = Metric(np.zeros((1, 2)), np.zeros((2, 2)), np.zeros((1, 2)))
    counts = np.zeros(3)
    for seed in range(1000):
        noise = noise_of(seed, 0, 1, 2)
        counts[choose_seeds(k, weight, flat, 1, noise, kernel="softmax", scale=1.0)[0][0]] += 1
    np.testing.assert_allclose(counts / 1000, np.array([1, 4, 9]) / 14, atol=0.06)
