"""Draws that do not change between versions, properties over shapes and dtypes, bad arguments, and many threads."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import favorsharp as fs
from favorsharp.draws import DRAWS, draw_rows


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 9),
    s=st.integers(1, 9),
    d=st.integers(1, 5),
    e=st.integers(1, 3),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    kernel=st.sampled_from(["softmax", "gaussian"]),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    hidden=st.integers(0, 2**9 - 1),
)
def test_attention_and_estimates_are_means_of_the_values(n, s, d, e, dtype, kernel, spread, hidden):
    rng = np.random.default_rng(0)
    x, y, v = ((spread * rng.standard_normal(shape)).astype(dtype) for shape in ((n, d), (s, d), (s, e)))
    fm = fs.feature_map(fs.fit(y, y, kernel=kernel), 6, rng=0)
    mask = (hidden >> np.arange(s)) % 2 == 1
    for out, seen in (
        (fs.nadaraya_watson(x, y, v, fm), v),
        (fs.linear_attention(x, y, v, fm, key_mask=mask), v[mask]),
    ):
        assert out.shape == (n, e)
        assert out.dtype == np.dtype(dtype)
        slack = 1e-2 * (1 + spread) if dtype == "float16" else 1e-4 * (1 + spread)
        low, high = (seen.min(0), seen.max(0)) if len(seen) else (np.zeros(e), np.zeros(e))
        assert np.all(out >= low - slack)
        assert np.all(out <= high + slack)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.sampled_from([(), (2,), (2, 1)]),
    s=st.integers(1, 70),
    d=st.integers(1, 6),
    dtype=st.sampled_from(["float32", "float64"]),
    method=st.sampled_from(["optimal", "sderf", "posrf", "hyperbolic", "relu"]),
    kernel=st.sampled_from(["softmax", "gaussian"]),
    spread=st.sampled_from([1e-3, 1.0, 8.0]),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_blocks_masks_and_orders_of_keys_change_nothing(batch, s, d, dtype, method, kernel, spread, share, seed):
    """A state made block by block equals the state of all keys, a hidden key counts as absent, and the order of keys
    does not matter."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        (a * rng.standard_normal((*batch, n, e))).astype(dtype)
        for a, n, e in ((spread, 5, d), (spread, s, d), (1, s, 3))
    )
    fm = fs.feature_map(fs.fit(k, k, method=method, kernel=kernel), 9, rng=seed)
    seen = rng.random(s) < share
    order = rng.permutation(s)
    whole = fs.linear_attention(q, k, v, fm, key_mask=seen)
    close = {"rtol": 1e-3, "atol": 1e-4} if dtype == "float32" else {"rtol": 1e-8, "atol": 1e-9}
    there = fs.linear_attention(q, k[..., seen, :], v[..., seen, :], fm)
    np.testing.assert_allclose(there, whole, **close)
    turned = fs.linear_attention(q, k[..., order, :], v[..., order, :], fm, key_mask=seen[order])
    np.testing.assert_allclose(turned, whole, **close)
    cut = int(rng.integers(s + 1))
    empty = fs.init_state(fm, 3, like=k)
    first, second = (
        fs.update(empty, k[..., part, :], v[..., part, :], fm, key_mask=seen[part])
        for part in (np.s_[:cut], np.s_[cut:])
    )
    np.testing.assert_allclose(fs.read(fs.combine(first, second), q, fm), whole, **close)
    a, b = (fs.moments(q, k[..., part, :], mask_y=seen[part]) for part in (np.s_[:cut], np.s_[cut:]))
    for name in ("count_y", "mean_y", "covariance_y"):
        joined, want = getattr(fs.combine(a, b), name), getattr(fs.moments(q, k, mask_y=seen), name)
        np.testing.assert_allclose(joined, want, rtol=1e-9, atol=1e-12 * spread**2)


_ODD = [None, 3, "q", [1.0], np.zeros(3), np.zeros((2, 3), int), np.zeros((2, 3)), np.zeros((0, 3)), np.zeros((2, 0)),
        np.zeros((2, 3), complex), np.array([[object()]]), np.full((2, 3), np.nan)]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.tuples(*[st.integers(0, len(_ODD) - 1)] * 3), st.sampled_from([0, -1, 1.5, None, "8", 4]))
def test_bad_arguments_raise_or_give_the_shapes_that_were_promised(indices, size):
    x, y, v = (_ODD[index] for index in indices)
    for call in (
        lambda: fs.attention(x, y, v, num_features=size, rng=0),
        lambda: fs.nadaraya_watson(x, y, v, fs.feature_map(fs.fit(np.eye(3), np.eye(3)), 4, rng=0)),
    ):
        try:
            with np.errstate(all="ignore"):
                out = call()
        except (TypeError, ValueError):
            continue
        assert out.shape == ((*x.shape[:-1], v.shape[-1]) if v.ndim > 1 else x.shape[:-1])


@pytest.mark.parametrize(
    ("seed", "calls"),
    [(0, 300), pytest.param(1, 6000, marks=pytest.mark.slow), pytest.param(2, 6000, marks=pytest.mark.slow)],
)
def test_random_calls_never_crash_hang_or_lie_about_shapes(seed, calls):
    """The calls run in a process of their own, so that a crash or a hang ends this test only."""
    script = Path(__file__).with_name("fuzz.py")
    command = [sys.executable, str(script), str(seed), str(calls), *(["--torch"] if calls > 1000 else [])]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600 + calls / 10)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.compiled
def test_eight_threads_give_what_one_gives():
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 400, 16))

    def run(seed):
        fm = fs.feature_map(fs.fit(q, k), 32, rng=seed)
        return fs.linear_attention(q, k, v, fm, is_causal=True), fs.kernel_matvec(q, k, v, fm)

    want = [run(seed) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(run, range(16)))
    for a, b in zip(want, got, strict=True):
        for one, other in zip(a, b, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("draw", list(DRAWS))
def test_a_seed_gives_the_rows_that_it_always_gave(draw):
    np.testing.assert_allclose(draw_rows(draw, 5, 3, 7)[[0, 4]], GOLDEN[draw], rtol=1e-9)


GOLDEN = {
    "iid": [
        [0.0012301533574825742, 0.2987455375084699, -0.2741378553622176],
        [0.10541424899789856, -0.9304680447082047, -0.02925182246327349],
    ],
    "orthogonal": [
        [0.004057795696376565, 0.6547485518408671, -2.8706848148571904],
        [0.21109416054031363, -1.5409437863717166, 1.0526132919495759],
    ],
    "simplex": [
        [2.8386648351034087, -0.01824068391934066, -0.7817881231464038],
        [1.2548110740994285, 0.4767242879162357, 1.313486338485841],
    ],
    "sobol": [
        [0.38647313404450867, 1.3872036393293588, -1.278954877827796],
        [0.7108697377564522, 0.09107240619817045, 0.584384543544844],
    ],
    "antithetic": [
        [0.0011953315041242987, 0.19287357714781325, -0.8456364623468199],
        [0.9347470883103034, -0.06183150160456148, -0.012781296376283733],
    ],
}
"""Rows 0 and 4 of draw_rows(draw, 5, 3, 7), as version 0.1.0 drew them."""
