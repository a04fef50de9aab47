"""The operators of torch that the CUDA backend defines, on the CPU through the shim."""

import math
from dataclasses import replace

import pytest

import favorsharp as fs
from favorsharp._values import map_arrays

torch = pytest.importorskip("torch")
pytest.importorskip("cupy")
from torch_calls import ALL_MODES, OPS, STATES, features_problem, state_after  # noqa: E402

from favorsharp_cuda import torch_ops  # noqa: E402
from favorsharp_cuda.host.problem import lows_of, sums_of  # noqa: E402
from favorsharp_cuda.torch import operators  # noqa: E402

pytestmark = [pytest.mark.own_backend, pytest.mark.usefixtures("torch_on_host")]


@pytest.mark.parametrize(("is_causal", "window"), ALL_MODES)
def test_operators_are_what_torch_expects_of_them(problem, is_causal, window):
    q, k, v, mask, fm = problem
    of_map, options = operators.arrays_of(fm), operators.options_of(fm, window, is_causal)
    given = (mask if is_causal else None, *of_map, *options, None, None, None)
    torch.library.opcheck(OPS["attention"], (q, k, v, *given))
    out, stats = OPS["attention"](q, k, v, *given)
    for of_map in (False, True):
        torch.library.opcheck(
            OPS["attention_backward"], (torch.ones_like(out), q, k, v, *given, out, stats), {"of_map": of_map}
        )


@pytest.mark.parametrize("of_map", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_operators_of_sums_are_too(problem, begun, of_map):
    q, k, v, mask, fm = problem
    arrays, options = operators.arrays_of(fm), operators.options_of(fm, 0, True)
    sums = sums_of(state_after(problem, 0, 5)) if begun else (None, None, None)
    given = (k, v, mask, *arrays, *options[:2], *sums)
    torch.library.opcheck(OPS["absorb"], given)
    after = OPS["absorb"](*given)
    torch.library.opcheck(OPS["absorb_backward"], (*after, *given, *after), {"of_map": of_map})
    if begun:
        attended = (q, k, v, mask, *arrays, *options, *sums)
        torch.library.opcheck(OPS["attention"], attended)
        out, stats = OPS["attention"](*attended)
        torch.library.opcheck(OPS["attention_backward"], (out, *attended, out, stats), {"of_map": of_map})
    torch.library.opcheck(OPS["kernel_matvec"], (q, k, v, *arrays, *options[:2]))
    torch.library.opcheck(OPS["kernel_matvec_backward"], (v, q, k, v, *arrays, *options[:2]), {"of_map": of_map})


def test_operators_of_features_are_too():
    u = features_problem(torch.float32)
    torch.library.opcheck(OPS["exponential_features"], u)
    torch.library.opcheck(OPS["exponential_features_backward"], (torch.ones(2, 5, 4), *u))


@pytest.mark.parametrize(("window", "before"), STATES)
def test_operators_of_states_are_what_torch_expects_of_them(problem, window, before):
    q, k, v, mask, fm = problem
    state = state_after(problem, window, before)
    of_state = operators.arguments_of(state, fm)
    token, hidden = [x[:, 5:6] for x in (q, k, v)], mask[:, 5:6]
    torch.library.opcheck(OPS["decode_step"], (*token, hidden, *of_state, *lows_of(state)))
    torch.library.opcheck(OPS["decode_step"], (*token, None, *of_state, None, None))
    torch.library.opcheck(OPS["update"], (k[:, 5:], v[:, 5:], mask[:, 5:], *of_state, *lows_of(state)))
    torch.library.opcheck(OPS["read"], (q, *of_state))


def test_low_parts_go_through_the_operators(problem):
    """Keys that vanish beside the sums of a state are in its low parts."""
    *points, _, fm = problem
    k, v = (x.float() for x in points[1:])
    fm = map_arrays(fm, lambda x: x.float())
    once = torch_ops.update(fs.init_state(fm, 2, like=k), k, v, fm)
    many = replace(once, kv=once.kv * 2**31, z=once.z * 2**31, c=once.c + 1)  # so references do not rise
    torch.library.opcheck(OPS["update"], (k, v, None, *operators.arguments_of(many, fm), *lows_of(many)))
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
    arrays = [x.clone() for x in operators.arrays_of(fm)]
    options = operators.options_of(fm, 0, False)
    rest = (*options, None, None, None)
    before, _ = OPS["attention"](q, k, v, None, *arrays, *rest)
    again, _ = OPS["attention"](q, k, v, None, *arrays, *rest)
    arrays[0].mul_(1.5)
    after, _ = OPS["attention"](q, k, v, None, *arrays, *rest)
    assert torch.equal(before, again)
    assert not torch.allclose(before, after)
    assert len(operators._maps) <= operators.MAPS_KEPT
