"""States: prefill and decode equal the causal call, and states merge."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from problems import attention_problem, key_mask

import favorsharp as fs
from favorsharp.ops.state import decode_step

pytestmark = pytest.mark.compiled
WINDOWS = [0, 1, 5, 16, 64]


def problem(xp, n=90, heads=(2,), key_heads=None):
    q, k, v = attention_problem(0, heads, n=n)
    if key_heads:
        k, v = k[:, :key_heads], v[:, :key_heads]
    arrays = [xp(x) for x in (q, k, v)]
    fm = fs.feature_map(fs.fit(*arrays[:2], enable_gqa=bool(key_heads)), 16, rng=0)
    return (*arrays, fm)


def assert_states(xp, a, b):
    for name in ("kv", "z", "c", "recent_k", "recent_v", "recent_mask"):
        left, right = (xp.back(getattr(state, name)) for state in (a, b))
        np.testing.assert_allclose(np.broadcast_to(left, right.shape), right, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("window", WINDOWS)
def test_prefill_and_decode_is_the_causal_call(few_xp, window):
    xp = few_xp
    q, k, v, fm = problem(xp, n=40)
    want = xp.back(fs.linear_attention(q, k, v, fm, is_causal=True, window=window))
    out, state = fs.linear_attention(
        *(x[..., :21, :] for x in (q, k, v)), fm, is_causal=True, window=window, return_state=True
    )
    pieces = [xp.back(out)]
    for i in range(21, 30):
        out, state = fs.decode_step(*(x[..., i : i + 1, :] for x in (q, k, v)), state, fm)
        assert xp.is_like(out, v)
        pieces.append(xp.back(out))
    out, last = fs.linear_attention(
        *(x[..., 30:, :] for x in (q, k, v)), fm, is_causal=True, window=window, state=state, return_state=True
    )
    np.testing.assert_allclose(np.concatenate([*pieces, xp.back(out)], axis=-2), want, atol=1e-11)
    _, whole = fs.linear_attention(q, k, v, fm, is_causal=True, window=window, return_state=True)
    assert_states(xp, last, whole)


@pytest.mark.parametrize("window", WINDOWS)
def test_blocks_of_any_length_give_one_state(few_xp, window):
    xp = few_xp
    q, k, v, fm = problem(xp)
    mask = xp(key_mask(1, (2, 90), "holes"))
    _, whole = fs.linear_attention(q, k, v, fm, is_causal=True, window=window, key_mask=mask, return_state=True)
    state = fs.init_state(fm, 5, like=k, window=window)
    for a, b in [(0, 1), (1, 1), (1, 30), (30, 64), (64, 90)]:
        state = fs.update(state, k[..., a:b, :], v[..., a:b, :], fm, key_mask=mask[..., a:b])
    assert_states(xp, state, whole)


@pytest.mark.parametrize("window", WINDOWS)
def test_grouped_heads(window):
    q, k, v, fm = problem(np.asarray, n=40, heads=(2, 6), key_heads=2)
    want = fs.linear_attention(q, k, v, fm, is_causal=True, window=window, enable_gqa=True)
    out, state = fs.linear_attention(
        *(x[..., :30, :] for x in (q, k, v)), fm, is_causal=True, window=window, enable_gqa=True, return_state=True
    )
    assert state.kv.shape[:2] == (2, 2)
    pieces = [out]
    for i in range(30, 40):
        out, state = fs.decode_step(*(x[..., i : i + 1, :] for x in (q, k, v)), state, fm, enable_gqa=True)
        pieces.append(out)
    np.testing.assert_allclose(np.concatenate(pieces, axis=-2), want, atol=1e-11)
    np.testing.assert_allclose(fs.read(state, q[..., -1:, :], fm, enable_gqa=True), want[..., -1:, :], atol=1e-11)


def test_bidirectional_state(xp):
    q, k, v, fm = problem(xp, n=50)
    want = xp.back(fs.linear_attention(q, k, v, fm))
    out, state = fs.linear_attention(q, k[..., :20, :], v[..., :20, :], fm, return_state=True)
    np.testing.assert_allclose(
        xp.back(out), xp.back(fs.linear_attention(q, k[..., :20, :], v[..., :20, :], fm)), atol=1e-11
    )
    out = fs.linear_attention(q, k[..., 20:, :], v[..., 20:, :], fm, state=state)
    np.testing.assert_allclose(xp.back(out), want, atol=1e-11)


def test_combine_is_associative_with_an_identity(xp):
    q, k, v, fm = problem(xp)
    empty = fs.init_state(fm, 5, like=k)
    parts = [fs.update(empty, k[..., a:b, :], v[..., a:b, :], fm) for a, b in [(0, 11), (11, 12), (12, 90)]]
    left = fs.combine(fs.combine(parts[0], parts[1]), parts[2])
    right = fs.combine(parts[0], fs.combine(parts[1], parts[2]))
    whole = fs.update(empty, k, v, fm)
    assert_states(xp, left, right)
    assert_states(xp, left, whole)
    for joined in (fs.combine(empty, whole), fs.combine(whole, empty)):
        for name in ("kv", "z", "c"):
            np.testing.assert_array_equal(xp.back(getattr(joined, name)), xp.back(getattr(whole, name)))
    np.testing.assert_allclose(xp.back(fs.read(left, q, fm)), xp.back(fs.linear_attention(q, k, v, fm)), atol=1e-11)


def test_combine_with_a_window():
    _, k, v, fm = problem(np.asarray)
    empty = fs.init_state(fm, 5, like=k, window=8)
    full = fs.update(empty, k, v, fm)
    for joined in (fs.combine(empty, full), fs.combine(full, empty)):
        assert_states(type("host", (), {"back": np.asarray}), joined, full)
    with pytest.raises(ValueError, match="window cannot be combined unless one is empty"):
        fs.combine(full, full)


def test_nothing_read_from_an_empty_state(xp):
    q, k, _, fm = problem(xp)
    for window in (0, 8):
        out = fs.read(fs.init_state(fm, 5, like=k, window=window), q, fm)
        np.testing.assert_array_equal(xp.back(out), np.zeros((2, 90, 5)))


@pytest.mark.parametrize("window", [0, 8])
def test_size_does_not_grow_and_old_states_stay(window):
    _, k, v, fm = problem(np.asarray)
    state = fs.update(fs.init_state(fm, 5, like=k, window=window), k, v, fm)
    before = state.kv.copy(), state.recent_k.copy()
    later = state
    for _ in range(5):
        later = fs.update(later, k, v, fm)
        assert later.kv.shape == state.kv.shape
        assert later.recent_k.shape[-2] <= 2 * window
    np.testing.assert_array_equal(state.kv, before[0])
    np.testing.assert_array_equal(state.recent_k, before[1])


def test_states_are_picklable_and_know_their_map():
    q, k, v, fm = problem(np.asarray)
    before = fs.update(fs.init_state(fm, 5, like=k), k, v, fm)
    state = pickle.loads(pickle.dumps(before))
    assert len(repr(state)) < 200
    for same in (pickle.loads(pickle.dumps(fm)), fs.feature_map(fs.fit(q, k), 16, rng=0)):
        np.testing.assert_array_equal(fs.read(state, q, same), fs.read(before, q, fm))
    for other in (
        fs.feature_map(fm.parameters, 16, rng=1),
        fs.feature_map(fm.parameters, 8, rng=0),
        fs.feature_map(fs.fit(q, k, method="oprf"), 16, rng=0),
    ):
        for call in (
            lambda other=other: fs.read(state, q, other),
            lambda other=other: fs.update(state, k, v, other),
            lambda other=other: fs.decode_step(q[:, :1], k[:, :1], v[:, :1], state, other),
            lambda other=other: fs.linear_attention(q, k, v, other, is_causal=True, state=state),
        ):
            with pytest.raises(ValueError, match="state comes from another feature map"):
                call()
    with pytest.raises(ValueError, match="different feature maps"):
        fs.combine(state, fs.init_state(fs.feature_map(fm.parameters, 16, rng=1), 5, like=k))


@pytest.mark.compiled(False)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_narrow_streams_are_summed_wide(dtype):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.asarray(x).to(getattr(torch, dtype)) for x in attention_problem(1, (2,), n=40))
    fm = fs.feature_map(fs.fit(q, k), 32, rng=0)
    state = fs.init_state(fm, 5, like=k, window=4)
    assert state.kv.dtype == torch.float32
    state = fs.update(state, k, v, fm)
    assert state.recent_k.dtype == k.dtype
    wide = fs.update(fs.init_state(fm, 5, like=k.float(), window=4), k.float(), v.float(), fm)
    torch.testing.assert_close(fs.read(state, q, fm), fs.read(wide, q.float(), fm).to(q.dtype))


@pytest.mark.jax
def test_decode_under_jit():
    jax = pytest.importorskip("jax")
    import favorsharp.jax  # noqa: F401  registers the values as pytrees

    jax.config.update("jax_enable_x64", True)

    q, k, v, fm = problem(jax.numpy.asarray, n=12)
    want = fs.linear_attention(q, k, v, fm, is_causal=True)
    step = jax.jit(lambda q, k, v, state: fs.decode_step(q, k, v, state, fm))
    state = fs.init_state(fm, 5, like=k)
    outs = []
    for i in range(12):
        out, state = step(*(x[..., i : i + 1, :] for x in (q, k, v)), state)
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, axis=-2), want, atol=1e-11)


@pytest.mark.parametrize("kind", ["Tensor", "Parameter"])
def test_a_map_whose_rows_were_written_to_is_looked_at_again(kind):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in attention_problem(0, (2,), n=12))
    fm = fs.feature_map(fs.fit(q, k, method="posrf"), 16, rng=0)
    fm = replace(fm, rows=torch.nn.Parameter(fm.rows.clone()) if kind == "Parameter" else fm.rows.clone())

    def results(fm):
        state = fs.update(fs.init_state(fm, v.shape[-1], like=k), k, v, fm)
        token = fs.decode_step(*(x[..., :1, :] for x in (q, k, v)), state, fm)[0]
        return token, fs.linear_attention(q, k, v, fm), fs.linear_attention(q, k, v, fm, is_causal=True)

    with torch.no_grad():
        for _ in range(2):  # the second call uses the plan of the first
            results(fm)
        fm.rows.mul_(0.5)
        for got, want in zip(results(fm), results(replace(fm, rows=fm.rows.detach().clone())), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("window", [0, 4])
def test_a_map_written_to_between_two_tokens_is_looked_at_again(window):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in attention_problem(0, (2,), n=12))
    fm = fs.feature_map(fs.fit(q, k, method="posrf"), 16, rng=0)
    fm = replace(fm, rows=fm.rows.clone())
    tokens = [[x[..., i : i + 1, :] for x in (q, k, v)] for i in range(12)]
    state = fs.init_state(fm, v.shape[-1], like=k, window=window)
    for token in tokens[:10]:
        _, state = fs.decode_step(*token, state, fm)
    fm.rows.mul_(0.5)
    bare = replace(state)  # without what is kept beside it
    for token in tokens[10:]:
        got, state = fs.decode_step(*token, state, fm)
        bare = fs.update(bare, *token[1:], fm)
        torch.testing.assert_close(got, fs.read(bare, token[0], fm), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["read-only", "reversed", "every other", "transposed"])
def test_a_token_of_arrays_of_any_layout(layout):
    q, k, v = attention_problem(0, (2,), n=12)
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    state = fs.update(fs.init_state(fm, v.shape[-1], like=k), k, v, fm)
    token = tuple(np.ascontiguousarray(x[..., :1, :]) for x in (q, k, v))

    def laid_out(x):
        if layout == "read-only":
            x = x.copy()
            x.flags.writeable = False
        elif layout == "reversed":
            x = x[..., ::-1].copy()[..., ::-1]
        elif layout == "every other":
            x = np.repeat(x, 2, axis=-1)[..., ::2]
        else:
            x = np.asfortranarray(x)
        return x

    arrays = {name: laid_out(getattr(state, name)) for name in ("kv", "z", "c")}
    want, after = fs.decode_step(*token, state, fm)
    for _ in range(2):
        got, further = fs.decode_step(*(laid_out(x) for x in token), replace(state, **arrays), fm)
        np.testing.assert_allclose(got, want, rtol=1e-12)
        np.testing.assert_allclose(further.kv, after.kv, rtol=1e-12)


@pytest.fixture(params=["reference", "numba"])
def implementation(request):
    """The references, and the kernels where they are installed."""
    if request.param == "numba":
        pytest.importorskip("numba")
    with fs.use(request.param):
        yield request.param


@pytest.mark.own_backend
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.usefixtures("implementation")
def test_what_a_mask_hides_may_be_anything(window):
    """This includes the last two blocks, whose values a state keeps unchanged."""
    q, k, v, fm = problem(np.asarray, n=30)
    mask = np.ones((2, 30), bool)
    mask[:, [3, 17, 26, 29]] = False
    spoiled = np.where(mask[..., None], v, np.nan)
    want, got = (
        fs.read(fs.update(fs.init_state(fm, 5, like=k, window=window), k, x, fm, key_mask=mask), q, fm)
        for x in (v, spoiled)
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.own_backend
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.usefixtures("implementation")
def test_a_masked_token_changes_nothing(window):
    """The op takes a mask; the public function does not."""
    q, k, v, fm = problem(np.asarray, n=30)
    before = fs.update(
        fs.init_state(fm, 5, like=k, window=window), k[:, :21], v[:, :21], fm
    )  # in a block of the window that has room
    token = [x[:, 21:22] for x in (q, k, v)]
    out, after = decode_step(*token, before, fm, key_mask=np.zeros((2, 1), bool))
    np.testing.assert_allclose(out, fs.read(before, token[0], fm), rtol=1e-12)
    np.testing.assert_allclose(fs.read(after, q, fm), fs.read(before, q, fm), rtol=1e-12)
    seen, _ = decode_step(*token, before, fm, key_mask=np.ones((2, 1), bool))
    assert np.abs(seen - out).max() > 1e-4


@pytest.mark.own_backend
@pytest.mark.usefixtures("implementation")
def test_states_with_a_window_may_be_continued_twice():
    """Tokens share the memory of their recent keys, and a state keeps its value when another token follows it."""
    q, k, v, fm = problem(np.asarray, n=40)
    mask = np.arange(40) != 3 * np.ones((2, 1))
    want = fs.linear_attention(q, k, v, fm, is_causal=True, window=4, key_mask=mask)
    state = fs.update(fs.init_state(fm, 5, like=k, window=4), k[:, :5], v[:, :5], fm, key_mask=mask[:, :5])
    for i in range(5, 40):
        token = [x[:, i : i + 1] for x in (q, k, v)]
        before, copied = fs.read(state, q, fm), pickle.loads(pickle.dumps(state))
        out, after = fs.decode_step(*token, state, fm)
        fs.decode_step(*(-x for x in token), state, fm)
        again, _ = fs.decode_step(np.repeat(token[0], 2, axis=-1)[..., ::2], *token[1:], after, fm)
        np.testing.assert_allclose(again, fs.decode_step(*token, replace(after), fm)[0], rtol=1e-12)
        np.testing.assert_allclose(out, want[:, i : i + 1], atol=1e-11)
        np.testing.assert_allclose(fs.decode_step(*token, copied, fm)[0], out, rtol=1e-12)
        np.testing.assert_array_equal(fs.read(state, q, fm), before)
        state = after


def test_a_combined_state_knows_the_map_of_either_side():
    q, k, v, fm = problem(np.asarray)
    state = fs.update(fs.init_state(fm, 5, like=k), k, v, fm)
    anonymous = replace(fs.init_state(fm, 5, like=k), fingerprint=None)
    other = fs.feature_map(fm.parameters, 16, rng=1)
    for joined in (fs.combine(state, anonymous), fs.combine(anonymous, state)):
        assert joined.fingerprint == state.fingerprint is not None
        with pytest.raises(ValueError, match="state comes from another feature map"):
            fs.read(joined, q, other)


@pytest.mark.parametrize("kind", ["features", "landmarks"])
def test_a_pickled_state_has_no_more_than_its_fields(kind):
    """Torch pickles the whole memory of which a tensor is a part; states have room for further tokens in theirs."""
    torch = pytest.importorskip("torch")
    q, k, v = (torch.randn(2, 40, size, dtype=torch.float64) for size in (4, 4, 3))
    fm = fs.landmarks(16) if kind == "landmarks" else fs.feature_map(fs.fit(q, k), 16, rng=0)
    state = fs.init_state(fm, 3, like=k, window=8)
    for i in range(40):
        _, state = fs.decode_step(*(x[:, i : i + 1] for x in (q, k, v)), state, fm)
    held = sum(x.nbytes for x in vars(state).values() if torch.is_tensor(x))
    kept = pickle.dumps(state)
    assert len(kept) < held + 5000
    again = pickle.loads(kept)
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in vars(again).values() if torch.is_tensor(x))


@pytest.mark.parametrize("window", [0, 4])
def test_a_state_may_have_more_axes_than_later_points(few_xp, window):
    """Each of its heads goes on with the same points."""
    q, k, v = attention_problem(1, (2,), n=30)
    fm = fs.feature_map(fs.fit(few_xp(q[0]), few_xp(k[0])), 16, rng=0)
    x, y, z = (few_xp(points[0, :9]) for points in (q, k, v))

    def results(keys, values):
        state = fs.update(fs.init_state(fm, 5, like=few_xp(keys), window=window), few_xp(keys), few_xp(values), fm)
        yield fs.read(state, x, fm)
        yield fs.read(fs.update(state, y, z, fm), x, fm)
        yield fs.linear_attention(x, y, z, fm, is_causal=True, window=window, state=state)
        yield fs.decode_step(x[:1, :], y[:1, :], z[:1, :], state, fm)[0]

    alone = [[few_xp.back(out) for out in results(k[head], v[head])] for head in range(2)]
    for got, *want in zip(results(k, v), *alone, strict=True):
        np.testing.assert_allclose(few_xp.back(got), np.stack(want), rtol=1e-9, atol=1e-11)
