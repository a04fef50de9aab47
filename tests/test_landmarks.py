"""Landmarks: the laws of the choice, of reading them, of windows and of streams."""

import copy
import importlib
import pickle
from dataclasses import replace
from itertools import pairwise

import landmark_oracle
import numpy as np
import oracle
import pytest
from problems import attention_problem

import favorsharp as fs
from favorsharp._autodiff import has_fused_attention
from favorsharp.diagnostics import expected_error, load_sample
from favorsharp.landmarks.state import landmark_map, log_weights, moments_of
from favorsharp.ops.landmark_metric import Metric
from favorsharp.ops.landmark_seeds import choose_seeds, noise_of

KERNELS = ["softmax", "gaussian"]


def exact(q, k, v, kernel="softmax", mask=None, is_causal=False, scale=None):
    scale = (q.shape[-1] ** -0.5 if kernel == "softmax" else 1.0) if scale is None else scale
    return oracle.attention(oracle.log_kernel(q, k, kernel, scale), v, mask, is_causal)


def chosen_by(q, k, lm, mask=None):
    return landmark_map(k, log_weights(k, mask, k.dtype), moments_of(q, k, mask), lm)


def used_points(xp, chosen):
    return xp.back(chosen.points)[xp.back(chosen.used)[..., 0, :]]


def relative(a, b):
    return np.linalg.norm(a - b, axis=(-2, -1)) / np.linalg.norm(b, axis=(-2, -1))


# The choice -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kernel", KERNELS)
def test_as_many_landmarks_as_different_keys_are_exact(xp, kernel):
    q, few, v = attention_problem(0, (2,), n=70, s=9, d=4)
    rng = np.random.default_rng(1)
    pick = np.concatenate([np.arange(9), np.zeros(61, int)])  # more keys than candidates, most of them equal
    k = few[:, rng.permutation(pick)]
    v = rng.standard_normal((2, 70, 3))
    arrays = [xp(x) for x in (q, k, v)]
    for lm in (fs.landmarks(9, kernel=kernel), fs.landmarks(70, kernel=kernel)):
        for window in (0, 8):
            got = xp.back(fs.linear_attention(*arrays, lm, window=window))
            np.testing.assert_allclose(got, exact(q, k, v, kernel), atol=1e-12)
    hidden = rng.random((2, 70)) < 0.3
    other = np.where(hidden[..., None], rng.standard_normal(k.shape), k)
    got = xp.back(fs.linear_attention(xp(q), xp(other), xp(v), fs.landmarks(9, kernel=kernel), key_mask=xp(~hidden)))
    np.testing.assert_allclose(got, exact(q, k, v, kernel, ~hidden), atol=1e-12)


def test_no_seed_is_drawn_twice(few_xp, rng):
    """The distance of a seed from itself is rounded, and other keys may weigh next to nothing."""
    u, weight = few_xp(rng.standard_normal((50, 6))), few_xp(np.linspace(0, -200, 50))
    metric = Metric(0 * u[:1, :], few_xp(np.eye(6)), 0 * u[:1, :])
    given = {"kernel": "softmax", "scale": 1.0}
    index, needed = choose_seeds(u, weight, metric, 60, noise_of(0, 0, 60, 6), **given)
    assert sorted(few_xp.back(index)[:50]) == list(range(50))
    assert few_xp.back(needed).tolist() == [True] * 50 + [False] * 10


def test_one_query_needs_one_landmark(few_xp):
    """Keys are told apart by queries only: one query sees one number of each key, and the choice knows it."""
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


# Streams --------------------------------------------------------------------------------------------------------------

WINDOWS = [0, 1, 5, 64]


def stream_problem(xp, n=60, batch=(2,), **kwargs):
    return [xp(x) for x in attention_problem(10, batch, n=n, **kwargs)]


def part(arrays, start, stop):
    return [x[..., start:stop, :] for x in arrays]


