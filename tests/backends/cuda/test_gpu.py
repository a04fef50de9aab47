"""The same laws on a GPU, through the library's own dispatch; `make gpu-check` runs these tests.

On machines without a GPU, the tests of gradients run through the shim.
"""

from dataclasses import replace

import numpy as np
import pytest
from on_host import guarded, installed
from shape_classes import (
    CALLS,
    LENGTHS,
    OF_STATES,
    SHAPES,
    VJPS,
    Lengths,
    Problem,
    by_autograd,
    has_gradients,
    vjp_options,
    wanted,
)

import favorsharp as fs
from favorsharp._values import map_arrays
from favorsharp.dispatch import OPS, watch
from favorsharp.testing import check_backend, relative_error
from favorsharp_cuda.host.launch import shared_room

pytestmark = pytest.mark.own_backend
on_gpu = pytest.mark.gpu
TOLERANCES = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 2e-5, "float64": 1e-10}
LIBRARIES = ("cupy", "torch")
DEVICES = {"torch": "cuda", "torch on the host": "cpu"}
AUTOGRAD = "vjp of every array, window 16"
"""Of `VJPS` the one that torch's autograd is asked for; the others are asked for results with their pullbacks."""


@on_gpu
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("op", sorted({CALLS[name](Problem(SHAPES[0], LENGTHS[0]))[0] for name in CALLS}))
def test_every_case_of_every_op(op, library):
    if library == "torch":
        pytest.skip("check_backend makes torch tensors on the CPU; test_shape_classes has CUDA tensors")
    assert check_backend("cuda", ops=[op], libraries=[library])


def on_device(value, library):
    """Arrays on the GPU, at any depth of a call's arguments."""
    if isinstance(value, np.ndarray):
        if library == "numpy":
            return value
        if library == "cupy":
            import cupy

            return cupy.asarray(np.ascontiguousarray(value))
        import torch

        host = np.array(value, order="C")  # a copy, because torch warns about read-only memory
        if str(host.dtype) == "bfloat16":
            return torch.from_numpy(host.view(np.int16)).to(DEVICES[library]).view(torch.bfloat16)
        return torch.from_numpy(host).to(DEVICES[library])
    if hasattr(type(value), "__dataclass_fields__"):
        return map_arrays(value, lambda x: on_device(x, library))
    return value


def on_host(value):
    if isinstance(value, tuple):
        return tuple(map(on_host, value))
    if hasattr(type(value), "__dataclass_fields__"):
        return map_arrays(value, on_host)
    if hasattr(value, "cpu"):
        value = value.detach().cpu()
        return (value.float() if value.element_size() < 4 and value.is_floating_point() else value).numpy()
    return value.get() if hasattr(value, "get") else np.asarray(value)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_torch_gets_memory_of_its_own(dtype):
    """The arrays of the problems are read-only. torch would warn about that, and a warning is an error here."""
    pytest.importorskip("torch")
    given = guarded(np.arange(6).reshape(2, 3).astype(dtype))
    tensor = on_device(given, "torch on the host")
    np.testing.assert_array_equal(on_host(tensor), given.astype(on_host(tensor).dtype))
    tensor.zero_()
    assert given.astype("float32").any()


def gradients_of(name, shape, lengths, library):
    """The result and its gradients, through dispatch: by `vjp`, and for tensors by autograd."""
    problem = Problem(shape, lengths)
    if name == "features vjp":
        given = [on_device(x, library) for x in problem.plain]
        out, pullback = OPS["exponential_features_vjp"](*given)
        return out, *pullback(on_device(problem.feature_gradient, library))
    if name == "matvec vjp":
        points = [on_device(x, library) for x in (problem.q, problem.k, problem.v)]
        out, pullback = OPS["kernel_matvec_vjp"](*points, on_device(problem.map, library), of_map=True)
        return out, *pullback(on_device(problem.gradient, library))
    if name in OF_STATES:
        return by_autograd(name, problem, lambda x: on_device(x, library), OPS.__getitem__)
    points = [on_device(x, library) for x in (problem.q, *problem.same)]
    feature_map, gradient = on_device(problem.map, library), on_device(problem.gradient, library)
    options = {key: on_device(x, library) for key, x in vjp_options(name, problem).items()}
    if name != AUTOGRAD:
        out, pullback = OPS["attention_vjp"](*points, feature_map, **options)
        return out, *pullback(gradient)
    import torch

    p = feature_map.parameters
    held = [feature_map.rows, feature_map.log_weight, p.g1, p.g2, p.center_x, p.center_y]
    leaves = [x.requires_grad_() for x in (*points, *held)]
    q, k, v, rows, log_weight, g1, g2, center_x, center_y = leaves
    own = replace(p, g1=g1, g2=g2, center_x=center_x, center_y=center_y)
    out = OPS["attention"](q, k, v, replace(feature_map, parameters=own, rows=rows, log_weight=log_weight), **options)
    return out, *torch.autograd.grad(out, leaves, gradient)


FIRST_OPS = {
    AUTOGRAD: "attention",
    "features vjp": "exponential_features_vjp",
    "matvec vjp": "kernel_matvec_vjp",
    **dict(zip(OF_STATES, ("update", "read", "causal_attention"), strict=True)),
}
"""What calls for gradients begin with, if not with `attention_vjp`."""


