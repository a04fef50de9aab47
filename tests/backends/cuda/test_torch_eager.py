"""Derivatives of eager calls of torch on the CUDA backend, on the CPU through the shim."""

import contextlib
from dataclasses import replace

import pytest
from problems import attention_problem

import favorsharp as fs
from favorsharp.backend import arrays_of
from favorsharp.dispatch import OPS
from favorsharp.features.map_gradients import with_arrays
from favorsharp.ops.state import State

torch = pytest.importorskip("torch")
pytest.importorskip("cupy")
from torch_calls import ALL_MODES, MODES, NAMES, features_problem, leaves, state_after  # noqa: E402

from favorsharp_cuda import torch_ops  # noqa: E402
from favorsharp_cuda.host import gradient_sizes  # noqa: E402

pytestmark = [pytest.mark.own_backend, pytest.mark.usefixtures("torch_on_host")]


@pytest.mark.parametrize(("is_causal", "window"), ALL_MODES)
def test_derivatives_are_those_of_differences(problem, is_causal, window):
    """Derivatives with respect to the points and to every array of the map."""
    *points, mask, fm = problem
    given = leaves(*(x[:, :6] for x in points), *arrays_of(fm))
    mask = mask[:, :6]

    def call(q, k, v, *arrays):
        own = with_arrays(fm, *arrays)
        if not is_causal:
            return torch_ops.attention(q, k, v, own, key_mask=mask, window=window)
        out, state = torch_ops.causal_attention(q, k, v, own, key_mask=mask, window=window)
        return out, state.kv, state.z

    assert torch.autograd.gradcheck(call, given, fast_mode=True)


KEYS = {  # the keys in a state with a window of 2, and the new ones
    "none leave": (1, 1),
    "some leave": (3, 4),
    "there are none yet": (0, 2),
}


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS.keys())
@pytest.mark.parametrize("window", [0, 2])
def test_derivatives_of_states_are_those_of_differences(problem, window, keys):
    """Derivatives with respect to points, a state's sums, references and recent keys, and every array of the map.

    The reference, which computes gradients that are to be differentiated again, gives the same.
    """
    q, k, v, _, fm = problem
    before, new = keys
    mask = torch.tensor([[True] * 12, [True, False] * 6])  # of the keys that leave, one is hidden
    state = state_after((q, k, v, torch.ones_like(mask), fm), window, before)
    floats = [getattr(state, name) for name in NAMES[:5]]
    if (floats[2] == -torch.inf).any():  # from there, there are no differences
        floats = [torch.rand_like(x) for x in floats[:3]] + floats[3:]
    mask = mask[:, before : before + new]
    points = (q[:, :new], *(x[:, before : before + new] for x in (k, v)))
    given = leaves(*points, *floats, *arrays_of(fm))

    def taken(given):
        q, k, v, *rest = given
        own = with_arrays(fm, *rest[5:])
        carried = replace(state, **dict(zip(NAMES[:5], rest[:5], strict=True)))
        return q, k, v, carried, own

    def flat(*results):
        arrays = [x for x in results if torch.is_tensor(x)]
        for after in (x for x in results if isinstance(x, State)):
            arrays += [getattr(after, name) for name in NAMES[:5]]
        return tuple(x for x in arrays if x.requires_grad and x.numel())

    def updated(*given):
        _, k, v, carried, own = taken(given)
        return flat(torch_ops.update(carried, k, v, own, key_mask=mask))

    def reading(*given):
        q, _, _, carried, own = taken(given)
        return flat(torch_ops.read(carried, q, own))

    def attended(*given):
        q, k, v, carried, own = taken(given)
        return flat(*torch_ops.causal_attention(q, k, v, own, key_mask=mask, window=window, state=carried))

    def multiplied(*given):
        q, k, v, _, own = taken(given)
        return flat(torch_ops.kernel_matvec(q, k, v, own))

    points, carried, own = given[:3], *taken(given)[3:]
    by_kernels = torch_ops.update(carried, *points[1:], own, key_mask=mask)
    by_reference = OPS["update"].reference(carried, *points[1:], own, key_mask=mask)
    outs = (OPS["read"].reference(after, points[0], own) for after in (by_kernels, by_reference))
    torch.testing.assert_close(*outs)
    for function in (updated, reading, attended, multiplied):
        assert torch.autograd.gradcheck(function, given, fast_mode=True), function.__name__
        results = function(*given)
        weights = [torch.randn_like(x) for x in results]
        of_kernels, of_reference = (
            torch.autograd.grad(results, given, weights, retain_graph=True, create_graph=again, materialize_grads=True)
            for again in (False, True)
        )
        torch.testing.assert_close(of_kernels, of_reference)
    assert torch.autograd.gradgradcheck(attended, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *given: (*updated(*given), *reading(*given)), given, fast_mode=True)


