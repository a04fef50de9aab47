"""Sums over many keys, on tensor cores that cut what they add: an error does not grow with the number of keys."""

from dataclasses import replace

import numpy as np
import pytest
from host_module import TruncatingModule
from on_host import installed
from shape_classes import function

import favorsharp as fs

pytestmark = pytest.mark.own_backend
pytest.importorskip("favorsharp_cuda")
from favorsharp_cuda import launch, tiles  # noqa: E402

N, LAST = 8_192 + 40, 100
LIMIT = 1.5e-5
"""Of float32 at any length: values, weights and sums in two planes of bfloat16."""


@pytest.fixture(autouse=True)
def on_tensor_cores_that_cut(monkeypatch):
    """And in as few pieces as there may be: those of a GPU that many heads fill."""
    monkeypatch.setattr(tiles, "BLOCKS", 1)
    with installed() as name, fs.use(name):
        launch.module_class = TruncatingModule
        yield


def problem(n=N, *, equal, d=4, e=2):
    """Values of one sign. Equal keys are the worst case: whatever is cut or rounded off is the same for each."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((n, d), dtype=np.float32) / d**0.5 for _ in range(2))
    v = rng.standard_normal((n, e), dtype=np.float32) + 3
    fm = fs.feature_map(fs.fit(q[:1000], k[:1000]), 8, rng=0)
    if equal:
        k[:], v[:] = k[0], v[0]
    return q, k, v, fm


def expected(name, *arrays, **options):
    with fs.use("reference"):
        return getattr(fs, name)(*(x.astype(np.float64) for x in arrays[:3]), arrays[3], **options)


def assert_close(got, want, limit=LIMIT):
    assert got.dtype == np.float32
    assert np.abs(got - want).max() <= limit * np.abs(want).max()


either = pytest.mark.parametrize("equal", [False, True], ids=["keys that differ", "equal keys"])


@either
@pytest.mark.parametrize("window", [0, 16, 64])
def test_causal(window, equal):
    arrays = problem(equal=equal)
    out = fs.linear_attention(*arrays, is_causal=True, window=window)
    assert_close(out, expected("linear_attention", *arrays, is_causal=True, window=window))


@pytest.mark.parametrize("name", ["linear_attention", "kernel_matvec"])
def test_all_keys(name):
    for equal, n in ((True, 8 * N), (False, N)):
        q, *arrays = problem(n, equal=equal)
        assert_close(getattr(fs, name)(q[:LAST], *arrays), expected(name, q[:LAST], *arrays))


@pytest.mark.slow
def test_causal_of_many():
    arrays = problem(8 * N, equal=True)
    assert_close(fs.linear_attention(*arrays, is_causal=True), np.broadcast_to(arrays[2][0], arrays[2].shape))


def test_window_and_packed():
    """Both ways of a window; and sequences of which one is long."""
    q, k, v, fm = problem(5000, equal=True)
    bounds = [0, 100, 4600, 5000]
    out = fs.linear_attention(q, k, v, fm, window=16, cu_seqlens=bounds)
    assert_close(out, np.broadcast_to(v[0], v.shape))
    out = fs.linear_attention(q, k, v, fm, is_causal=True, cu_seqlens=bounds)
    assert_close(out, np.broadcast_to(v[0], v.shape))


@either
@pytest.mark.parametrize("block", [8, 64, N])
def test_blocks_of_a_state(block, equal):
    """Fewer keys than 16 are taken in by the plain kernels."""
    n = N if block > 8 else 2400
    q, k, v, fm = problem(n, equal=equal)
    state = fs.init_state(fm, 2, like=k)
    for start in range(0, n, block):
        state = fs.update(state, k[start : start + block], v[start : start + block], fm)
    assert_close(fs.read(state, q[:LAST], fm), expected("linear_attention", q[:LAST], k, v, fm))


def after_very_many(k, v, fm):
    """A state that has seen the first key 2**31 times."""
    state = fs.update(fs.init_state(fm, v.shape[1], like=k), k[:1], v[:1], fm)
    return replace(state, kv=state.kv * np.float32(2**31), z=state.z * np.float32(2**31))


@pytest.mark.parametrize("by", ["tokens", "blocks", "causal attention"])
def test_keys_are_not_lost_in_very_many(by):
    """A tile of them is below the rounding of the sums, which states keep in their low parts."""
    n, large = 1200, 4e5
    q, k, v, fm = problem(n, equal=True)
    state = after_very_many(k, v, fm)
    v = v * np.float32(large)
    if by == "causal attention":
        out, state = function("causal_attention")(q, k, v, fm, state=state)
        seen = np.arange(1, n + 1)[:, None]
        assert_close(out, v[:1] / large * (1 + seen * large / 2**31))
    else:
        block = 1 if by == "tokens" else 40
        for start in range(0, n, block):
            state = fs.update(state, k[start : start + block], v[start : start + block], fm)
    want = v[0].astype(np.float64) / large * (1 + n * large / 2**31) / (1 + n / 2**31)
    assert want[0] > 1.2 * v[0, 0] / large
    assert_close(fs.read(state, q[:20], fm), np.broadcast_to(want, (20, 2)))
    total = np.exp(state.c.astype(np.float64)) * (state.z + state.z_low.astype(np.float64))
    first = fm.key(k[:1].astype(np.float64))
    np.testing.assert_allclose(total / first, 2**31 + n, rtol=1e-5)
    assert (np.abs(state.z_low) <= np.spacing(state.z)).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_plain_kernels(is_causal):
    """Points that no tile holds."""
    q, k, v, fm = problem(3000, equal=True, d=130)
    out = fs.linear_attention(q[-3000 if is_causal else -LAST :], k, v, fm, is_causal=is_causal)
    assert_close(out, np.broadcast_to(v[0], out.shape), 2e-6)
