"""torch's side of the CUDA backend: operators, compilers, transforms and derivatives, on the CPU through the shim."""

import contextlib
from dataclasses import replace

import pytest
from host_module import HostModule
from problems import attention_problem, key_mask

import favorsharp as fs
from favorsharp import dispatch
from favorsharp.dispatch import OPS as OPS_OF_FAVORSHARP
from favorsharp.ops.state import State

torch = pytest.importorskip("torch")
pytest.importorskip("cupy")
import favorsharp_cuda  # noqa: E402
from favorsharp_cuda import gradients, launch, operators, torch_ops  # noqa: E402

pytestmark = pytest.mark.own_backend
RUN = {
    "attention": operators.attention,
    "attention_backward": operators.attention_backward_,
    "absorb": operators.absorb,
    "absorb_backward": operators.absorb_backward,
    "update": operators.update_,
    "read": operators.read_,
    "read_with_stats": operators.read_with_stats_,
    "read_backward": operators.read_backward_,
    "decode_step": operators.decode_step_,
    "kernel_matvec": operators.kernel_matvec_,
    "kernel_matvec_backward": operators.kernel_matvec_backward,
    "exponential_features": operators.exponential_features,
    "exponential_features_backward": operators.exponential_features_backward_,
}
OPS = {name: getattr(operators, f"{name}_op") for name in RUN}
for name, op in OPS.items():
    op.register_kernel("cpu")(RUN[name])  # the same functions, on the tensors that the shim can read

MODES = [(False, 0), (True, 4)]
"""is_causal and window."""
ALL_MODES = [*MODES, *(pytest.param(*mode, marks=pytest.mark.slow) for mode in ((True, 0), (False, 4)))]


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch):
    """The backend takes tensors of the CPU, and the shim runs its kernels."""
    kernels = [replace(kernel, devices=kernel.devices | {"cpu"}) for kernel in favorsharp_cuda.BACKEND.kernels]
    monkeypatch.setattr(favorsharp_cuda, "BACKEND", replace(favorsharp_cuda.BACKEND, kernels=tuple(kernels)))
    monkeypatch.setattr(launch, "module_class", HostModule)
    dispatch.rediscover()
    launch.forget()
    torch._dynamo.reset()
    yield
    monkeypatch.undo()
    dispatch.rediscover()
    launch.forget()
    torch._dynamo.reset()


@pytest.fixture
def problem():
    q, k, v = (torch.asarray(x) for x in attention_problem(0, (2,), n=12, d=3, e=2))
    mask = torch.asarray(key_mask(1, (2, 12), "holes"))
    return q, k, v, mask, fs.feature_map(fs.fit(q, k), 5, rng=0)


