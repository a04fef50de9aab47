"""Tokens with a window, one by one through kernels, against one causal call of the reference."""

import numpy as np
import pytest

import favorsharp as fs

pytestmark = [pytest.mark.compiled, pytest.mark.own_backend]
pytest.importorskip("numba")


def tokens(q, k, v, fm, state, grouped=False):
    """The results of tokens one by one, and the states after them."""
    outs, states = [], []
    for i in range(k.shape[-2]):
        out, state = fs.decode_step(*(x[..., i : i + 1, :] for x in (q, k, v)), state, fm, enable_gqa=grouped)
        outs.append(np.asarray(out))
        states.append(state)
    return np.concatenate(outs, axis=-2), states


@pytest.mark.parametrize(
    ("group", "d", "e", "m", "window", "start", "dtype", "kernel"),
    [
        (1, 8, 5, 16, 4, 9, "float64", "softmax"),
        (3, 7, 3, 11, 1, 3, "float64", "softmax"),
        (1, 16, 17, 33, 33, 0, "float64", "softmax"),
        (2, 64, 64, 16, 40, 70, "float64", "softmax"),
        pytest.param(2, 64, 64, 16, 40, 70, "float32", "softmax", marks=pytest.mark.kernels),
        pytest.param(1, 8, 5, 16, 4, 9, "float16", "softmax", marks=pytest.mark.kernels),
        (1, 8, 5, 16, 4, 9, "float64", "gaussian"),
    ],
)
def test_tokens_give_what_one_call_gives(group, d, e, m, window, start, dtype, kernel):
    rng, n, heads = np.random.default_rng(0), start + 2 * window + 9, 2
    q, k, v = (rng.standard_normal((size, n, x)) for size, x in ((heads * group, d), (heads, d), (heads, e)))
    fm = fs.feature_map(fs.fit(q.reshape(heads, -1, d), k, kernel=kernel), m, rng=0)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    mask = np.ones((heads, n), dtype=bool)
    mask[0, : start // 2] = mask[:, max(0, start - 2) : start] = False
    k[:, max(0, start - 1) : start], v[:, max(0, start - 1) : start] = np.nan, np.inf  # hidden
    options = {"is_causal": True, "window": window, "enable_gqa": group > 1}
    with fs.use("reference"):
        wide = (x.astype(np.float64) for x in (q, k, v))
        want = fs.linear_attention(*wide, fm, key_mask=mask, **options)
    before = (x[:, :start] for x in (q, k, v))
    _, state = fs.linear_attention(*before, fm, key_mask=mask[:, :start], return_state=True, **options)
    got, states = tokens(*(x[:, start:] for x in (q, k, v)), fm, state, group > 1)
    tolerance = {"float16": 3e-3, "float32": 3e-5, "float64": 1e-12}[dtype]
    np.testing.assert_allclose(got, want[:, start:], atol=tolerance * np.abs(want).max())
    _, whole = fs.linear_attention(q, k, v, fm, key_mask=mask, return_state=True, **options)
    np.testing.assert_array_equal(states[-1].recent_k, whole.recent_k)
    np.testing.assert_array_equal(states[-1].recent_mask, whole.recent_mask)


def test_a_state_in_a_store_stays_what_it_is():
    """Its keys are made when they are first read; by then the store holds the keys of later tokens, too."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 24, 8))
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    _, states = tokens(q, k, v, fm, fs.init_state(fm, 8, like=k, window=5))
    for i in (3, 11, 12):
        again, _ = tokens(*(x[:, i + 1 :] for x in (q, k, v)), fm, states[i])
        assert states[i].recent_k.shape[-2] == i + 1 - max(0, -(-(i + 1) // 5) - 2) * 5
        np.testing.assert_array_equal(states[i].recent_k, k[:, i + 1 - states[i].recent_k.shape[-2] : i + 1])
        want, _ = tokens(q, k, v, fm, fs.init_state(fm, 8, like=k, window=5))
        np.testing.assert_array_equal(again, want[:, i + 1 :])


def test_a_query_or_a_key_that_is_not_finite_reaches_its_readers_only():
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 6, 8))
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    q[0, 1, 3], k[1, 4, 2] = np.nan, np.inf
    out, _ = tokens(q, k, v, fm, fs.init_state(fm, 8, like=k, window=4))
    assert np.isnan(out[0, 1]).all()
    assert np.isnan(out[1, 4:]).all()
    assert np.isfinite(np.delete(out[0], 1, axis=0)).all()
    assert np.isfinite(out[1, :4]).all()
