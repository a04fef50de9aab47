"""The kernels on a CPU against the references in float64, at every shape class, in three orders of threads."""

import os

import numpy as np
import pytest
from host_module import SCHEDULES, HostModule, scheduled
from on_host import check_guards, installed
from shape_classes import LENGTHS, RAGGED, SHAPES, VJPS, Lengths, leaves, names, run, wanted

from favorsharp.testing import check_backend, relative_error

pytestmark = pytest.mark.own_backend
pytest.importorskip("favorsharp_cuda")
pytest.importorskip("ml_dtypes")

TOLERANCES = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 2e-5, "float64": 1e-10}
OPS = ["exponential_features", "attention", "causal_attention", "update", "read", "decode_step", "kernel_matvec"]
TURNS = 12
"""Of the calls that a shape can make, one in so many is made by default: another one at each shape."""
SWEEP_TURNS = int(os.environ.get("FAVORSHARP_SWEEP_TURNS", "4"))
"""The same for `make test-sweep`. With 1, every call is made at every shape, which takes an hour of two cores."""


@pytest.fixture(autouse=True)
def on_the_host():
    with installed() as name:
        yield name


def compare(call, shape, lengths):
    """Check that results are right and have the same bits in every order of threads, and that guards are intact."""
    if call in VJPS:
        pytest.importorskip("torch")
    results = []
    for schedule in SCHEDULES:
        with scheduled(schedule):
            results.append(run(call, shape, lengths))
    check_guards()
    for other in results[1:]:
        for a, b in zip(leaves(results[0]), leaves(other), strict=True):
            assert np.array_equal(*(np.ascontiguousarray(x).view(np.uint8) for x in (a, b))), (
                f"{call}: the result depends on the order"
            )
    want = wanted(call, shape, lengths)
    if call in VJPS:  # gradients that are 0 in exact arithmetic are compared with the size of the others
        size = max((float(np.abs(x).max()) for x in map(np.asarray, want[1:]) if x.size), default=1.0)
        want = tuple(np.append(x, size / 30) for x in want)
        results[0] = tuple(np.append(x, np.asarray(size / 30, x.dtype)) for x in results[0])
    error = relative_error(results[0], want)
    assert error <= TOLERANCES[shape.dtype], f"{call}: relative error {error:.2g}"


def turn_of(shape, turns):
    number = SHAPES.index(shape)
    return [call for at, call in enumerate(names(shape)) if (at + number) % turns == 0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_classes(shape):
    for call in turn_of(shape, TURNS):
        compare(call, shape, Lengths(100, 131))


@pytest.mark.sweep
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_more_calls_at_every_shape_class(shape):
    for call in turn_of(shape, SWEEP_TURNS):
        compare(call, shape, RAGGED)


@pytest.mark.parametrize("lengths", LENGTHS[1:6], ids=str)
def test_lengths(lengths):
    number = LENGTHS.index(lengths)
    shape = SHAPES[(0, 2, 4)[number % 3]]  # one a dtype
    for call in names()[number % 3 :: 3]:
        if not (lengths.n == 0 and call in VJPS):
            compare(call, shape, lengths)


@pytest.mark.sweep
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("op", OPS)
def test_every_case_of_every_op_through_dispatch(op, library, on_the_host):
    pytest.importorskip(library)
    with scheduled(SCHEDULES[(OPS.index(op) + (library == "torch")) % 3]):
        dtypes = {row.dtype for row in check_backend(on_the_host, ops=[op], libraries=[library])}
    assert {"float16", "float32", "float64"} <= dtypes


@pytest.mark.parametrize("op", ["exponential_features", "decode_step"])
def test_the_cases_of_testing_through_dispatch(op, on_the_host):
    check_backend(on_the_host, ops=[op], libraries=["numpy"])


@pytest.mark.sweep
def test_every_instantiation_is_run():
    """The calls of the tests above launch every instance.

    One that nothing launches is untested and should not be compiled.
    """
    from favorsharp_cuda.host.source import INSTANTIATIONS

    HostModule.launched = set()
    try:
        for shape in SHAPES:
            for call in names(shape):
                run(call, shape, Lengths(66, 70, (1,)))
            for call in ("decode", "decode, window 16"):
                run(call, shape, Lengths(40, 40, (1,), group=2))  # heads of queries that share a state
        assert set(INSTANTIATIONS) - HostModule.launched == set()
    finally:
        HostModule.launched = None
