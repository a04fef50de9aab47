"""Attention in every mode, against brute force built from the map's own log features."""

from itertools import product
from pathlib import Path

import numpy as np
import oracle
import pytest
from problems import attention_problem, key_mask

import favorsharp as fs

pytestmark = pytest.mark.compiled
MODES = list(product([False, True], [0, 1, 3, 16, 512]))
MAPS = [
    ("optimal", "softmax"),
    ("posrf", "softmax"),
    ("oprf", "softmax"),
    ("hyperbolic", "softmax"),
    ("optimal", "gaussian"),
    ("relu", "softmax"),
    ("elu", "softmax"),
    (np.square, "softmax"),
]


def brute_force(fm, q, k, v, mask=None, is_causal=False, window=0):
    p = fm.parameters
    exact = oracle.log_kernel(q, k, p.kernel, p.scale) if window else None
    scores = oracle.log_scores(fm.log_query(q), fm.log_key(k), exact, window, is_causal)
    return oracle.attention(scores, v, mask, is_causal)


def agree(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * max(1, np.abs(want).max(initial=0)))


def map_of(q, k, m=12, method="optimal", kernel="softmax", **options):
    return fs.feature_map(fs.fit(q, k, method=method, kernel=kernel, **options), m, rng=0)


@pytest.mark.parametrize("kind", ["none", "padding", "holes"])
@pytest.mark.parametrize(("is_causal", "window"), MODES)
def test_every_mode_on_every_library(xp, is_causal, window, kind):
    q, k, v = attention_problem(0, (2, 3), n=37)
    mask = key_mask(1, (2, 1, 37), kind)
    want = brute_force(map_of(q, k), q, k, v, mask, is_causal, window)
    arrays = [xp(x) for x in (q, k, v)]
    fm = map_of(arrays[0], arrays[1])
    options = {"is_causal": is_causal, "window": window, "key_mask": None if mask is None else xp(mask)}
    got = fs.linear_attention(*arrays, fm, **options)
    assert xp.is_like(got, arrays[2])
    agree(xp.back(got), want)


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(("method", "kernel"), MAPS)
@pytest.mark.parametrize(("is_causal", "window"), MODES)
def test_every_positive_map(method, kernel, is_causal, window):
    q, k, v = attention_problem(2, (2,), n=75)
    mask = key_mask(2, (2, 75), "holes")
    fm = map_of(q, k, method=method, kernel=kernel)
    got = fs.linear_attention(q, k, v, fm, is_causal=is_causal, window=window, key_mask=mask)
    agree(got, brute_force(fm, q, k, v, mask, is_causal, window))


