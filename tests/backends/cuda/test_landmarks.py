"""The kernel that draws seeds, compared with the reference; and landmarks with torch's tensors."""

import numpy as np
import pytest
from host_module import SCHEDULES, HostModule, scheduled

import favorsharp as fs
from favorsharp.ops.landmark_seeds import draw_seeds

pytestmark = pytest.mark.own_backend
pytest.importorskip("favorsharp_cuda")
from favorsharp_cuda import landmarks  # noqa: E402


def candidates(rng, batch, slots, d, dtype):
    """Some slots without a candidate, and equal candidates with the largest score, of which the first is drawn."""
    points, logs = rng.standard_normal((*batch, slots, d)), rng.gumbel(size=(*batch, slots))
    if slots > 9:
        logs[..., 3] = -np.inf
        points[..., [7, slots - 1], :] = points[..., 8:9, :]
        logs[..., [7, 8, slots - 1]] = 20.0
    return points.astype(dtype), logs.astype(dtype)


@pytest.mark.usefixtures("used_on_host")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("batch", "slots", "d", "m"), [((), 1, 1, 3), ((2, 3), 40, 5, 50), ((0,), 8, 3, 2), ((2,), 600, 17, 12)]
)
def test_seeds_are_those_of_the_reference(rng, batch, slots, d, m, dtype):
    given = candidates(rng, batch, slots, d, dtype)
    want = draw_seeds(*given, num_seeds=m)
    for schedule in SCHEDULES:
        with scheduled(schedule):
            got = landmarks.drawn(*given, num_seeds=m)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("used_on_host")
def test_scores_that_are_no_numbers_give_places_that_exist(rng):
    points, _ = candidates(rng, (), 20, 4, "float32")
    picks, used = landmarks.drawn(points, np.full(20, np.nan, "float32"), num_seeds=3)
    assert not used.any()
    assert (picks == 0).all()


@pytest.mark.usefixtures("used_on_host")
def test_more_candidates_than_a_block_holds_are_drawn_by_arrays(rng, monkeypatch):
    given = candidates(rng, (2,), 40, 5, "float32")
    want = landmarks.drawn(*given, num_seeds=6)
    monkeypatch.setattr(HostModule, "shared_limit", 512)
    monkeypatch.setattr(landmarks, "run", None)
    for a, b in zip(landmarks.drawn(*given, num_seeds=6), want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("torch_on_host")
def test_calls_of_torch_choose_by_the_kernel(monkeypatch):
    """This holds for calls that record gradients, too."""
    torch = pytest.importorskip("torch")
    numbers = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((2, 2, 90, 8), generator=numbers, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    lm, launched = fs.landmarks(7), []

    def results():
        out, state = fs.linear_attention(q, k, v, lm, is_causal=True, return_state=True)
        out = out + fs.linear_attention(q, k, v, lm) + fs.linear_attention(q, k, v, lm, window=4)
        return out.detach(), state.keys.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))

    with fs.use("reference"):
        want = results()
    run = landmarks.run
    monkeypatch.setattr(landmarks, "run", lambda *args: launched.append(args[0]) or run(*args))
    with fs.use("cuda", "reference"):
        got = results()
    assert len(launched) >= 3
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
