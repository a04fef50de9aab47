"""Calls that are traced by compilers, transforms and fake tensors, on the CPU through the shim."""

from dataclasses import replace

import pytest

import favorsharp as fs
from favorsharp import dispatch
from favorsharp._values import map_arrays
from favorsharp.backend import arrays_of
from favorsharp.ops.state import State

torch = pytest.importorskip("torch")
pytest.importorskip("cupy")
from torch_calls import ALL_MODES, MODES, NAMES, STATES, arguments, features_problem, leaves, state_after  # noqa: E402

from favorsharp.torch_operators import Traced  # noqa: E402
from favorsharp_cuda import torch_ops  # noqa: E402
from favorsharp_cuda.torch.operators import ATTENTION, EXPONENTIAL_FEATURES  # noqa: E402

pytestmark = [pytest.mark.own_backend, pytest.mark.usefixtures("torch_on_host")]


@pytest.mark.parametrize(("is_causal", "window"), ALL_MODES)
def test_derivatives_are_those_of_differences(problem, is_causal, window):
    """Derivatives with respect to the points and to every array of the map."""
    *points, mask, fm = problem
    given = leaves(*(x[:, :6] for x in points), *arrays_of(fm))
    numbers = ATTENTION.numbers(fm, {"window": window, "causal": is_causal})

    def call(q, k, v, *arrays):
        return Traced.apply(ATTENTION, numbers, q, k, v, mask[:, :6], None, None, None, *arrays)

    assert torch.autograd.gradcheck(call, given, fast_mode=True)


def test_derivatives_of_features_are_those_of_differences():
    def call(*given):
        return Traced.apply(EXPONENTIAL_FEATURES, (), *given)

    assert torch.autograd.gradcheck(call, leaves(*features_problem(torch.float64)))


@pytest.mark.parametrize("window", [0, 2])
def test_compiled_derivatives_of_states_are_the_eager_ones(problem, window):
    q, k, v, mask, fm = problem
    state = state_after(problem, window, 5)
    given = leaves(q[:, 5:], k[:, 5:], v[:, 5:], *(getattr(state, name) for name in NAMES[:5]), fm.rows)

    def call(q, k, v, kv, z, c, recent_k, recent_v, rows):
        own = replace(fm, rows=rows)
        carried = replace(state, kv=kv, z=z, c=c, recent_k=recent_k, recent_v=recent_v)
        out, after = torch_ops.causal_attention(q, k, v, own, key_mask=mask[:, 5:], window=window, state=carried)
        after = torch_ops.update(after, k, v, own, key_mask=mask[:, 5:])
        return out, torch_ops.read(after, q, own), after.kv, after.z, after.c, torch_ops.kernel_matvec(q, k, v, own)

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*given)
    want = call(*given)
    torch.testing.assert_close(got, want)
    weights = [torch.randn_like(x) for x in want]
    torch.testing.assert_close(
        torch.autograd.grad(got, given, weights, materialize_grads=True),
        torch.autograd.grad(want, given, weights, materialize_grads=True),
    )


@pytest.mark.parametrize(("is_causal", "window"), ALL_MODES)
def test_a_compiled_call_is_one_graph_and_trains(problem, is_causal, window):
    q, k, v, mask, fm = problem
    given = leaves(q, k, v, fm.rows)

    def call(q, k, v, rows):
        return fs.linear_attention(q, k, v, replace(fm, rows=rows), is_causal=is_causal, window=window, key_mask=mask)

    with fs.use("cuda"), dispatch.watch() as calls:
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*given)
        eager = call(*given)
    op = "causal_attention" if is_causal else "attention"
    assert set(calls) == {(op, "cuda")}
    weight = torch.randn_like(eager)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, given, weight), torch.autograd.grad(eager, given, weight))


@pytest.mark.parametrize(("is_causal", "window"), MODES)
def test_a_compiled_call_takes_sizes_that_are_not_known(problem, is_causal, window):
    """With `dynamic`, torch also replaces the numbers of the map by symbols."""
    q, k, v, _, fm = problem

    def call(q, k, v):
        return fs.linear_attention(q, k, v, fm, is_causal=is_causal, window=window)

    with fs.use("cuda"):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
        for n in (12, 9):
            given = leaves(*(x[:, :n] for x in (q, k, v)))
            got, want = compiled(*given), call(*given)
            torch.testing.assert_close(got, want)
            weight = torch.randn_like(want)
            torch.testing.assert_close(
                torch.autograd.grad(got, given, weight), torch.autograd.grad(want, given, weight)
            )