@pytest.mark.parametrize("window", [0, 32])
def test_derivatives_of_states_in_parts(window, monkeypatch):
    """With more features and wider values than a sweep processes at once, and with points in several segments."""
    monkeypatch.setattr(gradient_sizes, "SHORTEST_SEGMENT", 40)
    q, k, v = (torch.asarray(x) for x in attention_problem(2, (2,), n=190, d=5, e=133))
    fm = fs.feature_map(fs.fit(q, k), 70, rng=0)
    given = leaves(q[:, 90:], k, v, *arrays_of(fm))
    weights = [torch.randn(size, dtype=q.dtype) for size in ((2, 100, 133), (2, 70, 133), (2, 1, 70), (2, 1, 70))]

    def found(backend):
        q, k, v, *arrays = given
        own = with_arrays(fm, *arrays)
        with fs.use(backend):
            state = fs.update(fs.init_state(fm, 133, like=k, window=window), k[:, :90], v[:, :90], fm)
            out, state = OPS["causal_attention"](
                q, k[:, 90:], v[:, 90:], own, window=window, state=replace(state, fingerprint=None)
            )
            out = out + OPS["read"](state, q, own) + OPS["kernel_matvec"](q, k, v, own)
        total = sum((x * w).sum() for x, w in zip((out, state.kv, state.z, state.c), weights, strict=True))
        return torch.autograd.grad(total, given)

    for a, b in zip(found("cuda"), found("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * float(b.abs().max()))


def test_derivatives_of_features_are_those_of_differences():
    assert torch.autograd.gradcheck(torch_ops.exponential_features, leaves(*features_problem(torch.float64)))


@pytest.mark.parametrize(("is_causal", "window"), MODES)
def test_second_derivatives_are_those_of_the_reference(problem, is_causal, window):
    q, k, v, mask, fm = problem

    def second(backend):
        own = leaves(q, k, v)
        with fs.use(backend):
            out = fs.linear_attention(*own, fm, key_mask=mask, is_causal=is_causal, window=window)
            first = torch.autograd.grad(out.square().sum(), own, create_graph=True)
            return torch.autograd.grad(sum(x.square().sum() for x in first), own)

    torch.testing.assert_close(second("cuda"), second("reference"))


def test_a_token_is_the_kernels_with_gradients_and_without(problem):
    q, k, v, _, fm = problem
    token = [x[:, :1] for x in (q, k, v)]
    with fs.use("reference"):
        state = fs.update(fs.init_state(fm, v.shape[-1], like=k), k, v, fm)
        want, after = fs.decode_step(*token, state, fm)
    with fs.use("cuda"):
        out, got = fs.decode_step(*token, state, fm)
    torch.testing.assert_close((out, got.kv, got.z, got.c), (want, after.kv, after.z, after.c))

    def gradients(backend):
        given = leaves(*token)
        with fs.use(*backend) if backend else contextlib.nullcontext():
            return torch.autograd.grad(fs.decode_step(*given, state, fm)[0].square().sum(), given)

    for backends in ((), ("cuda",)):
        torch.testing.assert_close(gradients(backends), gradients(("reference",)))


def test_gradients_reach_a_call_through_the_state_of_another(problem):
    def run(backend):
        q, k, v, _, fm = problem
        given = leaves(q, k, v)
        with fs.use(*backend):
            first, second = ([x[:, s] for x in given] for s in (slice(0, 7), slice(7, None)))
            _, state = fs.linear_attention(*first, fm, is_causal=True, return_state=True, window=2)
            out = fs.linear_attention(*second, fm, is_causal=True, state=state, window=2)
        return torch.autograd.grad(out.square().sum(), given)

    torch.testing.assert_close(run(("cuda",)), run(("reference",)))
