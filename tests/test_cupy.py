"""CuPy arrays are recognised, checked and dispatched.

No GPU is needed, because they use host memory and are not read.
"""

import numpy as np
import pytest

import favorsharp as fs
from favorsharp import _arrays, _autodiff, dispatch
from favorsharp.backend import LANDMARKS

cupy = pytest.importorskip("cupy")


@pytest.fixture
def array():
    """A real cupy.ndarray of device 0 over the memory of a NumPy array."""
    from cupy.cuda import memory

    def make(shape, dtype="float32"):
        host = np.zeros(shape, dtype)
        pointer = memory.MemoryPointer(memory.UnownedMemory(host.ctypes.data, max(host.nbytes, 1), host, 0), 0)
        return cupy.ndarray(shape, dtype, memptr=pointer)

    return make


def test_it_is_known_for_what_it_is(array):
    x = array((2, 3), "float16")
    assert _arrays.is_array(x)
    assert (_arrays.library_of(x), _arrays.device_of(x), _arrays.dtype_name(x)) == ("cupy", "cuda", "float16")
    assert not _autodiff.is_traced(x)
    assert _arrays.namespace_of(x).__name__ == "array_api_compat.cupy"
    assert _arrays.dtype_name(_arrays.compute_dtype(_arrays.namespace_of(x), x)) == "float32"


@pytest.mark.own_backend
def test_every_op_is_dispatched_for_it(array):
    for op in dispatch.OPS:
        explanation = fs.explain(op, like=array((4, 4)))
        by_functions = op in LANDMARKS and op != "choose_landmarks"
        assert explanation.chosen == ("reference" if by_functions else "cuda")
        assert explanation.request == dispatch.Request(op, "cupy", "cuda", "float32")


def test_errors_come_before_any_work(array):
    with pytest.raises(TypeError, match="all arrays must come from one library, got q: cupy, k: numpy"):
        fs.softmax_attention(array((4, 8)), np.zeros((4, 8)), array((4, 8)))
    with pytest.raises(TypeError, match="q has dtype int32; accepted: float16"):
        fs.softmax_attention(array((4, 8), "int32"), array((4, 8)), array((4, 8)))
    with pytest.raises(ValueError, match="q has d=8, k has d=7"):
        fs.softmax_attention(array((4, 8)), array((4, 7)), array((4, 8)))
    with pytest.raises(ValueError, match="method 'favor' is unknown"):
        fs.fit(array((4, 8)), array((4, 8)), method="favor")