def test_a_compiled_call_on_packed_sequences_is_one_graph(problem):
    """It processes one sequence after the other; an eager call groups sequences."""
    q, k, v, mask, fm = problem
    given = leaves(q, k, v)

    def call(q, k, v):
        return fs.linear_attention(q, k, v, fm, is_causal=True, key_mask=mask, cu_seqlens=[0, 1, 1, 7, 12])

    with fs.use("cuda"):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*given)
        eager = call(*given)
    torch.testing.assert_close(compiled, eager)
    weight = torch.randn_like(eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, given, weight), torch.autograd.grad(eager, given, weight))


def test_a_compiled_call_without_gradients(problem):
    q, k, v, _, fm = problem

    def call(q, k, v):
        out, state = torch_ops.causal_attention(q, k, v, fm, window=2)
        return out, state.kv, state.z, state.c, torch_ops.kernel_matvec(q, k, v, fm)

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(got, call(q, k, v))


@pytest.mark.parametrize(("is_causal", "window"), MODES)
def test_a_compiled_call_returns_a_state(problem, is_causal, window):
    """A causal call has operators for the state; another call uses an update and, with a window, a read."""
    q, k, v, mask, fm = problem

    def call(q, k, v):
        return fs.linear_attention(
            q, k, v, fm, is_causal=is_causal, window=window, key_mask=mask, return_state=True
        )  # fmt: skip

    with fs.use("cuda", "reference"), dispatch.watch() as calls:
        out, state = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
        ran = set(calls)
        want, kept = call(q, k, v)
        following = fs.linear_attention(q, k, v, fm, is_causal=True, window=window, state=state)
    assert ran == ({("causal_attention", "cuda")} if is_causal else {("update", "cuda"), ("read", "cuda")})
    names = ("kv", "z", "c", "recent_k", "recent_v", "recent_mask")
    torch.testing.assert_close(out, want)
    torch.testing.assert_close([getattr(state, name) for name in names], [getattr(kept, name) for name in names])
    torch.testing.assert_close(following, fs.linear_attention(q, k, v, fm, is_causal=True, window=window, state=kept))


@pytest.mark.parametrize(("window", "before"), STATES)
def test_a_compiled_token_is_one_graph(problem, window, before):
    """It consists of operators, also with gradients, and does not change the old state."""
    q, k, v, _, fm = problem
    state = state_after(problem, window, before)
    kept = [getattr(state, name).clone() for name in NAMES]
    given = [x[:, 5:6] for x in (q, k, v)]

    def step(q, k, v, state):
        out, state = fs.decode_step(q, k, v, state, fm)
        return out, fs.read(state, q, fm), state, fs.update(state, k, v, fm)

    def arrays(result):
        return [x for part in result for x in ([part] if torch.is_tensor(part) else [getattr(part, n) for n in NAMES])]

    dispatch._loaded.clear()  # as in a process that has not traced these before
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with fs.use("cuda", "reference"), dispatch.watch() as calls:
        got = compiled(*given, state)
        assert set(calls) == {("decode_step", "cuda"), ("read", "cuda"), ("update", "cuda")}
        want = step(*given, state)
        torch.testing.assert_close(arrays(got), arrays(want))
        torch.testing.assert_close([getattr(state, name) for name in NAMES], kept, rtol=0, atol=0)
        calls.clear()
        own = leaves(*given)
        found = torch.autograd.grad(compiled(*own, state)[0].square().sum(), own)
        assert set(calls) == {("decode_step", "cuda"), ("read", "cuda"), ("update", "cuda")}
    with fs.use("reference"):
        torch.testing.assert_close(found, torch.autograd.grad(step(*own, state)[0].square().sum(), own))


def test_transforms_of_torch(problem):
    q, k, v, mask, fm = problem

    def loss(q, k):
        return fs.linear_attention(q, k, v[0], fm, key_mask=mask[1]).square().sum()

    with fs.use("cuda"):
        found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(q, k[0])
    with fs.use("reference"):
        want = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(q, k[0])
    torch.testing.assert_close(found, want)


