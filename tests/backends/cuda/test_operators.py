"""The operators of torch that the CUDA backend defines, on the CPU through the shim."""

import math
from dataclasses import replace

import pytest

import favorsharp as fs
from favorsharp._values import map_arrays

torch = pytest.importorskip("torch")
pytest.importorskip("cupy")
from torch_calls import ALL_MODES, STATES, arguments, features_problem, state_after  # noqa: E402

from favorsharp_cuda import torch_ops  # noqa: E402
from favorsharp_cuda.host.problem import lows_of, sums_of  # noqa: E402
from favorsharp_cuda.torch import operators  # noqa: E402
from favorsharp_cuda.torch.operators import (  # noqa: E402
    ABSORB,
    ATTENTION,
    DECODE_STEP,
    EXPONENTIAL_FEATURES,
    KERNEL_MATVEC,
    READ,
    UPDATE,
)

pytestmark = [pytest.mark.own_backend, pytest.mark.usefixtures("torch_on_host")]


@pytest.mark.parametrize(("is_causal", "window"), ALL_MODES)
def test_operators_are_what_torch_expects_of_them(problem, is_causal, window):
    *points, mask, fm = problem
    check(ATTENTION, fm, *points, mask if is_causal else None, None, None, None, window=window, causal=is_causal)


def check(operator, fm, *tensors, **options):
    """Check an operator, and the operator of its gradients."""
    given = arguments(operator, fm, *tensors, **options)
    torch.library.opcheck(operator.op, given)
    if operator.backward is None:
        return
    made = operator.op(*given)
    gradients = [torch.ones_like(x) for x in made[: len(operator.results)]]
    made = made if operator.keeps_results else made[len(gradients) :]
    for of_map in (False, True):
        torch.library.opcheck(operator.backward_op, (*gradients, *given, *made), {"of_map": of_map})


@pytest.mark.parametrize("begun", [False, True])
def test_operators_of_sums_are_too(problem, begun):
    q, k, v, mask, fm = problem
    sums = sums_of(state_after(problem, 0, 5)) if begun else (None, None, None)
    check(ABSORB, fm, k, v, mask, *sums)
    if begun:
        check(ATTENTION, fm, q, k, v, mask, *sums, window=0, causal=True)
    check(KERNEL_MATVEC, fm, q, k, v)


def test_operators_of_features_are_too():
    check(EXPONENTIAL_FEATURES, None, *features_problem(torch.float32))


@pytest.mark.parametrize(("window", "before"), STATES)
def test_operators_of_states_are_what_torch_expects_of_them(problem, window, before):
    q, k, v, mask, fm = problem
    state = state_after(problem, window, before)
    held, lows, options = operators.tensors_of(state), lows_of(state), {"window": window}
    token, hidden = [x[:, 5:6] for x in (q, k, v)], mask[:, 5:6]
    check(DECODE_STEP, fm, *token, hidden, *held, *lows, **options)
    check(DECODE_STEP, fm, *token, None, *held, None, None, **options)
    check(UPDATE, fm, k[:, 5:], v[:, 5:], mask[:, 5:], *held, *lows, **options)
    check(READ, fm, q, *held)


def test_a_token_of_fewer_heads_than_its_state(problem):
    q, k, v, _, fm = problem
    state = state_after(problem, 0, 5)
    given = (*(x[0, 5:6] for x in (q, k, v)), None, *operators.tensors_of(state), None, None)
    check(DECODE_STEP, fm, *given, window=0)


def test_low_parts_go_through_the_operators(problem):
    """Keys that are below the rounding error of a state's sums are in its low parts."""
    *points, _, fm = problem
    k, v = (x.float() for x in points[1:])
    fm = map_arrays(fm, lambda x: x.float())
    once = torch_ops.update(fs.init_state(fm, 2, like=k), k, v, fm)
    many = replace(once, kv=once.kv * 2**31, z=once.z * 2**31, c=once.c + 1)  # so references do not rise
    check(UPDATE, fm, k, v, None, *operators.tensors_of(many), *lows_of(many), window=0)
    after = torch_ops.update(torch_ops.update(many, k, v, fm), k, v, fm)
    decoded = torch_ops.update(many, k, v, fm)
    for i in range(k.shape[-2]):
        _, decoded = torch_ops.decode_step(*(x[:, i : i + 1] for x in (k, k, v)), decoded, fm)
    for name in ("kv", "z"):
        for found in (after, decoded):
            gained = getattr(found, name).double() - getattr(many, name) + getattr(found, f"{name}_low")
            torch.testing.assert_close(gained, 2 / math.e * getattr(once, name).double(), rtol=1e-4, atol=1e-4)


def test_a_map_changed_in_place_is_packed_again(problem):
    q, k, v, _, fm = problem
    fm = map_arrays(fm, torch.clone)
    given = (fm, q, k, v, None, None, None, None)
    before, again = (ATTENTION.direct(*given, window=0, causal=False)[0] for _ in range(2))
    fm.rows.mul_(1.5)
    after = ATTENTION.direct(*given, window=0, causal=False)[0]
    assert torch.equal(before, again)
    assert not torch.allclose(before, after)
    assert len(operators._maps) <= operators.MAPS_KEPT
