"""Hidden keys do not affect any number of a query's row: results have the same bits, for every position."""

from contextlib import nullcontext

import numpy as np
import pytest
from problems import attention_problem

import favorsharp as fs

WINDOWS = [0, 1, 3, 16, 50, 200]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("backend", ["reference", None])
def test_no_future(few_xp, window, dtype, backend):
    """Later tokens of a very different size would change any maximum or sum that earlier rows share with them.

    The reference shares none, so its bits are equal. Kernels may share a factor that cancels up to rounding.
    """
    xp = few_xp
    with fs.use(backend) if backend else nullcontext():
        _check_no_future(xp, window, dtype, 0.0 if backend else 30 * np.finfo(dtype).eps)


def _check_no_future(xp, window, dtype, error):
    q, k, v = attention_problem(0, (2,), n=150)
    p = fs.fit(xp(q, dtype), xp(k, dtype))
    fm = fs.feature_map(p, 8, rng=0)
    want = xp.back(fs.linear_attention(*(xp(x, dtype) for x in (q, k, v)), fm, is_causal=True, window=window))
    for at in (0, 1, 2, 15, 16, 17, 64, 127, 128, 149):
        later = [x.copy() for x in (q, k, v)]
        for x in later:
            x[:, at:] = 40 * x[:, at:] + 1
        got = xp.back(fs.linear_attention(*(xp(x, dtype) for x in later), fm, is_causal=True, window=window))
        np.testing.assert_allclose(got[:, :at], want[:, :at], rtol=error, atol=error, err_msg=str(at))
        assert not np.allclose(got[:, at:], want[:, at:], rtol=1e-3)


@pytest.mark.parametrize("window", WINDOWS)
def test_the_last_row_is_the_bidirectional_one_where_blocks_allow(window):
    """The last query sees all keys, and its own block is the last one. So its near keys are the same in both modes."""
    q, k, v = attention_problem(1, (2,), n=150)
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    both = [fs.linear_attention(q, k, v, fm, is_causal=is_causal, window=window) for is_causal in (False, True)]
    np.testing.assert_allclose(both[0][:, -1], both[1][:, -1], atol=1e-11)


def test_two_tokens_see_what_they_may():
    """The first row equals its own value exactly."""
    q, k, v = attention_problem(2, (3,), n=2)
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    for window in WINDOWS:
        np.testing.assert_allclose(
            fs.linear_attention(q, k, v, fm, is_causal=True, window=window)[:, 0], v[:, 0], rtol=1e-14
        )