def leaves(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize(("is_causal", "window"), ALL_MODES)
def test_operators_are_what_torch_expects_of_them(problem, is_causal, window):
    q, k, v, mask, fm = problem
    of_map, options = operators.arrays_of(fm), operators.options_of(fm, window, is_causal)
    given = (mask if is_causal else None, *of_map, *options, None, None, None)
    torch.library.opcheck(OPS["attention"], (q, k, v, *given))
    out, stats = OPS["attention"](q, k, v, *given)
    for of_map in (False, True):
        torch.library.opcheck(
            OPS["attention_backward"], (torch.ones_like(out), q, k, v, *given, out, stats), {"of_map": of_map}
        )


@pytest.mark.parametrize("of_map", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_operators_of_sums_are_too(problem, begun, of_map):
    q, k, v, mask, fm = problem
    arrays, options = operators.arrays_of(fm), operators.options_of(fm, 0, True)
    sums = torch_ops.sums_of(state_after(problem, 0, 5)) if begun else (None, None, None)
    given = (k, v, mask, *arrays, *options[:2], *sums)
    torch.library.opcheck(OPS["absorb"], given)
    after = OPS["absorb"](*given)
    torch.library.opcheck(OPS["absorb_backward"], (*after, *given, *after), {"of_map": of_map})
    if begun:
        attended = (q, k, v, mask, *arrays, *options, *sums)
        torch.library.opcheck(OPS["attention"], attended)
        out, stats = OPS["attention"](*attended)
        torch.library.opcheck(OPS["attention_backward"], (out, *attended, out, stats), {"of_map": of_map})
    torch.library.opcheck(OPS["kernel_matvec"], (q, k, v, *arrays, *options[:2]))
    torch.library.opcheck(OPS["kernel_matvec_backward"], (v, q, k, v, *arrays, *options[:2]), {"of_map": of_map})


def test_operators_of_features_are_too():
    u = [torch.randn(shape) / 2 for shape in ((2, 5, 3), (1, 4, 3), (2, 5, 1), (1, 1, 4))]
    torch.library.opcheck(OPS["exponential_features"], tuple(u))
    torch.library.opcheck(OPS["exponential_features_backward"], (torch.ones(2, 5, 4), *u))


@pytest.mark.parametrize(("is_causal", "window"), ALL_MODES)
def test_derivatives_are_those_of_differences(problem, is_causal, window):
    """Eagerly, and through the operators that compilers see; for the points and for every array of the map."""
    *points, mask, fm = problem
    given = leaves(*(x[:, :6] for x in points), *operators.arrays_of(fm))
    mask = mask[:, :6]

    def eager(q, k, v, *arrays):
        own = operators.map_of(arrays, fm.parameters.scale, fm.parameters.kernel)
        if not is_causal:
            return torch_ops.attention(q, k, v, own, key_mask=mask, window=window)
        out, state = torch_ops.causal_attention(q, k, v, own, key_mask=mask, window=window)
        return out, state.kv, state.z

    def traced(*given):
        q, k, v, *arrays = given
        options = operators.options_of(fm, window, is_causal)
        return torch_ops._TracedAttention.apply(options, q, k, v, mask, None, None, None, *arrays)[0]

    assert torch.autograd.gradcheck(eager, given, fast_mode=True)
    assert torch.autograd.gradcheck(traced, given, fast_mode=True)


KEYS = {  # which keys are in a state of a window of 2, and which come
    "none leave": (1, 1),
    "some leave": (3, 4),
    "there are none yet": (0, 2),
}


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS.keys())
@pytest.mark.parametrize("window", [0, 2])
def test_derivatives_of_states_are_those_of_differences(problem, window, keys):
    """For points, the sums of the state, their references, its recent keys, and every array of the map."""
    q, k, v, _, fm = problem
    before, new = keys
    mask = torch.tensor([[True] * 12, [True, False, True] * 4])
    state = state_after((q, k, v, torch.ones_like(mask), fm), window, before)
    floats = [getattr(state, name) for name in NAMES[:5]]
    if (floats[2] == -torch.inf).any():  # from there, there are no differences
        floats = [torch.rand_like(x) for x in floats[:3]] + floats[3:]
    mask = mask[:, before : before + new]
    points = (q[:, :new], *(x[:, before : before + new] for x in (k, v)))
    given = leaves(*points, *floats, *operators.arrays_of(fm))

    def taken(given):
        q, k, v, *rest = given
        own = operators.map_of(rest[5:], fm.parameters.scale, fm.parameters.kernel)
        carried = replace(state, **dict(zip(NAMES[:5], rest[:5], strict=True)))
        return q, k, v, carried, own

    def flat(*results):
        arrays = [x for x in results if torch.is_tensor(x)]
        for after in (x for x in results if isinstance(x, State)):
            arrays += [getattr(after, name) for name in NAMES[:5]]
        return tuple(x for x in arrays if x.requires_grad and x.numel())

    def updated(*given):
        _, k, v, carried, own = taken(given)
        return flat(torch_ops.update(carried, k, v, own, key_mask=mask))

    def reading(*given):
        q, _, _, carried, own = taken(given)
        return torch_ops.read(carried, q, own)

    def attended(*given):
        q, k, v, carried, own = taken(given)
        return flat(*torch_ops.causal_attention(q, k, v, own, key_mask=mask, window=window, state=carried))

    def multiplied(*given):
        q, k, v, _, own = taken(given)
        return torch_ops.kernel_matvec(q, k, v, own)

    for function in (updated, reading, attended, multiplied):
        assert torch.autograd.gradcheck(function, given, fast_mode=True), function.__name__
    assert torch.autograd.gradgradcheck(attended, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *given: (*updated(*given), reading(*given)), given, fast_mode=True)


@pytest.mark.parametrize("window", [0, 32])
def test_derivatives_of_states_in_parts(window, monkeypatch):
    """Of more features than a sweep works on at once, wider values than it takes, and points in several segments."""
    monkeypatch.setattr(gradients, "SHORTEST_SEGMENT", 40)
    q, k, v = (torch.asarray(x) for x in attention_problem(2, (2,), n=190, d=5, e=133))
    fm = fs.feature_map(fs.fit(q, k), 70, rng=0)
    given = leaves(q[:, 90:], k, v, *operators.arrays_of(fm))
    weights = [torch.randn(size, dtype=q.dtype) for size in ((2, 100, 133), (2, 70, 133), (2, 1, 70), (2, 1, 70))]

    def found(backend):
        q, k, v, *arrays = given
        own = operators.map_of(arrays, fm.parameters.scale, fm.parameters.kernel)
        with fs.use(backend):
            state = fs.update(fs.init_state(fm, 133, like=k, window=window), k[:, :90], v[:, :90], fm)
            out, state = OPS_OF_FAVORSHARP["causal_attention"](
                q, k[:, 90:], v[:, 90:], own, window=window, state=replace(state, fingerprint=None)
            )
            out = out + OPS_OF_FAVORSHARP["read"](state, q, own) + OPS_OF_FAVORSHARP["kernel_matvec"](q, k, v, own)
        total = sum((x * w).sum() for x, w in zip((out, state.kv, state.z, state.c), weights, strict=True))
        return torch.autograd.grad(total, given)

    for a, b in zip(found("cuda"), found("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * float(b.abs().max()))


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


def test_derivatives_of_features_are_those_of_differences():
    u = leaves(*(torch.randn(shape, dtype=torch.float64) / 2 for shape in ((2, 5, 3), (1, 4, 3), (2, 5, 1), (1, 1, 4))))
    assert torch.autograd.gradcheck(torch_ops.exponential_features, u)
    assert torch.autograd.gradcheck(torch_ops._TracedFeatures.apply, u)


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
    """Nor are the numbers of the map, which `dynamic` makes symbols of too."""
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
    """It goes sequence by sequence; an eager call groups them."""
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
    with fs.use("cuda"):
        call = torch.compile(
            lambda q, k, v: torch_ops.causal_attention(q, k, v, fm, window=2), fullgraph=True, backend="aot_eager"
        )
        out, state = call(q, k, v)
        want, kept = torch_ops.causal_attention(q, k, v, fm, window=2)
    torch.testing.assert_close((out, state.kv, state.z, state.c), (want, kept.kv, kept.z, kept.c))


@pytest.mark.parametrize(("is_causal", "window"), MODES)
def test_a_compiled_call_returns_a_state(problem, is_causal, window):
    """Of a causal call by its own operators; of another by an update, and with a window by a read."""
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


NAMES = ("kv", "z", "c", "recent_k", "recent_v", "recent_mask")
STATES = ((0, 5), (4, 5), (2, 4))
"""A window, and how many keys came before: without, as none leaves, as two do."""


def state_after(problem, window, before):
    _, k, v, mask, fm = problem
    state = fs.init_state(fm, 2, like=k, window=window)
    return fs.update(state, k[:, :before], v[:, :before], fm, key_mask=mask[:, :before])


@pytest.mark.parametrize(("window", "before"), STATES)
def test_operators_of_states_are_what_torch_expects_of_them(problem, window, before):
    q, k, v, mask, fm = problem
    of_state = torch_ops._of_state(state_after(problem, window, before), fm)
    token, hidden = [x[:, 5:6] for x in (q, k, v)], mask[:, 5:6]
    torch.library.opcheck(OPS["decode_step"], (*token, hidden, *of_state))
    torch.library.opcheck(OPS["decode_step"], (*token, None, *of_state))
    torch.library.opcheck(OPS["update"], (k[:, 5:], v[:, 5:], mask[:, 5:], *of_state))
    torch.library.opcheck(OPS["read"], (q, *of_state))


@pytest.mark.parametrize(("window", "before"), STATES)
def test_a_compiled_token_is_one_graph(problem, window, before):
    """By operators, with gradients too, and the old state stays as it was."""
    q, k, v, _, fm = problem
    state = state_after(problem, window, before)
    kept = [getattr(state, name).clone() for name in NAMES]
    given = [x[:, 5:6] for x in (q, k, v)]

    def step(q, k, v, state):
        out, state = fs.decode_step(q, k, v, state, fm)
        return out, fs.read(state, q, fm), state, fs.update(state, k, v, fm)

    def arrays(result):
        return [x for part in result for x in ([part] if torch.is_tensor(part) else [getattr(part, n) for n in NAMES])]

    dispatch._loaded.clear()  # as in a process that has traced none of these
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize(("window", "before"), STATES)
def test_fake_tokens_of_a_gpu(problem, window, before, dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode

    fm = problem[-1]
    narrow, wide = getattr(torch, dtype), torch.float64 if dtype == "float64" else torch.float32
    recent = before if window else 0
    with FakeTensorMode(), fs.use("cuda"):
        arrays = [torch.empty(x.shape, dtype=wide, device="cuda") for x in operators.arrays_of(fm)]
        own = operators.map_of(arrays, 1.0, "softmax")
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


def test_transforms_of_torch(problem):
    q, k, v, mask, fm = problem

    def loss(q, k):
        return fs.linear_attention(q, k, v[0], fm, key_mask=mask[1]).square().sum()

    with fs.use("cuda"):
        found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(q, k[0])
    with fs.use("reference"):
        want = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(q, k[0])
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize(("is_causal", "window"), MODES)
def test_second_derivatives_are_those_of_the_reference(problem, is_causal, window):
    q, k, v, mask, fm = problem

    def second(backend):
        own = leaves(q, k, v)
        with fs.use(backend):
            out = fs.linear_attention(*own, fm, key_mask=mask, is_causal=is_causal, window=window)
            first = torch.autograd.grad(out.square().sum(), own, create_graph=True)
            return torch.autograd.grad(sum(x.square().sum() for x in first), own)

    torch.testing.assert_close(second("cuda"), second("reference"))


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
    """Shapes, dtypes and devices of results, for tensors that this machine could not even hold."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    *points, _, fm = problem
    wide = torch.float64 if dtype == "float64" else torch.float32
    with FakeTensorMode(), fs.use("cuda"):
        points = [torch.empty((2, *x.shape), dtype=getattr(torch, dtype), device="cuda") for x in points]
        arrays = [torch.empty(x.shape, dtype=wide, device="cuda") for x in operators.arrays_of(fm)]
        own = operators.map_of(arrays, 1.0, "softmax")
        out = fs.linear_attention(*points, own, is_causal=is_causal, window=window)
        assert (out.shape, out.dtype, out.device.type) == ((2, 2, 12, 2), points[0].dtype, "cuda")
        if is_causal:
            _, state = fs.linear_attention(*points, own, is_causal=True, window=window, return_state=True)
            assert (state.kv.shape, state.kv.dtype, state.kv.device.type) == ((2, 2, 5, 2), wide, "cuda")
            assert (state.recent_k.shape[-2], state.fingerprint) == (2 * window, None)
        options = operators.options_of(own, window, is_causal)
        stats = torch.empty((2, 2, 12, 2), dtype=wide, device="cuda")
        found = OPS["attention_backward"](
            out, *points, None, *arrays, *options, None, None, None, out, stats, of_map=True
        )
        assert [x.shape for x in found[:3]] == [x.shape for x in points]
        assert [x.dtype for x in found] == [points[0].dtype] * 3 + [wide] * 10


def test_a_map_changed_in_place_is_packed_again(problem):
    q, k, v, _, fm = problem
    arrays = [x.clone() for x in operators.arrays_of(fm)]
    options = operators.options_of(fm, 0, False)
    rest = (*options, None, None, None)
    before, _ = OPS["attention"](q, k, v, None, *arrays, *rest)
    again, _ = OPS["attention"](q, k, v, None, *arrays, *rest)
    arrays[0].mul_(1.5)
    after, _ = OPS["attention"](q, k, v, None, *arrays, *rest)
    assert torch.equal(before, again)
    assert not torch.allclose(before, after)
    assert len(operators._maps) <= operators.MAPS_KEPT


def test_a_token_is_the_kernels_with_gradients_and_without(problem):
    q, k, v, _, fm = problem
    token = [x[:, :1] for x in (q, k, v)]
    with fs.use("reference"):
        state = fs.update(fs.init_state(fm, v.shape[-1], like=k), k, v, fm)
        want, after = fs.decode_step(*token, state, fm)
    with fs.use("cuda"):
        out, got = fs.decode_step(*token, state, fm)
    torch.testing.assert_close((out, got.kv, got.z, got.c), (want, after.kv, after.z, after.c))

    def gradients(backend):
        given = leaves(*token)
        with fs.use(*backend) if backend else contextlib.nullcontext():
            return torch.autograd.grad(fs.decode_step(*given, state, fm)[0].square().sum(), given)

    for backends in ((), ("cuda",)):
        torch.testing.assert_close(gradients(backends), gradients(("reference",)))


def test_gradients_reach_a_call_through_the_state_of_another(problem):
    def run(backend):
        q, k, v, _, fm = problem
        given = leaves(q, k, v)
        with fs.use(*backend):
            first, second = ([x[:, s] for x in given] for s in (slice(0, 7), slice(7, None)))
            _, state = fs.linear_attention(*first, fm, is_causal=True, return_state=True, window=2)
            out = fs.linear_attention(*second, fm, is_causal=True, state=state, window=2)
        return torch.autograd.grad(out.square().sum(), given)

    torch.testing.assert_close(run(("cuda",)), run(("reference",)))
