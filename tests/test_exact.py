"""The yardsticks against definitions."""

import numpy as np
import oracle
import pytest
from problems import attention_problem, key_mask

import favorsharp as fs


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
def test_kernel_matrix(xp, kernel):
    q, k, _ = attention_problem(0, (2, 3), n=7, s=5)
    got = fs.kernel_matrix(xp(q), xp(k), kernel=kernel, scale=0.3)
    assert xp.is_like(got, xp(q))
    np.testing.assert_allclose(xp.back(got), np.exp(oracle.log_kernel(q, k, kernel, 0.3)), rtol=1e-10)


def test_gaussian_kernel_far_from_the_origin():
    q, k, _ = attention_problem(1, n=7)
    near = fs.kernel_matrix(q, k, kernel="gaussian")
    far = fs.kernel_matrix((q + 1000).astype(np.float32), (k + 1000).astype(np.float32), kernel="gaussian")
    np.testing.assert_allclose(far, near, rtol=2e-3)


@pytest.mark.parametrize("kind", ["none", "padding", "holes"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_softmax_attention(xp, is_causal, kind):
    q, k, v = attention_problem(2, (2, 3), n=19)
    mask = key_mask(0, (2, 1, 19), kind)
    got = fs.softmax_attention(
        xp(q), xp(k), xp(v), is_causal=is_causal, key_mask=None if mask is None else xp(mask), scale=0.4
    )
    want = oracle.attention(oracle.log_kernel(q, k, "softmax", 0.4), v, mask, is_causal)
    np.testing.assert_allclose(xp.back(got), want, atol=1e-12)


def test_softmax_attention_is_torchs():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.asarray(x) for x in attention_problem(3, (2, 6), n=40))
    k, v = k[:, :2], v[:, :2]
    got = fs.softmax_attention(q, k, v, is_causal=True, enable_gqa=True)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("n", "s"), [(0, 0), (0, 3), (3, 0), (1, 1)])
def test_softmax_attention_of_next_to_nothing(xp, n, s):
    q, k, v = attention_problem(4, n=max(n, 1), s=max(s, 1))
    got = xp.back(fs.softmax_attention(xp(q[:n]), xp(k[:s]), xp(v[:s])))
    assert got.shape == (n, 5)
    np.testing.assert_allclose(got, np.zeros((n, 5)) if s == 0 else np.broadcast_to(v[:1], (n, 5)) if s == 1 else got)
