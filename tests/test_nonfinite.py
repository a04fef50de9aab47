"""A value that is not finite affects the rows that see it, and no others; a masked value affects none."""

import numpy as np
import pytest
from problems import attention_problem

import favorsharp as fs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
AT = 137


def spoiled(which, bad):
    arrays = dict(zip("qkv", attention_problem(0, (2,), n=200), strict=True))
    clean = fs.feature_map(fs.fit(arrays["q"], arrays["k"]), 16, rng=0)
    good = {name: x.copy() for name, x in arrays.items()}
    arrays[which][0, AT, 2] = BAD[bad]
    return good, arrays, clean


@pytest.mark.parametrize("window", [0, 1, 16, 150])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_causal_rows_before_are_untouched(which, bad, window):
    good, arrays, fm = spoiled(which, bad)
    want = fs.linear_attention(*good.values(), fm, is_causal=True, window=window)
    got = fs.linear_attention(*arrays.values(), fm, is_causal=True, window=window)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(got[0, :AT], want[0, :AT])
    if which == "q":
        np.testing.assert_array_equal(got[0, AT + 1 :], want[0, AT + 1 :])
        assert not np.isfinite(got[0, AT]).any()
    elif which == "k":
        assert not np.isfinite(got[0, AT:]).any()
    else:
        assert not np.isfinite(got[0, AT:, 2]).any()
        np.testing.assert_array_equal(np.delete(got[0], 2, axis=-1), np.delete(want[0], 2, axis=-1))


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_bidirectional_and_exact_rows(which, bad, window):
    good, arrays, fm = spoiled(which, bad)
    for call in (
        lambda a: fs.linear_attention(*a.values(), fm, window=window),
        lambda a: fs.softmax_attention(*a.values()),
    ):
        got, want = call(arrays), call(good)
        np.testing.assert_array_equal(got[1], want[1])
        if which == "q":
            np.testing.assert_array_equal(np.delete(got[0], AT, axis=0), np.delete(want[0], AT, axis=0))
            assert not np.isfinite(got[0, AT]).any()
        else:
            assert not np.isfinite(got[0] if which == "k" else got[0, :, 2]).any()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("bad", BAD)
def test_masked_points_may_be_anything(few_xp, bad, window, is_causal):
    xp = few_xp
    good, arrays, _ = spoiled("k", bad)
    arrays["v"][0, AT] = BAD[bad]
    mask = np.ones((2, 200), dtype=bool)
    mask[0, AT] = False
    own = fs.feature_map(fs.fit(xp(good["q"]), xp(good["k"])), 16, rng=0)
    options = {"key_mask": xp(mask), "window": window, "is_causal": is_causal}
    got = xp.back(fs.linear_attention(*(xp(x) for x in arrays.values()), own, **options))
    want = xp.back(fs.linear_attention(*(xp(x) for x in good.values()), own, **options))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("is_causal", [False, True])
def test_masked_points_reach_no_gradient_of_the_yardstick(is_causal):
    torch = pytest.importorskip("torch")
    good, arrays, _ = spoiled("k", "nan")
    arrays["v"][0, AT] = np.inf
    mask = np.ones((2, 200), dtype=bool)
    mask[0, AT] = False
    leaves = [[torch.asarray(x.copy()).requires_grad_() for x in values.values()] for values in (arrays, good)]
    for points in leaves:
        fs.softmax_attention(*points, key_mask=torch.asarray(mask), is_causal=is_causal).sum().backward()
    for x, y in zip(*leaves, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=0)


def test_a_fit_ignores_what_is_masked_and_refuses_what_is_not():
    good, arrays, _ = spoiled("k", "nan")
    mask = np.ones((2, 200), dtype=bool)
    mask[0, AT] = False
    got = fs.fit(arrays["q"], arrays["k"], mask_y=mask)
    np.testing.assert_array_equal(got.g1, fs.fit(good["q"], good["k"], mask_y=mask).g1)
    with pytest.raises(ValueError, match="y holds values that are not finite"):
        fs.fit(arrays["q"], arrays["k"])


def test_streams_go_on_being_spoiled():
    good, arrays, fm = spoiled("k", "nan")
    state = fs.update(fs.init_state(fm, 5, like=good["k"]), arrays["k"], arrays["v"], fm)
    assert np.isnan(fs.read(state, good["q"], fm)[0]).all()
    assert np.isfinite(fs.read(state, good["q"], fm)[1]).all()