def assert_states(xp, a, b):
    assert (a.num_seen, a.window, a.settings) == (b.num_seen, b.window, b.settings)
    for name in ("keys", "log_weight", "values"):
        np.testing.assert_allclose(*(xp.back(getattr(s, name)) for s in (a, b)), rtol=1e-8, atol=1e-9, err_msg=name)
    for name in ("count_x", "mean_x", "covariance_x", "count_y", "mean_y", "covariance_y"):
        np.testing.assert_allclose(*(xp.back(getattr(s.moments, name)) for s in (a, b)), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("window", WINDOWS)
def test_whole_call_chunks_and_tokens_are_one_stream(few_xp, window):
    arrays = stream_problem(few_xp)
    lm = fs.landmarks(8, room=5, rng=3)
    want, last = fs.linear_attention(*arrays, lm, is_causal=True, window=window, return_state=True)
    out, state = fs.linear_attention(*part(arrays, 0, 21), lm, is_causal=True, window=window, return_state=True)
    outs = [out]
    for i in range(21, 36):
        out, state = fs.decode_step(*part(arrays, i, i + 1), state, lm)
        assert few_xp.is_like(out, arrays[2])
        outs.append(out)
    out, state = fs.linear_attention(
        *part(arrays, 36, 60), lm, is_causal=True, window=window, state=state, return_state=True
    )
    got = np.concatenate([few_xp.back(x) for x in (*outs, out)], axis=-2)
    np.testing.assert_allclose(got, few_xp.back(want), rtol=1e-8, atol=1e-9)
    assert_states(few_xp, state, last)
    assert last.held <= 8 + 5 + 2 * max(window, 1)


@pytest.mark.parametrize("window", [0, 4])
def test_states_of_tokens_are_values(few_xp, window):
    """A state goes on twice, and copies of it too, with grouped heads; hidden keys that are not finite stay hidden."""
    q, k, v = (few_xp.back(x).copy() for x in stream_problem(few_xp, n=40, batch=(4,)))
    k, v, mask = k[:2], v[:2], np.arange(40) != 3
    k[:, 3], v[:, 3] = np.nan, np.inf
    arrays, lm = [few_xp(x) for x in (q, k, v)], fs.landmarks(8, room=9)
    options = {"is_causal": True, "window": window, "enable_gqa": True, "return_state": True}
    want, last = fs.linear_attention(*arrays, lm, key_mask=few_xp(mask), **options)
    want = few_xp.back(want)
    _, state = fs.linear_attention(*part(arrays, 0, 20), lm, key_mask=few_xp(mask[:20]), **options)
    for t in range(20, 40):
        out, after = fs.decode_step(*part(arrays, t, t + 1), state, lm, enable_gqa=True)
        other, _ = fs.decode_step(*part(arrays, 5, 6), state, lm, enable_gqa=True)
        again, twin = fs.decode_step(*part(arrays, t, t + 1), state, lm, enable_gqa=True)
        for x in (out, again):
            np.testing.assert_allclose(few_xp.back(x), want[:, t : t + 1], rtol=1e-8, atol=1e-9)
        assert not np.allclose(few_xp.back(other), want[:, t : t + 1])
        state = copy.copy(after) if t % 7 == 0 else twin if t % 3 == 0 else after
    shown = [few_xp.back(getattr(s, name)) for s in (state, last) for name in ("log_weight", "values")]
    np.testing.assert_allclose(shown[0], shown[2], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(few_xp.back(state.moments.covariance_x), few_xp.back(last.moments.covariance_x))
    assert state.num_seen == last.num_seen


def test_every_token_is_checked_against_the_landmarks_of_its_state():
    arrays, lm = attention_problem(0, n=3), fs.landmarks(4)
    state = fs.init_state(lm, arrays[2].shape[-1], like=arrays[1])
    for t in range(3):
        with pytest.raises(ValueError, match="state comes from other landmarks"):
            fs.decode_step(*part(arrays, t, t + 1), state, fs.landmarks(5))
        _, state = fs.decode_step(*part(arrays, t, t + 1), state, lm)


@pytest.mark.parametrize("window", WINDOWS)
def test_no_output_depends_on_a_later_token(few_xp, window):
    arrays = [few_xp.back(x) for x in stream_problem(few_xp)]
    lm = fs.landmarks(6, room=4)
    want = few_xp.back(fs.linear_attention(*(few_xp(x) for x in arrays), lm, is_causal=True, window=window))
    for cut in (1, 17, 44):
        future = [np.concatenate([x[:, :cut], 1000 + x[:, cut:]], axis=-2) for x in arrays]
        got = few_xp.back(fs.linear_attention(*(few_xp(x) for x in future), lm, is_causal=True, window=window))
        np.testing.assert_allclose(got[:, :cut], want[:, :cut], rtol=1e-9, atol=1e-11)


def test_a_stream_is_exact_until_it_compresses(few_xp):
    arrays = stream_problem(few_xp)
    host = [few_xp.back(x) for x in arrays]
    lm = fs.landmarks(20, room=7)
    got = few_xp.back(fs.linear_attention(*arrays, lm, is_causal=True))
    want = exact(*host, is_causal=True)
    np.testing.assert_allclose(got[:, :27], want[:, :27], atol=1e-12)
    assert np.abs(got[:, 27:] - want[:, 27:]).max() > 1e-4
    windowed = few_xp.back(fs.linear_attention(*arrays, lm, is_causal=True, window=16))
    np.testing.assert_allclose(windowed[:, :48], want[:, :48], atol=1e-12)  # 2 blocks after the first full store
    assert np.abs(windowed[:, 48:] - want[:, 48:]).max() > 1e-4


@pytest.mark.parametrize(("kernel", "window"), [("softmax", 0), ("softmax", 4), ("gaussian", 3)])
def test_stream_is_the_definition(few_xp, kernel, window):
    q, k, v = attention_problem(19, n=50, d=4)
    lm = fs.landmarks(6, kernel=kernel, room=4, rng=2)
    root = lm.scale_of(4) ** 0.5
    want = landmark_oracle.stream(q * root, k * root, v, lm, window, kernel, lambda t: noise_of(2, t, 6, 4))
    got = fs.linear_attention(few_xp(q), few_xp(k), few_xp(v), lm, is_causal=True, window=window)
    np.testing.assert_allclose(few_xp.back(got), want, rtol=1e-7, atol=1e-8)


def test_a_stream_conserves_the_mean_kernel_of_its_keys(few_xp):
    """With a tilt of 0, the mean is that over queries with the mean and covariance of those seen."""
    q, k, v = (0.6 * x for x in attention_problem(23, n=25, d=4))
    lm = fs.landmarks(8, tilt=0, room=16)
    arrays = [few_xp(x) for x in (q, k, v)]
    _, state = fs.linear_attention(*arrays, lm, is_causal=True, return_state=True)
    assert state.held == 9  # the last key is exact
    x, y, points = (z * lm.scale_of(4) ** 0.5 for z in (q[:24], k[:24], few_xp.back(state.keys)[:8]))
    cov = np.cov(x.T, bias=True)
    cov += 1e-3 / 4 * np.trace(cov) * np.eye(4)

    def mean_kernels(z):
        away = z - y.mean(0)
        return np.exp(away @ x.mean(0) + ((away @ cov) * away).sum(1) / 2)

    got = np.exp(few_xp.back(state.log_weight)[:8]) @ mean_kernels(points)
    np.testing.assert_allclose(got, mean_kernels(y).sum(), rtol=1e-9)


def test_single_precision_devices():
    strict = pytest.importorskip("array_api_strict")
    arrays = [x[:2].astype(np.float32) for x in load_sample()]
    given = [strict.asarray(x, device=strict.Device("no_float64")) for x in arrays]
    for options in ({"window": 16}, {"is_causal": True, "window": 16}):
        got = fs.linear_attention(*given, fs.landmarks(32), **options).to_device(strict.Device("CPU_DEVICE"))
        want = fs.linear_attention(*arrays, fs.landmarks(32), **options)
        assert (relative(np.asarray(got), want) < 1e-3).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_reading_a_state_is_attention_with_a_bias(few_xp, kernel):
    q, k, v = stream_problem(few_xp)
    lm = fs.landmarks(8, kernel=kernel)
    out, state = fs.linear_attention(q, k, v, lm, is_causal=True, window=4, return_state=True)
    x, keys, bias, values = (few_xp.back(a) for a in (q, state.keys, state.log_weight, state.values))
    assert keys.shape[:2] == bias.shape == values.shape[:2]
    scale = lm.scale_of(8)
    want = oracle.attention(oracle.log_kernel(x, keys, kernel, scale) + bias[..., None, :], values)
    np.testing.assert_allclose(few_xp.back(fs.read(state, q, lm)), want, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(few_xp.back(out)[:, -1:], want[:, -1:], rtol=1e-9, atol=1e-11)
    if kernel == "gaussian":  # as softmax attention: the documented bias
        plain = scale * np.einsum("...nd,...sd->...ns", x, keys) + (bias - scale * (keys**2).sum(-1) / 2)[..., None, :]
        np.testing.assert_allclose(oracle.attention(plain, values), want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("window", WINDOWS)
def test_updates_of_any_length_are_one_stream(few_xp, window):
    q, k, v = stream_problem(few_xp)
    lm = fs.landmarks(8, room=5)
    mask = few_xp(np.random.default_rng(2).random((2, 60)) > 0.3)
    states = []
    for cuts in ([0, 60], [0, 1, 1, 22, 23, 60]):
        state = fs.init_state(lm, 5, like=k, window=window)
        for a, b in pairwise(cuts):
            state = fs.update(state, k[..., a:b, :], v[..., a:b, :], lm, key_mask=mask[..., a:b])
        states.append(state)
    assert_states(few_xp, *states)
    short = fs.update(fs.init_state(lm, 5, like=k, window=window), *part((k, v), 0, 12), lm)
    want = exact(*(few_xp.back(x) for x in (q, *part((k, v), 0, 12))))
    np.testing.assert_allclose(few_xp.back(fs.read(short, q, lm)), want, atol=1e-12)


def test_without_queries_keys_stand_for_them(few_xp):
    _, k, v = stream_problem(few_xp, n=16)
    lm = fs.landmarks(8, room=7)
    state = fs.update(fs.init_state(lm, 5, like=k), k, v, lm)
    _, seen = fs.linear_attention(k, k, v, lm, is_causal=True, return_state=True)
    np.testing.assert_allclose(few_xp.back(state.keys), few_xp.back(seen.keys), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(few_xp.back(state.log_weight), few_xp.back(seen.log_weight), rtol=1e-9, atol=1e-10)


def test_combine(few_xp):
    q, k, v = stream_problem(few_xp, n=60)
    want = exact(*(few_xp.back(x) for x in (q, k, v)))
    lm = fs.landmarks(40, room=20)  # 60 keys fit
    empty = fs.init_state(lm, 5, like=k)
    parts = [fs.update(empty, *part((k, v), a, a + 20), lm) for a in (0, 20, 40)]
    left = fs.combine(fs.combine(parts[0], parts[1]), parts[2])
    right = fs.combine(parts[0], fs.combine(parts[1], parts[2]))
    assert_states(few_xp, left, right)
    for state in (fs.combine(empty, parts[0]), fs.combine(parts[0], empty)):
        assert_states(few_xp, state, parts[0])
    assert left.num_seen == 60
    np.testing.assert_allclose(few_xp.back(fs.read(left, q, lm)), want, atol=1e-12)

    lm = fs.landmarks(16, room=4)
    parts = [
        fs.linear_attention(*part((q, k, v), a, a + 20), lm, is_causal=True, return_state=True)[1] for a in (0, 20, 40)
    ]
    left = fs.combine(fs.combine(parts[0], parts[1]), parts[2])
    right = fs.combine(parts[0], fs.combine(parts[1], parts[2]))
    assert left.held == right.held == 16
    alone = relative(few_xp.back(fs.read(parts[0], q, lm)), want)
    for state in (left, right):
        assert (relative(few_xp.back(fs.read(state, q, lm)), want) < 0.5 * alone).all()


def test_a_bidirectional_call_gives_the_state_of_its_landmarks(few_xp):
    q, k, v = stream_problem(few_xp)
    lm = fs.landmarks(8)
    want = few_xp.back(fs.linear_attention(q, k, v, lm))
    out, state = fs.linear_attention(q, k, v, lm, return_state=True)
    np.testing.assert_allclose(few_xp.back(out), want, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(few_xp.back(fs.read(state, q, lm)), want, rtol=1e-9, atol=1e-11)
    assert (state.held, state.num_seen) == (8, 60)
    out, longer = fs.linear_attention(q, k, v, lm, state=state, return_state=True)
    np.testing.assert_allclose(few_xp.back(out), few_xp.back(fs.read(longer, q, lm)), rtol=1e-9, atol=1e-11)
    out, windowed = fs.linear_attention(q, k, v, lm, window=16, return_state=True)
    np.testing.assert_allclose(few_xp.back(out), few_xp.back(fs.linear_attention(q, k, v, lm, window=16)))
    np.testing.assert_array_equal(few_xp.back(windowed.keys)[:, 8:], few_xp.back(k)[:, 32:])


@pytest.mark.parametrize("window", [0, 4])
def test_grouped_heads(few_xp, window):
    q, k, v = stream_problem(few_xp, batch=(2, 6), n=40)
    k, v = k[:, :2, ...], v[:, :2, ...]
    lm = fs.landmarks(8, room=6)
    for is_causal in (False, True):
        got = few_xp.back(fs.linear_attention(q, k, v, lm, enable_gqa=True, window=window, is_causal=is_causal))
        for head in range(2):  # the three query heads of a key head are its queries
            x = few_xp.back(q)[:, 3 * head : 3 * head + 3]
            wide = [np.repeat(few_xp.back(a)[:, head : head + 1], 3, axis=1) for a in (k, v)]
            if not is_causal and window == 0:
                pooled = few_xp(x.reshape(2, 120, 8))
                alone = fs.linear_attention(pooled, *(few_xp(a[:, 0]) for a in wide), lm)
                np.testing.assert_allclose(
                    got[:, 3 * head : 3 * head + 3].reshape(2, 120, 5), few_xp.back(alone), rtol=1e-9, atol=1e-11
                )
    out, state = fs.linear_attention(
        *part((q, k, v), 0, 30), lm, is_causal=True, window=window, enable_gqa=True, return_state=True
    )
    outs = [out]
    assert tuple(state.keys.shape[:2]) == (2, 2)
    for i in range(30, 40):
        out, state = fs.decode_step(*part((q, k, v), i, i + 1), state, lm, enable_gqa=True)
        outs.append(out)
    np.testing.assert_allclose(np.concatenate([few_xp.back(x) for x in outs], axis=-2), got, rtol=1e-8, atol=1e-9)
    last = fs.read(state, q[..., -1:, :], lm, enable_gqa=True)
    np.testing.assert_allclose(few_xp.back(last), got[..., -1:, :], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"is_causal": True}, {"is_causal": True, "window": 4}])
def test_packed_sequences_and_leading_axes(few_xp, options):
    q, k, v = stream_problem(few_xp, n=60, batch=(3,))
    lm = fs.landmarks(6, room=3)
    bounds = [0, 25, 25, 30, 60]
    got = few_xp.back(fs.linear_attention(q, k, v, lm, cu_seqlens=bounds, **options))
    alone = [
        few_xp.back(fs.linear_attention(*part((q, k, v), a, b), lm, **options))
        for a, b in ((0, 25), (25, 30), (30, 60))
    ]
    np.testing.assert_allclose(got, np.concatenate(alone, axis=-2), rtol=1e-9, atol=1e-11)
    shared = few_xp.back(fs.linear_attention(q, k[0, ...], v[0, ...], lm, **options))
    mask = few_xp(np.arange(60) < np.array([[60], [31], [60]]))
    hidden = few_xp.back(fs.linear_attention(q, k[0, ...], v[0, ...], lm, key_mask=mask, **options))
    for row in range(3):
        want = fs.linear_attention(q[row, ...], k[0, ...], v[0, ...], lm, **options)
        np.testing.assert_allclose(shared[row], few_xp.back(want), rtol=1e-9, atol=1e-11)
    want = fs.linear_attention(q[1, ...], k[0, ...], v[0, ...], lm, key_mask=mask[1, ...], **options)
    np.testing.assert_allclose(hidden[1], few_xp.back(want), rtol=1e-9, atol=1e-11)


# One call, and other verbs --------------------------------------------------------------------------------------------


def test_attention_in_one_call(few_xp):
    q, k, v = stream_problem(few_xp, n=50)
    for options in ({}, {"window": 4}, {"is_causal": True}):
        got = fs.attention(q, k, v, method="landmarks", num_features=9, scale=0.5, rng=2, **options)
        want = fs.linear_attention(q, k, v, fs.landmarks(9, scale=0.5, rng=2), **options)
        np.testing.assert_array_equal(few_xp.back(got), few_xp.back(want))
    with pytest.raises(ValueError, match="takes no calibration"):
        fs.attention(q, k, v, method="landmarks", calibration=(q, k))
    with pytest.raises(ValueError, match="takes no draw"):
        fs.attention(q, k, v, method="landmarks", draw="iid")


def test_nadaraya_watson(xp):
    x, y, v = (xp(a) for a in attention_problem(11, n=20, s=50, d=3))
    lm = fs.landmarks(50, kernel="gaussian", scale=2.0)
    want = exact(*(xp.back(a) for a in (x, y, v)), "gaussian", scale=2.0)
    np.testing.assert_allclose(xp.back(fs.nadaraya_watson(x, y, v, lm)), want, atol=1e-12)
    np.testing.assert_allclose(xp.back(fs.nadaraya_watson(x, y, v[:, 0], lm)), want[:, 0], atol=1e-12)
    rough = fs.nadaraya_watson(x, y, v, fs.landmarks(25, kernel="gaussian", scale=2.0))
    assert relative(xp.back(rough), want) < 0.5


def test_out_is_written(few_xp):
    if few_xp.name == "numpy-readonly-strided":
        few_xp = replace(few_xp, to=np.array)
    q, k, v = stream_problem(few_xp)
    lm = fs.landmarks(8)
    out = few_xp(np.zeros((2, 60, 5)))
    assert fs.linear_attention(q, k, v, lm, is_causal=True, out=out) is out
    np.testing.assert_array_equal(few_xp.back(out), few_xp.back(fs.linear_attention(q, k, v, lm, is_causal=True)))
    with pytest.raises(ValueError, match=r"out has shape \(2, 60, 4\)"):
        fs.linear_attention(q, k, v, lm, out=out[..., :4])


@pytest.mark.parametrize("window", [0, 4])
def test_saved_and_pickled_states_go_on(tmp_path, few_xp, window):
    arrays = stream_problem(few_xp, n=40)
    lm = fs.landmarks(8, room=4, rng=np.random.default_rng(0))
    want = few_xp.back(fs.linear_attention(*arrays, lm, is_causal=True, window=window))
    _, state = fs.linear_attention(*part(arrays, 0, 25), lm, is_causal=True, window=window, return_state=True)
    fs.save(tmp_path / "state.npz", state)
    fs.save(tmp_path / "settings.npz", lm)
    again = fs.load(tmp_path / "settings.npz")
    assert again == lm
    kept = [fs.load(tmp_path / "state.npz", like=arrays[0])]
    if few_xp.name in ("numpy-readonly-strided", "torch"):
        kept.append(pickle.loads(pickle.dumps(state)))
    for held in kept:
        assert_states(few_xp, held, state)
        out = fs.linear_attention(*part(arrays, 25, 40), again, is_causal=True, window=window, state=held)
        np.testing.assert_allclose(few_xp.back(out), want[:, 25:], rtol=1e-8, atol=1e-9)


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "whole", "causal"), [(32, 0.27, 0.12), (128, 0.13, 0.035)])
def test_errors_on_the_attention_sample(m, whole, causal):
    q, k, v = (x.astype(np.float32) for x in load_sample())
    lm = fs.landmarks(m)
    assert relative(fs.linear_attention(q, k, v, lm), exact(q, k, v)).mean() <= whole
    got = fs.linear_attention(q, k, v, lm, is_causal=True, window=16)
    assert relative(got, exact(q, k, v, is_causal=True)).mean() <= causal
    if m == 128:
        assert relative(fs.linear_attention(q, k, v, lm, window=16), exact(q, k, v)).mean() <= 0.09


def test_narrow_dtypes(few_xp):
    for dtype in ("float16", "float32"):
        if hasattr(few_xp.namespace, dtype):
            check_narrow(few_xp, dtype)


def check_narrow(few_xp, dtype):
    q, k, v = attention_problem(12, (2,), n=60)
    q, k = 6 * q, 6 * k  # norms of 30
    narrow = [few_xp(x.astype(np.float16), dtype) for x in (q, k, v)]
    wide = [few_xp(few_xp.back(x).astype(np.float64)) for x in narrow]
    for options in ({}, {"window": 4}, {"is_causal": True}):
        lm = fs.landmarks(20, scale=0.1)
        got = fs.linear_attention(*narrow, lm, **options)
        assert few_xp.is_like(got, narrow[2])
        want = few_xp.back(fs.linear_attention(*wide, lm, **options))
        tolerance = 2e-3 if dtype == "float16" else 2e-4
        assert (relative(few_xp.back(got).astype(np.float64), want) < tolerance).all()


def test_bfloat16():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.asarray(x).to(torch.bfloat16) for x in attention_problem(12, (2,), n=60))
    out, state = fs.linear_attention(q, k, v, fs.landmarks(20), is_causal=True, return_state=True)
    assert out.dtype == torch.bfloat16
    assert state.keys.dtype == torch.float32
    want = fs.linear_attention(q.double(), k.double(), v.double(), fs.landmarks(20), is_causal=True)
    assert (relative(out.double().numpy(), want.numpy()) < 0.01).all()


EXTREMES = {
    "one key dominates": lambda q, k, v: (q, np.concatenate([k[:1] * 40, k[1:]]), v),
    "rank one": lambda q, k, v: (q[:, :1] * np.ones(8), k[:, :1] * np.arange(8), v),
    "constant keys": lambda q, k, v: (q, np.ones_like(k), v),
    "constant queries": lambda q, k, v: (np.ones_like(q), k, v),
    "all zero": lambda q, k, v: (0 * q, 0 * k, v),
    "large": lambda q, k, v: (1e6 * q, 1e6 * k, v),
    "tiny": lambda q, k, v: (1e-18 * q, 1e-18 * k, v),
    "large values": lambda q, k, v: (q, k, 1e37 * v),
    "far away": lambda q, k, v: (q, k + 1e3, v),
    "one key": lambda q, k, v: (q[:1], k[:1], v[:1]),
    "no key": lambda q, k, v: (q[:0], k[:0], v[:0]),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extremes_are_finite(few_xp, name, dtype):
    q, k, v = (few_xp(x, dtype) for x in EXTREMES[name](*attention_problem(13, n=60)))
    for lm in (fs.landmarks(5), fs.landmarks(5, kernel="gaussian")):
        for options in ({}, {"window": 4}, {"is_causal": True, "window": 4}):
            out = few_xp.back(fs.linear_attention(q, k, v, lm, **options))
            assert np.isfinite(out).all()
    if name in ("constant keys", "all zero", "constant queries", "one key", "no key"):
        got = few_xp.back(fs.linear_attention(q, k, v, fs.landmarks(1)))
        want = exact(*(few_xp.back(x).astype(np.float64) for x in (q, k, v)))
        np.testing.assert_allclose(got, want, atol=1e-5 if dtype == "float32" else 1e-12)


def test_a_nan_reaches_only_who_sees_it(few_xp):
    q, k, v = attention_problem(14, (2,), n=60)
    lm = fs.landmarks(6)
    plain = {
        causal: few_xp.back(fs.linear_attention(few_xp(q), few_xp(k), few_xp(v), lm, is_causal=causal))
        for causal in (False, True)
    }
    for spoiled in range(3):
        arrays = [x.copy() for x in (q, k, v)]
        arrays[spoiled][0, 40, 2] = np.nan
        for causal in (False, True):
            got = few_xp.back(fs.linear_attention(*(few_xp(x) for x in arrays), lm, is_causal=causal))
            np.testing.assert_allclose(got[1], plain[causal][1], rtol=1e-9, atol=1e-11)
            if causal:
                np.testing.assert_allclose(got[0, :40], plain[True][0, :40], rtol=1e-9, atol=1e-11)
            assert np.isnan(got[0, 40]).any()
            if spoiled == 0:
                assert np.isfinite(np.delete(got[0], 40, axis=0)).all()
            else:
                assert np.isnan(got[0, 40 if causal else 0 :]).any(-1).all()


# Gradients ------------------------------------------------------------------------------------------------------------


def torch_gradients(function, arrays, weight):
    torch = pytest.importorskip("torch")
    leaves = [torch.asarray(x.copy()).requires_grad_() for x in arrays]
    (function(*leaves) * torch.asarray(weight)).sum().backward()
    return [x.grad.numpy() for x in leaves]


def jax_gradients(function, arrays, weight):
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    given = [jax.numpy.asarray(x) for x in arrays]
    gradients = jax.grad(lambda *a: (function(*a) * weight).sum(), argnums=(0, 1, 2))
    return [np.asarray(g) for g in jax.jit(gradients)(*given)]


def vjp_gradients(function, arrays, weight):
    torch = pytest.importorskip("torch")
    given = [torch.asarray(x) for x in arrays]
    _, pullback = fs.vjp(fs.linear_attention, *given, function.args[0], **function.keywords)
    return [x.numpy() for x in pullback(torch.asarray(weight))]


def numpy_gradients(function, arrays, weight):
    _, pullback = fs.vjp(fs.linear_attention, *arrays, function.args[0], **function.keywords)
    return pullback(weight)


class Through:
    """linear_attention with landmarks as a function of q, k and v."""

    def __init__(self, lm, **keywords):
        self.args, self.keywords = (lm,), keywords

    def __call__(self, q, k, v):
        return fs.linear_attention(q, k, v, *self.args, **self.keywords)


@pytest.mark.parametrize(
    ("gradients", "kernel", "window", "steps"),
    [
        (torch_gradients, "softmax", 0, 3),
        (torch_gradients, "gaussian", 0, 2),
        (torch_gradients, "softmax", 3, 1),
        (torch_gradients, "softmax", 0, 0),
        (numpy_gradients, "softmax", 0, 3),
        (numpy_gradients, "gaussian", 0, 1),
        (numpy_gradients, "softmax", 0, 0),
        (vjp_gradients, "softmax", 3, 3),
        (numpy_gradients, "softmax", 3, 3),
        (numpy_gradients, "gaussian", 1, 0),
        (jax_gradients, "gaussian", 3, 1),
    ],
)
def test_gradients_with_the_assignment_held(rng, gradients, kernel, window, steps):
    arrays = attention_problem(15, n=24, d=3, e=2)
    q, k, _ = arrays
    lm = fs.landmarks(5, kernel=kernel, steps=steps)
    scale = lm.scale_of(3)
    _, held = landmark_oracle.choose(q * scale**0.5, k * scale**0.5, lm, noise_of(0, 0, 5, 3), kernel)
    near = oracle.near_pairs(24, window, False) if window else None
    weight = rng.standard_normal((24, 2))
    got = gradients(Through(lm, window=window), arrays, weight)
    for i in range(3):
        way = rng.standard_normal(arrays[i].shape)
        values = []
        for step in (1e-5, -1e-5):
            moved = [x + step * way if j == i else x for j, x in enumerate(arrays)]
            values.append((landmark_oracle.held_attention(*moved, scale, held, kernel, near) * weight).sum())
        np.testing.assert_allclose((got[i] * way).sum(), (values[0] - values[1]) / 2e-5, rtol=1e-5, atol=1e-7)


def test_gradients_of_a_stream_are_finite_and_causal():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.asarray(x).requires_grad_() for x in attention_problem(16, (2,), n=60))
    out = fs.linear_attention(q, k, v, fs.landmarks(8, room=4), is_causal=True, window=4)
    out[:, :41].square().sum().backward()
    for x in (q, k, v):
        assert torch.isfinite(x.grad).all()
        assert (x.grad[:, 41:] == 0).all()
        assert (x.grad[:, 1:40].abs().amax(-1) > 0).all()


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, "softmax"),
        ({"is_causal": True}, "softmax"),
        ({"is_causal": True, "window": 4}, "gaussian"),
        ({"window": 3}, "softmax"),
        ({"window": 16}, "gaussian"),
    ],
)
def test_gradients_of_numpy_arrays_are_those_of_autograd(options, kernel):
    """Grouped heads that share keys, a mask, values that are broadcast, packed sequences, and a long tile."""
    q, k, v = attention_problem(16, (2, 4), n=90)
    k, v = k[:, :2], v[:1, :1]
    mask = np.random.default_rng(4).random((2, 1, 90)) > 0.2
    k[~np.broadcast_to(mask, k.shape[:-1])] = np.nan
    options = {**options, "enable_gqa": True, "cu_seqlens": [0, 30, 90]}
    lm, weight = (
        fs.landmarks(8, room=4, kernel=kernel),
        np.random.default_rng(5).standard_normal((2, 4, 90, v.shape[-1])),
    )
    out, pullback = fs.vjp(fs.linear_attention, q, k, v, lm, key_mask=mask, **options)
    torch = pytest.importorskip("torch")
    given = [torch.asarray(x) for x in (q, k, v)]
    same, reverse = fs.vjp(fs.linear_attention, *given, lm, key_mask=torch.asarray(mask), **options)
    np.testing.assert_allclose(out, same.numpy(), rtol=1e-9, atol=1e-11)
    for own, want in zip(pullback(weight), reverse(torch.asarray(weight)), strict=True):
        np.testing.assert_allclose(own, want.numpy(), rtol=1e-7, atol=1e-9)


