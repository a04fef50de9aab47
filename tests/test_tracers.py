"""Tracers and modes of torch: a traced program equals the function on new inputs, or tracing raises a clear error."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from problems import attention_problem, key_mask

import favorsharp as fs

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils.checkpoint import (  # noqa: E402
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from favorsharp.torch import LinearAttention, MultiheadAttention  # noqa: E402

pytestmark = pytest.mark.own_backend

MODES = [{}, {"is_causal": True}, {"window": 4}, {"is_causal": True, "window": 4}]


def inputs(seed=0, n=24):
    return [torch.from_numpy(x) for x in attention_problem(seed, (2,), n=n)]


def explicit(q, k, v, feature_map, mask=None, is_causal=False, window=0):
    """The formula with whole matrices, in NumPy."""
    scores = feature_map.log_query(q).numpy(), feature_map.log_key(k).numpy()
    p = feature_map.parameters
    exact = oracle.log_kernel(q.numpy(), k.numpy(), p.kernel, p.scale)
    return oracle.attention(oracle.log_scores(*scores, exact, window, is_causal), v.numpy(), mask, is_causal)


@pytest.mark.parametrize(
    "modes",
    [
        pytest.param(("default device", "device", "fake"), marks=pytest.mark.slow),
        pytest.param(("dispatch", "function", "flops", "float64", "float16"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_verb_under_every_mode(modes):
    """The calls run in a process of their own, because a kernel with an invalid pointer ends the process."""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), *(path for path in sys.path if path)])
    run = subprocess.run(
        [sys.executable, str(tests / "mode_checks.py"), *modes],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert run.returncode == 0, f"{run.stdout[-300:]}\n{run.stderr[-3000:]}"
    assert run.stdout.endswith("done\n")


def graph_of(tracer, call, *example):
    if tracer == "non-strict export":
        module = torch.nn.Module()
        module.forward = call
        return torch.export.export(module, example, strict=False).module()
    if tracer == "compile":
        torch._dynamo.reset()
        return torch.compile(call, fullgraph=True, backend="eager")
    mode, _, pre_dispatch = tracer.partition(" ")
    options = {"tracing_mode": mode, "pre_dispatch": bool(pre_dispatch), "_allow_non_fake_inputs": True}
    return make_fx(call, **options)(*example)


def case_of(tracer, *options):
    """A test case; some tracers take seconds for each."""
    is_slow = tracer in ("compile", "real pre-dispatch", "symbolic pre-dispatch", "non-strict export")
    return pytest.param(tracer, *options, marks=pytest.mark.slow if is_slow else ())


TRACERS = ["real", "fake", "symbolic", "real pre-dispatch", "symbolic pre-dispatch", "compile", "non-strict export"]


@pytest.mark.parametrize(
    ("tracer", "options"),
    [*(("real", options) for options in MODES), *(case_of(tracer, MODES[-1]) for tracer in TRACERS[1:])],
    ids=str,
)
def test_a_traced_function_equals_the_formula_on_new_input(tracer, options):
    q, k, v = inputs()
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    mask = torch.from_numpy(key_mask(0, (2, 24), "holes"))

    def call(q, k, v, mask):
        return fs.linear_attention(q, k, v, fm, key_mask=mask, **options)

    call(q, k, v, mask)  # this call is cached, and cached arrays must not become part of the graph
    traced = graph_of(tracer, call, q, k, v, mask)
    new, other = inputs(1), torch.from_numpy(key_mask(5, (2, 24), "holes"))
    want = explicit(*new, fm, other.numpy(), **options)
    np.testing.assert_allclose(traced(*new, other), want, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(call(*new, other), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tracer", [case_of(tracer) for tracer in TRACERS])
def test_a_traced_module_equals_itself_on_new_input(tracer):
    q, k, v = inputs()
    head = LinearAttention(8, num_features=16, rng=0, is_causal=True, dtype=torch.float64).calibrate(q, k)
    layer = MultiheadAttention(8, 2, num_features=16, rng=0, batch_first=True, dtype=torch.float64).calibrate(q).eval()
    head(q, k, v), layer(q, q, q)
    new = inputs(1)
    with torch.no_grad():
        traced = graph_of(tracer, lambda q, k, v: head(q, k, v), q, k, v)
        want = explicit(*new, head.feature_map, is_causal=True)
        np.testing.assert_allclose(traced(*new), want, rtol=1e-6, atol=1e-9)
        traced = graph_of(tracer, lambda q: layer(q, q, q)[0], q)
        torch.testing.assert_close(traced(new[0]), layer(new[0], new[0], new[0])[0])


@pytest.mark.parametrize("tracer", [case_of(tracer) for tracer in TRACERS])
def test_a_traced_call_of_attention_fits_anew(tracer):
    q, k, v = inputs()
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((16, 8)))

    def call(q, k, v):
        return fs.attention(q, k, v, num_features=16, draw=rows)

    call(q, k, v)
    new = inputs(1)
    want = explicit(*new, fs.feature_map(fs.fit(*new[:2]), 16, draw=rows))
    np.testing.assert_allclose(graph_of(tracer, call, q, k, v)(*new), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("tracer", "options"), [("real", MODES[0]), ("real", MODES[3]), ("symbolic", MODES[1])], ids=str
)
def test_traced_gradients_are_those_of_new_input(tracer, options):
    q, k, v = inputs()
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)

    def call(q, k, v):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        return torch.autograd.grad(fs.linear_attention(q, k, v, fm, **options).sin().sum(), (q, k, v))

    call(q, k, v)
    new = inputs(1)
    for got, want in zip(graph_of(tracer, call, q, k, v)(*new), call(*new), strict=True):
        torch.testing.assert_close(got, want)


def test_kernel_operators_and_features_are_traced():
    q, k, v = inputs()
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    state = fs.update(fs.init_state(fm, 5, like=k), k, v, fm)
    token = [x[:, :1].contiguous() for x in (q, k, v)]
    calls = {
        "kernel_matvec": lambda q, k, v: fs.kernel_matvec(q, k, v, fm),
        "query": lambda q, k, v: fm.query(q),
        "read": lambda q, k, v: fs.read(state, q, fm),
        "update": lambda q, k, v: fs.update(state, k, v, fm).kv,
        "decode_step": lambda q, k, v: fs.decode_step(q[:, :1], k[:, :1], v[:, :1], state, fm)[0],
        "packed": lambda q, k, v: fs.linear_attention(q, k, v, fm, cu_seqlens=[0, 7, 24]),
    }
    for _ in range(2):  # the second call repeats the first
        fs.decode_step(*token, state, fm)
    new = inputs(1)
    for name, call in calls.items():
        call(q, k, v)
        torch.testing.assert_close(make_fx(call)(q, k, v)(*new), call(*new), msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("options", MODES, ids=str)
def test_flops_are_counted_as_of_the_reference(options):
    q, k, v = inputs()
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)

    def count():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with FlopCounterMode(display=False) as counter:
            fs.linear_attention(*leaves, fm, **options).sum().backward()
        return counter.get_total_flops()

    fs.linear_attention(q, k, v, fm, **options)
    own = count()
    with fs.use("reference"):
        assert own == count() > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of fake copies
def test_a_backward_pass_alone_is_followed():
    """The forward pass ran kernels, and the mode began afterwards."""
    q, k, v = inputs()
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)

    def forward():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        return leaves, fs.linear_attention(*leaves, fm, is_causal=True, window=4)

    leaves, out = forward()
    out.sum().backward()
    for mode in (FlopCounterMode(display=False), FakeTensorMode(allow_non_fake_inputs=True)):
        others, out = forward()
        with mode:
            found = torch.autograd.grad(out.sum(), others)
        for x, want in zip(found, leaves, strict=True):
            if isinstance(mode, FlopCounterMode):
                torch.testing.assert_close(x, want.grad)
                assert mode.get_total_flops() > 0
                assert x.grad_fn is None
            else:
                assert type(x).__name__ == "FakeTensor"
                assert x.shape == want.shape


def test_a_pullback_is_not_followed_where_its_call_was_not():
    q, k, v = inputs()
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    for name, arguments in (("linear_attention", (q, k, v, fm)), ("kernel_matvec", (q, k, v, fm))):
        out, pullback = fs.vjp(name, *arguments)
        with pytest.raises(TypeError, match="gradient is traced, or a mode of torch follows"):
            make_fx(pullback)(torch.ones_like(out))


def test_selective_checkpoints_keep_and_compute_again():
    q, k, v = inputs()
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    kept = []

    def policy(context, op, *args, **kwargs):
        kept.append(op)
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.bmm.default else CheckpointPolicy.PREFER_RECOMPUTE

    def call(q, k, v):
        return fs.linear_attention(q.sin(), k, v, fm, is_causal=True).sin()

    gradients = []
    for run in (
        lambda *x: call(*x),
        lambda *x: checkpoint(call, *x, use_reentrant=False),
        lambda *x: checkpoint(
            call, *x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        ),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        run(*leaves).sum().backward()
        gradients.append([x.grad for x in leaves])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
    assert torch.ops.aten.bmm.default in kept


@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript:DeprecationWarning")
def test_other_tracers_are_refused():
    """These tracers take sizes for constants, or have no example inputs."""
    q, k, v = inputs()
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    layer = MultiheadAttention(8, 2, num_features=16, rng=0, batch_first=True, dtype=torch.float64).calibrate(q).eval()

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, x, x)[0]

    calls = {
        "linear_attention": lambda q, k, v: fs.linear_attention(q, k, v, fm),
        "causal": lambda q, k, v: fs.linear_attention(q, k, v, fm, is_causal=True, window=4),
        "attention": lambda q, k, v: fs.attention(q, k, v, num_features=8, rng=0),
        "softmax_attention": lambda q, k, v: fs.softmax_attention(q, k, v),
        "kernel_matvec": lambda q, k, v: fs.kernel_matvec(q, k, v, fm),
        "query": lambda q, k, v: fm.query(q),
        "moments": lambda q, k, v: fs.moments(q, k).mean_x,
    }
    for call in calls.values():
        call(q, k, v)
        with pytest.raises(TypeError, match=r"torch\.jit\.trace .* accepted: torch\.export"):
            torch.jit.trace(call, (q, k, v))
        with fs.use("reference"), pytest.raises(TypeError, match=r"torch\.jit\.trace .* accepted: torch\.export"):
            torch.jit.trace(call, (q, k, v))
        with pytest.raises(TypeError, match=r"torch\.fx\.symbolic_trace"):
            torch.fx.symbolic_trace(call)
    with pytest.raises(TypeError, match=r"torch\.jit\.trace"):
        torch.jit.trace(Layer(), (q,))
    with pytest.raises(TypeError, match=r"torch\.jit\.trace"):
        torch.onnx.export(Layer(), (q,), io.BytesIO(), dynamo=False)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_tensors_that_are_not_dense_are_refused():
    """They are refused also after a call with a dense tensor of the same shape."""
    q, k, v = (x[0] for x in inputs())
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    state = fs.update(fs.init_state(fm, 5, like=k), k, v, fm)
    token = [x[:1].contiguous() for x in (q, k, v)]
    for _ in range(2):
        fs.linear_attention(q, k, v, fm)
        fs.decode_step(*token, state, fm)

    def freed():
        x = q.clone()
        x.untyped_storage().resize_(0)
        return x

    cases = [
        (q.to_sparse(), "must be a dense tensor, got layout torch.sparse_coo; accepted: torch.strided"),
        (q.to_sparse_csr(), "got layout torch.sparse_csr"),
        (freed(), "whose storage was freed|storage was freed; accepted"),
    ]
    if torch.backends.mkldnn.is_available():
        cases.append((q.float().to_mkldnn(), "got layout torch._mkldnn"))
    calls = [
        lambda x: fs.linear_attention(x, k, v, fm),
        lambda x: fs.linear_attention(q, x, v, fm, is_causal=True),
        lambda x: fs.kernel_matvec(x, k, v, fm),
        lambda x: fm.query(x),
        lambda x: fs.moments(x, k),
        lambda x: fs.kernel_matrix(x, k),
        lambda x: fs.softmax_attention(x, k, v),
        lambda x: fs.read(state, x, fm),
    ]
    for x, match in cases:
        for call in calls:
            with pytest.raises(TypeError, match=match):
                call(x)
    with pytest.raises(TypeError, match="nested"):
        fs.linear_attention(torch.nested.nested_tensor([q, q[:5]], layout=torch.jagged), k, v, fm)
    bare = token[0].clone()
    bare.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="storage was freed"):
        fs.decode_step(bare, *token[1:], state, fm)
