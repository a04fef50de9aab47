"""The same laws on a GPU, through the library's own dispatch: run by `make gpu-check`."""

import numpy as np
import pytest
from shape_classes import CALLS, LENGTHS, SHAPES, Problem, wanted

import favorsharp as fs
from favorsharp.dispatch import OPS, watch
from favorsharp.parameters import map_arrays
from favorsharp.testing import check_backend, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.own_backend]
TOLERANCES = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 2e-5, "float64": 1e-10}
LIBRARIES = ("cupy", "torch")


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("op", sorted({CALLS[name](Problem(SHAPES[0], LENGTHS[0]))[0] for name in CALLS}))
def test_every_case_of_every_op(op, library):
    if library == "torch":
        pytest.skip("check_backend makes torch tensors on the CPU; test_shape_classes has CUDA tensors")
    assert check_backend("cuda", ops=[op], libraries=[library])


def on_device(value, library):
    """Arrays on the GPU, at any depth of a call's arguments."""
    if isinstance(value, np.ndarray):
        if library == "cupy":
            import cupy

            return cupy.asarray(np.ascontiguousarray(value))
        import torch

        host = np.ascontiguousarray(value)
        if str(host.dtype) == "bfloat16":
            return torch.from_numpy(host.view(np.int16)).cuda().view(torch.bfloat16)
        return torch.from_numpy(host.copy()).cuda()
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
    return value.get()


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


@pytest.mark.parametrize("is_causal", [False, True])
def test_long_sequences_need_64_bits(is_causal):
    """More than 2**31 items of queries: the last head equals a call of its own."""
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
