"""The choice of an implementation: which one is chosen, which calls are refused, and that nothing falls back
quietly."""

import asyncio
import sys
import threading

import numpy as np
import pytest
from problems import attention_problem

import favorsharp as fs
from favorsharp import declarations, dispatch
from favorsharp.dispatch import Backend, BackendUnavailable, Kernel, Op

pytestmark = pytest.mark.own_backend

NUMPY = {
    "libraries": frozenset({"numpy"}),
    "devices": frozenset({"cpu"}),
    "dtypes": frozenset({"float64"}),
}


class Point:
    """An entry point, and the distribution that it belongs to."""

    def __init__(self, name, backend, owner="favorsharp"):
        self.name, self.value, self.backend = name, f"made_up:{name}", backend
        self.dist = type("Distribution", (), {"name": owner})()

    def load(self):
        if isinstance(self.backend, Exception):
            raise self.backend
        return self.backend


@pytest.fixture
def install(monkeypatch):
    """Install backends as entry points, as the metadata of a package would."""
    import importlib.metadata

    def put(*points):
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: list(points))
        dispatch.rediscover()

    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    yield put
    monkeypatch.undo()
    dispatch.rediscover()


def doubled(op="attention", name="numba", **changes):
    kernel = Kernel(op, f"{__name__}:twice", **(NUMPY | changes))
    return Backend(name, kernels=(kernel,))


def twice(q, k, v, feature_map, **options):
    return 2 * dispatch.OPS["attention"].reference(q, k, v, feature_map, **options)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or __import__("types").ModuleType(__name__))
    sys.modules[__name__].twice = twice
    sys.modules[__name__].broken = broken


def broken(*args, **kwargs):
    raise ZeroDivisionError("inside the kernel")


def call(dtype=np.float64):
    q, k, v = (x.astype(dtype) for x in attention_problem(0))
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    return fs.linear_attention(q, k, v, fm), dispatch.OPS["attention"].reference(q, k, v, fm)


def test_bundled_backends_run_by_themselves(install):
    install(Point("numba", doubled()))
    got, reference = call()
    np.testing.assert_array_equal(got, 2 * reference)


def test_installing_something_else_changes_nothing(install):
    install(Point("other", doubled(name="other"), owner="somebody-elses"))
    got, reference = call()
    np.testing.assert_array_equal(got, reference)
    with fs.use("other"):
        np.testing.assert_array_equal(call()[0], 2 * reference)
    assert "can run it, when named by use()" in str(fs.explain("attention", like=reference))


def test_a_named_backend_runs_or_the_call_raises(install):
    install(Point("numba", doubled()))
    with fs.use("numba"):
        got, reference = call()
        np.testing.assert_array_equal(got, 2 * reference)
        with pytest.raises(BackendUnavailable, match="attention cannot run as use.* asks: numba: dtype float32"):
            call(np.float32)
    with fs.use("numba", "reference"):
        got, reference = call(np.float32)
        np.testing.assert_array_equal(got, reference)
    with fs.use("reference"):
        np.testing.assert_array_equal(*call())


def test_unknown_names_are_refused_at_once(install):
    install(Point("numba", doubled()))
    with pytest.raises(ValueError, match="'numbda' is unknown; known: reference, numba"), fs.use("numbda"):
        pass


def test_environment_variable(install, monkeypatch):
    install(Point("numba", doubled()))
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    np.testing.assert_array_equal(*call())
    monkeypatch.setenv(dispatch.VARIABLE, "numba")
    with pytest.raises(BackendUnavailable, match="FAVORSHARP_BACKEND"):
        call(np.float32)
    with fs.use("reference"):
        np.testing.assert_array_equal(*call())
    monkeypatch.setenv(dispatch.VARIABLE, "gpu")
    with pytest.raises(ValueError, match="FAVORSHARP_BACKEND='gpu': backend 'gpu' is unknown"):
        call()


def test_use_nests_and_is_of_one_context(install):
    install(Point("numba", doubled()))
    _, reference = call()
    seen = {}
    with fs.use("reference"):
        with fs.use("numba"):
            np.testing.assert_array_equal(call()[0], 2 * reference)
        np.testing.assert_array_equal(call()[0], reference)
        thread = threading.Thread(target=lambda: seen.update(thread=call()[0]))
        thread.start()
        thread.join()
    np.testing.assert_array_equal(seen["thread"], 2 * reference)

    async def under(name):
        with fs.use(name):
            await asyncio.sleep(0.01)
            return call()[0]

    async def both():
        return await asyncio.gather(under("reference"), under("numba"))

    one, two = asyncio.run(both())
    np.testing.assert_array_equal(2 * one, two)


def test_reasons(install):
    torch = pytest.importorskip("torch")
    cases = {
        "library torch": (doubled(), torch.ones(3).double()),
        "dtype float32": (doubled(), np.ones(3, np.float32)),
        "needs no_such_module": (Backend("numba", ("no_such_module",), doubled().kernels), np.ones(3)),
        "gradients": (doubled(libraries=frozenset({"torch"})), torch.ones(3).double().requires_grad_()),
        "traced arrays": (doubled(libraries=frozenset({"torch"})), torch.ones(3, device="meta").double()),
        "op attention": (doubled(op="read"), np.ones(3)),
    }
    for reason, (backend, like) in cases.items():
        install(Point("numba", backend))
        explanation = fs.explain("attention", like=like)
        assert explanation.chosen == "reference"
        assert explanation.reasons["numba"].startswith(reason)
        assert str(explanation) == f"reference: chosen\nnumba: {explanation.reasons['numba']}"


