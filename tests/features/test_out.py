"""`out` of query, key, log_query and log_key: it receives what the call without it returns."""

import numpy as np
import pytest
from problems import attention_problem

import favorsharp as fs


@pytest.mark.parametrize("method", ["optimal", "relu", "trig"])
def test_out_receives_the_features(method):
    q, k, _ = attention_problem(0, (2,), n=9)
    fm = fs.feature_map(fs.fit(q, k, method=method), 6, rng=0)
    for name in ("query", "key", "log_query", "log_key") if fm.positive else ("query", "key"):
        wide = np.full((2, 9, 8), 7.0)
        out = wide[..., 1:7]
        assert getattr(fm, name)(q, out=out) is out
        np.testing.assert_array_equal(out, getattr(fm, name)(q))
        assert (wide[..., [0, 7]] == 7).all()


def test_out_may_be_the_points():
    q, k, _ = attention_problem(0, n=9)
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    want = fm.query(q)
    np.testing.assert_array_equal(fm.query(q, out=q), want)


@pytest.mark.parametrize("method", ["optimal", "relu", "trig", "poisson", "nystrom"])
def test_out_may_share_memory_with_the_points(method):
    """The points are more than are computed at a time, and `out` begins one point after them."""
    memory, _, _ = attention_problem(0, n=600)
    fm = fs.fit_map(memory, memory, 8, method=method, kernel="gaussian", rng=0)
    x, out = memory[:-1], memory[1:]
    want = np.concatenate([fm.query(part) for part in (x[:250], x[250:])])
    np.testing.assert_allclose(fm.query(x, out=out), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["optimal", "elu", "trig"])
def test_out_of_another_shape_or_dtype_is_refused(method):
    q, k, _ = attention_problem(0, n=9)
    fm = fs.feature_map(fs.fit(q, k, method=method), 6, rng=0)
    for out in (np.zeros((9, 5)), np.zeros((9, 6), np.float32)):
        with pytest.raises(ValueError, match=r"out has shape .*accepted: \(9, 6\) and float64"):
            fm.query(q, out=out)
    with pytest.raises(ValueError, match=r"read-only"):
        fm.key(q, out=np.broadcast_to(0.0, (9, 6)))


def test_a_write_to_out_is_recorded():
    torch = pytest.importorskip("torch")
    q, k, _ = (torch.from_numpy(x) for x in attention_problem(0, n=9))
    fm = fs.feature_map(fs.fit(q, k), 6, rng=0)
    out, points = torch.zeros(9, 6, dtype=torch.float64), q.clone().requires_grad_()
    fm.log_query(points, out=out).sum().backward()
    want = q.clone().requires_grad_()
    fm.log_features("query", want).sum().backward()
    torch.testing.assert_close(points.grad, want.grad)
