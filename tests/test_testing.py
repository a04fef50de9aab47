"""What a third party runs finds what is wrong, and the loopback backend right."""

import numpy as np
import pytest

from favorsharp import dispatch
from favorsharp.testing import cases, check_backend

pytestmark = pytest.mark.own_backend


def test_loopback_passes_on_numpy_and_torch():
    import favorsharp_loopback

    before = sum(favorsharp_loopback.calls.values())
    rows = check_backend("loopback", libraries=["numpy", "torch"])
    assert {row.op for row in rows} == {op for op in dispatch.OPS if not op.endswith("_vjp")}
    assert {row.dtype for row in rows} == {"float16", "bfloat16", "float32", "float64"}
    assert sum(favorsharp_loopback.calls.values()) == before + len(rows)


@pytest.mark.parametrize("op", ["attention", "read", "exponential_features"])
def test_a_wrong_kernel_is_found(monkeypatch, op):
    import favorsharp_loopback

    def wrong(*args, **kwargs):
        return dispatch.OPS[op].reference(*args, **kwargs) * (1 + 1e-4)

    monkeypatch.setattr(favorsharp_loopback, op, wrong, raising=False)
    dispatch.rediscover()
    with pytest.raises(AssertionError, match=f"{op}, case .*numpy float.*error .* is above"):
        check_backend("loopback", ops=[op], libraries=["numpy"])
    monkeypatch.undo()
    dispatch.rediscover()


def test_every_op_has_cases():
    for op in dispatch.OPS:
        if op.endswith("_vjp"):  # its result is a function; test_vjp.py
            continue
        assert len({case.name for case in cases(op)}) == len(cases(op)) > 2
    with pytest.raises(ValueError, match="op 'softmax' has no cases"):
        cases("softmax")


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="backend 'triton' is unknown; known: "):
        check_backend("triton")
    with pytest.raises(ValueError, match="nothing to compare"):
        check_backend("loopback", ops=["no such op"])


def test_cases_are_the_same_problem_in_every_dtype():
    q16 = cases("attention")[0].make(lambda host: np.asarray(host, np.float16))[0][0]
    q64 = cases("attention")[0].make(lambda host: np.asarray(host, np.float64))[0][0]
    np.testing.assert_array_equal(q16, q64)
