"""Refinement lowers the held-out error or leaves it as it is, and the map stays unbiased."""

import numpy as np
import pytest
from problems import attention_problem

torch = pytest.importorskip("torch")

import favorsharp as fs  # noqa: E402
from favorsharp.diagnostics import load_sample, relative_error  # noqa: E402
from favorsharp.torch import LinearAttention, refine  # noqa: E402
from favorsharp.torch.refinement import _Problem, _Steps, _trained  # noqa: E402

NAMES = ("a", "g1", "g2", "center_x", "center_y")


@pytest.fixture(scope="module", autouse=True)
def _reference():
    """Run the references: every new kind of call would be compiled, and gradients of the kernels have tests of their
    own."""
    with fs.use("reference"):
        yield


def heads(start, stop):
    """Part of the sample: q, k and v of three heads."""
    return tuple(torch.from_numpy(x[:3, start:stop].astype(np.float32)) for x in load_sample())


@pytest.fixture(scope="module")
def found():
    first = heads(0, 256)
    start = fs.fit(*first[:2])
    return start, refine(start, first, held_out=heads(256, 384), steps=100, num_features=32, rng=0)


def test_error_falls_on_tokens_that_nothing_has_seen(found):
    start, refined = found
    q, k, v = heads(384, 512)
    exact = fs.softmax_attention(q, k, v)
    before, after = (
        np.mean(
            [
                relative_error(fs.linear_attention(q, k, v, fs.feature_map(p, 32, rng=100 + seed)), exact).mean()
                for seed in range(8)
            ]
        )
        for p in (start, refined.parameters)
    )
    assert after < 0.9 * before
    assert refined.after.shape == (3,)
    assert bool((refined.after <= refined.before).all())
    assert [steps for steps, _, _ in refined.history] == list(range(10, 101, 10))


def test_refined_maps_are_unbiased():
    """The mean of many independent features is the kernel, at points that were not fitted."""
    q, k, v = (torch.from_numpy(x) for x in attention_problem(0, n=40, d=4))
    start = fs.fit(q, k)
    parameters = refine(start, [(q, k, v)] * 2, steps=40, num_features=16, rng=0).parameters
    moved = [float((getattr(parameters, name) - getattr(start, name)).abs().max()) for name in NAMES]
    assert min(moved) > 0.05
    torch.testing.assert_close(parameters.g1.T @ parameters.g2, torch.eye(4, dtype=q.dtype), atol=1e-12, rtol=0)
    x, y = torch.from_numpy(0.5 * np.random.default_rng(0).standard_normal((2, 3, 4)))
    fm = fs.feature_map(parameters, 200_000, draw="iid", rng=1)
    ratios = fm.num_features * fm.query(x)[:, None] * fm.key(y)[None] / fs.kernel_matrix(x, y)[..., None]
    error = (ratios.mean(-1) - 1).abs()
    assert bool((error < 5 * ratios.std(-1) / 200_000**0.5).all())
    assert error.max() < 0.05


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": 4}, {"is_causal": True, "window": 4}], ids=str)
def test_never_worse_with_masks_causal_and_windows(options):
    q, k, v = (torch.from_numpy(x) for x in attention_problem(0, (2, 3), n=24))
    mask = (torch.arange(24) < torch.tensor([24, 17])[:, None])[:, None]
    start = fs.fit(q, k, axis=(0, -2))
    start = type(start)(**{n: x[0] if isinstance(x, torch.Tensor) else x for n, x in vars(start).items()})
    refined = refine(start, [(q, k, v, mask)] * 3, steps=6, num_features=8, rng=0, learning_rate=1.0, **options)
    assert refined.before.shape == (3,)
    assert bool((refined.after <= refined.before).all())
    again = refine(start, [(q, k, v, mask)] * 3, steps=6, num_features=8, rng=0, learning_rate=1.0, **options)
    assert torch.equal(again.parameters.g1, refined.parameters.g1)


@pytest.mark.parametrize("filler", [50.0, None], ids=["large", "like data"])
def test_padding_has_no_influence(filler):
    """The padding has values of ordinary size, whose influence is harder to notice than that of large values."""
    q, k, v = (torch.from_numpy(x) for x in attention_problem(0, (2,), n=24))
    mask = torch.arange(24) < 16
    start = fs.fit(q[:, :16], k[:, :16])
    options = {"steps": 5, "num_features": 8, "rng": 0}
    short = refine(start, [tuple(x[:, :16] for x in (q, k, v))] * 2, **options)
    spoiled = (q, k, v) if filler is None else tuple(torch.where(mask[:, None], x, filler) for x in (q, k, v))
    padded = refine(start, [(*spoiled, mask)] * 2, **options)
    torch.testing.assert_close(padded.parameters.g1, short.parameters.g1)
    torch.testing.assert_close(padded.after, short.after)


