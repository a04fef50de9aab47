"""Results of attention that kernels write into the caller's own array."""

import math
from dataclasses import replace

import numpy as np
import pytest
from problems import attention_problem, key_mask

import favorsharp as fs
from favorsharp._values import map_arrays

pytestmark = [pytest.mark.own_backend, pytest.mark.usefixtures("used_on_host")]
pytest.importorskip("cupy")
from favorsharp_cuda.host import arrays  # noqa: E402


@pytest.fixture
def made(monkeypatch):
    """The numbers of items of the arrays that the backend allocates."""
    sizes = []
    empty = arrays.empty
    monkeypatch.setattr(
        arrays, "empty", lambda like, shape, dtype: sizes.append(math.prod(shape)) or empty(like, shape, dtype)
    )
    return sizes


CALLS = {
    "bidirectional": {},
    "window": {"window": 16},
    "causal": {"is_causal": True},
    "causal window": {"is_causal": True, "window": 16},
    "packed": {"is_causal": True, "cu_seqlens": [0, 25, 50, 75, 100]},
    "of a state": {"is_causal": True, "state": True},
    "of a state, window": {"is_causal": True, "window": 16, "state": True},
    "grouped": {"enable_gqa": True},
}
OUTS = {
    "whole": np.empty_like,
    "every other item": lambda x: np.empty((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)[..., ::2],
    "backwards": lambda x: np.empty_like(x)[..., ::-1, :],
}


def problem(call, dtype):
    q, k, v = (x.astype(dtype) for x in attention_problem(4, (4,), n=100, d=8, e=6))
    options = dict(CALLS[call])
    if call == "grouped":
        k, v = k[:2], v[:2]
    fitted = fs.fit(*(x.astype("float64") for x in (q, k)), enable_gqa=call == "grouped")
    wide = "float32" if dtype == "float16" else dtype
    fm = map_arrays(fs.feature_map(fitted, 16, rng=0), lambda x: x.astype(wide))
    if options.get("state"):
        state = fs.init_state(fm, v.shape[-1], window=options.get("window", 0), like=k)
        options["state"] = fs.update(state, k[..., :40, :], v[..., :40, :], fm)
    return q, k, v, fm, options


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("call", CALLS)
def test_results_are_written_where_the_caller_wants_them(call, dtype, made):
    q, k, v, fm, options = problem(call, dtype)
    mask = key_mask(1, k.shape[:-1], "holes")
    want = fs.linear_attention(q, k, v, fm, key_mask=mask, **options)
    assert want.size in made
    for kind, make in OUTS.items():
        made.clear()
        out = make(want)
        assert fs.linear_attention(q, k, v, fm, key_mask=mask, out=out, **options) is out
        np.testing.assert_array_equal(out, want, err_msg=kind)
        assert want.size not in made, kind


@pytest.mark.parametrize("bounds", [[0, 30, 100], [0, 20, 40, 41, 100]])
def test_sequences_that_have_to_be_gathered_are_copied(bounds):
    q, k, v, fm, _ = problem("causal", "float32")
    want = fs.linear_attention(q, k, v, fm, is_causal=True, cu_seqlens=bounds)
    out = np.empty_like(want)
    assert fs.linear_attention(q, k, v, fm, is_causal=True, cu_seqlens=bounds, out=out) is out
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("call", [*CALLS][:4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_array_that_shares_memory_with_the_values_is_written_last(call, dtype, made):
    q, k, v, fm, options = problem(call, dtype)
    want = fs.linear_attention(q, k, v, fm, **options)
    memory = np.concatenate([v, v], axis=-2)
    for shift in (0, 1, 64, 99, 100):
        memory[:, :100] = v
        made.clear()
        out = memory[:, shift : shift + 100]
        got = fs.linear_attention(q, k, memory[:, :100], fm, out=out, **options)
        np.testing.assert_array_equal(got, want, err_msg=str(shift))
        assert want.size in made, "extents overlap, as heads lie behind each other"


def test_a_state_in_the_place_of_the_result_is_read_before():
    """With few new keys, the state that is returned keeps recent values of the earlier state."""
    q, k, v, fm, options = problem("of a state, window", "float64")
    points, given = [x[:, :3] for x in (q, k, v)], options.pop("state")
    want, state = fs.linear_attention(*points, fm, state=given, return_state=True, **options)
    memory = given.recent_v.copy()
    own, out = replace(given, recent_v=memory), memory[:, -3:]
    got, found = fs.linear_attention(*points, fm, state=own, return_state=True, out=out, **options)
    assert got is out
    np.testing.assert_array_equal(out, want)
    for name in ("kv", "z", "c", "recent_k", "recent_v"):
        np.testing.assert_array_equal(getattr(found, name), getattr(state, name), err_msg=name)


def test_what_a_kernel_cannot_write_to_is_left_alone():
    x = np.zeros((2, 3, 4), np.float32)
    raw = np.zeros(x.nbytes + 4, np.uint8)
    cases = {
        "missing": None,
        "of another dtype": np.zeros(x.shape),
        "not aligned": raw[1:-3].view(np.float32).reshape(x.shape),
        "repeated": np.broadcast_to(np.zeros(1, np.float32), x.shape),
        "of the other byte order": np.zeros(x.shape, ">f4"),
        "an input": x,
    }
    for kind, out in cases.items():
        assert arrays.target(out, (x, None), x.shape, "float32") is not out, kind
    out = np.zeros(x.shape, np.float32)
    assert arrays.target(out, (x, None), x.shape, "float32") is out


def test_a_tensor_that_a_kernel_cannot_write_to_is_left_alone():
    torch = pytest.importorskip("torch")
    x = torch.zeros(2, 3, 4)
    unaligned = torch.frombuffer(bytearray(4 * 24 + 1), dtype=torch.float32, offset=1).reshape(x.shape)
    for out in (torch.empty(2, 3, 4, device="meta"), unaligned):
        found = arrays.target(out, (x,), (2, 3, 4), "float32")
        assert found is not out
        assert found.device == x.device


@pytest.mark.parametrize("bounds", [None, [0, 20, 40]])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_write_is_seen_by_autograd(is_causal, bounds, made):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.asarray(x) for x in attention_problem(5, (2,), n=40))
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    options = {"is_causal": is_causal, "cu_seqlens": bounds}
    want = fs.linear_attention(q, k, v, fm, **options)
    factor = torch.ones_like(v).requires_grad_()
    held = torch.zeros_like(v)
    product = (factor * held).sum()  # its derivative needs what was in `held`
    version = held._version
    made.clear()
    assert fs.linear_attention(q, k, v, fm, **options, out=held) is held
    assert want.numel() not in made
    assert torch.equal(held, want)
    assert held._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with pytest.raises(RuntimeError, match="in-place operation"):
        fs.linear_attention(q, k, v, fm, **options, out=factor)
    version = v._version
    assert torch.equal(fs.linear_attention(q, k, v, fm, **options, out=v), want)
    assert v._version == version + 1


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_result_that_needs_gradients_is_copied_with_them(is_causal):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.asarray(x) for x in attention_problem(5, (2,), n=40))
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    q.requires_grad_()
    found = []
    for out in (None, torch.zeros_like(v)):
        got = fs.linear_attention(q, k, v, fm, is_causal=is_causal, out=out)
        found.append(torch.autograd.grad(got.sum(), q)[0])
    torch.testing.assert_close(*found, rtol=0, atol=0)
    leaf = torch.ones_like(v).requires_grad_()
    out = leaf * 2  # an array that was overwritten gets no gradient
    got = fs.linear_attention(q.detach(), k, v, fm, is_causal=is_causal, out=out)
    assert torch.equal(torch.autograd.grad(got.sum(), leaf)[0], torch.zeros_like(leaf))
