"""The kernel of `landmark_keys`, one task a head, finds the landmarks that separate ops find one after the other."""

import numpy as np
import pytest

import favorsharp as fs
from favorsharp.dispatch import watch
from favorsharp.landmarks.attention import landmark_keys

pytestmark = [pytest.mark.own_backend, pytest.mark.kernels]
pytest.importorskip("numba")

CASES = {
    "plain": {"n": 150, "s": 150, "d": 8, "e": 8, "m": 12},
    "more queries": {"n": 200, "s": 150, "d": 5, "e": 3, "m": 7},
    "few queries, no steps": {"n": 3, "s": 150, "d": 17, "e": 33, "m": 20, "steps": 0},
    "no queries": {"n": 0, "s": 40, "d": 3, "e": 2, "m": 5},
    "one key": {"n": 1, "s": 1, "d": 1, "e": 1, "m": 1},
    "more landmarks than keys": {"n": 17, "s": 17, "d": 3, "e": 3, "m": 30},
    "one landmark": {"n": 40, "s": 40, "d": 3, "e": 3, "m": 1, "steps": 5},
}


def problem(rng, n, s, d, e, m, steps=3, group=0):
    """Queries, keys and values of six heads, and settings."""
    lead = (2, 3, group) if group else (2, 3)
    shapes = (*lead, n, d), (2, 3, s, d), (2, 3, s, e)
    return *(1 + rng.standard_normal(shape) for shape in shapes), fs.landmarks(m, steps=steps, rng=1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("group", [0, 2])
def test_it_finds_the_landmarks_of_the_reference(rng, name, masked, group):
    given = problem(rng, **CASES[name], group=group)
    mask = rng.random(given[1].shape[:-1]) < 0.7 if masked else None
    options = {"key_mask": mask, "grouped": bool(group)}
    with fs.use("numba"):
        got = landmark_keys(*given, **options)
    with fs.use("reference"):
        want = landmark_keys(*given, **options)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_heads_share_nothing(rng):
    """A head with one key after a head with many, on one thread: nothing of the first is left in the workspace."""
    q, k, v, lm = problem(rng, n=60, s=60, d=4, e=3, m=9)
    mask = np.ones((2, 3, 60), bool)
    mask[:, 1, 1:] = False
    v[:, 0] = np.nan
    with fs.use("numba"):
        keys, log_weight, values = landmark_keys(q, k, v, lm, key_mask=mask)
    assert (np.isfinite(log_weight[:, 1]).sum(axis=-1) == 1).all()
    assert np.isfinite(values[:, 1:]).all()
    np.testing.assert_allclose(keys[:, 1][np.isfinite(log_weight[:, 1])], k[:, 1, 0])


def test_few_heads_are_cut_into_pieces_by_the_ops_of_the_steps(rng, monkeypatch):
    monkeypatch.setattr("favorsharp_numba.host.threads.num_threads", lambda: 2)
    q, k, v = rng.standard_normal((3, 1, 2000, 16))
    with fs.use("numba"), watch() as calls:
        few = fs.linear_attention(q, k, v, fs.landmarks(160))
    assert ("choose_landmarks", "numba") in calls
    with fs.use("numba"), watch() as calls:
        many = fs.linear_attention(*(np.repeat(x, 4, axis=0) for x in (q, k, v)), fs.landmarks(160))
    assert ("choose_landmarks", "numba") not in calls
    np.testing.assert_allclose(np.repeat(few, 4, axis=0), many, rtol=1e-9, atol=1e-11)
