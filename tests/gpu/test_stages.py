"""Tests of what stages record with a fake device: wrong results, lost bits, compilation errors, and slow peers."""

import time

import numpy as np
import pytest
import records

pytestmark = pytest.mark.own_backend
pytest.importorskip("favorsharp_cuda")


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """The lines that were recorded."""
    file = tmp_path / "records.jsonl"
    monkeypatch.setenv("GPU_RECORDS", str(file))
    return lambda: records.read(file)


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (1.01, False), (np.nan, False)])
def test_a_call_is_right_if_it_is_near_float64(recorded, monkeypatch, factor, right):
    pytest.importorskip("ml_dtypes")
    import smoke
    from shape_classes import LENGTHS, SHAPES, wanted

    shape = next(x for x in SHAPES if x.dtype == "float64" and x.d < 32)

    def on_device(name, *given):
        return np.asarray(wanted(name, *given[:2])) * factor, "features by a fake"

    monkeypatch.setattr(smoke, "on_device", on_device)
    smoke.check("features", shape, LENGTHS[0], "cupy", {"call": "features"})
    (found,) = recorded()
    assert (found["ok"], found["limit"], found["ran"]) == (right, 1e-10, "features by a fake")


def test_shapes_of_the_calls_are_among_those_of_the_suite():
    pytest.importorskip("ml_dtypes")
    import calls
    import smoke
    from shape_classes import SHAPES

    labels = {str(shape) for shape in SHAPES}
    assert {*smoke.SHAPES, *(x for shapes in calls.SHAPES.values() for x in shapes)} <= labels
    for library in ("torch", "cupy"):
        names = [step.fields["call"] for step in smoke.steps(library, smoke.SHAPES[0])]
        assert {"features", "causal", "features vjp"} <= set(names)


def truncating(a, b, c):
    """Adds products one by one, and truncates each sum to float32."""
    total = c.astype(np.float64)
    for i in range(16):
        exact = total + np.outer(a[:, i].astype(np.float64), b[i])
        near = exact.astype(np.float32)
        total = np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near).astype(np.float64)
    return total.astype(np.float32)


def test_the_probe_tells_cutting_from_rounding():
    import rounding

    def exactly(a, b, c):
        return (c + a.astype(np.float64) @ b).astype(np.float32)

    assert rounding.probe(exactly)["additions are"] == "rounded"
    assert list(rounding.probe(exactly)["sums"].values()) == [1, -1, 8, 4, 2]
    assert rounding.probe(truncating)["additions are"] == "cut"


def test_an_instance_that_does_not_compile_is_named(monkeypatch):
    import compiling

    def refuse(architecture, expression):
        raise RuntimeError(f"walk.cuh(3): error: expected a ';' in {expression}")

    monkeypatch.setattr(compiling, "DRY", True)
    monkeypatch.setattr(compiling.cubins, "compile_for", refuse)
    found = compiling.compile_one("walk<float, 64>", None)
    assert found["expression"] == "walk<float, 64>"
    assert "expected a ';'" in found["said"]
    assert compiling.weight("gradient_sweep<float, 64>", {}) > compiling.weight("scan", {}) == 1
    assert compiling.weight("scan", {"scan": 20.5}) == 20.5


def test_a_peer_has_a_limit(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(records.ROOT))
    import peers

    with pytest.raises(TimeoutError, match="more than 0 s"), peers.at_most(0.05):
        time.sleep(20)
    with peers.at_most(5):
        pass
    with pytest.raises(TimeoutError, match="no time was left"):
        peers.measure(peers.CASES[0], "torch", time.time() + 1)


def test_peers_that_take_minutes_to_tune_are_left_out(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(records.ROOT))
    import peers

    for case in peers.CASES:
        names = peers.names(case)
        assert names[0] == "favorsharp"
        assert not any(name.startswith("flash-linear-attention") for name in names)
        assert any(name.startswith("torch.compile") for name in names)
