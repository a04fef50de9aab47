"""Exact kernels and exact attention, compared with their definitions."""

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


def distances_kernel(x, y, scale):
    """From differences, in float64."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.exp(-scale / 2 * ((x[..., :, None, :] - y[..., None, :, :]) ** 2).sum(-1))


def rows_of_pixels(rng):
    return np.rint(255 * rng.random((30, 300))), 1.0


def narrow(rng):
    return rng.standard_normal((30, 50)), 1e4


def time_stamps(rng):
    return 1.7e9 + np.rint(3e7 * rng.random((30, 1))), 1e-2


def two_far_groups(rng):
    return rng.standard_normal((30, 4)) + 1e6 * (np.arange(30) % 2)[:, None], 1.0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("data", [rows_of_pixels, narrow, time_stamps, two_far_groups])
def test_gaussian_kernel_of_a_point_with_itself_is_one(xp, rng, data, dtype):
    points, scale = data(rng)
    points = points.astype(dtype)
    got = xp.back(fs.kernel_matrix(xp(points, dtype), xp(points, dtype), kernel="gaussian", scale=scale))
    np.testing.assert_allclose(np.diag(got), 1, atol=1e-6)
    assert got.max() <= 1
    np.testing.assert_allclose(got, distances_kernel(points, points, scale), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("unit", [1e-30, 1e-12, 1e12, 1e30])
def test_gaussian_kernel_in_any_unit(few_xp, unit):
    q, k, _ = attention_problem(1, (2,), n=7)
    q, k = ((x * unit).astype(np.float32) for x in (q, k))
    got = fs.kernel_matrix(few_xp(q, "float32"), few_xp(k, "float32"), kernel="gaussian", scale=0.3 / unit**2)
    np.testing.assert_allclose(few_xp.back(got), distances_kernel(q, k, 0.3 / unit**2), rtol=1e-5)


@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.jax
def test_gaussian_kernel_without_float64(unit, compiled):
    jax = pytest.importorskip("jax")
    x = (1000 + np.random.default_rng(2).standard_normal((30, 3))).astype(np.float32) * np.float32(unit)
    scale = 0.3 / unit**2

    def kernel(x):
        return fs.kernel_matrix(x, x, kernel="gaussian", scale=scale)

    with jax.enable_x64(False):
        got = np.asarray((jax.jit(kernel) if compiled else kernel)(jax.numpy.asarray(x)))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, distances_kernel(x, x, scale), rtol=1e-5)


def test_gaussian_kernel_without_float64_on_a_device():
    strict = pytest.importorskip("array_api_strict")
    x = (1000 + np.random.default_rng(2).standard_normal((30, 3))).astype(np.float32)
    device = strict.Device("no_float64")
    held = strict.asarray(x, device=device)
    got = fs.kernel_matrix(held, held, kernel="gaussian", scale=0.3)
    got = np.asarray(got.to_device(strict.Device("CPU_DEVICE")))
    np.testing.assert_allclose(got, distances_kernel(x, x, 0.3), rtol=1e-5)


@pytest.mark.parametrize("scale", [0.3, 1e18])
def test_derivatives_of_the_gaussian_kernel_at_equal_points(scale):
    """First derivatives vanish there; the second ones are the scale."""
    torch = pytest.importorskip("torch")
    x = torch.asarray(np.random.default_rng(3).standard_normal((10, 3)))

    def own(a):
        return torch.diagonal(fs.kernel_matrix(a, x, kernel="gaussian", scale=scale)).sum()

    torch.testing.assert_close(torch.autograd.functional.jacobian(own, x), torch.zeros_like(x))
    hessian = torch.autograd.functional.hessian(own, x).reshape(30, 30)
    torch.testing.assert_close(hessian, -scale * torch.eye(30, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_gaussian_kernel_of_points_that_are_not_finite():
    q, k, _ = attention_problem(4, n=7)
    want = fs.kernel_matrix(q, k, kernel="gaussian")
    q[2, 1], k[3, 0] = np.nan, np.inf
    got = fs.kernel_matrix(q, k, kernel="gaussian")
    assert np.isnan(got[2]).all()
    assert np.isnan(got[:, 3]).all()
    left = np.delete(np.arange(7), 2)[:, None], np.delete(np.arange(7), 3)
    np.testing.assert_allclose(got[left], want[left], rtol=1e-12)


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
