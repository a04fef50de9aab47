# ruff: noqa: E402 - without Numba these tests are skipped before anything is imported
"""Layouts of workspaces, the guards around workspaces in these tests, and the window rule that kernels share."""

import ctypes
import importlib
import pkgutil

import pytest
from problems import attention_problem

import favorsharp as fs

pytestmark = pytest.mark.own_backend
pytest.importorskip("numba")

import favorsharp_numba.kernels
from favorsharp_numba.host.arguments import Packed
from favorsharp_numba.host.threads import share
from favorsharp_numba.kernels import window_rule
from favorsharp_numba.kernels.exponential_features import Features
from favorsharp_numba.kernels.landmark_call import Call
from favorsharp_numba.kernels.landmark_stream import Stream
from favorsharp_numba.kernels.landmarks import Landmarks
from favorsharp_numba.kernels.point_moments import MomentSizes
from favorsharp_numba.kernels.workspace import items_of, on_host
from favorsharp_numba.vectors.compiling import TAGS

MODULES = [
    importlib.import_module(f"favorsharp_numba.kernels.{module.name}")
    for module in pkgutil.iter_modules(favorsharp_numba.kernels.__path__)
]
LAYOUTS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": value
    for module in MODULES
    for name, value in vars(module).items()
    if name != "metric_space"  # it takes other arguments
    and name.endswith(("_space", "_sums_at"))
    and value.py_func.__module__ == module.__name__
}
KERNELS = {value for module in MODULES for value in vars(module).values() if hasattr(value, "layout")}


def sizes_for(name):
    """Sizes for which the parts of a workspace have different lengths."""
    if name.startswith("exponential_features"):
        return [Features(100, 21, 5, 32, 16, 1, direct, 0) for direct in (0, 1)]
    if name.startswith(("landmark_stream", "landmark_compression")):
        places = 16, 32, 48, 112, 128
        return [Stream(5, 16, 8, m, 32, 3, 16, 2, 1, 7, 40, 48, 20, 4, 3, *places, 16, 32) for m in (1, 21)]
    if name.startswith("landmark"):
        found = [Landmarks(100, m, 24, 5, 8, 3, 16, 2, 0, 1, 1, 21, 24, 8, 16, 24, 64, 104, 112) for m in (1, 21, 200)]
        return [Call(s, s, 3, 1, 100, 0, 112, 8, 2) for s in found] if name.startswith("landmark_call") else found
    if name.startswith("point_moments"):
        return [MomentSizes(100, 5, 8, 1)]
    found = []
    for d, m, e in ((8, 12, 5), (5, 1, 1), (3, 40, 130)):
        q, k, _ = attention_problem(0, d=d)
        fm = fs.feature_map(fs.fit(q, k, method="sderf"), m, rng=0)
        found += [Packed(fm, dtype).layout(e) for dtype in TAGS]
    return [(sizes, 48) for sizes in found] if name.startswith("windowed_token") else found


def flat(parts):
    """All places of a layout, including those of nested layouts."""
    for part in parts:
        yield from flat(part) if isinstance(part, tuple) else (part,)


@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_lie_in_the_order_of_their_names_and_move_together(name):
    layout = on_host(LAYOUTS[name])
    for sizes in sizes_for(name):
        at = layout(sizes, 0)
        assert at._fields[-1] == "end"
        starts = [next(flat([part])) for part in at]
        assert starts[0] == 0
        assert starts == sorted(starts), at
        assert at.end == max(flat(at))
        assert list(flat(layout(sizes, 1000))) == [x + 1000 for x in flat(at)]


def test_every_kernel_has_the_workspace_that_its_layout_says():
    assert len(KERNELS) >= 18
    for kernel in KERNELS:
        assert kernel.layout in LAYOUTS.values()
    name = next(name for name, layout in LAYOUTS.items() if name == "attention.read_space")
    kernel = next(kernel for kernel in KERNELS if kernel.layout is LAYOUTS[name])
    assert items_of(kernel, sizes_for(name)[0]) == on_host(LAYOUTS[name])(sizes_for(name)[0], 0).end


def write(item):
    """A kernel that writes one item of its workspace."""

    def kernel(one, low, high, place):
        ctypes.c_float.from_address((place + item) * one.itemsize).value = 1.0

    return kernel


@pytest.mark.parametrize("item", [100, 600])
def test_a_write_outside_of_a_workspace_is_seen(item, faults):
    share(write(item), 3, 0.0, 100, TAGS["float32"])
    assert len(faults) == 1
    faults.clear()


@pytest.mark.parametrize("item", [0, 99])
def test_a_write_in_a_workspace_is_no_fault(item, faults):
    share(write(item), 3, 0.0, 100, TAGS["float32"])
    assert not faults


@pytest.mark.parametrize("causal", [0, 1])
def test_a_block_is_either_near_or_far(causal):
    near, behind, readers, last = (
        on_host(getattr(window_rule, name)) for name in ("first_near", "behind_near", "first_reader", "last_reader")
    )
    before, after = on_host(window_rule.far_before), on_host(window_rule.far_after)
    for block in range(-3, 4):
        for other in range(-8, 9):
            is_near = near(block) <= other < behind(block)
            assert is_near == (abs(block - other) <= window_rule.NEIGHBOURS)
            assert is_near != (other <= before(block) or other >= after(block))
            reads = readers(other, causal) <= block <= last(other)
            assert reads == (is_near and (not causal or other <= block))
