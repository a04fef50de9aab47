"""Compilers, vectorising maps and derivatives of torch and JAX go through the references."""

import numpy as np
import pytest
from problems import attention_problem, key_mask

import favorsharp as fs

MODES = [{}, {"is_causal": True}, {"window": 4}, {"is_causal": True, "window": 4}]


def torch_problem(**options):
    torch = pytest.importorskip("torch")
    return torch, [torch.asarray(x) for x in attention_problem(0, **options)]


@pytest.mark.slow
@pytest.mark.parametrize("options", MODES, ids=str)
def test_torch_compile_fullgraph(options):
    torch, (q, k, v) = torch_problem(batch=(2,), n=20)
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    mask = torch.asarray(key_mask(0, (2, 20), "holes"))

    def call(q, k, v):
        return fs.linear_attention(q, k, v, fm, key_mask=mask, **options)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="eager")(q, k, v), call(q, k, v))


@pytest.mark.slow
def test_torch_compile_fits_and_features():
    torch, (q, k, v) = torch_problem(n=20)
    rows = torch.asarray(np.random.default_rng(0).standard_normal((8, 8)))
    calls = [
        lambda q, k, v: fs.attention(q, k, v, num_features=8, draw=rows),
        lambda q, k, v: fs.feature_map(fs.fit(q, k), 8, draw=rows).query(q),
        lambda q, k, v: fs.excess(fs.fit(q, k, method="sderf"), q, k),
        lambda q, k, v: fs.softmax_attention(q, k, v, is_causal=True),
    ]
    for call in calls:
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="eager")(q, k, v), call(q, k, v))


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 4])
def test_torch_compile_states(window):
    """A compiled prefill and a compiled step return the state that eager calls return, and accept each other's
    states."""
    torch, (q, k, v) = torch_problem(batch=(2,), n=20)
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)

    def prefill(q, k, v):
        return fs.linear_attention(q, k, v, fm, is_causal=True, return_state=True, window=window)

    def step(q, k, v, state):
        out, state = fs.decode_step(q, k, v, state, fm)
        return out + fs.read(state, q, fm), fs.update(state, k, v, fm)

    torch._dynamo.reset()
    compiled = [torch.compile(call, fullgraph=True, backend="eager") for call in (prefill, step)]
    for first, second in (compiled, (prefill, compiled[1]), (compiled[0], step)):
        token = [x[..., -1:, :] for x in (q, k, v)]
        out, state = first(q, k, v)
        want, eager = prefill(q, k, v)
        torch.testing.assert_close(out, want)
        out, state = second(*token, state)
        want, eager = step(*token, eager)
        torch.testing.assert_close(out, want)
        for name in ("kv", "z", "c", "recent_k", "recent_v"):
            torch.testing.assert_close(getattr(state, name), getattr(eager, name))


def test_a_compiled_call_refuses_the_state_of_another_map():
    torch, (q, k, v) = torch_problem(n=20)
    p = fs.fit(q, k)
    own, other = (fs.feature_map(p, 8, rng=seed) for seed in (0, 1))
    _, state = fs.linear_attention(q, k, v, own, return_state=True)
    fs.read(
        fs.linear_attention(q, k, v, other, return_state=True)[1], q, other
    )  # from here on its fingerprint is known
    torch._dynamo.reset()
    with pytest.raises(Exception, match="state comes from another feature map"):
        torch.compile(lambda q: fs.read(state, q, other), fullgraph=True, backend="eager")(q)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"window": 4}], ids=str)
def test_torch_compiled_bidirectional_calls_return_states(options):
    torch, (q, k, v) = torch_problem(batch=(2,), n=20)
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)

    def call(q, k, v):
        return fs.linear_attention(q, k, v, fm, return_state=True, **options)

    torch._dynamo.reset()
    (out, state), (want, kept) = torch.compile(call, fullgraph=True, backend="eager")(q, k, v), call(q, k, v)
    torch.testing.assert_close(out, want)
    for name in ("kv", "z", "c", "recent_k", "recent_v", "recent_mask"):
        torch.testing.assert_close(getattr(state, name), getattr(kept, name))


