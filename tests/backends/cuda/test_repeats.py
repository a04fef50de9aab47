"""Calls that repeat the launches of an earlier call have the same results as calls that do not."""

from dataclasses import replace

import pytest

import favorsharp as fs
from favorsharp._values import map_arrays

torch = pytest.importorskip("torch")
pytest.importorskip("cupy")
from favorsharp_cuda.host import launch, plain, repeats, tiles  # noqa: E402

pytestmark = [pytest.mark.own_backend, pytest.mark.usefixtures("torch_on_host")]
N, D, E = 70, 3, 2
CALLS = {
    "attention": lambda q, k, v, fm: fs.linear_attention(q, k, v, fm),
    "masked": lambda q, k, v, fm: fs.linear_attention(q, k, v, fm, key_mask=v[..., 0] > -0.5),
    "window": lambda q, k, v, fm: fs.linear_attention(q, k, v, fm, window=4),
    "causal": lambda q, k, v, fm: fs.linear_attention(q, k, v, fm, is_causal=True, return_state=True),
    "continued": lambda q, k, v, fm: fs.linear_attention(
        q, k, v, fm, is_causal=True, window=4, state=fs.update(fs.init_state(fm, E, like=k, window=4), k, v, fm)
    ),
    "update": lambda q, k, v, fm: fs.update(fs.init_state(fm, E, like=k), k, v, fm),
    "read": lambda q, k, v, fm: fs.read(fs.update(fs.init_state(fm, E, like=k), k, v, fm), q, fm),
    "tokens": lambda q, k, v, fm: tokens(q, k, v, fm, 0),
    "tokens with a window": lambda q, k, v, fm: tokens(q, k, v, fm, 2),
}


def tokens(q, k, v, fm, window):
    state, outs = fs.init_state(fm, E, like=k, window=window), []
    for i in range(7):
        out, state = fs.decode_step(*(x[:, i : i + 1] for x in (q, k, v)), state, fm)
        outs.append(out)
    return torch.cat(outs, dim=-2), state


def points(seed, dtype=torch.float32):
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn((2, N, size), generator=draws).to(dtype) for size in (D, D, E)]


def drawn(seed=0):
    q, k, _ = points(seed)
    return fs.feature_map(fs.fit(q[0], k[0]), 70, rng=seed)


def tensors(result):
    parts = result if isinstance(result, tuple) else (result,)
    return [x for part in parts for x in ([part] if torch.is_tensor(part) else [part.kv, part.z, part.c])]


@pytest.fixture
def planned(monkeypatch):
    """The calls that were not repeated: they made a `Tiles` or chose the cut of a token."""
    found = []
    for module, name in ((tiles.Tiles, "__init__"), (plain, "cut_of_decode")):
        kept = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, kept=kept, **o: (found.append(1), kept(*a, **o))[1])
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_repeated_call_is_one_made_anew(call, dtype, planned):
    fm = drawn()
    with fs.use("cuda"):
        first = tensors(call(*points(1, getattr(torch, dtype)), fm))
        kept = [x.clone() for x in first]
        planned.clear()
        repeated = tensors(call(*points(2, getattr(torch, dtype)), fm))
        assert not planned
        anew = tensors(call(*points(2, getattr(torch, dtype)), map_arrays(fm, torch.clone)))
        assert planned
    torch.testing.assert_close(repeated, anew, rtol=0, atol=0)
    torch.testing.assert_close(first, kept, rtol=0, atol=0)  # what the first call returned is not written again


def test_calls_with_one_tensor_in_two_places(planned):
    """Such a call does not show which address belongs to which argument, so later calls do not repeat it.

    It may itself repeat an earlier call.
    """
    q, k, v = points(3)
    with fs.use("reference"):
        want = [fs.linear_attention(*given, drawn()) for given in ((q, q, v), (q, k, v))]
    for order in ((0, 1), (1, 0)):
        fm = drawn()
        for i in order:
            with fs.use("cuda"):
                out = fs.linear_attention(*((q, q, v), (q, k, v))[i], fm)
            torch.testing.assert_close(out, want[i], rtol=1e-4, atol=1e-4)


LAYOUTS = {
    "whole": lambda q, k, v: (q, k, v),
    "transposed": lambda q, k, v: (q.mT.contiguous().mT, k, v),
    "negated when read": lambda q, k, v: (torch._neg_view(q), k, v),
    "fewer queries": lambda q, k, v: (q[:, :50], k, v),
    "wide": lambda q, k, v: (q.double(), k.double(), v.double()),
}


def test_a_repeated_call_notices_another_layout_and_a_changed_map():
    fm = map_arrays(drawn(), torch.clone)

    def compared(layout, **options):
        for seed in (4, 5):  # the second call is like the first
            given = layout(*points(seed))
            with fs.use("cuda"):
                out = fs.linear_attention(*given, fm, **options)
            with fs.use("reference"):
                torch.testing.assert_close(out, fs.linear_attention(*given, fm, **options), rtol=1e-4, atol=1e-4)

    for layout in LAYOUTS.values():
        compared(layout)
    compared(LAYOUTS["whole"], key_mask=torch.arange(N).expand(2, N) < 30)
    fm.rows.mul_(0.5)
    compared(LAYOUTS["whole"])


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"is_causal": True}], ids=str)
def test_a_result_over_an_argument_is_not_repeated_from_one_beside_it(options):
    fm = drawn()
    q, k, _ = points(6)
    v = points(7)[1]
    with fs.use("cuda"):
        want = fs.linear_attention(q, k, v, fm, out=torch.empty_like(q), **options).clone()
        for out in (q, k, v):
            given = [q, k, v]
            kept = [x.clone() for x in given]
            fs.linear_attention(*given, fm, out=out, **options)
            torch.testing.assert_close(out, want)
            for x, before in zip(given, kept, strict=True):
                x.copy_(before)


def test_another_stream_repeats_nothing(planned, monkeypatch):
    """There, the constants of the map may not be ready."""
    fm = drawn()
    for stream, repeats_it in ((1, False), (1, True), (2, False), (1, True)):
        monkeypatch.setattr(launch, "stream_of", lambda like, stream=stream: (stream, False))
        planned.clear()
        with fs.use("cuda"):
            fs.linear_attention(*points(1), fm)
        assert bool(planned) != repeats_it


def test_a_map_that_is_trained_is_never_kept(planned):
    fm = drawn()
    fm = replace(fm, rows=fm.rows.clone().requires_grad_())
    with fs.use("cuda"), torch.no_grad():
        for seed in (1, 2):
            planned.clear()
            fs.linear_attention(*points(seed), fm)
            assert planned


def test_kinds_of_calls_are_bounded():
    fm = drawn()
    with fs.use("cuda"):
        for n in range(1, repeats.MOST + 10):
            fs.linear_attention(*(x[:, :n] for x in points(5)), fm)
    assert len(repeats.derived(fm, "launches", dict)) <= repeats.MOST
