"""Gradients of landmarks with a constant choice, and calls that JAX compiles."""

import landmark_oracle
import numpy as np
import oracle
import pytest
from problems import attention_problem

import favorsharp as fs
from favorsharp.landmarks import window_gradients
from favorsharp.ops.landmark_seeds import noise_of


def torch_gradients(function, arrays, weight):
    torch = pytest.importorskip("torch")
    leaves = [torch.asarray(x.copy()).requires_grad_() for x in arrays]
    (function(*leaves) * torch.asarray(weight)).sum().backward()
    return [x.grad.numpy() for x in leaves]


def jax_gradients(function, arrays, weight):
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    given = [jax.numpy.asarray(x) for x in arrays]
    gradients = jax.grad(lambda *a: (function(*a) * weight).sum(), argnums=(0, 1, 2))
    return [np.asarray(g) for g in jax.jit(gradients)(*given)]


def vjp_gradients(function, arrays, weight):
    torch = pytest.importorskip("torch")
    given = [torch.asarray(x) for x in arrays]
    _, pullback = fs.vjp(fs.linear_attention, *given, function.args[0], **function.keywords)
    return [x.numpy() for x in pullback(torch.asarray(weight))]


def numpy_gradients(function, arrays, weight):
    _, pullback = fs.vjp(fs.linear_attention, *arrays, function.args[0], **function.keywords)
    return pullback(weight)


class Through:
    """linear_attention with landmarks as a function of q, k and v."""

    def __init__(self, lm, **keywords):
        self.args, self.keywords = (lm,), keywords

    def __call__(self, q, k, v):
        return fs.linear_attention(q, k, v, *self.args, **self.keywords)


@pytest.mark.parametrize(
    ("gradients", "kernel", "window", "steps"),
    [
        (torch_gradients, "softmax", 0, 3),
        (torch_gradients, "gaussian", 0, 2),
        (torch_gradients, "softmax", 3, 1),
        (torch_gradients, "softmax", 0, 0),
        (numpy_gradients, "softmax", 0, 3),
        (numpy_gradients, "gaussian", 0, 1),
        (numpy_gradients, "softmax", 0, 0),
        (vjp_gradients, "softmax", 3, 3),
        (numpy_gradients, "softmax", 3, 3),
        (numpy_gradients, "gaussian", 1, 0),
        pytest.param(jax_gradients, "gaussian", 3, 1, marks=pytest.mark.jax),
    ],
)
def test_gradients_with_the_assignment_held(rng, monkeypatch, gradients, kernel, window, steps):
    monkeypatch.setattr(window_gradients, "UNIT", 6)  # several units, which read keys before and behind them
    arrays = attention_problem(15, n=24, d=3, e=2)
    q, k, _ = arrays
    lm = fs.landmarks(5, kernel=kernel, steps=steps)
    scale = lm.scale_of(3)
    _, held = landmark_oracle.choose(q * scale**0.5, k * scale**0.5, lm, noise_of(0, 0, 5, 3), kernel)
    near = oracle.near_pairs(24, window, False) if window else None
    weight = rng.standard_normal((24, 2))
    got = gradients(Through(lm, window=window), arrays, weight)
    for i in range(3):
        way = rng.standard_normal(arrays[i].shape)
        values = []
        for step in (1e-5, -1e-5):
            moved = [x + step * way if j == i else x for j, x in enumerate(arrays)]
            values.append((landmark_oracle.held_attention(*moved, scale, held, kernel, near) * weight).sum())
        np.testing.assert_allclose((got[i] * way).sum(), (values[0] - values[1]) / 2e-5, rtol=1e-5, atol=1e-7)