def test_modules_take_the_result(found):
    start, refined = found
    q, k, v = heads(0, 256)
    module = LinearAttention(32, 3, num_features=16, rng=0).calibrate(q, k)
    module.set_parameters(refined.parameters)
    want = fs.linear_attention(q, k, v, fs.feature_map(refined.parameters, 16, rng=0))
    torch.testing.assert_close(module(q, k, v), want)
    assert not torch.equal(start.g1, refined.parameters.g1)
    assert torch.equal(fs.fit(q, k).g1, start.g1)  # not modified


def test_bad_arguments():
    q, k, v = (torch.from_numpy(x) for x in attention_problem(0, n=10))
    p = fs.fit(q, k)
    for call, error, message in (
        (lambda: refine(q, (q, k, v)), TypeError, r"parameters must be favorsharp.Parameters .*, got Tensor"),
        (lambda: refine(fs.fit(q, k, method="relu"), (q, k, v)), ValueError, "refine takes .* got 'relu'"),
        (lambda: refine(fs.fit(q.numpy(), k.numpy()), (q, k, v)), TypeError, "parameters must hold tensors"),
        (lambda: refine(p, (q, k)), TypeError, r"batches must hold tuples .*, got \(Tensor, Tensor\)"),
        (lambda: refine(p, []), ValueError, "batches holds no batch"),
        (lambda: refine(p, 3), TypeError, "batches must be a tuple"),
        (lambda: refine(p, (q[:1], k, v)), ValueError, "cut in half"),
        (lambda: refine(p, (q, k, v), steps=-1), ValueError, "steps must be an integer of 0 or more"),
        (lambda: refine(p, (q, k, v), learning_rate=0), ValueError, "learning_rate must be a positive number"),
        (lambda: refine(p, (q, k, 0 * v)), ValueError, "relative error is undefined"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_grouped_heads_have_a_mask_each():
    """Queries at padding do not count: query head h has the mask and map of key head h // g, shared by a batch."""
    q, k, v = (torch.from_numpy(x) for x in attention_problem(0, (2, 4), n=24))
    k, v = k[:, :2], v[:, :2]
    mask = torch.arange(24) < torch.tensor([[20], [11]])
    start = fs.fit(q[0], k[0], enable_gqa=True)
    options = {"steps": 3, "num_features": 8, "rng": 0}
    refined = refine(start, [(q, k, v, mask)] * 2, enable_gqa=True, **options)
    for head, length in enumerate((20, 11)):
        fields = {n: x[head : head + 1] if isinstance(x, torch.Tensor) else x for n, x in vars(start).items()}
        own = type(start)(**fields)
        pieces = (q[:, 2 * head : 2 * head + 2, :length], *(x[:, head : head + 1, :length] for x in (k, v)))
        alone = refine(own, [pieces] * 2, enable_gqa=True, **options)
        torch.testing.assert_close(refined.before[head], alone.before[0])
        torch.testing.assert_close(refined.parameters.g1[head], alone.parameters.g1[0])
        assert refined.after[head] < refined.before[head]


def test_a_stays_where_second_moments_are_finite():
    """A step that would make `a` positive ends at 0."""
    q, k, _ = (torch.from_numpy(x) for x in attention_problem(0, (3,), n=24))
    steps = _Steps(fs.fit(q, k))
    optimizer = torch.optim.SGD([steps.spread], lr=10.0)
    steps.spread.sum().backward()  # its descent raises `a`
    optimizer.step()
    assert float(steps.parameters().a.detach().max()) > 0
    steps.project()
    assert float(steps.parameters().a.detach().max()) == 0


def test_each_head_keeps_the_best_of_all_steps_that_were_checked():
    q, k, v = (torch.from_numpy(x) for x in attention_problem(0, (3,), n=24))
    start = fs.fit(q, k)
    problem = _Problem((q, k, v), start, {"is_causal": False, "window": 0, "enable_gqa": False})
    errors, checked = torch.tensor([[5, 5, 5], [4, 6, 5], [3, 7, 9], [6, 8, 1], [3, 9, 2]]).double(), []

    class Held:
        def error(self, parameters, draws):
            checked.append(parameters)
            return errors[len(checked) - 1]

    best, history = _trained(start, [problem], Held(), lambda: torch.randn(8, 8).double(), 4, 0.1)
    assert [error for _, _, error in history] == [float(error.mean()) for error in errors[1:]]
    for head, step in enumerate((2, 0, 3)):
        assert torch.equal(best.g1[head], checked[step].g1[head])
