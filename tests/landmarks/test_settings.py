"""The settings of landmarks, what they refuse, and the size of the workspace."""

import pickle

import numpy as np
import pytest
from problems import attention_problem

import favorsharp as fs
from favorsharp.diagnostics import expected_error


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
with fs.use("reference"):  # or each worker would compile kernels while it collects tests
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
    monkeypatch.setattr("favorsharp.ops.tiles.TILE_ELEMENTS", 1)  # 16 points
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