def test_gradients_of_a_stream_are_finite_and_causal():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.asarray(x).requires_grad_() for x in attention_problem(16, (2,), n=60))
    out = fs.linear_attention(q, k, v, fs.landmarks(8, room=4), is_causal=True, window=4)
    out[:, :41].square().sum().backward()
    for x in (q, k, v):
        assert torch.isfinite(x.grad).all()
        assert (x.grad[:, 41:] == 0).all()
        assert (x.grad[:, 1:40].abs().amax(-1) > 0).all()


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, "softmax"),
        ({"is_causal": True}, "softmax"),
        ({"is_causal": True, "window": 4}, "gaussian"),
        ({"window": 3}, "softmax"),
        ({"window": 16}, "gaussian"),
    ],
)
def test_gradients_of_numpy_arrays_are_those_of_autograd(options, kernel):
    """The cases have grouped heads, a mask, values that are broadcast, packed sequences, and a long tile."""
    q, k, v = attention_problem(16, (2, 4), n=90)
    k, v = k[:, :2], v[:1, :1]
    mask = np.random.default_rng(4).random((2, 1, 90)) > 0.2
    k[~np.broadcast_to(mask, k.shape[:-1])] = np.nan
    options = {**options, "enable_gqa": True, "cu_seqlens": [0, 30, 90]}
    lm, weight = (
        fs.landmarks(8, room=4, kernel=kernel),
        np.random.default_rng(5).standard_normal((2, 4, 90, v.shape[-1])),
    )
    out, pullback = fs.vjp(fs.linear_attention, q, k, v, lm, key_mask=mask, **options)
    torch = pytest.importorskip("torch")
    given = [torch.asarray(x) for x in (q, k, v)]
    same, reverse = fs.vjp(fs.linear_attention, *given, lm, key_mask=torch.asarray(mask), **options)
    np.testing.assert_allclose(out, same.numpy(), rtol=1e-9, atol=1e-11)
    for own, want in zip(pullback(weight), reverse(torch.asarray(weight)), strict=True):
        np.testing.assert_allclose(own, want.numpy(), rtol=1e-7, atol=1e-9)


def test_gradients_of_numpy_arrays_with_unequal_lengths():
    torch = pytest.importorskip("torch")
    q, k, v = attention_problem(16, (2,), n=30)
    for keys in (0, 20):
        arrays, weight = (q, k[0, :keys], v[:, :keys]), np.ones((2, 30, v.shape[-1]))
        _, pullback = fs.vjp(fs.linear_attention, *arrays, fs.landmarks(8))
        _, reverse = fs.vjp(fs.linear_attention, *(torch.asarray(x) for x in arrays), fs.landmarks(8))
        for own, want in zip(pullback(weight), reverse(torch.asarray(weight)), strict=True):
            np.testing.assert_allclose(own, want.numpy(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("steps", [0, 2])
def test_tiles_do_not_matter_to_gradients_of_numpy_arrays(monkeypatch, steps):
    q, k, v = attention_problem(20, (2,), n=70)
    lm = fs.landmarks(6, room=40, steps=steps)
    calls = {}, {"is_causal": True}, {"window": 24}

    def results():
        pullbacks = [fs.vjp(fs.linear_attention, q, k, v, lm, **options)[1] for options in calls]
        return [x for pullback in pullbacks for x in pullback(v)]

    want = results()
    monkeypatch.setattr("favorsharp.ops.tiles.TILE_ELEMENTS", 1)  # 16 points
    for a, b in zip(results(), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.jax
def test_compiled_by_jax():
    """The results are those of NumPy, so the laws hold as they do there."""
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    import favorsharp.jax  # noqa: F401

    host = attention_problem(17, (2,), n=30)
    mask = np.arange(30) < np.array([[30], [20]])
    given = [jax.numpy.asarray(x) for x in (*host, mask)]
    lm = fs.landmarks(5)
    for options in ({"window": 4}, {"is_causal": True, "window": 4, "return_state": True}):

        def call(q, k, v, mask, lm, options=options):
            return fs.linear_attention(q, k, v, lm, key_mask=mask, **options)

        want = jax.tree_util.tree_leaves(call(*host, mask, lm))
        for a, b in zip(jax.tree_util.tree_leaves(jax.jit(call)(*given, lm)), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.jax
def test_states_and_grouped_heads_compiled_by_jax():
    """One function makes all calls of a stream, so that JAX compiles only once."""
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    import favorsharp.jax  # noqa: F401

    q, k, v = attention_problem(18, (2,), n=16, d=3)
    host = np.concatenate([q, -q]), k, v, np.arange(16) < np.array([[16], [9]])
    lm = fs.landmarks(3, room=2)

    def call(q, k, v, mask):
        out = fs.linear_attention(q, k, v, lm, key_mask=mask, enable_gqa=True)
        start = q[:2, :9], k[:, :9], v[:, :9]
        _, state = fs.linear_attention(*start, lm, is_causal=True, return_state=True)
        token, state = fs.decode_step(q[:2, 9:10], k[:, 9:10], v[:, 9:10], state, lm)
        other = fs.update(fs.init_state(lm, v.shape[-1], like=k), k[:, 10:], v[:, 10:], lm)
        return out, token, fs.read(fs.combine(state, other), q[:2], lm)

    for a, b in zip(jax.jit(call)(*(jax.numpy.asarray(x) for x in host)), call(*host), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
