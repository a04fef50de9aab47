"""Causal streams of landmarks, their states, and the states of whole calls."""

import copy
from itertools import pairwise

import landmark_oracle
import numpy as np
import oracle
import pytest
from landmark_problems import (
    KERNELS,
    WINDOWS,
    assert_states,
    exact,
    part,
    relative,
    stream_problem,
)
from problems import attention_problem, key_mask

import favorsharp as fs
from favorsharp.diagnostics import load_sample
from favorsharp.ops.landmark_seeds import noise_of

pytestmark = pytest.mark.compiled


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
    """Two tokens may follow one state, or copies of it, also with grouped heads.

    Hidden keys that are not finite stay hidden.
    """
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
    """With a tilt of 0, the mean is taken over queries with the mean and covariance of the queries seen."""
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


@pytest.mark.compiled(False)
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


@pytest.mark.compiled(False)
@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32")])
def test_moments_are_of_the_widest_dtype_so_far(dtypes):
    arrays, lm = attention_problem(0, n=24), fs.landmarks(4)
    state = fs.init_state(lm, arrays[2].shape[-1], like=arrays[1].astype(dtypes[0]))
    for dtype, half in zip(dtypes, (slice(0, 12), slice(12, 24)), strict=True):
        points = (x[half].astype(dtype) for x in arrays)
        _, state = fs.linear_attention(*points, lm, is_causal=True, state=state, return_state=True)
    assert state.moments.dtype == "float64"
    assert state.keys.dtype == dtypes[0]


@pytest.mark.parametrize("window", [0, 5])
def test_what_a_mask_hides_within_a_stream_enters_nothing(few_xp, window):
    """Neither its keys nor the queries at their positions, which would change the metric of later compressions."""
    arrays, lm = attention_problem(4, (2,), n=40), fs.landmarks(4, room=4)
    mask = key_mask(2, (2, 40), "holes")

    def stream(*points):
        given = (few_xp(x) for x in points)
        options = {"key_mask": few_xp(mask), "window": window, "is_causal": True, "return_state": True}
        out, state = fs.linear_attention(*given, lm, **options)
        return [few_xp.back(x) for x in (out, state.moments.covariance_x, state.moments.mean_y)]

    (out, *moments), (other, *others) = stream(*arrays), stream(*(np.where(mask[..., None], x, 9 - x) for x in arrays))
    np.testing.assert_array_equal(np.where(mask[..., None], out, 0), np.where(mask[..., None], other, 0))
    for got, want in zip(moments, others, strict=True):
        np.testing.assert_array_equal(got, want)
