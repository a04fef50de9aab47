"""Tokens that are kept beside a state until its sums are read count as if they had been added to the sums."""

import pickle

import numpy as np
import pytest

import favorsharp as fs

SIZES = (1, 4, 3, 16, 31, 32, 33, 2, 0, 5, 60, 1, 7)

pytestmark = pytest.mark.own_backend


def problem(batch, m, d, e, n, dtype=np.float64):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((*batch, n, size)).astype(dtype) for size in (d, d, e))
    return q, k, v, fs.feature_map(fs.fit(q, k), m, rng=0)


def sums(state):
    """kv and z with their low parts, not relative to c."""
    scale = np.exp(state.c.astype(np.float64))
    kv, z = (x if low is None else x + low.astype(np.float64) for x, low in
             ((state.kv, state.kv_low), (state.z, state.z_low)))  # fmt: skip
    return kv * np.swapaxes(scale, -1, -2), z * scale


def assert_same(state, want, rtol):
    for got, other in zip(sums(state), sums(want), strict=True):
        np.testing.assert_allclose(got, other, rtol=0, atol=rtol * np.abs(other).max(initial=0))
    np.testing.assert_allclose(state.c, want.c, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [pytest.param(np.float32, marks=pytest.mark.kernels), np.float64])
@pytest.mark.parametrize("shape", [((2,), 16, 8, 16), ((), 8, 4, 5), ((2, 3), 17, 5, 1), ((13,), 1, 1, 33)])
def test_blocks_of_any_length(shape, dtype):
    """Some updates keep a few keys, others add more at once, and tokens of `decode_step` come between them."""
    q, k, v, fm = problem(*shape, sum(SIZES), dtype)
    tolerance = 1e-5 if dtype == np.float32 else 1e-13
    ways = {}
    for backend in ("numba", "reference"):
        with fs.use(backend):
            state, start, outs = fs.init_state(fm, shape[-1], like=k), 0, []
            for i, size in enumerate(SIZES):
                part = (..., slice(start, start + size), slice(None))
                state, start = fs.update(state, k[part], v[part], fm), start + size
                if i % 3 == 1:
                    out, state = fs.decode_step(q[..., :1, :], k[..., :1, :], v[..., :1, :], state, fm)
                    outs.append(out)
                if i % 3 == 2:
                    outs.append(fs.read(state, q, fm))
            ways[backend] = state, outs
    assert_same(ways["numba"][0], ways["reference"][0], tolerance)
    for got, want in zip(ways["numba"][1], ways["reference"][1], strict=True):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [pytest.param(np.float32, marks=pytest.mark.kernels), np.float64])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_features_that_rise_by_far(size, dtype):
    """A token may have features that are 2**40 times as large as those of the sums, or more; the sums then rise."""
    q, k, v, fm = problem((3,), 16, 8, 4, 60, np.float64)
    k[:, :3] *= 30  # points far away have small features
    k[1, 3:41] *= 12
    ways = {}
    for backend in ("reference", "numba"):
        x, y, z = (array.astype(dtype if backend == "numba" else np.float64) for array in (q, k, v))
        with fs.use(backend):
            state, outs = fs.init_state(fm, 4, like=y), []
            for start in range(0, 60, size):
                part = (slice(None), slice(start, start + size))
                if size == 1:
                    out, state = fs.decode_step(x[part], y[part], z[part], state, fm)
                    outs.append(out)
                else:
                    state = fs.update(state, y[part], z[part], fm)
        ways[backend] = state.c, state.kv / np.swapaxes(state.z, -1, -2), *outs
    tolerance = 1e-3 if dtype == np.float32 else 1e-11  # logarithms are near 1000
    for got, want in zip(ways["numba"], ways["reference"], strict=True):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [1, 2])
