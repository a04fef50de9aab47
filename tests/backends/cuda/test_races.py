"""Races, bounds and unwritten memory: every kernel under the sanitizers, and with each of its barriers removed."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mutations
import pytest
import sanitized
import shape_classes
from shape_classes import LENGTHS, SHAPES, Lengths, Shape

pytestmark = pytest.mark.own_backend
pytest.importorskip("favorsharp_cuda")
pytest.importorskip("ml_dtypes")
from favorsharp_cuda.source import INSTANTIATIONS, source  # noqa: E402

SCRIPT = Path(shape_classes.__file__)
RANDOM = ["random", "random", 3]


def kernel_of(name):
    return name.partition("<")[0].rpartition("::")[2]


def check(sanitizer, **request):
    """Run calls under a sanitizer: what it said, and which instances were launched."""
    done = sanitized.run(sanitizer, SCRIPT, json.dumps({"schedules": [RANDOM], **request}))
    launched = json.loads(done.stdout.splitlines()[-1])["launched"] if done.returncode == 0 else []
    return done, launched


def assert_clean(sanitizer, **request):
    done, launched = check(sanitizer, **request)
    assert done.returncode == 0, done.stderr[:6000]
    return launched


QUICK = {
    "tiles": {
        "shapes": [SHAPES.index(Shape("float32", 64, 64, 80))],
        "lengths": LENGTHS.index(Lengths(130, 201, (1,))),
    },
    "plain": {"shapes": [SHAPES.index(Shape("float64", 12, 9, 24))], "lengths": LENGTHS.index(Lengths(70, 97, (1,)))},
    "heads that share keys": {
        "shapes": [SHAPES.index(Shape("float64", 9, 5, 7, "optimal", "gaussian"))],
        "lengths": LENGTHS.index(Lengths(40, 40, (1,), group=2)),
        "calls": ("vjp, window 16", "vjp of every array, window 16"),
    },
}
"""Shape classes that together run every kernel, with loops that go around."""

CALLS = (
    *("features", "features vjp", "attention, masked", "attention, window 16", "causal, masked"),
    *("causal, window 64, masked", "causal, from a state, window 16", "update, window 16", "read, window 16"),
    *("decode, window 16", "matvec", "vjp, masked", "vjp, window 16", "vjp of the map, causal"),
    "vjp, causal, window 16",
)


@pytest.mark.parametrize("quick", QUICK)
def test_no_kernel_races(quick):
    assert_clean("thread", **{"calls": CALLS, **QUICK[quick]})


@pytest.mark.sweep
def test_the_quick_classes_run_every_kernel():
    launched = [name for request in QUICK.values() for name in assert_clean("thread", **{"calls": CALLS, **request})]
    assert {*map(kernel_of, launched)} == {*map(kernel_of, INSTANTIATIONS)}


@pytest.mark.parametrize("shape", [Shape("bfloat16", 32, 32, 16)], ids=str)
def test_no_kernel_leaves_its_memory(shape):
    lengths = LENGTHS.index(Lengths(70, 97, (1,)))
    assert_clean("address", shapes=[SHAPES.index(shape)], lengths=lengths, calls=CALLS)


@pytest.mark.sweep
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_shape_class_races(shape):
    assert_clean("thread", shapes=[SHAPES.index(shape)], lengths=LENGTHS.index(Lengths(70, 97, (1,))), calls=CALLS)


@pytest.mark.sweep
@pytest.mark.parametrize("shape", SHAPES[3::4], ids=str)
def test_no_wider_kernel_leaves_its_memory(shape):
    assert_clean("address", shapes=[SHAPES.index(shape)], lengths=LENGTHS.index(Lengths(70, 97, (1,))), calls=CALLS)


# Barriers ------------------------------------------------------------------------------------------------------------


def test_every_barrier_is_found():
    """The expression that finds barriers knows every function that the primitives have for waiting."""
    code = source()
    found = mutations.sites(code)
    assert len(found) > 30
    for site in found:
        removed = mutations.without(code, site)
        assert removed.count("\n") == code.count("\n")
        assert len(mutations.sites(removed)) == len(found) - 1
    waits = ("__syncthreads", "__syncwarp", "wait_copies", "barrier")
    rest = "".join(text for text in mutations.BARRIER.split(code.partition('"arguments.cuh"')[2]))
    for line in rest.splitlines():
        code_of_line = line.partition("//")[0]
        assert not any(f"{wait}(" in code_of_line or f"{wait}<" in code_of_line for wait in waits), line


def notice(site, folder):
    """How the quick classes notice that a barrier is gone; None if they do not."""
    code = source()
    file = Path(folder) / f"{site.file}-{site.line}-{site.start}.cu"
    file.write_text(mutations.without(code, site))
    kernels = [site.kernel] if site.kernel else mutations.kernels_of(code, site.file) or [None]
    for name, request in QUICK.items():
        for call in calls_of(name, kernels):
            done, _ = check("thread", source=str(file), **{**request, "calls": [call]})
            if done.returncode:
                return done.stderr
    return None


_launches: dict[str, dict[str, list[str]]] = {}


def launches_of(quick):
    """Which instances each call of a quick class launches, found by running it without a sanitizer."""
    if quick not in _launches:
        from host_module import HostModule
        from on_host import installed

        found = {}
        request = QUICK[quick]
        with installed():
            for call in request.get("calls", CALLS):
                HostModule.launched = set()
                shape_classes.run(call, SHAPES[request["shapes"][0]], LENGTHS[request["lengths"]])
                found[call] = sorted(HostModule.launched)
        HostModule.launched = None
        _launches[quick] = found
    return _launches[quick]


def calls_of(quick, kernels):
    """Calls that launch one of these kernels, those that launch least first; all calls for [None]."""
    found = launches_of(quick)
    fitting = [c for c, used in found.items() if kernels == [None] or {*map(kernel_of, used)} & {*kernels}]
    return sorted(fitting, key=lambda call: len(found[call]))


@pytest.mark.sweep
def test_removing_any_barrier_is_noticed(tmp_path):
    """By the quick classes under ThreadSanitizer, which every run of the tests makes."""
    for quick in QUICK:
        launches_of(quick)
    found = mutations.sites(source())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = list(pool.map(lambda site: notice(site, tmp_path), found))
    unnoticed = [str(site) for site, report in zip(found, said, strict=True) if report is None]
    assert not unnoticed, "\n".join(unnoticed)
