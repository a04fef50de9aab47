"""The caller's settings of NumPy and JAX do not turn underflow to 0 or broadcasting inside the library into errors."""

import numpy as np
import pytest

import favorsharp as fs
from favorsharp.diagnostics import predicted_error

METHODS = ["posrf", "oprf", "sderf", "optimal", "hyperbolic", "relu", "elu"]


def data(dtype, size=20.0):
    """Queries and keys so far apart that most weights are below the least number of the dtype."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 40, 8))
    size = min(size, 6.0) if dtype == "float16" else size
    return (size * q).astype(dtype), (size * k).astype(dtype), v.astype(dtype)


def results(q, k, v, method):
    """The results of the functions, for data with very small kernels and features."""
    mask = np.arange(40) < np.asarray([[40], [0]])
    fm = fs.feature_map(fs.fit(q, k, method=method), 16, rng=0)
    state = fs.update(fs.init_state(fm, 8, like=k), k[:, :20], v[:, :20], fm)
    for is_causal in (False, True):
        yield fs.softmax_attention(q, k, v, is_causal=is_causal, key_mask=mask)
        for window in (0, 8):
            yield fs.linear_attention(q, k, v, fm, is_causal=is_causal, window=window, key_mask=mask)
    yield fs.linear_attention(q[:, :0], k[:, :0], v[:, :0], fm)
    yield fs.attention(q, k, v, num_features=16, is_causal=True, calibration=(q, k), window=8, rng=0)
    yield fs.decode_step(q[:, :1], k[:, :1], v[:, :1], state, fm)[0]
    yield fs.read(fs.combine(state, fs.update(state, k, v, fm)), q, fm)
    if method not in ("relu", "elu"):
        yield fs.excess(fm.parameters, q, k)
        yield np.asarray(predicted_error(fm.parameters, q, k, v, 16))


def gaussian_results(q, k, v, method):
    fm = fs.feature_map(fs.fit(q, k, method=method, kernel="gaussian"), 16, rng=0)
    yield fs.kernel_matrix(q, k, kernel="gaussian")
    yield fs.kernel_matvec(q, k, v, fm)
    yield fs.nadaraya_watson(q, k, v, fm)
    yield fs.leave_one_out(q, v, fm)
    yield fm.query(q)
    yield fm.key(k)
    yield fs.log_second_moment(fm.parameters, q, k)
    yield fs.moments(q, k).second_x
    yield fs.fit(q, k, weighting=1.0).g1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_underflow_is_no_error(dtype, method):
    check(results, *data(dtype), method)


@pytest.mark.parametrize("method", ["posrf", "trig"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_underflow_of_small_kernels_is_no_error(dtype, method):
    check(gaussian_results, *data(dtype), method)


def check(function, *arguments):
    """Check that results are the same under both settings, and that errors other than underflow are still raised."""
    with np.errstate(all="ignore"):
        wanted = list(function(*arguments))
    with np.errstate(under="raise"):
        found = list(function(*arguments))
    for want, got in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(got, want)


def test_overflow_is_still_heard_of():
    q, k, _ = data("float64", 200.0)
    with np.errstate(all="raise"), pytest.raises(FloatingPointError, match="overflow"):
        fs.kernel_matrix(q, k)


@pytest.mark.jax
def test_ranks_may_be_promoted():
    """The cases have one fit for points with leading axes, and masks of another rank."""
    jax = pytest.importorskip("jax")
    q, k, v = (jax.numpy.asarray(x, dtype="float32") for x in np.random.default_rng(0).normal(size=(3, 2, 12, 4)))
    mask = jax.numpy.arange(12) < 9
    with jax.numpy_rank_promotion("raise"):
        fm = fs.feature_map(fs.fit(q[0], k[0], method="posrf"), 8, rng=0)
        found = [
            fs.fit(q, k, method="posrf").g1,
            fm.query(q),
            fs.softmax_attention(q, k, v, is_causal=True, key_mask=mask),
            fs.linear_attention(q, k, v, fm, key_mask=mask),
            fs.log_second_moment(fm.parameters, q, k),
        ]
        assert all(bool(jax.numpy.isfinite(x).all()) for x in found)
        with pytest.raises(ValueError, match="rank_promotion"):
            _ = q + v[0]  # the caller's own arithmetic
