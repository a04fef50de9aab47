"""Sums over many keys, on tensor cores that truncate when they add: errors do not grow with the number of keys."""

from dataclasses import replace

import numpy as np
import pytest
from host_module import TruncatingModule
from on_host import installed
from shape_classes import function

import favorsharp as fs
from favorsharp._values import astype

pytestmark = pytest.mark.own_backend
pytest.importorskip("favorsharp_cuda")
from favorsharp_cuda.host import (  # noqa: E402
    gradient_sizes,
    launch,
    tiles,
)

N, LAST = 8_192 + 40, 100
LIMIT = 1e-5
"""Of float32 at any length: values, weights and sums in two planes of bfloat16."""


@pytest.fixture(autouse=True)
def on_tensor_cores_that_cut(monkeypatch):
    """Run the kernels on such tensor cores, with as few segments as possible, as on a GPU that many heads fill."""
    monkeypatch.setattr(tiles, "SHORTEST", 1 << 30)
    monkeypatch.setattr(gradient_sizes, "SHORTEST_SEGMENT", 1 << 30)
    with installed() as name, fs.use(name):
        launch.module_class = TruncatingModule
        yield


def problem(n=N, *, equal, d=4, e=2):
    """A problem with values of one sign. Equal keys are the worst case, because each has the same rounding error."""
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
    want = expected("linear_attention", *arrays, is_causal=True, window=window)
    assert_close(out, want, 2 * LIMIT)  # errors of some early rows are 1.2e-5
    assert_close(out[-LAST:], want[-LAST:])


@pytest.mark.parametrize("name", ["linear_attention", "kernel_matvec"])
def test_all_keys(name):
    for equal, n in ((True, 8 * N), (False, N)):
        q, *arrays = problem(n, equal=equal)
        assert_close(getattr(fs, name)(q[:LAST], *arrays), expected(name, q[:LAST], *arrays))


@pytest.mark.slow
def test_causal_of_many():
    arrays = problem(8 * N, equal=True)
    out = fs.linear_attention(*arrays, is_causal=True)
    assert_close(out, np.broadcast_to(arrays[2][0], arrays[2].shape), 2 * LIMIT)


def test_window_and_packed():
    """Windows, causal and bidirectional; and packed sequences of which one is long."""
    q, k, v, fm = problem(5000, equal=True)
    bounds = [0, 100, 4600, 5000]
    out = fs.linear_attention(q, k, v, fm, window=16, cu_seqlens=bounds)
    assert_close(out, np.broadcast_to(v[0], v.shape), 2 * LIMIT)
    out = fs.linear_attention(q, k, v, fm, is_causal=True, cu_seqlens=bounds)
    assert_close(out, np.broadcast_to(v[0], v.shape), 2 * LIMIT)


@either
@pytest.mark.parametrize("block", [8, 64, N])
def test_blocks_of_a_state(block, equal):
    """Blocks of fewer than 16 keys are added by the plain kernels."""
    n = N if block > 8 else 2400
    q, k, v, fm = problem(n, equal=equal)
    state = fs.init_state(fm, 2, like=k)
    for start in range(0, n, block):
        state = fs.update(state, k[start : start + block], v[start : start + block], fm)
    assert_close(fs.read(state, q[:LAST], fm), expected("linear_attention", q[:LAST], k, v, fm))


@pytest.mark.parametrize("by", ["tokens", "decoded tokens", "blocks", "causal attention"])
def test_keys_are_not_lost_in_very_many(by):
    """The sum over a tile is below the rounding error of the sums, so the low parts must keep it."""
    n, many = 300, np.float32(2**31)
    q, k, v, fm = problem(n, equal=True)
    state = fs.update(fs.init_state(fm, v.shape[1], like=k), k[:1], v[:1], fm)
    c = state.c + 1  # references that do not rise
    state = before = replace(state, kv=state.kv * many, z=state.z * many, c=c, kv_low=None, z_low=None)
    if by == "causal attention":
        _, state = function("causal_attention")(q, k, v, fm, state=state)
    elif by == "decoded tokens":
        for token in range(n):
            _, state = fs.decode_step(*(x[token : token + 1] for x in (q, k, v)), state, fm)
    else:
        block = 1 if by == "tokens" else 40
        for start in range(0, n, block):
            state = fs.update(state, k[start : start + block], v[start : start + block], fm)
    z = n * np.exp(fm.log_key(k[:1].astype(np.float64)) - c)
    for sum_, low, old, want in ((state.z, state.z_low, before.z, z), (state.kv, state.kv_low, before.kv, z.T * v[0])):
        assert (np.abs(low) <= np.spacing(sum_) / 2 * 1.001).all()
        np.testing.assert_allclose(sum_.astype(np.float64) - old + low, want, rtol=2e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_plain_kernels(is_causal):
    """Points that are too wide for the tensor-core kernels."""
    q, k, v, fm = problem(3000, equal=True, d=130)
    out = fs.linear_attention(q[-3000 if is_causal else -LAST :], k, v, fm, is_causal=is_causal)
    assert_close(out, np.broadcast_to(v[0], out.shape), 2e-6)


def gradients_of(name, arrays, dtype, **options):
    """The gradients of q, k, v, and of the rows and weights of the map, for a gradient of the result of one sign."""
    q, k, v = (x.astype(dtype) for x in arrays[:3])
    _, pullback = fs.vjp(name, q, k, v, astype(arrays[3], dtype), of_map=True, **options)
    return pullback(1 + v[:, ::-1] / 4)


def assert_gradients(name, arrays, limits, **options):
    """Check the largest errors relative to the largest gradient, for points and for a map."""
    pytest.importorskip("favorsharp_numba")
    got = gradients_of(name, arrays, np.float32, **options)
    with fs.use("numba"):
        want = gradients_of(name, arrays, np.float64, **options)
    for group, limit in zip((slice(0, 3), slice(3, 5)), limits, strict=True):
        largest = max(np.abs(x).max() for x in want[group])
        for a, b in zip(got[group], want[group], strict=True):
            assert a.dtype == np.float32
            assert np.abs(a - b).max() <= limit * largest


@either
def test_gradients_of_products(equal):
    """In these gradients all terms have one sign, so nothing cancels."""
    assert_gradients("kernel_matvec", problem(3100, equal=equal), (2e-6, 2e-6))


@pytest.mark.parametrize("options", [{"is_causal": True}, {"is_causal": True, "window": 64}], ids=str)
def test_gradients_of_attention(options):
    """The terms of the gradients of the map mostly cancel."""
    assert_gradients("linear_attention", problem(2300, equal=False), (1e-5, 1e-4), **options)


def test_gradients_of_features():
    n = 4136
    q, *_, fm = problem(n, equal=False)
    rows, row, column = fm.rows.astype(np.float32), np.full((n, 1), -1, np.float32), np.zeros((1, 8), np.float32)
    given = q, rows, row, column
    found = function("exponential_features_vjp")(*given)[1](np.ones((n, 8), np.float32))
    q, rows, row, column = (x.astype(np.float64) for x in given)
    features = np.exp(q @ rows.T + row + column)
    want = (features @ rows, features.T @ q, features.sum(1)[:, None], features.sum(0)[None])
    for a, b in zip(found, want, strict=True):
        assert np.abs(a - b).max() <= 2e-6 * np.abs(b).max()
