"""Every op on real cupy.ndarray objects over host memory: dispatch, allocation and launches are the library's own, and

only the compiled kernels come from the shim.
"""

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from host_module import HostModule
from problems import attention_problem, key_mask

import favorsharp as fs
from favorsharp import dispatch
from favorsharp.ops.attention import attention
from favorsharp.ops.causal_attention import causal_attention
from favorsharp.ops.exponential_features import exponential_features
from favorsharp.ops.kernel_matvec import kernel_matvec
from favorsharp.ops.state import decode_step, empty_state, read, update
from favorsharp.ops.vjp import attention_vjp, exponential_features_vjp

cupy = pytest.importorskip("cupy")
torch = pytest.importorskip("torch")
from favorsharp_cuda.host import (  # noqa: E402
    arrays,
    launch,
    maps,
)

pytestmark = pytest.mark.own_backend
PARAMETERS = ("a", "g1", "g2", "center_x", "center_y")


def host_memory(size):
    """Host memory that CuPy takes for memory of device 0."""
    host = np.full(size + 512, 0xFF, np.uint8)  # floats are NaN until they are written
    start = (host.ctypes.data + 511) // 512 * 512
    return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(start, size, host, 0), 0)


def seen(x):
    """The numbers of a cupy.ndarray over host memory, with any strides."""
    base = np.frombuffer((ctypes.c_ubyte * max(1, x.base.nbytes if x.base is not None else x.nbytes)).from_address(
        (x.base if x.base is not None else x).data.ptr), np.uint8)  # fmt: skip
    offset = x.data.ptr - (x.base if x.base is not None else x).data.ptr
    return np.ndarray(x.shape, x.dtype, base, offset, x.strides)


def np_of(x):
    return seen(x) if isinstance(x, cupy.ndarray) else x


def put(x):
    x = np.asarray(x)
    made = cupy.empty(x.shape, x.dtype)
    if x.size:
        seen(made)[...] = x
    return made


@pytest.fixture(autouse=True)
def over_host_memory(monkeypatch):
    monkeypatch.setattr(launch, "module_class", HostModule)
    # streams, and the arithmetic of CuPy that packs maps, need the driver; everything else is as on a GPU
    monkeypatch.setattr(maps, "stream_of", lambda like: (0, False))
    monkeypatch.setattr(launch, "current_device", lambda: 0)
    for name in ("_pack_plain", "_pack_tiles"):
        monkeypatch.setattr(maps, name, packed_by_numpy(getattr(maps, name)))
    before = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(host_memory)
    launch.forget()
    yield
    cupy.cuda.set_allocator(before)
    launch.forget()


def packed_by_numpy(pack):
    def run(feature_map, *given):
        packed = pack(placed(feature_map, np_of), *given)
        moved = {name: put(x) for name, x in vars(packed).items() if isinstance(x, np.ndarray)}
        return replace(packed, **moved)

    return run


def placed(feature_map, make):
    """A feature map with its arrays put elsewhere."""
    p = replace(feature_map.parameters, **{name: make(getattr(feature_map.parameters, name)) for name in PARAMETERS})
    own = {name: make(getattr(feature_map, name)) for name in ("rows", "log_weight", "projection")}
    return replace(feature_map, parameters=p, **own)


class Problem:
    def __init__(self, batch=(2,), n=20):
        self.host = attention_problem(0, batch, n=n, d=4, e=3)
        self.mask = key_mask(1, (*batch, n), "holes")
        self.map = fs.feature_map(fs.fit(*self.host[:2]), 6, rng=0)
        self.points = [put(x) for x in self.host]
        self.gpu_map = placed(self.map, put)

    def reference(self, op, *given, **options):
        return op.reference(*given, **options)


def run(op, *given, **options):
    with fs.use("cuda"), dispatch.watch() as calls:
        result = op(*given, **options)
    assert set(calls) == {(op.name, "cuda")}
    return result


def close(got, want):
    assert isinstance(got, cupy.ndarray)
    assert got.shape == tuple(want.shape)
    np.testing.assert_allclose(seen(got), np.asarray(want), rtol=1e-10, atol=1e-12)


MODES = [{}, {"window": 4}]


@pytest.mark.parametrize("options", MODES, ids=str)
def test_attention(options):
    p = Problem()
    got = run(attention, *p.points, p.gpu_map, key_mask=put(p.mask), **options)
    close(got, attention.reference(*p.host, p.map, key_mask=p.mask, **options))


