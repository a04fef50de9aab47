"""Packed sequences on the CUDA backend take few launches, and equal separate calls, forward and backward."""

from itertools import pairwise

import numpy as np
import pytest
from host_module import SCHEDULES, scheduled
from problems import attention_problem, key_mask

import favorsharp as fs
from favorsharp._values import map_arrays
from favorsharp.dispatch import watch

pytestmark = [pytest.mark.own_backend, pytest.mark.usefixtures("used_on_host")]
pytest.importorskip("cupy")
from favorsharp_cuda.host import launch  # noqa: E402
from favorsharp_cuda.host.packed import Packing  # noqa: E402

RAGGED = [0, 0, 1, 14, 20, 20, 51, 52, 60]
EQUAL = [0, 20, 40, 60]
MODES = [(False, 0), (True, 0), (False, 5), (True, 16)]


@pytest.fixture
def launches(monkeypatch):
    """The kernels that are launched."""
    found = []
    run = launch.run
    for module in ("plain", "tiles", "attention_gradients"):
        monkeypatch.setattr(
            f"favorsharp_cuda.host.{module}.run",
            lambda name, *rest, **more: (found.append(name), run(name, *rest, **more)),
        )
    return found


def problem(dtype="float64", grouped=False):
    q, k, v = (x.astype(dtype) for x in attention_problem(3, (2, 4), n=60))
    if grouped:
        k, v = k[:, ::2], v[:, ::2]
    fitted = fs.fit(*(x.astype("float64") for x in (q, k)), enable_gqa=grouped)
    mask = key_mask(1, k.shape[:-1], "holes")
    return q, k, v, mask, map_arrays(fs.feature_map(fitted, 11, rng=0), lambda x: x.astype(dtype))


def pieces(run, bounds, arrays, mask, *rest, **options):
    return [
        run(*(x[..., a:b, :] for x in arrays), *rest, key_mask=mask[..., a:b], **options)
        for a, b in pairwise(bounds)
        if a < b
    ]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("bounds", [RAGGED, EQUAL], ids=["ragged", "equal"])
@pytest.mark.parametrize(("is_causal", "window"), MODES)
def test_packed_sequences_are_separate_ones(is_causal, window, bounds, grouped):
    *points, mask, feature_map = problem(grouped=grouped)
    options = {"is_causal": is_causal, "window": window, "enable_gqa": grouped}
    with watch() as calls:
        got = fs.linear_attention(*points, feature_map, cu_seqlens=bounds, key_mask=mask, **options)
    assert len(calls) == 1
    want = np.concatenate(pieces(fs.linear_attention, bounds, points, mask, feature_map, **options), axis=-2)
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_on_tensor_cores():
    *points, mask, feature_map = problem("float32")
    options = {"is_causal": True, "window": 16}
    for schedule in SCHEDULES:
        with scheduled(schedule):
            got = fs.linear_attention(*points, feature_map, cu_seqlens=RAGGED, key_mask=mask, **options)
    want = np.concatenate(pieces(fs.linear_attention, RAGGED, points, mask, feature_map, **options), axis=-2)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("bounds", [RAGGED, EQUAL], ids=["ragged", "equal"])
@pytest.mark.parametrize(("is_causal", "window"), [MODES[0], MODES[3]])
def test_pullbacks_of_packed_sequences(is_causal, window, bounds, grouped):
    *points, mask, feature_map = problem(grouped=grouped)
    gradient = np.random.default_rng(0).standard_normal((2, 4, 60, 5))
    options = {"is_causal": is_causal, "window": window, "enable_gqa": grouped, "of_map": True}

    def run(*given, **more):
        return fs.vjp("linear_attention", *given, **more)

    out, pullback = run(*points, feature_map, cu_seqlens=bounds, key_mask=mask, **options)
    found = pullback(gradient)
    alone = pieces(run, bounds, points, mask, feature_map, **options)
    spans = [(a, b) for a, b in pairwise(bounds) if a < b]
    backs = [back(gradient[..., a:b, :]) for (_, back), (a, b) in zip(alone, spans, strict=True)]
    np.testing.assert_allclose(out, np.concatenate([x for x, _ in alone], axis=-2), atol=1e-12)
    for i, x in enumerate(found):
        parts = [back[i] for back in backs]
        want = np.concatenate(parts, axis=-2) if i < 3 else sum(parts)
        np.testing.assert_allclose(x, want, atol=1e-11)


def test_autograd_of_packed_sequences():
    torch = pytest.importorskip("torch")
    *points, mask, feature_map = problem()
    leaves = [torch.asarray(x).requires_grad_() for x in points]
    feature_map, mask = map_arrays(feature_map, torch.asarray), torch.asarray(mask)
    options = {"is_causal": True, "window": 5}
    got = fs.linear_attention(*leaves, feature_map, cu_seqlens=RAGGED, key_mask=mask, **options)
    want = torch.cat(pieces(fs.linear_attention, RAGGED, leaves, mask, feature_map, **options), dim=-2)
    weights = torch.linspace(-1, 1, want.numel(), dtype=want.dtype).reshape(want.shape)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), leaves) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_what_is_not_finite_stays_in_its_sequence():
    q, k, v, _, feature_map = problem()
    q[..., 50, :], k[..., 51, :], v[..., 0, :] = np.nan, np.inf, np.nan  # ends of sequences, which pad them
    gradient = np.random.default_rng(0).standard_normal(v.shape)
    options = {"cu_seqlens": RAGGED, "is_causal": True}
    out, pullback = fs.vjp("linear_attention", q, k, v, feature_map, **options)
    for x in (out, *pullback(gradient)):
        others = np.r_[1:20, 52:60]
        assert np.isfinite(x[..., others, :]).all()


def test_calls_grow_with_the_digits_of_lengths_and_not_with_sequences(launches):
    *points, _, feature_map = problem()
    for bounds, calls in ((EQUAL, 1), (list(range(0, 61, 3)), 1), (list(range(61)), 1), (RAGGED, 4)):
        launches.clear()
        fs.linear_attention(*points, feature_map, cu_seqlens=bounds, is_causal=True)
        assert len(launches) == calls


def test_groups_hold_lengths_within_a_factor_of_two():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(0, 1 << rng.integers(1, 9), rng.integers(1, 40))
        packing = Packing([0, *np.cumsum(lengths).tolist()])
        assert sorted(x for group in packing.groups for x in group.lengths) == sorted(lengths[lengths > 0].tolist())
        assert all(2 * min(group.lengths) > group.length for group in packing.groups)
        assert len(packing.groups) <= max(1, int(lengths.max())).bit_length()
        x = np.arange(sum(lengths))[:, None]
        if x.size:
            assert np.array_equal(packing.together([group.taken(x) for group in packing.groups]), x)