def test_maps_of_other_families_are_declined(install):
    install(Point("numba", doubled()))
    q, k, v = attention_problem(1)
    fm = fs.feature_map(fs.fit(q, k, method="relu"), 8, rng=0)
    assert fs.explain("attention", like=(q, fm)).reasons["numba"] == "elementwise feature maps"
    np.testing.assert_array_equal(fs.linear_attention(q, k, v, fm), dispatch.OPS["attention"].reference(q, k, v, fm))


def test_a_missing_requirement_names_its_cure(install):
    assert Backend("numba", requires=("numba_is_not_here",)).why_not() == "needs numba_is_not_here"
    declarations.CURES["numba_is_not_here"] = "favorsharp[cpu]"
    try:
        assert "pip install 'favorsharp[cpu]'" in Backend("numba", requires=("numba_is_not_here",)).why_not()
    finally:
        del declarations.CURES["numba_is_not_here"]


def test_a_broken_plugin_is_a_warning_with_its_name(install):
    install(Point("numba", ImportError("no such symbol")))
    with pytest.warns(RuntimeWarning, match="backend 'numba' .* could not be loaded: ImportError: no such symbol"):
        got, reference = call()
    np.testing.assert_array_equal(got, reference)
    with fs.use("numba"), pytest.raises(BackendUnavailable, match="no such symbol"):
        call()


def test_an_exception_inside_a_kernel_surfaces(install):
    install(Point("numba", Backend("numba", kernels=(Kernel("attention", f"{__name__}:broken", **NUMPY),))))
    with pytest.raises(ZeroDivisionError, match="inside the kernel"):
        call()


def test_watch_tells_what_ran(install):
    install(Point("numba", doubled()))
    with dispatch.watch() as calls:
        call()
        call(np.float32)
    attention = [call for call in calls if call[0] == "attention"]  # the fits ran an op, too
    assert attention == [("attention", "numba"), ("attention", "reference")]


def test_explain_takes_ops_names_and_functions(install):
    install()
    like = np.ones(3)
    for op in ("attention", fs.linear_attention, fs.attention, dispatch.OPS["attention"]):
        assert fs.explain(op, like=like).op == "attention"
    assert fs.explain(fs.kernel_matvec, like=like).chosen == "reference"
    with pytest.raises(ValueError, match="op 'softmax' is unknown; known: .*causal_attention"):
        fs.explain("softmax", like=like)


def test_ops_keep_their_documentation():
    for op in dispatch.OPS.values():
        assert isinstance(op, Op)
        assert "Parameters\n" in op.__doc__


def test_a_wish_that_tracing_cannot_honour_is_an_error(install):
    torch = pytest.importorskip("torch")
    install(Point("numba", doubled(libraries=frozenset({"torch"}))))
    q, k, v = (torch.asarray(x) for x in attention_problem(2))
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    with fs.use("numba"), pytest.raises(BackendUnavailable, match="traced arrays"):
        torch.func.grad(lambda q: fs.linear_attention(q, k, v, fm).sum())(q)


# Repeated calls -----------------------------------------------------------------------------------------------


def prepared_problem():
    q, k, v = attention_problem(0)
    return (q, k, v), fs.feature_map(fs.fit(q, k), 8, rng=0)


def test_a_call_like_one_before_is_not_checked_again(monkeypatch):
    (q, k, v), fm = prepared_problem()
    first = fs.linear_attention(q, k, v, fm)
    monkeypatch.setattr(sys.modules["favorsharp.calls"], "check_attention", broken)
    np.testing.assert_array_equal(fs.linear_attention(q, k, v, fm), first)
    for other in ({"is_causal": True}, {"window": 2}, {"is_causal": 0}, {"key_mask": np.ones(len(k), bool)}):
        with pytest.raises(ZeroDivisionError):
            fs.linear_attention(q, k, v, fm, **other)
    with pytest.raises(ZeroDivisionError):
        fs.linear_attention(q[1:], k, v, fm)
    with pytest.raises(ZeroDivisionError):
        fs.linear_attention(q.astype("f"), k, v, fm)


def test_a_wish_reaches_a_call_like_one_before(install):
    install(Point("numba", doubled()))
    (q, k, v), fm = prepared_problem()
    twofold = fs.linear_attention(q, k, v, fm)
    with fs.use("reference"):
        np.testing.assert_allclose(2 * fs.linear_attention(q, k, v, fm), twofold)
    with dispatch.watch() as calls:
        fs.linear_attention(q, k, v, fm)
    assert calls == [("attention", "numba")]


def test_no_map_is_kept_alive_by_its_calls():
    import gc
    import weakref

    (q, k, v), fm = prepared_problem()
    state = fs.init_state(fm, v.shape[-1], like=k)
    fs.linear_attention(q, k, v, fm)
    fs.decode_step(q[:1], k[:1], v[:1], state, fm)
    known = weakref.ref(fm)
    del fm
    gc.collect()
    assert known() is None


def test_gradients_are_seen_in_calls_like_one_before():
    torch = pytest.importorskip("torch")
    (q, k, v), _ = prepared_problem()
    q, k, v = (torch.asarray(x) for x in (q, k, v))
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    assert not fs.linear_attention(q, k, v, fm).requires_grad
    assert fs.linear_attention(q.clone().requires_grad_(), k, v, fm).requires_grad
    fm.rows.requires_grad_()
    assert fs.linear_attention(q, k, v, fm).requires_grad
    with torch.no_grad():
        assert not fs.linear_attention(q, k, v, fm).requires_grad
    with torch.inference_mode():
        drawn = fs.feature_map(fs.fit(q, k), 8, rng=0)
        torch.testing.assert_close(fs.linear_attention(q, k, v, drawn), fs.linear_attention(q, k, v, fm))