def test_causal_attention_and_its_state():
    p = Problem()
    got, state = run(causal_attention, *p.points, p.gpu_map, key_mask=put(p.mask))
    want, kept = causal_attention.reference(*p.host, p.map, key_mask=p.mask)
    close(got, want)
    for name in ("kv", "z", "c"):
        close(getattr(state, name), getattr(kept, name))


def test_streaming(monkeypatch):
    p = Problem()
    q, k, v = p.host
    empty = empty_state(p.map, (2,), 4, 3, 0, k[..., :0, :])
    state = replace(
        empty, **{f: put(getattr(empty, f)) for f in ("kv", "z", "c", "recent_k", "recent_v", "recent_mask")}
    )
    state = run(update, state, p.points[1], p.points[2], p.gpu_map)
    kept = update.reference(empty, k, v, p.map)
    close(state.kv, kept.kv)
    close(run(read, state, p.points[0], p.gpu_map), read.reference(kept, q, p.map))
    token = [put(x[:, :1]) for x in p.host]
    monkeypatch.setattr(HostModule, "launched", set())
    out, after = run(decode_step, *token, state, p.gpu_map)
    assert HostModule.launched == {"favorsharp::decode<double, 1, 0>"}
    want, last = decode_step.reference(*(x[:, :1] for x in p.host), kept, p.map)
    close(out, want)
    for name in ("kv", "z", "c"):
        close(getattr(after, name), getattr(last, name))


def test_kernel_matvec_and_features():
    p = Problem()
    close(run(kernel_matvec, *p.points, p.gpu_map), kernel_matvec.reference(*p.host, p.map))
    u, rows, row, column = _features()
    want = exponential_features.reference(u, rows, row, column)
    close(run(exponential_features, *(put(x) for x in (u, rows, row, column))), want)
    out = put(np.zeros(want.shape))
    assert run(exponential_features, *(put(x) for x in (u, rows, row, column)), out=out) is out
    close(out, want)


def test_features_may_be_written_over_their_points(monkeypatch):
    """A result that shares memory with an input is computed elsewhere and then copied by CuPy, which needs a GPU.

    The test looks at what is copied.
    """
    rng = np.random.default_rng(0)
    memory, rows, row, column = (put(rng.standard_normal(shape) / 2) for shape in ((30, 4), (4, 4), (20, 1), (1, 4)))
    given, copies = (memory[:20], rows, row, column), []
    monkeypatch.setattr(arrays, "cast", lambda x, dtype: copies.append(seen(x).copy()) or x)
    want = exponential_features.reference(*(seen(x).copy() for x in given))
    with pytest.raises(Exception, match="(?i)cuda|driver"):
        run(exponential_features, *given, out=memory[1:21])
    np.testing.assert_allclose(copies[0], want, rtol=1e-12)


def _features():
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape) / 2 for shape in ((2, 9, 4), (6, 4), (2, 9, 1), (1, 6))]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", MODES, ids=str)
def test_gradients_of_attention(options, is_causal):
    p = Problem()
    options = {"is_causal": is_causal, "of_map": True, **options}
    out, pullback = run(attention_vjp, *p.points, p.gpu_map, key_mask=put(p.mask), **options)
    weight = np.random.default_rng(1).standard_normal(out.shape)
    given = [torch.asarray(x) for x in p.host]
    want, pull = attention_vjp.reference(
        *given, placed(p.map, torch.asarray), key_mask=torch.asarray(p.mask), **options
    )
    close(out, want)
    for got, expected in zip(pullback(put(weight)), pull(torch.asarray(weight)), strict=True):
        close(got, expected)


def test_gradients_of_features():
    u = _features()
    out, pullback = run(exponential_features_vjp, *(put(x) for x in u))
    weight = np.random.default_rng(1).standard_normal(out.shape)
    want, pull = exponential_features_vjp.reference(*(torch.asarray(x) for x in u))
    close(out, want)
    for got, expected in zip(pullback(put(weight)), pull(torch.asarray(weight)), strict=True):
        close(got, expected)


def test_the_public_vjp():
    p = Problem()
    with fs.use("cuda"):
        out, pullback = fs.vjp(fs.linear_attention, *p.points, p.gpu_map, is_causal=True)
        found = pullback(put(np.ones(out.shape)))
    with fs.use("reference"):
        want, pull = fs.vjp(
            fs.linear_attention, *(torch.asarray(x) for x in p.host), placed(p.map, torch.asarray), is_causal=True
        )
    close(out, want)
    for got, expected in zip(found, pull(torch.ones_like(want)), strict=True):
        close(got, expected)
