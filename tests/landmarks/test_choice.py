"""The laws of the choice of landmarks, and of the expected error."""

from dataclasses import replace

import landmark_oracle
import numpy as np
import oracle
import pytest
from landmark_problems import KERNELS, chosen_by, exact, used_points
from problems import attention_problem

import favorsharp as fs
from favorsharp.diagnostics import expected_error
from favorsharp.landmarks.state import map_of_points
from favorsharp.ops.landmark_metric import Metric
from favorsharp.ops.landmark_seeds import choose_seeds, noise_of


@pytest.mark.parametrize(("kernel", "n", "steps"), [("softmax", 30, 3), ("gaussian", 90, 2), ("softmax", 90, 0)])
def test_choice_is_the_definition(xp, kernel, n, steps):
    q, k, v = attention_problem(3, n=n, d=4)
    k[n // 2 :: 7] = k[1]
    lm = fs.landmarks(6, kernel=kernel, steps=steps, rng=5)
    scale = lm.scale_of(4)
    points, held = landmark_oracle.choose(q * scale**0.5, k * scale**0.5, lm, noise_of(5, 0, 6, 4), kernel)
    np.testing.assert_allclose(used_points(xp, chosen_by(xp(q), xp(k), lm)), points, rtol=1e-7, atol=1e-9)
    want = landmark_oracle.attention(q * scale**0.5, k * scale**0.5, v, points, held, kernel, None)
    out = fs.linear_attention(xp(q), xp(k), xp(v), lm)
    assert xp.is_like(out, xp(v))
    np.testing.assert_allclose(xp.back(out), want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_window_is_the_definition(few_xp, kernel):
    q, k, v = attention_problem(4, n=61, d=4)
    lm = fs.landmarks(5, kernel=kernel)
    scale = lm.scale_of(4)
    points, held = landmark_oracle.choose(q * scale**0.5, k * scale**0.5, lm, noise_of(0, 0, 5, 4), kernel)
    for window in (1, 7, 16, 64):
        near = oracle.near_pairs(61, window, False)
        want = landmark_oracle.attention(q * scale**0.5, k * scale**0.5, v, points, held, kernel, near)
        got = fs.linear_attention(few_xp(q), few_xp(k), few_xp(v), lm, window=window)
        np.testing.assert_allclose(few_xp.back(got), want, rtol=1e-7, atol=1e-9)


def with_nine_different_keys():
    """More keys than candidates, most of them equal."""
    q, few, _ = attention_problem(0, (2,), n=70, s=9, d=4)
    rng = np.random.default_rng(1)
    k = few[:, rng.permutation(np.concatenate([np.arange(9), np.zeros(61, int)]))]
    return q, k, rng.standard_normal((2, 70, 3)), rng


@pytest.mark.parametrize("kernel", KERNELS)
def test_as_many_landmarks_as_different_keys_are_exact_with_windows(few_xp, kernel):
    q, k, v, _ = with_nine_different_keys()
    for lm in (fs.landmarks(9, kernel=kernel), fs.landmarks(70, kernel=kernel)):
        got = few_xp.back(fs.linear_attention(few_xp(q), few_xp(k), few_xp(v), lm, window=8))
        np.testing.assert_allclose(got, exact(q, k, v, kernel), atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_as_many_landmarks_as_different_keys_are_exact(xp, kernel):
    q, k, v, rng = with_nine_different_keys()
    for lm in (fs.landmarks(9, kernel=kernel), fs.landmarks(70, kernel=kernel)):
        got = xp.back(fs.linear_attention(xp(q), xp(k), xp(v), lm))
        np.testing.assert_allclose(got, exact(q, k, v, kernel), atol=1e-12)
    hidden = rng.random((2, 70)) < 0.3
    other = np.where(hidden[..., None], rng.standard_normal(k.shape), k)
    got = xp.back(fs.linear_attention(xp(q), xp(other), xp(v), fs.landmarks(9, kernel=kernel), key_mask=xp(~hidden)))
    np.testing.assert_allclose(got, exact(q, k, v, kernel, ~hidden), atol=1e-12)


def test_no_seed_is_drawn_twice(few_xp, rng):
    """The distance of a seed from itself has a rounding error, and all other keys may have almost no weight."""
    u, weight = few_xp(rng.standard_normal((50, 6))), few_xp(np.linspace(0, -200, 50))
    metric = Metric(0 * u[:1, :], few_xp(np.eye(6)), 0 * u[:1, :])
    given = {"kernel": "softmax", "scale": 1.0}
    index, needed = choose_seeds(u, weight, metric, 60, noise_of(0, 0, 60, 6), **given)
    assert sorted(few_xp.back(index)[:50]) == list(range(50))
    assert few_xp.back(needed).tolist() == [True] * 50 + [False] * 10


def test_one_query_needs_one_landmark(few_xp):
    """Only the queries distinguish keys.

    One query sees one number of each key, and the choice takes this into account.
    """
    q, k, v = attention_problem(2, n=1, s=50)
    got = fs.linear_attention(few_xp(q), few_xp(k), few_xp(v), fs.landmarks(1))
    np.testing.assert_allclose(few_xp.back(got), exact(q, k, v), atol=1e-9)


def test_outputs_lie_in_the_hull_of_the_values(few_xp, rng):
    q, k, v = attention_problem(5, (2,), n=80)
    lm = fs.landmarks(6)
    directions = rng.standard_normal((v.shape[-1], 50))
    for options in ({}, {"window": 8}, {"is_causal": True}, {"is_causal": True, "window": 4}):
        out = few_xp.back(fs.linear_attention(few_xp(q), few_xp(k), few_xp(v), lm, **options)) @ directions
        reach = v @ directions
        assert (out <= reach.max(-2, keepdims=True) + 1e-12).all()
        assert (out >= reach.min(-2, keepdims=True) - 1e-12).all()
        constant = fs.linear_attention(few_xp(q), few_xp(k), few_xp(np.full_like(v, 3.25)), lm, **options)
        np.testing.assert_allclose(few_xp.back(constant), 3.25, rtol=1e-14)


@pytest.mark.parametrize("n", [40, 90])  # fewer keys than candidates, and more
def test_order_and_offset_of_the_keys_do_not_matter(few_xp, rng, n):
    q, k, v = attention_problem(6, (2,), n=n)
    lm = fs.landmarks(12)
    want = few_xp.back(fs.linear_attention(few_xp(q), few_xp(k), few_xp(v), lm))
    order = rng.permutation(n)
    moved = few_xp.back(fs.linear_attention(few_xp(q), few_xp(k[:, order]), few_xp(v[:, order]), lm))
    np.testing.assert_allclose(moved, want, rtol=1e-8, atol=1e-10)
    shifted = fs.linear_attention(few_xp(q), few_xp(k + 7 * rng.standard_normal(k.shape[-1])), few_xp(v), lm)
    np.testing.assert_allclose(few_xp.back(shifted), want, rtol=1e-6, atol=1e-8)


def test_inverse_maps_of_queries_and_keys_do_not_change_what_is_chosen(rng):
    q, k, _ = attention_problem(7, n=30, d=4)  # all keys are candidates, in an order that a map may change
    lm = fs.landmarks(29, steps=0)
    turn = rng.standard_normal((4, 4)) + 2 * np.eye(4)
    x, y = q @ np.linalg.inv(turn), k @ turn.T
    plain, turned = chosen_by(q, k, lm), chosen_by(x, y, lm)
    np.testing.assert_allclose(
        turned.metric.lift @ turned.metric.lift.T,
        np.linalg.inv(turn.T) @ plain.metric.lift @ plain.metric.lift.T @ np.linalg.inv(turn),
        rtol=1e-4,
    )
    np.testing.assert_allclose(turned.metric.direction, plain.metric.direction @ np.linalg.inv(turn), rtol=1e-4)
    np.testing.assert_allclose(
        plain.log_key(k).max(-1), chosen_again(plain, turned, turn).log_key(y).max(-1), rtol=1e-4, atol=1e-5
    )


def chosen_again(plain, turned, turn):
    return replace(turned, points=plain.points @ turn.T, used=plain.used)


@pytest.mark.parametrize("n", [70, 20])
def test_masked_keys_enter_nothing(few_xp, n):
    q, k, v = attention_problem(8, (3,), n=n)
    mask = np.arange(n) < np.array([[n // 2], [n], [0]])
    lm = fs.landmarks(7)
    spoiled = [np.where(mask[..., None], x, np.nan) for x in (k, v)]
    for options in ({}, {"window": 8}, {"is_causal": True}, {"is_causal": True, "window": 4}):
        got = few_xp.back(
            fs.linear_attention(few_xp(q), *(few_xp(x) for x in spoiled), lm, key_mask=few_xp(mask), **options)
        )
        for row, length in enumerate((n // 2, n)):
            alone = fs.linear_attention(*(few_xp(x[row, :length]) for x in (q, k, v)), lm, **options)
            np.testing.assert_allclose(got[row, :length], few_xp.back(alone), rtol=1e-9, atol=1e-11)
        np.testing.assert_array_equal(got[2], 0)
    left = [np.concatenate([np.full_like(x[1, :9], np.nan), x[1]]) for x in (k, v)]
    x = np.concatenate([np.zeros_like(q[1, :9]), q[1]])
    got = fs.linear_attention(few_xp(x), *(few_xp(x) for x in left), lm, key_mask=few_xp(np.arange(n + 9) >= 9))
    np.testing.assert_allclose(
        few_xp.back(got)[9:],
        few_xp.back(fs.linear_attention(*(few_xp(x[1]) for x in (q, k, v)), lm)),
        rtol=1e-9,
        atol=1e-11,
    )


def test_one_seed_is_one_result(few_xp):
    q, k, v = (few_xp(x) for x in attention_problem(9, (2,), n=60))

    def run(rng):
        return few_xp.back(fs.linear_attention(q, k, v, fs.landmarks(8, rng=rng)))

    np.testing.assert_array_equal(run(None), run(0))
    np.testing.assert_array_equal(run(np.random.SeedSequence(4)), run(np.random.SeedSequence(4)))
    assert np.abs(run(1) - run(0)).max() > 1e-3
    generator = np.random.default_rng(3)
    assert fs.landmarks(8, rng=generator) != fs.landmarks(8, rng=generator)


@pytest.mark.parametrize("kernel", KERNELS)
def test_expected_error_is_the_definition(few_xp, kernel):
    q, k, _ = attention_problem(18, n=40, d=4)
    lm = fs.landmarks(6, kernel=kernel)
    scale = lm.scale_of(4)
    points, held = landmark_oracle.choose(q * scale**0.5, k * scale**0.5, lm, noise_of(0, 0, 6, 4), kernel)
    y = k * scale**0.5 - held.center
    kernels = np.array([2 * (landmark_oracle.log_norm(row, held) + landmark_oracle.own_mass(row, kernel)) for row in y])
    apart = np.array(
        [landmark_oracle.distance(*pair, held.matrix) for pair in zip(y, points[held.labels], strict=True)]
    )
    want = np.sqrt(np.average(1 - np.exp(-apart), weights=np.exp(kernels)))
    np.testing.assert_allclose(few_xp.back(expected_error(few_xp(q), few_xp(k), lm)), want, rtol=1e-6)
    wide = few_xp(np.stack([q, q])), few_xp(np.stack([np.concatenate([k, np.full((3, 4), np.nan)])]))
    mask = few_xp(np.arange(43) < 40)
    got = few_xp.back(expected_error(*wide, lm, key_mask=mask, enable_gqa=True))
    np.testing.assert_allclose(got, [want], rtol=1e-6)
    assert few_xp.back(expected_error(few_xp(q), few_xp(k), fs.landmarks(40, kernel=kernel))) == 0


def test_weights_of_points_are_repetitions_in_the_metric(few_xp):
    x, _, _ = attention_problem(6, n=30)
    weight, lm = 1 + np.arange(30) % 3, fs.landmarks(7, kernel="gaussian", scale=0.1)
    weighted = map_of_points(few_xp(x), lm, few_xp(weight.astype(float))).metric
    repeated = map_of_points(few_xp(np.repeat(x, weight, axis=0)), lm).metric
    for name in ("center", "direction"):
        got, want = (few_xp.back(getattr(metric, name)) for metric in (weighted, repeated))
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    squares = [few_xp.back(metric.lift) @ few_xp.back(metric.lift).T for metric in (weighted, repeated)]
    np.testing.assert_allclose(*squares, rtol=1e-9)