@pytest.mark.parametrize("n", [0, 1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize(("is_causal", "window"), [(c, w) for c, w in product([False, True], [0, 1, 16, 100, 130])])
def test_every_length(few_xp, n, is_causal, window):
    xp = few_xp
    q, k, v = attention_problem(3, (2,), n=n)
    fm = map_of(*(attention_problem(4)[:2]))
    want = brute_force(fm, q, k, v, None, is_causal, window)
    arrays = [xp(x) for x in (q, k, v)]
    own = fs.feature_map(fs.fit(*(xp(x) for x in attention_problem(4)[:2])), 12, rng=0)
    agree(xp.back(fs.linear_attention(*arrays, own, is_causal=is_causal, window=window)), want)


@pytest.mark.parametrize(("n", "s"), [(0, 4), (4, 0), (1, 7), (7, 1), (33, 129), (300, 2)])
def test_unequal_lengths(xp, n, s):
    q, k, v = attention_problem(5, (2,), n=n, s=s, e=3)
    mask = key_mask(0, (2, s), "holes")
    reference = attention_problem(6, (2,))[:2]
    want = brute_force(map_of(*reference), q, k, v, mask)
    fm = map_of(*(xp(x) for x in reference))
    agree(xp.back(fs.linear_attention(xp(q), xp(k), xp(v), fm, key_mask=xp(mask))), want)


def test_batch_axes_broadcast(few_xp):
    xp = few_xp
    q, k, v = (
        attention_problem(7, (2, 1), n=9)[0],
        attention_problem(8, (3,), n=9)[1],
        attention_problem(9, (4, 1, 1), n=9)[2],
    )
    mask = key_mask(0, (2, 1, 9), "holes")
    shared = map_of(*attention_problem(10)[:2])
    full = [np.broadcast_to(x, (4, 2, 3, *x.shape[-2:])) for x in (q, k, v)]
    own = fs.feature_map(fs.fit(*(xp(x) for x in attention_problem(10)[:2])), 12, rng=0)
    for is_causal, window in [(False, 0), (True, 0), (False, 4), (True, 4)]:
        want = brute_force(shared, *full, np.broadcast_to(mask, (4, 2, 3, 9)), is_causal, window)
        got = fs.linear_attention(xp(q), xp(k), xp(v), own, key_mask=xp(mask), is_causal=is_causal, window=window)
        agree(xp.back(got), want)


@pytest.mark.parametrize(("is_causal", "window"), [(False, 0), (True, 0), (False, 5), (True, 5)])
@pytest.mark.parametrize("kind", ["none", "holes"])
def test_maps_per_head_or_pooled_over_a_batch(is_causal, window, kind):
    q, k, v = attention_problem(11, (2, 3), n=21)
    mask = key_mask(3, (2, 1, 21), kind)
    for axis in (-2, (0, -2)):
        fm = map_of(q, k, axis=axis)
        got = fs.linear_attention(q, k, v, fm, is_causal=is_causal, window=window, key_mask=mask)
        agree(got, brute_force(fm, q, k, v, mask, is_causal, window))


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize(("is_causal", "window"), MODES)
def test_grouped_heads_are_repeated_keys(few_xp, is_causal, window, kernel):
    xp = few_xp
    q, k, v = attention_problem(12, (2, 6), n=40)
    k, v = k[:, :2], v[:, :2]
    mask = key_mask(0, (2, 2, 40), "holes")
    arrays = [xp(x) for x in (q, k, v)]
    fm = map_of(arrays[0], arrays[1], kernel=kernel, enable_gqa=True)
    got = fs.linear_attention(*arrays, fm, is_causal=is_causal, window=window, key_mask=xp(mask), enable_gqa=True)
    host = map_of(q, k, kernel=kernel, enable_gqa=True)
    for group in range(3):
        want = fs.linear_attention(q[:, group::3], k, v, host, is_causal=is_causal, window=window, key_mask=mask)
        agree(xp.back(got)[:, group::3], want)


@pytest.mark.parametrize(("is_causal", "window"), MODES)
def test_packed_sequences_are_separate_ones(few_xp, is_causal, window):
    xp = few_xp
    q, k, v = attention_problem(13, (2,), n=60)
    mask = key_mask(0, (2, 60), "holes")
    bounds = [0, 7, 7, 30, 60]
    arrays, fm = [xp(x) for x in (q, k, v)], map_of(xp(q), xp(k))
    options = {"is_causal": is_causal, "window": window}
    want = [
        fs.linear_attention(*(x[:, a:b] for x in (q, k, v)), map_of(q, k), key_mask=mask[:, a:b], **options)
        for a, b in [(0, 7), (7, 30), (30, 60)]
    ]
    for given, e in ((bounds, 5), (tuple(bounds), 2), (xp(np.array(bounds), "int32"), 1)):
        few = xp(v[..., :e])
        got = fs.linear_attention(*arrays[:2], few, fm, cu_seqlens=given, key_mask=xp(mask), **options)
        agree(xp.back(got), np.concatenate(want, axis=1)[..., :e])


def test_a_padded_batch_is_its_rows_one_by_one(few_xp):
    xp = few_xp
    q, k, v = attention_problem(14, (3,), n=40)
    lengths = [40, 23, 9]
    mask = np.arange(40) < np.array(lengths)[:, None]
    hidden = [x.copy() for x in (q, k, v)]
    for x in hidden:
        x[~mask] = 1e3
    for window in (0, 8):
        got = xp.back(fs.attention(*(xp(x) for x in hidden), num_features=32, key_mask=xp(mask), window=window, rng=0))
        for row, length in enumerate(lengths):
            alone = fs.attention(*(x[row, :length] for x in (q, k, v)), num_features=32, window=window, rng=0)
            np.testing.assert_allclose(got[row, :length], alone, atol=1e-7)


def test_a_window_as_long_as_the_sequence_is_exact(xp):
    q, k, v = (xp(x) for x in attention_problem(15, (2,), n=33))
    for is_causal in (False, True):
        fm = map_of(q, k, m=4)
        got = fs.linear_attention(q, k, v, fm, window=33, is_causal=is_causal)
        agree(xp.back(got), xp.back(fs.softmax_attention(q, k, v, is_causal=is_causal)))


def test_error_falls_with_features_and_with_the_window():
    q, k, v = attention_problem(16, (4,), n=200, d=4)
    q, k = 0.5 * q, 0.5 * k
    exact = fs.softmax_attention(q, k, v)

    def error(**options):
        return np.mean([np.linalg.norm(fs.attention(q, k, v, rng=seed, **options) - exact) for seed in range(3)])

    assert error(num_features=8) > 1.5 * error(num_features=128) > 2 * error(num_features=2048)
    assert error(num_features=32) > error(num_features=32, window=64) > 2 * error(num_features=32, window=128)


@pytest.mark.parametrize("is_causal", [False, True])
def test_one_call_is_fit_draw_and_apply(few_xp, is_causal):
    xp = few_xp
    q, k, v = (xp(x) for x in attention_problem(17, (2, 3), n=30))
    q0, k0 = (xp(x) for x in attention_problem(18, (2, 3), n=50)[:2])
    for calibration, window in product([None, (q0, k0)], [0, 4]):
        if is_causal and calibration is None:
            continue
        got = fs.attention(
            q, k, v, num_features=20, rng=3, calibration=calibration, is_causal=is_causal, window=window, scale=0.4
        )
        fm = fs.feature_map(fs.fit(*(calibration or (q, k)), scale=0.4), 20, rng=3)
        agree(xp.back(got), xp.back(fs.linear_attention(q, k, v, fm, is_causal=is_causal, window=window)))


def test_one_call_with_grouped_heads_and_a_mask(few_xp):
    xp = few_xp
    q, k, v = attention_problem(19, (2, 4), n=20)
    k, v = k[:, :2], v[:, :2]
    mask = key_mask(4, (2, 2, 20), "padding")
    got = fs.attention(xp(q), xp(k), xp(v), num_features=16, rng=0, enable_gqa=True, key_mask=xp(mask))
    fm = fs.feature_map(fs.fit(q, k, enable_gqa=True, mask_x=np.repeat(mask, 2, axis=1), mask_y=mask), 16, rng=0)
    agree(xp.back(got), fs.linear_attention(q, k, v, fm, enable_gqa=True, key_mask=mask))


def test_causal_calls_do_not_fit_to_the_future():
    q, k, v = attention_problem(20)
    with pytest.raises(ValueError, match=r"needs calibration=\(q0, k0\).*its own future"):
        fs.attention(q, k, v, is_causal=True)
    out = fs.attention(q, k, v, is_causal=True, method="posrf", rng=0)
    changed = [x.copy() for x in (q, k, v)]
    for x in changed:
        x[20:] += 1
    again = fs.attention(*changed, is_causal=True, method="posrf", rng=0)
    np.testing.assert_allclose(again[:20], out[:20], rtol=1e-13)


def test_out_takes_the_result(few_xp):
    xp = few_xp
    q, k, v = (xp(x) for x in attention_problem(21, (2,), n=30))
    fm = map_of(q, k)
    for options in ({}, {"is_causal": True}, {"cu_seqlens": [0, 10, 30]}):
        want = fs.linear_attention(q, k, v, fm, **options)
        out = want * 0
        got = fs.linear_attention(q, k, v, fm, out=out, **options)
        assert got is out
        np.testing.assert_array_equal(xp.back(out), xp.back(want))


@pytest.mark.compiled(False)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": 8}, {"is_causal": True, "window": 8}])
def test_half_precision_inputs_of_large_norm(dtype, options):
    torch = pytest.importorskip("torch")
    arrays = [torch.asarray(x) for x in attention_problem(22, (2,), n=60, d=16)]
    arrays[:2] = [30 * x / x.norm(dim=-1, keepdim=True) for x in arrays[:2]]
    narrow = [x.to(getattr(torch, dtype)) for x in arrays]
    wide = [x.double() for x in narrow]
    fm = fs.feature_map(fs.fit(*wide[:2]), 64, rng=0)
    got = fs.linear_attention(*narrow, fm, **options)
    assert got.dtype == narrow[0].dtype
    want = fs.linear_attention(*wide, fm, **options)
    tolerance = 2e-3 if dtype == "float16" else 2e-2
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.compiled(False)
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 30.0, 1e3, 1e9, 1e15])
@pytest.mark.parametrize("method", ["optimal", "posrf", "oprf", "sderf", "hyperbolic", "relu"])
def test_rows_stay_within_the_values_at_every_scale(method, scale):
    """Rows are convex combinations: nothing overflows, and no denominator underflows or depends on an epsilon."""
    q, k, v = (x.astype(np.float32) for x in attention_problem(23, (2,), n=150))
    q, k = q * np.float32(scale), k * np.float32(scale)
    fm = map_of(q, k, method=method)
    for is_causal, window in product([False, True], [0, 16]):
        out = fs.linear_attention(q, k, v, fm, is_causal=is_causal, window=window)
        assert np.isfinite(out).all()
        assert (out >= v.min(-2, keepdims=True) - 1e-4).all()
        assert (out <= v.max(-2, keepdims=True) + 1e-4).all()


