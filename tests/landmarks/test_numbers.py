"""The errors of landmarks on real heads, narrow dtypes, extreme numbers and NaN."""

import numpy as np
import pytest
from landmark_problems import exact, relative
from problems import attention_problem

import favorsharp as fs
from favorsharp.diagnostics import load_sample


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