@pytest.mark.slow
def test_states_of_torch_compiled_calls_know_a_map_that_was_asked():
    """A compiler reads no number while it traces.

    A digest that is known becomes part of the graph, together with its checks.
    """
    torch, (q, k, v) = torch_problem(batch=(2,), n=6)
    fm, other = (fs.feature_map(fs.fit(q, k), 8, rng=seed) for seed in (0, 1))
    token = [x[:, :1] for x in (q, k, v)]
    torch._dynamo.reset()

    def call(feature_map):
        return fs.linear_attention(q, k, v, feature_map, return_state=True)

    prefill = torch.compile(call, fullgraph=True, backend="eager")
    step = torch.compile(lambda state, feature_map: fs.decode_step(*token, state, feature_map)[0], backend="eager")
    _, unsigned = prefill(fm)
    assert unsigned.fingerprint is None
    fs.decode_step(*token, unsigned, fm)
    assert fm.fingerprint is not None
    _, state = prefill(fm)
    assert state.fingerprint == fm.fingerprint
    _, theirs = prefill(other)
    assert theirs.fingerprint is None  # the digest of the map in the call, not of the map that was traced
    assert other.fingerprint != fm.fingerprint
    for feature_map in (other, fm):  # known by now, although a graph was made for a map without a digest
        assert prefill(feature_map)[1].fingerprint == feature_map.fingerprint
    for run in (step, lambda state, feature_map: fs.decode_step(*token, state, feature_map)):
        run(state, fm)
        with pytest.raises(ValueError, match="state comes from another feature map"):
            run(state, other)


def test_a_transform_leaves_no_mark_on_a_map():
    """A state that is made inside a transform has no digest; states that are made later have one."""
    torch, (q, k, v) = torch_problem(batch=(2,), n=6)
    fm = fs.feature_map(fs.fit(q[0], k[0]), 8, rng=0)
    torch.func.vmap(lambda q, k, v: fs.linear_attention(q, k, v, fm, return_state=True)[1].kv)(q, k, v)
    assert fs.init_state(fm, 3, like=k).fingerprint is not None


@pytest.mark.slow
def test_torch_inductor():
    torch, (q, k, v) = torch_problem(batch=(2,), n=40)
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)

    def call(q, k, v):
        return fs.linear_attention(q, k, v, fm)

    torch.testing.assert_close(torch.compile(call, fullgraph=True)(q, k, v), call(q, k, v))


@pytest.mark.parametrize("options", MODES, ids=str)
def test_torch_gradients(options):
    """Gradients with respect to q, k, v and the numbers of the map, with a masked row."""
    torch, (q, k, v) = torch_problem(batch=(2,), n=9, d=3, e=2)
    p = fs.fit(q, k)
    rows = torch.asarray(np.random.default_rng(0).standard_normal((4, 3)))
    mask = torch.asarray(key_mask(0, (2, 9), "holes"))

    def call(q, k, v, a, g1, center_x):
        from dataclasses import replace

        changed = replace(p, a=a, g1=g1, g2=torch.linalg.inv(g1).mT, center_x=center_x)
        return fs.linear_attention(q, k, v, fs.feature_map(changed, 4, draw=rows), key_mask=mask, **options)

    arguments = [x.clone().requires_grad_() for x in (q, k, v, p.a, p.g1, p.center_x)]
    assert torch.autograd.gradcheck(call, arguments)


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.jax
def test_functional_gradients_agree(options):
    torch, (q, k, v) = torch_problem(n=9)
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    x = k.clone().requires_grad_()
    fs.linear_attention(q, x, v, fm, **options).sin().sum().backward()
    functional = torch.func.grad(lambda k: fs.linear_attention(q, k, v, fm, **options).sin().sum())(k)
    torch.testing.assert_close(functional, x.grad)
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    jnp = jax.numpy
    arrays = [jnp.asarray(t.numpy()) for t in (q, k, v)]
    own = fs.feature_map(fs.fit(*arrays[:2]), 8, rng=0)
    function = jax.jit(jax.grad(lambda k: jnp.sin(fs.linear_attention(arrays[0], k, arrays[2], own, **options)).sum()))
    np.testing.assert_allclose(function(arrays[1]), x.grad, atol=1e-9)


