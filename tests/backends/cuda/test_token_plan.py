"""Tokens that repeat an earlier launch by a plan equal tokens computed anew, and fall back where they must."""

from dataclasses import replace
from functools import partial

import pytest

import favorsharp as fs
from favorsharp._values import map_arrays

torch = pytest.importorskip("torch")
pytest.importorskip("cupy")
from favorsharp_cuda.host import repeats, token_plan  # noqa: E402

pytestmark = [pytest.mark.own_backend, pytest.mark.usefixtures("torch_on_host")]
N, D, E = 9, 3, 2


@pytest.fixture
def planned(monkeypatch):
    """The tokens that a plan launched without `decode_step`."""
    found, kept = [], repeats.launched

    def launched(known, tensors):
        found.append(len(tensors))
        return kept(known, tensors)

    monkeypatch.setattr(token_plan.repeats, "launched", launched)
    return found


def points(dtype):
    draws = torch.Generator().manual_seed(1)
    return [torch.randn((2, N, size), generator=draws).to(dtype) for size in (D, D, E)]


def drawn():
    q, k, _ = points(torch.float32)
    return fs.feature_map(fs.fit(q[0], k[0]), 5, rng=0)


def tokens(q, k, v, fm, *, change=None):
    state, outs = fs.init_state(fm, E, like=k), []
    for i in range(N):
        if change is not None and i == 5:
            state = change(state)
        given = tuple(x[:, i : i + 1].contiguous() for x in (q, k, v))
        with torch.no_grad():
            out, state = fs.decode_step(*given, state, fm)
        outs.append(out)
    return torch.cat(outs, dim=-2), state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_planned_tokens_equal_the_causal_call(dtype, planned):
    given, fm = points(dtype), drawn()
    with fs.use("cuda"):
        out, state = tokens(*given, fm)
        assert len(planned) == N - 1  # the first token is recorded
        whole, after = fs.linear_attention(*given, fm, is_causal=True, return_state=True)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-5}[dtype]
    torch.testing.assert_close(out, whole, rtol=0, atol=tolerance * whole.abs().max().item())
    torch.testing.assert_close(state.z, after.z, rtol=1e-3, atol=0)


def test_a_state_without_low_parts_has_no_plan(planned):
    given, fm = points(torch.float32), drawn()
    with fs.use("cuda"):
        want, _ = tokens(*given, fm)
        planned.clear()
        without = partial(replace, kv_low=None, z_low=None)
        out, _ = tokens(*given, map_arrays(fm, torch.clone), change=without)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)
    assert len(planned) == N - 2


def test_a_state_that_is_not_contiguous_has_no_plan():
    q, k, v = (x[:, :1] for x in points(torch.float32))
    fm = drawn()
    with fs.use("cuda"):
        state = fs.update(fs.init_state(fm, E, like=k), k, v, fm)
        strided = replace(state, kv=state.kv.mT.contiguous().mT)
        assert token_plan.plan_of(q, k, v, state, None) is not None
        assert token_plan.plan_of(q, k, v, strided, None) is None
        assert token_plan.plan_of(q.double(), k, v, state, None) is None
        assert token_plan.plan_of(q[0], k, v, state, None) is None
