"""Every kernel runs under the sanitizers, which find races, accesses out of bounds and reads of unwritten memory.

Every kernel also runs with each of its barriers removed.
"""

import json
from pathlib import Path

import mutations
import pytest
import sanitized
import shape_classes
from shape_classes import LENGTHS, SHAPES, SPOILED, Lengths, Shape

pytestmark = pytest.mark.own_backend
pytest.importorskip("favorsharp_cuda")
pytest.importorskip("ml_dtypes")
from favorsharp_cuda.host.source import INSTANTIATIONS, source  # noqa: E402

SCRIPT = Path(shape_classes.__file__)
RANDOM = ["random", "random", 3]

CALLS = (
    *("features", "features vjp", "attention, masked", "attention, window 16", "causal, masked"),
    *("causal, window 64, masked", "causal, from a state, window 16", "update, window 16", "read, window 16"),
    *(
        "decode, masked",
        "decode, window 16",
        "decode, window 20, masked",
        "matvec",
        "landmarks",
        "vjp, masked",
        "vjp, window 16",
    ),
    *("vjp of the map, causal", "vjp, causal, window 16", "update vjp, masked", "read vjp, window 16"),
)


def quick(shape, lengths, calls=CALLS, **more):
    return {"shapes": [SHAPES.index(shape)], "lengths": LENGTHS.index(lengths), "calls": calls, **more}


TILES = Shape("float32", 64, 64, 144)
QUICK = (
    quick(TILES, Lengths(0, 3), ("causal, masked",)),
    # points that enter products as they are
    quick(Shape("bfloat16", 64, 64, 144), Lengths(70, 97, (1,)), ("causal, masked", "attention, masked")),
    # tiles that are staged one by one
    quick(Shape("float32", 128, 5, 256, "sderf"), Lengths(70, 97, (1,)), ("causal, masked",)),
    # stages of `read` that are copied ahead
    quick(Shape("float32", 64, 32, 512, "saderf"), Lengths(70, 97, (1,)), ("attention, masked",)),
    quick(TILES, Lengths(130, 201, (1,)), (*SPOILED, *CALLS), short_segments=True),
    quick(Shape("float64", 12, 9, 24), Lengths(70, 97, (1,))),
    # factors of a map without a quadratic form
    quick(Shape("float32", 5, 7, 13, "posrf"), Lengths(70, 97, (1,)), ("causal, masked",)),
    # the further sweep that rounded results need
    quick(Shape("bfloat16", 32, 32, 16), Lengths(70, 97, (1,)), ("vjp of the map, causal", "vjp, window 16")),
    # more features, and more entries of a point, than the block of a token computes at once
    quick(
        Shape("float32", 64, 32, 512, "saderf"),
        Lengths(40, 40, (1,), group=2),
        ("decode, masked", "decode, window 20, masked"),
    ),
    # heads that share keys
    quick(
        Shape("float64", 9, 5, 7, "optimal", "gaussian"),
        Lengths(40, 40, (1,), group=2),
        ("vjp, window 16", "vjp of every array, window 16"),
    ),
)
"""Calls at shape classes that together run every kernel, with loops that go around, and come to every barrier.

First those that notice what many other calls come to without noticing.
"""


def run(sanitizer, script, request):
    """The output of a script under a sanitizer, which must not report anything."""
    done = sanitized.run(sanitizer, script, json.dumps(request))
    assert done.returncode == 0, done.stderr[:6000]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_no_kernel_races_and_removing_any_barrier_is_noticed():
    """Each quick call runs unchanged, and then without each barrier whose absence no earlier call has noticed."""
    said = run("thread", Path(mutations.__file__), QUICK)
    assert {name.partition("<")[0] for name in said["launched"]} == {name.partition("<")[0] for name in INSTANTIATIONS}
    found = mutations.sites(source())
    missed = set(range(len(found))).difference(said["noticed"])
    reached = said["reached"]
    assert not missed, "\n".join(f"{found[i]}{'' if i in reached else ' (never come to)'}" for i in sorted(missed))


def test_every_barrier_is_found():
    """The regular expression for barriers matches every function of the primitives that waits."""
    code = source()
    found = mutations.sites(code)
    assert len(found) > 30
    assert mutations.numbered(code).count("host::stands(") == len(found)
    assert mutations.numbered(code).count("\n") == code.count("\n")
    waits = ("__syncthreads", "__syncwarp", "wait_copies", "barrier")
    rest = "".join(text for text in mutations.BARRIER.split(code.partition('"arguments.cuh"')[2]))
    for line in rest.splitlines():
        code_of_line = line.partition("//")[0]
        assert not any(f"{wait}(" in code_of_line or f"{wait}<" in code_of_line for wait in waits), line


def under(sanitizer, shape):
    served = set(shape_classes.names(shape))
    request = quick(shape, Lengths(70, 97, (1,)), [call for call in CALLS if call in served])
    run(sanitizer, SCRIPT, request | {"schedules": [RANDOM]})


@pytest.mark.parametrize("shape", [Shape("bfloat16", 32, 32, 16)], ids=str)
def test_no_kernel_leaves_its_memory(shape):
    under("address", shape)


@pytest.mark.sweep
@pytest.mark.parametrize("shape", SHAPES[::2], ids=str)
def test_no_shape_class_races(shape):
    under("thread", shape)


@pytest.mark.sweep
@pytest.mark.parametrize("shape", SHAPES[3::6], ids=str)
def test_no_wider_kernel_leaves_its_memory(shape):
    under("address", shape)