@pytest.mark.parametrize("options", MODES, ids=str)
def test_forward_mode_derivatives_are_never_lost(options):
    """Kernels read only numbers, and would drop a tangent without an error."""
    torch, (q, k, v) = torch_problem(n=9)
    forward_ad = torch.autograd.forward_ad
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    fs.linear_attention(q, k, v, fm, **options)  # a call without a tangent comes first, and makes a plan
    for needs_gradient in (False, True):
        with forward_ad.dual_level():
            x = forward_ad.make_dual(k.clone().requires_grad_(needs_gradient), torch.ones_like(k))
            tangent = forward_ad.unpack_dual(fs.linear_attention(q, x, v, fm, **options)).tangent
        step = 1e-6
        ahead, behind = (fs.linear_attention(q, k + s * step, v, fm, **options) for s in (1, -1))
        torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
    functional = torch.func.jvp(lambda k: fs.linear_attention(q, k, v, fm, **options), (k,), (torch.ones_like(k),))[1]
    torch.testing.assert_close(functional, tangent)


def test_gradient_does_not_flow_through_the_fit_of_one_call():
    torch, (q, k, v) = torch_problem(n=9)
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    one, two = q.clone().requires_grad_(), q.clone().requires_grad_()
    fs.attention(one, k, v, num_features=8, rng=0).sin().sum().backward()
    fs.linear_attention(two, k, v, fm).sin().sum().backward()
    torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("options", MODES, ids=str)
def test_torch_vmap(options):
    torch, (q, k, v) = torch_problem(batch=(3,), n=9)
    fm = fs.feature_map(fs.fit(q[0], k[0]), 8, rng=0)
    mapped = torch.vmap(lambda q, k, v: fs.linear_attention(q, k, v, fm, **options))(q, k, v)
    torch.testing.assert_close(mapped, fs.linear_attention(q, k, v, fm, **options))


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.jax
def test_jax_jit_and_vmap(options):
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    q, k, v = (jax.numpy.asarray(x) for x in attention_problem(1, (2,), n=9))
    fm = fs.feature_map(fs.fit(q[0], k[0]), 8, rng=0)

    def call(q, k, v):
        return fs.linear_attention(q, k, v, fm, **options)

    host = fs.feature_map(fs.fit(*(np.asarray(x[0]) for x in (q, k))), 8, rng=0)
    want = fs.linear_attention(*(np.asarray(x) for x in (q, k, v)), host, **options)
    np.testing.assert_allclose(jax.jit(call)(q, k, v), want, atol=1e-10)
    np.testing.assert_allclose(jax.jit(jax.vmap(call))(q, k, v), want, atol=1e-10)


@pytest.mark.jax
def test_jax_jit_of_one_call():
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    arrays = attention_problem(2, n=12)
    got = jax.jit(lambda q, k, v: fs.attention(q, k, v, num_features=8, rng=0))(*(jax.numpy.asarray(x) for x in arrays))
    np.testing.assert_allclose(got, fs.attention(*arrays, num_features=8, rng=0), atol=1e-8)


def test_torch_meta_device():
    torch, (q, k, v) = torch_problem(n=9)
    fm = fs.feature_map(
        fs.fit(q.to("meta"), k.to("meta"), method="oprf"), 8, draw=torch.ones(8, 8, device="meta").double()
    )
    assert fs.linear_attention(*(x.to("meta") for x in (q, k, v)), fm).shape == (9, 5)