@pytest.mark.compiled(False)
def test_keys_of_very_unequal_size_do_not_drown_each_other():
    """A causal row reads its own small key as accurately as a later row reads a huge one."""
    q, k, v = attention_problem(24, n=130, d=4)
    k[100:] *= 60
    fm = map_of(q[:50], k[:50])
    got = fs.linear_attention(q.astype(np.float32), k.astype(np.float32), v.astype(np.float32), fm, is_causal=True)
    want = brute_force(fm, q, k, v, None, True)
    np.testing.assert_allclose(got[:100], want[:100], rtol=2e-3, atol=2e-3)


def test_inputs_are_not_modified():
    arrays = attention_problem(25, (2,), n=30)
    mask = key_mask(0, (2, 30), "holes")
    before = [x.copy() for x in (*arrays, mask)]
    fm = map_of(*arrays[:2])
    for is_causal, window in MODES:
        fs.linear_attention(*arrays, fm, is_causal=is_causal, window=window, key_mask=mask)
    for x, old in zip((*arrays, mask), before, strict=True):
        np.testing.assert_array_equal(x, old)


@pytest.mark.compiled(False)
def test_attention_error_on_real_heads():
    """The mean error over six heads of a sentence encoder and several seeds (512 tokens, 128 orthogonal features,
    float32)."""
    with np.load(Path(fs.__file__).parent / "data" / "attention_sample.npz") as file:
        q, k, v = (file[name].astype(np.float32) for name in "qkv")
    exact = fs.softmax_attention(q, k, v)

    def error(method):
        errors = [
            np.linalg.norm(fs.attention(q, k, v, num_features=128, method=method, rng=seed) - exact, axis=(-1, -2))
            for seed in range(5)
        ]
        return np.mean(np.array(errors) / np.linalg.norm(exact, axis=(-1, -2)))

    optimal = error("optimal")
    assert optimal <= 0.54
    assert optimal <= error("oprf") - 0.13
