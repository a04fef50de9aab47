"""Rows that can be read and written 16 bytes at a time give the same bits as those that are moved entry by entry."""

import numpy as np
import pytest
from on_host import check_guards, fresh, installed
from shape_classes import Lengths, Problem, Shape, function

pytestmark = pytest.mark.own_backend
pytest.importorskip("favorsharp_cuda")
pytest.importorskip("ml_dtypes")


def moved(x, how):
    """A copy of an array with other strides: the memory between its rows or entries is NaN."""
    x = np.asarray(x)
    *batch, n, d = x.shape
    if how == "rows of an odd length":
        view = fresh((*batch, n, d + 1), x.dtype)[..., :d]
    elif how == "an odd start":
        view = fresh((*batch, n, d + 16), x.dtype)[..., 3 : 3 + d]
    elif how == "every other entry":
        view = fresh((*batch, n, 2 * d), x.dtype)[..., ::2]
    elif how == "columns":
        view = fresh((*batch, d, n), x.dtype).swapaxes(-1, -2)
    else:
        view = fresh(x.shape, x.dtype)
    view[...] = x
    return view


WAYS = ("rows of an odd length", "an odd start", "every other entry", "columns")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_anywhere_give_the_same_bits(dtype):
    kernel = "gaussian" if dtype == "float32" else "softmax"
    problem = Problem(Shape(dtype, 64, 64, 80, "optimal", kernel), Lengths(70, 97, (1,)))
    k, v = problem.same
    calls = {
        "attention": {},
        "causal_attention": {"window": 16},
        "exponential_features": None,
    }
    with installed():
        for op, options in calls.items():
            given = [problem.q, k, v] if options is not None else list(problem.plain)
            rest = [problem.map] if options is not None else []
            first = given[:3] if options is not None else given[:2]  # rows and columns of numbers

            def result(how, out=None, op=op, options=options, given=given, rest=rest, first=first):
                arrays = [moved(x, how) for x in first] + given[len(first) :]
                found = function(op)(*arrays, *rest, **(options or {}), **({} if out is None else {"out": out}))
                return found[0] if isinstance(found, tuple) else found

            want = result("side by side")
            assert np.isfinite(want.astype(np.float32)).all()
            for how in WAYS:
                out = moved(np.zeros_like(want), how) if op == "attention" else None
                found = result(how, out)
                assert out is None or np.shares_memory(found, out), "the result is written in place"
                np.testing.assert_array_equal(found.astype(np.float32), want.astype(np.float32), err_msg=f"{op}, {how}")
    check_guards()