def test_transforms_of_tokens_are_those_of_the_reference(problem):
    q, k, v, _, fm = problem
    state = state_after(problem, 2, 4)

    def loss(q):
        return fs.decode_step(q, k[:, 5:6], v[:, 5:6], state, fm)[0].square().sum()

    found = []
    for backends in (("cuda", "reference"), ("reference",)):
        with fs.use(*backends):
            own = q[:, 5:6]
            tangent = torch.func.jvp(loss, (own,), (torch.ones_like(own),))[1]
            found.append([torch.func.grad(loss)(own), tangent, torch.func.vmap(loss)(torch.stack([own, 2 * own]))])
    torch.testing.assert_close(*found)


def test_forward_mode_and_second_derivatives_of_transforms_are_refused(problem):
    q, k, v, _, fm = problem
    with fs.use("cuda"):
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(lambda q: fs.linear_attention(q, k, v, fm), (q,), (q,))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            fs.linear_attention(torch.autograd.forward_ad.make_dual(q, q), k, v, fm)
        with pytest.raises(NotImplementedError, match="no second derivatives"):
            torch.func.grad(lambda q: torch.func.grad(lambda q: fs.linear_attention(q, k, v, fm).sum())(q).sum())(q)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("is_causal", "window"), MODES)
def test_fake_tensors_of_a_gpu(problem, is_causal, window, dtype):
    """Results have the right shapes, dtypes and devices, also if tensors exceed the memory of this machine."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    *points, _, fm = problem
    wide = torch.float64 if dtype == "float64" else torch.float32
    with FakeTensorMode(), fs.use("cuda"):
        points = [torch.empty((2, *x.shape), dtype=getattr(torch, dtype), device="cuda") for x in points]
        own = map_arrays(fm, lambda x: torch.empty(x.shape, dtype=wide, device="cuda"))
        out = fs.linear_attention(*points, own, is_causal=is_causal, window=window)
        assert (out.shape, out.dtype, out.device.type) == ((2, 2, 12, 2), points[0].dtype, "cuda")
        if is_causal:
            _, state = fs.linear_attention(*points, own, is_causal=True, window=window, return_state=True)
            assert (state.kv.shape, state.kv.dtype, state.kv.device.type) == ((2, 2, 5, 2), wide, "cuda")
            assert (state.recent_k.shape[-2], state.fingerprint) == (2 * window, None)
        given = arguments(ATTENTION, own, *points, None, None, None, None, window=window, causal=is_causal)
        stats = torch.empty((2, 2, 12, 2), dtype=wide, device="cuda")
        found = ATTENTION.backward_op(out, *given, out, stats, of_map=True)
        assert [x.shape for x in found[:3]] == [x.shape for x in points]
        assert [x.dtype for x in found] == [points[0].dtype] * 3 + [wide] * 6


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize(("window", "before"), STATES)
def test_fake_tokens_of_a_gpu(problem, window, before, dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode

    fm = problem[-1]
    narrow, wide = getattr(torch, dtype), torch.float64 if dtype == "float64" else torch.float32
    recent = before if window else 0
    with FakeTensorMode(), fs.use("cuda"):
        own = map_arrays(fm, lambda x: torch.empty(x.shape, dtype=wide, device="cuda"))
        sums = [torch.empty((2, *size), dtype=wide, device="cuda") for size in ((5, 2), (1, 5), (1, 5))]
        kept = [torch.empty((2, recent, size), dtype=narrow, device="cuda") for size in (3, 2)]
        state = State(*sums, window, *kept, torch.empty((2, recent), dtype=torch.bool, device="cuda"), None)
        q, k, v = (torch.empty((2, 1, size), dtype=narrow, device="cuda") for size in (3, 3, 2))
        out, after = fs.decode_step(q, k, v, state, own)
        assert (out.shape, out.dtype, out.device.type) == ((2, 1, 2), narrow, "cuda")
        length = recent + 1 - (window if recent == 2 * window else 0) if window else 0
        assert [getattr(after, name).shape for name in NAMES] == [
            *(x.shape for x in sums), (2, length, 3), (2, length, 2), (2, length),
        ]  # fmt: skip
        assert (after.kv.dtype, after.recent_k.dtype, after.recent_v.device.type) == (wide, narrow, "cuda")
        assert (after.kv is state.kv) == (0 < recent < 2 * window)
        assert fs.read(after, q, own).shape == (2, 1, 2)