def test_features_that_rise_a_little_and_then_by_far(size):
    """The sums are divided by both rises; of what they held, a share of 1e-8 is left."""
    q, k, v, _ = problem((3,), 16, 4, 2, 8, np.float64)
    fm = fs.feature_map(fs.fit(q, q, method="posrf"), 16, rng=0)
    k = k[:, :1] / np.linalg.norm(k[:, :1], axis=-1, keepdims=True) + 0.02 * k
    k = k * np.array([12, 11.9, 11.8, 11.7, 6, 6, 5.9, 5.8])[:, None]  # points far away have small features
    states = []
    for backend in ("numba", "reference"):
        with fs.use(backend):
            state = fs.init_state(fm, 2, like=k)
            for start in range(0, 8, size):
                part = (slice(None), slice(start, start + size))
                if size == 1:
                    _, state = fs.decode_step(q[part], k[part], v[part], state, fm)
                else:
                    state = fs.update(state, k[part], v[part], fm)
        states.append(state)
    for name in ("kv", "z", "c"):
        np.testing.assert_allclose(*(getattr(state, name) for state in states), rtol=1e-11, atol=1e-12)


def test_keys_of_two_ways():
    """Two states that continue one state do not see each other's keys, and that state does not change."""
    _, k, v, fm = problem((2,), 16, 8, 4, 40)
    with fs.use("numba"):
        start = fs.update(fs.init_state(fm, 4, like=k), k[:, :10], v[:, :10], fm)
        ways = [fs.update(start, k[:, part], v[:, part], fm) for part in (slice(10, 20), slice(20, 40), slice(0))]
        wants = [fs.update(fs.init_state(fm, 4, like=k), k[:, i], v[:, i], fm) for i in
                 (range(20), [*range(10), *range(20, 40)], range(10))]  # fmt: skip
    for way, want in zip([*ways, start], [*wants, wants[2]], strict=True):
        assert_same(way, want, 1e-6)


def test_sums_are_computed_when_they_are_asked_for():
    q, k, v, fm = problem((2,), 16, 8, 4, 40)
    with fs.use("numba"):
        state = fs.init_state(fm, 4, like=k)
        for i in range(20):
            _, state = fs.decode_step(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1], state, fm)
        state = fs.update(state, k[:, 20:22], v[:, 20:22], fm)
        assert "kv" not in vars(state)
        assert (state.num_features, state.v_size, state.like.shape) == (16, 4, (2, 16, 4))
        assert repr(state) == "State(num_features=16, v_size=4, batch=(2,), window=0, recent=0)"
        copy = pickle.loads(pickle.dumps(state))
        assert state.kv is state.kv
        tokens = q[:, 22:23], k[:, 22:23], v[:, 22:23]
        (out, state), (other, copy) = (fs.decode_step(*tokens, one, fm) for one in (state, copy))
    np.testing.assert_array_equal(out, other)  # both go on from the same sums
    np.testing.assert_array_equal(state.kv, copy.kv)
    with pytest.raises(AttributeError, match="no attribute 'kv_high'"):
        _ = state.kv_high


def test_sums_are_seen_by_tracers():
    """Calls that torch compiles, traces or differentiates read the sums with kept tokens."""
    torch = pytest.importorskip("torch")
    from torch.fx.experimental.proxy_tensor import make_fx

    q, k, v, _ = problem((2,), 16, 8, 4, 9)
    q, k, v = (torch.asarray(x) for x in (q, k, v))
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    want = fs.linear_attention(q, k, v, fm)

    def state():
        after = fs.init_state(fm, 4, like=k)
        for i in range(9):
            _, after = fs.decode_step(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1], after, fm)
        assert "kv" not in vars(after)
        return after

    one = state()
    compiled = torch.compile(lambda q, state: fs.read(state, q, fm), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, state()), want)
    torch.testing.assert_close(make_fx(lambda q: fs.read(one, q, fm))(q)(q), want)
    one = state()
    torch.testing.assert_close(torch.func.vmap(lambda q: fs.read(one, q, fm))(q[None])[0], want)
    one = state()
    assert torch.func.grad(lambda q: fs.read(one, q, fm).sum())(q).isfinite().all()


def test_sums_that_a_mode_asks_for_are_not_of_that_mode():
    """The sums stay with the state, which outlives the mode."""
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    q, k, v, _ = problem((2,), 16, 8, 4, 9)
    q, k, v = (torch.asarray(x) for x in (q, k, v))
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode()):
        state = fs.update(fs.init_state(fm, 4, like=k), k, v, fm)
        assert "kv" not in vars(state)
        with mode:
            _ = state.kv
        assert not isinstance(state.kv, FakeTensor)
        x = q.clone().requires_grad_()
        fs.read(state, x, fm).sum().backward()
        assert torch.isfinite(x.grad).all()
