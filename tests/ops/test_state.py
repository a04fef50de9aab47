"""Partial sums over keys have denominators of at least 1, and do not depend on how the keys are cut into tiles."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
from problems import attention_problem, key_mask

import favorsharp as fs
from favorsharp.ops import blocks, compensated_sums, partials, state, tiles
from favorsharp.ops.causal_attention import causal_attention


@pytest.fixture
def small_tiles(monkeypatch):
    """Cut the work into as many tiles, and sums into as many parts, as a long sequence would have."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 64)
    monkeypatch.setattr(compensated_sums, "PART", 5)
    monkeypatch.setattr(blocks, "_LONGEST_TILE", 16)


def problem(scale, n=50, s=70, m=9):
    q, k, v = attention_problem(0, (2,), n=n, s=s)
    q, k = scale * q, scale * k
    fm = fs.feature_map(fs.fit(q, k), m, rng=0)
    return q, k, v, fm, state.empty_state(fm, (2,), 8, 5, 0, k)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e3])
def test_denominators_are_at_least_one(scale):
    """This holds for sums through a state, pair by pair, with exact scores, and after merging.

    With the reference they give the plain sums.
    """
    q, k, v, fm, empty = problem(scale)
    lq, lk = fm.log_query(q), fm.log_key(k)
    cuts = (slice(0, 1), slice(1, 40), slice(40, 70))
    parts = [state.read_partial(state.absorb(empty, k[:, c], v[:, c], None, fm), lq) for c in cuts]
    parts += [partials.pair_partial(lq, lk[:, c], v[:, c]) for c in cuts]
    parts += [partials.exact_partial(fm.log_kernel(q, k[:, c]), None, v[:, c]) for c in cuts]
    parts.append(partials.merge(partials.merge(parts[0], parts[1]), parts[2]))
    parts.append(partials.merge(parts[3], partials.merge(parts[4], parts[5])))
    parts.append(partials.merge(parts[0], partials.merge(parts[4], parts[8])))
    for part in parts:
        assert (part.den >= 1 - 1e-12).all()
        assert np.isfinite(part.num).all()
    scores = oracle.log_scores(lq, lk)
    total = oracle.log_sum_exp(scores, axis=-1)
    want = oracle.attention(scores, v)
    for part in parts[9:11]:
        np.testing.assert_allclose(np.log(part.den[..., 0]) + part.ref[..., 0], total, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(partials.finish(part), want, atol=1e-9)


def test_low_parts_shrink_with_their_sums():
    """Keys with far larger features come last: what rounding took off the sums before hardly counts then."""
    rng = np.random.default_rng(0)
    logs = np.concatenate([rng.uniform(-1, 0, (3000, 4)), 20 + rng.uniform(-1, 0, (10, 4))]).astype(np.float32)
    v = rng.uniform(1, 2, (3010, 2)).astype(np.float32)
    made = state.empty_state(SimpleNamespace(num_features=4), (), 3, 2, 0, v)
    for start in range(0, 3010, 10):
        made = state.absorb_features(made, logs[start : start + 10], v[start : start + 10])
        if start == 2990:
            assert np.abs(made.z_low).max() > 1e-5
    features = np.exp(logs.astype(np.float64) - made.c)
    np.testing.assert_allclose(made.z[0].astype(np.float64) + made.z_low[0], features.sum(0), rtol=3e-7)
    np.testing.assert_allclose(made.kv.astype(np.float64) + made.kv_low, features.T @ v, rtol=3e-7)


def test_nothing_is_the_identity_of_merge():
    q, k, v, fm, empty = problem(1.0)
    lq = fm.log_query(q)
    nothing = state.read_partial(empty, lq)
    hidden = partials.exact_partial(fm.log_kernel(q, k), np.zeros((50, 70), bool), v)
    full = state.read_partial(state.absorb(empty, k, v, None, fm), lq)
    for none in (nothing, hidden):
        assert (none.den == 0).all()
        assert np.isneginf(none.ref).all()
        assert (partials.finish(none) == 0).all()
        for merged in (partials.merge(none, full), partials.merge(full, none)):
            for name in ("num", "den", "ref"):
                np.testing.assert_array_equal(getattr(merged, name), getattr(full, name))
        assert (partials.finish(partials.merge(none, none)) == 0).all()


def test_keys_in_any_order_and_any_cut_are_one_state(few_xp, rng):
    xp = few_xp
    _, k, v = attention_problem(1, (3,), s=41)
    fm = fs.feature_map(fs.fit(xp(k), xp(k)), 7, rng=0)
    mask = key_mask(1, (3, 41), "holes")
    whole = fs.update(fs.init_state(fm, 5, like=xp(k)), xp(k), xp(v), fm, key_mask=xp(mask))
    order = rng.permutation(41)
    k, v, mask = k[:, order], v[:, order], mask[:, order]
    cuts = np.sort(np.concatenate([[0, 41], rng.integers(0, 42, 4)]))
    parts = []
    for a, b in pairwise(cuts):
        part = fs.update(fs.init_state(fm, 5, like=xp(k)), xp(k[:, a:b]), xp(v[:, a:b]), fm, key_mask=xp(mask[:, a:b]))
        parts.insert(int(rng.integers(0, len(parts) + 1)), part)
    merged = parts[0]
    for part in parts[1:]:
        merged = fs.combine(merged, part)
    for name in ("kv", "z", "c"):
        left, right = (xp.back(getattr(x, name)) for x in (merged, whole))
        np.testing.assert_allclose(left, right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("window", [0, 1, 3, 16, 40])
@pytest.mark.parametrize("kind", ["none", "holes"])
@pytest.mark.usefixtures("small_tiles")
def test_tiles_do_not_matter(window, kind):
    q, k, v = attention_problem(2, (2,), n=131)
    fm = fs.feature_map(fs.fit(q, k), 6, rng=0)
    mask = key_mask(0, (2, 131), kind)
    exact = oracle.log_kernel(q, k, "softmax", fm.parameters.scale)
    for is_causal in (False, True):
        scores = oracle.log_scores(fm.log_query(q), fm.log_key(k), exact, window, is_causal)
        got = fs.linear_attention(q, k, v, fm, is_causal=is_causal, window=window, key_mask=mask)
        np.testing.assert_allclose(got, oracle.attention(scores, v, mask, is_causal), atol=1e-9)


@pytest.mark.usefixtures("small_tiles")
def test_a_stream_is_cut_anywhere_with_small_tiles():
    q, k, v = attention_problem(3, (2,), n=97)
    fm = fs.feature_map(fs.fit(q, k), 6, rng=0)
    for window in (0, 1, 5, 16):
        want = fs.linear_attention(q, k, v, fm, is_causal=True, window=window)
        for cut in range(0, 98, 7):
            head, middle = causal_attention(*(x[:, :cut] for x in (q, k, v)), fm, window=window)
            tail, _ = causal_attention(*(x[:, cut:] for x in (q, k, v)), fm, window=window, state=middle)
            np.testing.assert_allclose(
                np.concatenate([head, tail], axis=1), want, atol=1e-10, err_msg=f"{window} {cut}"
            )


def test_combine_keeps_the_low_parts_of_both_states(few_xp, rng):
    """Sums and low parts together equal the float64 sums."""

    def state_of():
        sizes = {"kv": (1, 4, 3), "z": (1, 1, 4), "recent_k": (1, 0, 2), "recent_v": (1, 0, 3)}
        arrays = {name: few_xp(rng.standard_normal(shape), "float32") for name, shape in sizes.items()}
        low = {f"{name}_low": few_xp(1e-8 * rng.standard_normal(sizes[name]), "float32") for name in ("kv", "z")}
        mask = few_xp(np.ones((1, 0), dtype=bool))
        return state.State(**arrays, **low, c=arrays["z"] * 0, window=0, recent_mask=mask, fingerprint=None)

    a, b = state_of(), state_of()
    joined = fs.combine(a, b)
    for name in ("kv", "z"):
        found, *wanted = (
            sum(few_xp.back(getattr(one, part)).astype(np.float64) for part in (name, f"{name}_low"))
            for one in (joined, a, b)
        )
        np.testing.assert_allclose(found, sum(wanted), atol=1e-14)
