"""Sums of float32 over very many keys: an error does not grow with their number."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest

import favorsharp as fs
from favorsharp._values import astype
from favorsharp.ops.vjp import attention_vjp, kernel_matvec_vjp

pytestmark = pytest.mark.slow

N, LAST, WINDOW = 320_000, 40, 32
LIMIT = 6e-6
BACKENDS = ["numba", "reference"]


def problem(e=5, n=N):
    """Points whose features differ much in size, and values near 3."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((n, 4), dtype=np.float32) for _ in range(2))
    v = rng.standard_normal((n, e), dtype=np.float32) + 3
    return q, k, v, fs.feature_map(fs.fit(q[:1000], k[:1000]), 8, rng=0)


def doubled(*arrays):
    return [x.astype(np.float64) for x in arrays]


def sums(k, v, fm):
    """The sums of the keys in float64."""
    k, v = doubled(k, v)
    features = fm.key(k)
    return features.T @ v, features.sum(axis=0)


def expected(q, k, v, fm, *, causal=False, window=0):
    """The expected attention of the last queries; with a window, of those for which all later keys are near."""
    n, rows = len(k), []
    base = n - LAST - 3 * WINDOW if causal or window else n
    before = sums(k[:base], v[:base], fm)
    for i in range(n - LAST, n):
        stop = i + 1 if causal else n
        far = (i // window - 1) * window if window else stop
        numerator, total = (x + y for x, y in zip(before, sums(k[base:far], v[base:far], fm), strict=True))
        query, keys, values = doubled(q[i : i + 1], k[far:stop], v[far:stop])
        scores = np.exp(query @ keys.T / 2)  # a scale of d**-0.5
        features = fm.query(query)
        rows.append((features @ numerator + scores @ values) / (features @ total + scores.sum()))
    return np.concatenate(rows)


def assert_close(got, want, limit=LIMIT):
    assert got.dtype == np.float32
    assert np.abs(got - want).max() <= limit * np.abs(want).max()


@pytest.mark.parametrize("window", [0, WINDOW])
@pytest.mark.parametrize("causal", [True, False])
def test_attention(window, causal):
    q, k, v, fm = problem()
    want = expected(q, k, v, fm, causal=causal, window=window)
    with fs.use("numba"):
        out = fs.linear_attention(q, k, v, fm, is_causal=causal, window=window)
        packed = fs.linear_attention(
            *(np.concatenate([x[:100], x, x[:50]]) for x in (q, k, v)),
            fm, is_causal=causal, window=window, cu_seqlens=np.array([0, 100, 100 + N, 150 + N]),
        )  # fmt: skip
    assert_close(out[-LAST:], want)
    assert_close(packed[N + 100 - LAST : N + 100], want)
    if window and not causal:  # the blocks behind, which another pass adds
        with fs.use("numba"):
            out = fs.linear_attention(q[::-1], k[::-1], v[::-1], fm, window=window)
        assert_close(out[:LAST][::-1], want)


def test_equal_blocks_in_both_directions():
    """Rounding errors of equal sums do not make up for each other."""
    q, k, v, fm = problem(n=2000 * WINDOW)
    k, v = (np.tile(x[:WINDOW], (2000, 1)) for x in (k, v))
    with fs.use("numba"):
        out = fs.linear_attention(q, k, v, fm, window=WINDOW)
        back = fs.linear_attention(q[::-1], k[::-1], v[::-1], fm, window=WINDOW)[::-1]
    for got in (out, back):
        assert_close(got[-LAST:], expected(q, k, v, fm, window=WINDOW))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("e", [1, 5])
def test_operators(backend, e):
    q, k, v, fm = problem(e)
    want = expected(q, k, v, fm)
    numerator, _ = sums(k, v, fm)
    with fs.use(backend):
        assert_close(fs.linear_attention(q[-LAST:], k, v, fm), want)
        assert_close(fs.nadaraya_watson(q[-LAST:], k, v, fm), want)
        assert_close(fs.kernel_matvec(q[-LAST:], k, v, fm), fm.query(*doubled(q[-LAST:])) @ numerator)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [64, 4096, N])
def test_blocks_of_a_state(backend, block):
    n = N if block > 64 or backend == "numba" else N // 4
    q, k, v, fm = problem(n=n)
    with fs.use(backend):
        state = fs.init_state(fm, 5, like=k)
        for start in range(0, n, block):
            state = fs.update(state, k[start : start + block], v[start : start + block], fm)
        assert_close(fs.read(state, q[-LAST:], fm), expected(q, k, v, fm))


