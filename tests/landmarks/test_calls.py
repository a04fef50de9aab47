"""Landmarks in all calls that take a feature map: heads, packed sequences, the other public functions, and files."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from landmark_problems import assert_states, exact, part, relative, stream_problem
from problems import attention_problem

import favorsharp as fs

pytestmark = pytest.mark.compiled


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


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"is_causal": True}])
def test_grouped_heads_have_the_mask_of_their_key_head(few_xp, options):
    """What it hides, keys and the queries at their positions, enters nothing."""
    q, k, v = attention_problem(3, (4,), n=40)
    k, v = k[:2], v[:2]
    lengths, lm = (31, 17), fs.landmarks(7)
    mask = np.arange(40) < np.array(lengths)[:, None]
    given = (few_xp(x) for x in (q, k, v))
    got = few_xp.back(fs.linear_attention(*given, lm, key_mask=few_xp(mask), enable_gqa=True, **options))
    for head, length in enumerate(lengths):
        queries = slice(2 * head, 2 * head + 2)
        visible = (few_xp(x[:, :length]) for x in (q[queries], k[head : head + 1], v[head : head + 1]))
        alone = few_xp.back(fs.linear_attention(*visible, lm, enable_gqa=True, **options))
        np.testing.assert_allclose(got[queries, :length], alone, rtol=1e-9, atol=1e-11)


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