def compare_gradients(name, shape, lengths, library, backend):
    op = FIRST_OPS.get(name, "attention_vjp")
    with fs.use(backend), watch() as calls:
        got = on_host(tuple(gradients_of(name, shape, lengths, library)))
    assert calls[0] == (op, backend)
    want = tuple(np.asarray(x) for x in wanted(name, shape, lengths))
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
    # gradients that are 0 in exact arithmetic are compared with the size of the others
    size = max(float(np.abs(x).max()) for x in want[1:] if x.size)
    got, want = (tuple(np.append(x, size / 30) for x in each) for each in (got, want))
    error = relative_error(got, want)
    assert error <= TOLERANCES[shape.dtype], f"{name}, {lengths}: relative error {error:.2g}"


def calls_for(library):
    return [name for name in VJPS if name not in (AUTOGRAD, *OF_STATES) or library.startswith("torch")]


@on_gpu
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_at_shape_classes(shape, library):
    pytest.importorskip(library)
    if library == "cupy" and shape.dtype == "bfloat16":
        pytest.skip("CuPy has no bfloat16")
    if not has_gradients(shape, shared_room(0)):
        pytest.skip("this card has no gradients of points of so many entries")
    for lengths in LENGTHS:
        for name in calls_for(library) if lengths.n else ():
            compare_gradients(name, shape, lengths, library, "cuda")


@pytest.mark.parametrize("library", ["numpy", "torch on the host"])
def test_gradients_through_the_shim(library):
    """The test above on a CPU."""
    pytest.importorskip("torch")
    shape = next(x for x in SHAPES if x.dtype == "float64" and x.d < 32)
    with installed() as backend:
        for name in calls_for(library):
            compare_gradients(name, shape, Lengths(20, 20), library, backend)


@on_gpu
@pytest.mark.parametrize("window", [0, 64])
def test_gradients_of_a_long_causal_sequence(window):
    """A call on the first of several segments alone has the same gradients."""
    torch = pytest.importorskip("torch")
    n, first, d = 2**17, 2**11, 64
    q, k, v = (torch.randn(4, n, d, device="cuda") for _ in range(3))
    sample = np.random.default_rng(0).standard_normal((2, 256, d))
    feature_map = fs.feature_map(fs.fit(*sample), 64, rng=0)
    feature_map = map_arrays(feature_map, lambda x: torch.from_numpy(np.array(x, np.float32)).cuda())

    def gradients(length):
        leaves = [x[:, :length].clone().requires_grad_() for x in (q, k, v)]
        out = fs.linear_attention(*leaves, feature_map, is_causal=True, window=window)
        return torch.autograd.grad(out[:, :first].square().sum(), leaves)

    for whole, alone in zip(gradients(n), gradients(first), strict=True):
        size = float(alone.abs().max())
        torch.testing.assert_close(whole[:, :first], alone, atol=1e-4 * size, rtol=0)
        assert float(whole[:, first:].abs().max()) <= 1e-6 * size


@on_gpu
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_training_step_is_captured_in_a_graph(is_causal, trained):
    """A replay uses the current points, and the current numbers of a map that is trained."""
    torch = pytest.importorskip("torch")
    q, k, v = (torch.randn(2, 200, 64, device="cuda") for _ in range(3))
    feature_map = fs.feature_map(fs.fit(q, k), 64, rng=0)
    g1 = feature_map.parameters.g1.requires_grad_(trained)

    def step():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = fs.linear_attention(*leaves, feature_map, is_causal=is_causal)
        return out.detach(), *torch.autograd.grad(out.square().sum(), [*leaves, *([g1] if trained else [])])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    q.mul_(0.5)
    if trained:
        g1.data.mul_(0.9)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


@on_gpu
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_classes(shape, library):
    pytest.importorskip(library)
    if library == "cupy" and shape.dtype == "bfloat16":
        pytest.skip("CuPy has no bfloat16")
    for lengths in LENGTHS:
        for name in CALLS:
            op, args, options = CALLS[name](Problem(shape, lengths))
            args = [on_device(x, library) for x in args]
            options = {key: on_device(x, library) for key, x in options.items()}
            with fs.use("cuda"), watch() as calls:
                got = on_host(OPS[op](*args, **options))
            assert calls[0] == (op, "cuda")
            error = relative_error(got, wanted(name, shape, lengths))
            assert error <= TOLERANCES[shape.dtype], f"{name}, {lengths}: relative error {error:.2g}"


@on_gpu
@pytest.mark.parametrize("is_causal", [False, True])
def test_long_sequences_need_64_bits(is_causal):
    """With more than 2**31 items of queries, the last head equals a call on that head alone."""
    torch = pytest.importorskip("torch")
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free memory")
    n, heads, d = 2**20, 33, 64
    q, k, v = (torch.randn(heads, n, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    sample = np.random.default_rng(0).standard_normal((2, 256, d))
    feature_map = fs.feature_map(fs.fit(*sample), 64, rng=0)
    feature_map = map_arrays(feature_map, lambda x: torch.from_numpy(np.array(x, np.float32)).cuda())
    whole = fs.linear_attention(q, k, v, feature_map, is_causal=is_causal)[-1]
    alone = fs.linear_attention(q[-1].clone(), k[-1].clone(), v[-1].clone(), feature_map, is_causal=is_causal)
    torch.testing.assert_close(whole, alone, atol=2e-2, rtol=2e-2)
