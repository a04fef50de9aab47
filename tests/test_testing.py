"""`check_backend` finds wrong kernels, and accepts the loopback backend."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from favorsharp import dispatch
from favorsharp._values import map_arrays
from favorsharp.testing import cases, check_backend

pytestmark = pytest.mark.own_backend


@pytest.mark.slow
def test_loopback_passes_on_numpy_and_torch():
    import favorsharp_loopback

    before = sum(favorsharp_loopback.calls.values())
    rows = check_backend("loopback", libraries=["numpy", "torch"])
    assert {row.op for row in rows} == {op for op in dispatch.OPS if not op.endswith("_vjp")}
    assert {row.dtype for row in rows} == {"float16", "bfloat16", "float32", "float64"}
    assert sum(favorsharp_loopback.calls.values()) == before + len(rows)


@pytest.mark.parametrize("op", ["attention", "read", "exponential_features"])
def test_a_wrong_kernel_is_found(monkeypatch, op):
    import favorsharp_loopback

    def wrong(*args, **kwargs):
        return dispatch.OPS[op].reference(*args, **kwargs) * (1 + 1e-4)

    monkeypatch.setattr(favorsharp_loopback, op, wrong, raising=False)
    dispatch.rediscover()
    with pytest.raises(AssertionError, match=f"{op}, case .*numpy float.*error .* is above"):
        check_backend("loopback", ops=[op], libraries=["numpy"])
    monkeypatch.undo()
    dispatch.rediscover()


def test_every_op_has_cases():
    for op in dispatch.OPS:
        if op.endswith("_vjp"):
            continue  # check_backend compares gradients; below
        assert len({case.name for case in cases(op)}) == len(cases(op)) > 2
    with pytest.raises(ValueError, match="op 'softmax' has no cases"):
        cases("softmax")


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="backend 'triton' is unknown; known: "):
        check_backend("triton")
    with pytest.raises(ValueError, match="nothing to compare"):
        check_backend("loopback", ops=["no such op"])


def test_cases_are_the_same_problem_in_every_dtype():
    q16 = cases("attention")[0].make(lambda host: np.asarray(host, np.float16))[0][0]
    q64 = cases("attention")[0].make(lambda host: np.asarray(host, np.float64))[0][0]
    np.testing.assert_array_equal(q16, q64)


def a_backend(monkeypatch, **functions):
    """The loopback backend with some functions replaced, and kernels that declare the options of these functions."""
    import favorsharp_loopback

    for name, function in functions.items():
        monkeypatch.setattr(favorsharp_loopback, name, function, raising=False)
    op = next(iter(functions))
    declared = {
        "packed": f"favorsharp_loopback:{op}_packed" if f"{op}_packed" in functions else None,
        "plan": f"favorsharp_loopback:{op}_plan" if f"{op}_plan" in functions else None,
        "takes_out": op == "attention",
    }
    kernel = dispatch.Kernel(
        op, f"favorsharp_loopback:{op}", {"numpy"}, {"cpu"}, {"float64"}, differentiable=True, **declared
    )
    monkeypatch.setattr(favorsharp_loopback, "BACKEND", dispatch.Backend("loopback", kernels=(kernel,)))
    dispatch.rediscover()


@pytest.fixture
def found_again():
    yield
    dispatch.rediscover()


def attention(q, k, v, own_map, *, key_mask=None, window=0, out=None):
    result = dispatch.OPS["attention"].reference(q, k, v, own_map, key_mask=key_mask, window=window)
    if out is None:
        return result
    out[...] = result
    return out


def packed(q, k, v, own_map, bounds, *, key_mask=None, **options):
    pieces = []
    for a, b in itertools.pairwise(bounds):
        mask = None if key_mask is None else key_mask[..., a:b]
        pieces.append(attention(q[..., a:b, :], k[..., a:b, :], v[..., a:b, :], own_map, key_mask=mask, **options))
    return np.concatenate(pieces, axis=-2)


@pytest.mark.parametrize("fault", ["none", "out", "packed"])
def test_out_and_packed_sequences_are_compared(monkeypatch, found_again, fault):
    def wrong_out(*args, out=None, **options):
        return attention(*args, **options) if out is None else out * 0 + 1

    functions = {
        "attention": wrong_out if fault == "out" else attention,
        "attention_packed": (lambda *args, **options: packed(*args, **options) + 1) if fault == "packed" else packed,
    }
    a_backend(monkeypatch, **functions)
    if fault == "none":
        names = {row.case for row in check_backend("loopback")}
        assert {"plain, window 0", "plain, window 0 (out)", "plain, window 0 (packed)"} <= names
    else:
        with pytest.raises(AssertionError, match=rf"attention, case .* \({fault}\)|float64 \({fault}\): error"):
            check_backend("loopback")


@pytest.mark.parametrize("off", [0.0, 1e-4])
def test_plans_are_compared(monkeypatch, found_again, off):
    step = dispatch.OPS["decode_step"].reference

    def planned(*args, **options):
        out, state = step(*args, **options)
        return out + off, state

    a_backend(monkeypatch, decode_step=step, decode_step_plan=lambda *args: planned)
    if off:
        with pytest.raises(AssertionError, match=r"\(plan\): error .* is above"):
            check_backend("loopback")
    else:
        assert "plain, window 0 (plan)" in {row.case for row in check_backend("loopback")}


def test_masks_of_recent_keys_are_compared(monkeypatch, found_again):
    update = dispatch.OPS["update"].reference

    def forgetful(*args, **options):
        state = update(*args, **options)
        return replace(state, recent_mask=np.ones_like(state.recent_mask))

    a_backend(monkeypatch, update=forgetful)
    with pytest.raises(AssertionError, match="update, case .*window 5.*error .* is above"):
        check_backend("loopback")


@pytest.mark.parametrize("off", [1.0, 1.01])
@pytest.mark.parametrize("op", [op for op in dispatch.OPS if op.endswith("_vjp")])
def test_gradients_are_compared(monkeypatch, found_again, op, off):
    torch = pytest.importorskip("torch")

    def tensors(args):
        return [torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray) else map_arrays(x, torch.from_numpy)
                for x in args]  # fmt: skip

    def by_torch(*args, key_mask=None, **options):
        masked = {} if key_mask is None else {"key_mask": torch.from_numpy(key_mask)}
        out, pullback = dispatch.OPS[op].reference(*tensors(args), **masked, **options)

        def own_pullback(gradient):
            *others, last = pullback(torch.from_numpy(gradient))
            return (*(x.numpy() for x in others), off * last.numpy())

        return out.numpy(), own_pullback

    a_backend(monkeypatch, **{op: by_torch})
    if off == 1:
        assert any(row.case.endswith("(gradients)") for row in check_backend("loopback"))
    else:
        with pytest.raises(AssertionError, match=r"\(gradients\): error .* is above"):
            check_backend("loopback")