def test_gradients_of_numpy_arrays_with_unequal_lengths():
    torch = pytest.importorskip("torch")
    q, k, v = attention_problem(16, (2,), n=30)
    for keys in (0, 20):
        arrays, weight = (q, k[0, :keys], v[:, :keys]), np.ones((2, 30, v.shape[-1]))
        _, pullback = fs.vjp(fs.linear_attention, *arrays, fs.landmarks(8))
        _, reverse = fs.vjp(fs.linear_attention, *(torch.asarray(x) for x in arrays), fs.landmarks(8))
        for own, want in zip(pullback(weight), reverse(torch.asarray(weight)), strict=True):
            np.testing.assert_allclose(own, want.numpy(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("steps", [0, 2])
def test_tiles_do_not_matter_to_gradients_of_numpy_arrays(monkeypatch, steps):
    q, k, v = attention_problem(20, (2,), n=70)
    lm = fs.landmarks(6, room=40, steps=steps)
    calls = {}, {"is_causal": True}, {"window": 24}

    def results():
        pullbacks = [fs.vjp(fs.linear_attention, q, k, v, lm, **options)[1] for options in calls]
        return [x for pullback in pullbacks for x in pullback(v)]

    want = results()
    monkeypatch.setattr("favorsharp.ops.state.TILE_ELEMENTS", 1)  # 16 points
    for a, b in zip(results(), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_compiled_by_jax():
    """The results are those of NumPy, so the laws hold as they do there."""
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    import favorsharp.jax  # noqa: F401

    host = attention_problem(17, (2,), n=30)
    mask = np.arange(30) < np.array([[30], [20]])
    given = [jax.numpy.asarray(x) for x in (*host, mask)]
    lm = fs.landmarks(5)
    for options in ({"window": 4}, {"is_causal": True, "window": 4, "return_state": True}):

        def call(q, k, v, mask, lm, options=options):
            return fs.linear_attention(q, k, v, lm, key_mask=mask, **options)

        want = jax.tree_util.tree_leaves(call(*host, mask, lm))
        for a, b in zip(jax.tree_util.tree_leaves(jax.jit(call)(*given, lm)), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


# Settings and errors --------------------------------------------------------------------------------------------------


def test_settings_are_a_value():
    lm = fs.landmarks(12, kernel="gaussian", scale=2, rng=7)
    text = "Landmarks(num_landmarks=12, kernel='gaussian', scale=2.0, tilt=1.5, steps=3, room=12, seed=7)"
    assert repr(lm) == text
    assert pickle.loads(pickle.dumps(lm)) == lm
    assert len({lm, fs.landmarks(12, kernel="gaussian", scale=2.0, rng=np.int64(7))}) == 1
    with pytest.raises(AttributeError):
        lm.seed = 3


q_, k_, v_ = attention_problem(0, (2,), n=9)
held_ = fs.landmarks(4)
state_ = fs.init_state(held_, 5, like=k_)
SPOILED = {
    "m": (lambda: fs.landmarks(0), ValueError, "num_landmarks must be an integer of 1 or more, got 0"),
    "m no integer": (lambda: fs.landmarks(2.5), TypeError, "num_landmarks must be an integer"),
    "kernel": (
        lambda: fs.landmarks(4, kernel="laplace"),
        ValueError,
        "kernel 'laplace' is unknown; accepted: softmax, gaussian",
    ),
    "scale": (lambda: fs.landmarks(4, scale=-1), ValueError, "scale must be a positive finite number, got -1"),
    "tilt": (lambda: fs.landmarks(4, tilt=-0.5), ValueError, "tilt must be a finite number of 0 or more, got -0.5"),
    "tilt nan": (lambda: fs.landmarks(4, tilt=float("nan")), ValueError, "tilt must be a finite number"),
    "tilt text": (lambda: fs.landmarks(4, tilt="1"), TypeError, "tilt must be a finite number"),
    "steps": (lambda: fs.landmarks(4, steps=-1), ValueError, "steps must be an integer of 0 or more"),
    "room": (lambda: fs.landmarks(4, room=0), ValueError, "room must be an integer of 1 or more, got 0"),
    "rng": (lambda: fs.landmarks(4, rng="a"), TypeError, "rng must be None, an int"),
    "rng below 0": (lambda: fs.landmarks(4, rng=-2), ValueError, "rng must be a non-negative int"),
    "causal and unequal": (
        lambda: fs.linear_attention(q_[:, :3], k_, v_, held_, is_causal=True),
        ValueError,
        "is_causal needs as many",
    ),
    "window and unequal": (
        lambda: fs.linear_attention(q_[:, :3], k_, v_, held_, window=2),
        ValueError,
        "window needs as many .* n=3",
    ),
    "window below 0": (
        lambda: fs.linear_attention(q_, k_, v_, held_, window=-2),
        ValueError,
        "window must be an integer of 0",
    ),
    "flag": (
        lambda: fs.linear_attention(q_, k_, v_, held_, return_state=1),
        TypeError,
        "return_state must be True or False",
    ),
    "state of features": (
        lambda: fs.linear_attention(
            q_, k_, v_, held_, is_causal=True, state=fs.init_state(fs.feature_map(fs.fit(q_, k_), 4, rng=0), 5, like=k_)
        ),
        TypeError,
        "state must be a favorsharp.LandmarkState.* got State",
    ),
    "state with features": (
        lambda: fs.read(state_, q_, fs.feature_map(fs.fit(q_, k_), 4, rng=0)),
        TypeError,
        "state must be a favorsharp.State, got LandmarkState",
    ),
    "other settings": (lambda: fs.read(state_, q_, fs.landmarks(5)), ValueError, "state comes from other landmarks"),
    "other d": (lambda: fs.read(state_, q_[..., :4], held_), ValueError, "state has d=8, q has d=4"),
    "other e": (lambda: fs.update(state_, k_, v_[..., :2], held_), ValueError, "state has e=5, v has e=2"),
    "other window": (
        lambda: fs.linear_attention(q_, k_, v_, held_, is_causal=True, window=2, state=state_),
        ValueError,
        "window must be that of the state, 0, got 2",
    ),
    "window, state, not causal": (
        lambda: fs.linear_attention(q_, k_, v_, held_, window=2, state=fs.init_state(held_, 5, like=k_, window=2)),
        ValueError,
        "a window with a state needs is_causal=True",
    ),
    "packed with state": (
        lambda: fs.linear_attention(q_, k_, v_, held_, cu_seqlens=[0, 9], return_state=True),
        ValueError,
        "cu_seqlens with state",
    ),
    "bounds": (
        lambda: fs.linear_attention(q_, k_, v_, held_, cu_seqlens=[0, 8]),
        ValueError,
        "cu_seqlens must start at 0, end at n=9",
    ),
    "two tokens": (lambda: fs.decode_step(q_, k_, v_, state_, held_), ValueError, "decode_step takes one token"),
    "combine settings": (
        lambda: fs.combine(state_, fs.init_state(fs.landmarks(5), 5, like=k_)),
        ValueError,
        "combine needs states of one",
    ),
    "combine sizes": (
        lambda: fs.combine(state_, fs.init_state(held_, 4, like=k_)),
        ValueError,
        "combine needs states of one kind",
    ),
    "combine types": (lambda: fs.combine(state_, fs.moments(q_, k_)), TypeError, "got LandmarkState and Moments"),
    "combine windows": (
        lambda: fs.combine(*(fs.update(fs.init_state(held_, 5, like=k_, window=2), k_, v_, held_),) * 2),
        ValueError,
        "states with a window cannot be combined",
    ),
    "of_map": (
        lambda: fs.vjp(fs.linear_attention, q_, k_, v_, held_, of_map=True),
        ValueError,
        "of_map needs a dense-exponential map",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_bad_arguments_are_named(case):
    call, kind, message = SPOILED[case]
    with pytest.raises(kind, match=message):
        call()


def test_tiles_do_not_matter(few_xp, monkeypatch):
    q, k, v = (few_xp(x) for x in attention_problem(20, (2,), n=70))
    lm = fs.landmarks(6)

    def results():
        calls = [fs.linear_attention(q, k, v, lm, **options) for options in ({}, {"window": 4}, {"is_causal": True})]
        return [few_xp.back(x) for x in (*calls, expected_error(q, k, lm))]

    want = results()
    monkeypatch.setattr("favorsharp.ops.state.TILE_ELEMENTS", 1)  # 16 points
    for a, b in zip(results(), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_memory_is_linear():
    import tracemalloc

    q, k, v = np.random.default_rng(0).standard_normal((3, 40000, 4)).astype(np.float32)
    lm = fs.landmarks(8)
    for options in ({}, {"window": 64}):
        fs.linear_attention(q[:2000], k[:2000], v[:2000], lm, **options)
        tracemalloc.start()
        fs.linear_attention(q, k, v, lm, **options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 150e6  # all pairs would take 6.4e9


# Reading by torch's own attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_torch_s_own_attention_reads_the_same(monkeypatch, masked, key_heads):
    """It is used on GPUs; here both read on the CPU. One row sees no key; hidden keys and a query hold NaN."""
    torch = pytest.importorskip("torch")
    q, k, v = (torch.asarray(x) for x in attention_problem(21, (2, 4), n=40, d=8))
    k, v = k[:, :key_heads].clone(), v[:, :key_heads].clone()
    mask = torch.arange(40)[None, None] < torch.tensor([23, 0])[:, None, None] if masked else None
    if masked:
        k[:, :, 30:], v[:, :, 30:], q[1, :, 5] = torch.nan, torch.nan, torch.nan
    options = {"key_mask": mask, "enable_gqa": key_heads < 4}

    def results():
        lm = fs.landmarks(6)
        out = [fs.linear_attention(q, k, v, fs.landmarks(m), **options) for m in (6, 64)]
        causal, state = fs.linear_attention(q, k, v, lm, is_causal=True, return_state=True, **options)
        first = q[:, :, :1], k[:, :, :1], v[:, :, :1]
        token, state = fs.decode_step(*first, state, lm, enable_gqa=options["enable_gqa"])
        return [*out, causal, token, fs.read(state, q, lm, enable_gqa=options["enable_gqa"])]

    want, calls = results(), []
    module = importlib.import_module("favorsharp.landmarks.attention")  # favorsharp.landmarks is a function too
    monkeypatch.setattr(module, "has_fused_attention", lambda *arrays: calls.append(0) or True)
    with fs.use("reference"):  # a kernel would read the token itself
        got = results()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, equal_nan=True)
    assert len(calls) == 4


def test_torch_s_own_attention_reads_what_no_derivative_follows(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("favorsharp._autodiff.is_followed", lambda x: False)  # tensors without numbers are followed
    elsewhere, here = torch.empty(3, device="meta"), torch.empty(3)
    trained = torch.empty(3, device="meta", requires_grad=True)
    assert has_fused_attention(elsewhere, elsewhere)
    assert not has_fused_attention(here, here)
    assert not has_fused_attention(elsewhere, trained)
    with torch.no_grad():
        assert has_fused_attention(elsewhere, trained)
        with torch.autograd.forward_ad.dual_level():
            assert not has_fused_attention(elsewhere, elsewhere)