def after_many(v, fm, key):
    """A state that has seen one key 2**25 times, and its exact sums."""
    state = fs.update(fs.init_state(fm, 1, like=key), key, v, fm)
    many = np.float32(2**25)
    return replace(state, kv=state.kv * many, z=state.z * many), [x * 2**25 for x in sums(key, v, fm)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by", ["decode_step", "update"])
def test_one_token_is_not_lost_in_very_many(backend, by):
    """Each token alone is smaller than the rounding error of the sums."""
    count = 2049
    q, k, v, fm = problem(1, count)
    v = v + 600
    with fs.use(backend):
        state, total = after_many(v[:1] / 200, fm, k[:1])
        for i in range(count):
            row = slice(i, i + 1)
            if by == "update":
                state = fs.update(state, k[row], v[row], fm)
            else:
                _, state = fs.decode_step(q[row], k[row], v[row], state, fm)
        out = fs.read(state, q, fm)
    numerator, weight = (x + y for x, y in zip(total, sums(k, v, fm), strict=True))
    features = fm.query(*doubled(q))
    want = features @ numerator / (features @ weight)[:, None]
    assert want.max() > v[0, 0] / 200 * 1.005
    assert_close(out, want, 1e-5)


@pytest.mark.parametrize("at", [0, 1, 127, 128, 129, 200])
def test_states_part_ways(at):
    """Two streams that continue one state, token by token, do not affect each other, and neither does a copy of the
    state."""
    q, k, v, fm = problem(2, 700)
    with fs.use("numba"):
        state = fs.init_state(fm, 2, like=k)
        for i in range(at):
            _, state = fs.decode_step(q[i : i + 1], k[i : i + 1], v[i : i + 1], state, fm)
        ways = [state, state, copy.deepcopy(state), pickle.loads(pickle.dumps(state))]
        assert ways[3].single_tokens is None
        parts = [range(at + 40 * j, at + 40 * j + 300) for j in range(len(ways))]
        for step in range(300):
            for j, part in enumerate(parts):
                i = part[step]
                _, ways[j] = fs.decode_step(q[i : i + 1], k[i : i + 1], v[i : i + 1], ways[j], fm)
        for way, part in zip(ways, parts, strict=True):
            seen = [*range(at), *part]
            want = fs.linear_attention(q[:20], k[seen], v[seen], fm)
            assert_close(fs.read(way, q[:20], fm), want)
            assert_close(fs.read(fs.update(way, k[:0], v[:0], fm), q[:20], fm), want)


def test_low_parts_are_part_of_a_state(tmp_path):
    _, k, v, fm = problem(n=5000)
    state = fs.update(fs.init_state(fm, 5, like=k), k, v, fm)
    other = fs.combine(state, fs.update(fs.init_state(fm, 5, like=k), k[::-1], v[::-1], fm))
    fs.save(tmp_path / "state.npz", other)
    loaded = fs.load(tmp_path / "state.npz")
    numerator, total = (2 * x for x in sums(k, v, fm))
    for one in (other, loaded):
        scale = np.exp(one.c.astype(np.float64))
        for sum_, low, want in ((one.kv, one.kv_low, numerator), (one.z, one.z_low, total)):
            assert (np.abs(low) <= np.spacing(np.abs(sum_)) / 2 * 1.001).all()
            factor = scale.T if sum_ is one.kv else scale
            np.testing.assert_allclose((sum_ + low.astype(np.float64)) * factor, want.reshape(sum_.shape), rtol=3e-6)
    double = fs.init_state(fm, 5, like=k.astype(np.float64))
    assert double.kv_low is None
    assert fs.update(double, *doubled(k, v), fm).z_low is None


def assert_gradients(single, double):
    """Check gradients whose terms mostly cancel: those of q, and even more those of the map."""
    for got, want, limit in zip(single, double, [3e-5] * 3 + [1e-4] * 2, strict=True):
        assert got.dtype == np.float32
        assert np.abs(got - want).max() <= limit * max(1, np.abs(want).max())


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {}, {"window": WINDOW}, {"is_causal": True, "window": WINDOW}]
)
def test_gradients(options):
    q, k, v, fm = problem(2)
    with fs.use("numba"):
        single, double = (
            attention_vjp(*arrays, astype(fm, arrays[0].dtype), of_map=True, **options)[1](1 + arrays[1][:, :2])
            for arrays in ((q, k, v), doubled(q, k, v))
        )
    assert_gradients(single, double)


def test_gradients_of_products():
    q, k, v, fm = problem(2)
    with fs.use("numba"):
        single, double = (
            kernel_matvec_vjp(*arrays, astype(fm, arrays[0].dtype), of_map=True)[1](1 + arrays[1][:, :2])
            for arrays in ((q, k, v), doubled(q, k, v))
        )
    assert_gradients(single, double)
