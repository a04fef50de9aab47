"""Landmarks read by torch's own attention, as on GPUs."""

import importlib

import pytest
from problems import attention_problem

import favorsharp as fs
from favorsharp._autodiff import has_fused_attention
from favorsharp.landmarks.fused_reading import read_fused
from favorsharp.landmarks.state import read_landmarks


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_torch_s_own_attention_reads_the_same(monkeypatch, masked, key_heads):
    """Torch's attention is used on GPUs.

    Here both ways run on the CPU. One row sees no key; hidden keys and a query are NaN.
    """
    torch = pytest.importorskip("torch")
    q, k, v = (torch.asarray(x) for x in attention_problem(21, (2, 4), n=40, d=8))
    k, v = k[:, :key_heads].clone(), v[:, :key_heads].clone()
    mask = torch.arange(40)[None, None] < torch.tensor([23, 0])[:, None, None] if masked else None
    if masked:
        k[:, :, 30:], v[:, :, 30:], q[1, :, 5] = torch.nan, torch.nan, torch.nan
    options = {"key_mask": mask, "enable_gqa": key_heads < 4}

    def results():
        lm = fs.landmarks(6)
        out = [fs.linear_attention(q, k, v, fs.landmarks(m), **options) for m in (6, 64)]
        causal, state = fs.linear_attention(q, k, v, lm, is_causal=True, return_state=True, **options)
        first = q[:, :, :1], k[:, :, :1], v[:, :, :1]
        token, state = fs.decode_step(*first, state, lm, enable_gqa=options["enable_gqa"])
        return [*out, causal, token, fs.read(state, q, lm, enable_gqa=options["enable_gqa"])]

    want, calls = results(), []
    module = importlib.import_module("favorsharp.landmarks.attention")  # favorsharp.landmarks is a function too
    monkeypatch.setattr(module, "has_fused_attention", lambda *arrays: calls.append(0) or True)
    with fs.use("reference"):  # a kernel would take the token without calling this
        got = results()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, equal_nan=True)
    assert len(calls) == 4


def test_torch_s_own_attention_reads_what_no_derivative_follows(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("favorsharp._autodiff.is_followed", lambda x: False)  # tensors without numbers are followed
    elsewhere, here = torch.empty(3, device="meta"), torch.empty(3)
    trained = torch.empty(3, device="meta", requires_grad=True)
    assert has_fused_attention(elsewhere, elsewhere)
    assert not has_fused_attention(here, here)
    assert not has_fused_attention(elsewhere, trained)
    with torch.no_grad():
        assert has_fused_attention(elsewhere, trained)
        with torch.autograd.forward_ad.dual_level():
            assert not has_fused_attention(elsewhere, elsewhere)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_log_weights_are_not_rounded_to_16_bits(dtype):
    """bfloat16 would round the log weight 9.99 to 10. The bias is the sum of two numbers, which keep the difference."""
    torch = pytest.importorskip("torch")
    numbers = torch.Generator().manual_seed(0)
    q, keys, values = (torch.randn(shape, generator=numbers) for shape in ((2, 3, 20, 6), (2, 3, 9, 6), (2, 3, 9, 11)))
    q, keys, values = (x.to(getattr(torch, dtype)) for x in (q, keys, values))
    weight = 10 + 0.03 * torch.randn(2, 3, 9, generator=numbers)
    weight[..., 4] = -torch.inf
    lm = fs.landmarks(9)
    want = read_landmarks(q.double(), keys.double(), weight.double(), values.double(), lm)
    got = read_fused(q, keys.float(), weight, values.float(), lm)
    error = (got - want).norm() / want.norm()
    rounded = read_landmarks(q.double(), keys.double(), weight.to(q.dtype).double(), values.double(), lm)
    assert error < (4e-4 if dtype == "float16" else 3e-3)
    assert dtype == "float16" or error < (rounded - want).norm() / want.norm() / 2
