"""`LinearAttention`: calibrated once, then frozen; saved, moved, compiled and differentiated like any other module."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
from torch_samples import sample  # noqa: E402

import favorsharp as fs  # noqa: E402
from favorsharp.torch import LinearAttention  # noqa: E402


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": 8}, {"is_causal": True, "window": 8}], ids=str)
def test_is_linear_attention_with_one_fit_a_head(options):
    q, k, v = sample(2, 4, 50, 8)
    mask = torch.arange(50) < torch.tensor([50, 31])[:, None, None]
    module = LinearAttention(8, 4, num_features=16, rng=3, scale=0.5, **options).calibrate(q, k, key_mask=mask)
    parameters = fs.fit(q, k, axis=(0, -2), mask_x=mask, mask_y=mask, scale=0.5)
    want = fs.linear_attention(q, k, v, fs.feature_map(parameters, 16, rng=3), key_mask=mask, **options)
    torch.testing.assert_close(module(q, k, v, mask), want)


def test_one_fit_for_all_heads():
    q, k, v = sample(2, 4, 50, 8)
    module = LinearAttention(8, num_features=16, rng=3).calibrate(q, k)
    fm = fs.feature_map(fs.fit(q.reshape(-1, 8), k.reshape(-1, 8)), 16, rng=3)
    torch.testing.assert_close(module(q, k, v), fs.linear_attention(q, k, v, fm))


def test_grouped_heads():
    q, k, v = sample(2, 4, 50, 8)
    k, v = k[:, :2], v[:, :2]
    module = LinearAttention(8, 2, num_features=16, rng=3, enable_gqa=True).calibrate(q, k)
    fm = fs.feature_map(fs.fit(q, k, axis=(0, -2), enable_gqa=True), 16, rng=3)
    torch.testing.assert_close(module(q, k, v), fs.linear_attention(q, k, v, fm, enable_gqa=True))


def test_calibration_on_moments_of_several_batches():
    q, k, v = sample(4, 4, 50, 8)
    parts = [fs.moments(q[i : i + 2], k[i : i + 2], axis=(0, -2)) for i in (0, 2)]
    one = LinearAttention(8, 4, num_features=16, rng=0).calibrate(fs.combine(*parts))
    two = LinearAttention(8, 4, num_features=16, rng=0).calibrate(q, k)
    torch.testing.assert_close(one(q, k, v), two(q, k, v), rtol=1e-4, atol=1e-5)


def test_calibration_on_pairs_by_their_attention():
    q, k, v = sample(2, 4, 50, 8)
    module = LinearAttention(8, 4, num_features=16, rng=0).calibrate(q, k, weighting=1.0, is_causal=True)
    fm = fs.feature_map(fs.fit(q, k, axis=(0, -2), weighting=1.0, is_causal=True), 16, rng=0)
    torch.testing.assert_close(module(q, k, v), fs.linear_attention(q, k, v, fm))


def test_uncalibrated_is_refused_and_posrf_is_ready():
    q, k, v = sample(2, 4, 50, 8)
    with pytest.raises(RuntimeError, match=r"LinearAttention .*'optimal' is not calibrated: call calibrate\(q, k\)"):
        LinearAttention(8, 4)(q, k, v)
    fm = fs.feature_map(fs.fit(q, k, method="posrf"), 16, rng=0)
    ready = LinearAttention(8, 4, method="posrf", num_features=16, rng=0)
    torch.testing.assert_close(ready(q, k, v), fs.linear_attention(q, k, v, fm))


@pytest.mark.parametrize("training", [True, False])
def test_calls_are_deterministic_and_change_nothing(attention, training):
    q, k, v = sample(2, 4, 50, 8)
    attention.train(training)
    before = copy.deepcopy(attention.state_dict())
    out = attention(q, k, v)
    assert torch.equal(attention(q, k, v), out)
    for name, value in attention.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"method": "posrf"}], ids=str)
def test_what_inference_mode_made_can_be_trained_with(options):
    """A training loop may run validation first, and calibrate or redraw inside inference mode."""
    q, k, v = sample(2, 4, 50, 8)
    module = LinearAttention(8, 4, num_features=16, rng=0, **options)
    for change in (lambda: module.calibrate(q, k), lambda: None, lambda: module.redraw(1)):
        with torch.inference_mode():
            change()
            out = module(q, k, v)
        x = q.clone().requires_grad_()
        trained = module(x, k, v)
        torch.testing.assert_close(trained, out)
        trained.sum().backward()
        assert x.grad.abs().max() > 0


def test_redraw_is_explicit_and_seeded(attention):
    q, k, v = sample(2, 4, 50, 8)
    old, parameters = attention(q, k, v), attention.g1.clone()
    new = attention.redraw(7)(q, k, v)
    assert (new - old).abs().max() > 1e-3
    assert torch.equal(attention.g1, parameters)
    assert torch.equal(attention.redraw(0)(q, k, v), old)
    torch.manual_seed(5)
    first = LinearAttention(8).projection
    torch.manual_seed(5)
    assert torch.equal(LinearAttention(8).projection, first)


@pytest.mark.parametrize("calibrated", [True, False])
def test_state_dict_round_trip(attention, calibrated):
    """The state dict loads into a module with other rows, whether that module is calibrated or not."""
    q, k, v = sample(2, 4, 50, 8)
    other = LinearAttention(8, 4, num_features=16, rng=1)
    if calibrated:
        other.calibrate(k, q)
    other.load_state_dict(attention.state_dict())
    assert torch.equal(other(q, k, v), attention(q, k, v))


def test_state_dict_loads_after_a_call(attention):
    """After loading, the map that calls share is made anew."""
    q, k, v = sample(2, 4, 50, 8)
    other = LinearAttention(8, 4, num_features=16, rng=1).calibrate(k, q)
    other(q, k, v), other.feature_map.fingerprint
    other.load_state_dict(attention.state_dict())
    assert torch.equal(other(q, k, v), attention(q, k, v))
    assert other.feature_map.fingerprint == attention.feature_map.fingerprint


def test_state_dicts_that_do_not_fit_are_refused(attention):
    earlier = {"projection": attention.projection}  # of an earlier version, not calibrated
    with pytest.raises(RuntimeError, match=r"Missing key.*g1"):
        attention.load_state_dict(earlier)
    other = LinearAttention(8, 2, num_features=16)
    with pytest.raises(RuntimeError, match="size mismatch for g1"):
        other.load_state_dict(attention.state_dict())


def test_copies_and_pickles(attention):
    q, k, v = sample(2, 4, 50, 8)
    out = attention(q, k, v)
    copied, pickled = copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))
    attention.redraw(9)
    for other in (copied, pickled):
        assert torch.equal(other(q, k, v), out)


def test_half_precision_keeps_the_map(attention):
    q, k, v = sample(2, 4, 50, 8)
    want = attention(q, k, v)
    for dtype in (torch.float16, torch.bfloat16):
        module = copy.deepcopy(attention).to(dtype)
        assert {x.dtype for x in module.buffers()} == {torch.float32}
        out = module(q.to(dtype), k.to(dtype), v.to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), want, atol=0.03, rtol=0.03)
    assert copy.deepcopy(attention).double().g1.dtype == torch.float64
    assert copy.deepcopy(attention).to("meta").g1.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_features(attention, dtype):
    q, k, v = (x.requires_grad_() for x in sample(2, 4, 50, 8))
    with fs.use("reference"):  # made of products that autocast would compute in half precision
        want = attention(q, k, v)
        with torch.autocast("cpu", dtype):
            out = attention(q, k, v)
            assert attention(q.to(dtype), k.to(dtype), v.to(dtype)).dtype == dtype
    torch.testing.assert_close(out, want)
    out.sum().backward()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in (q, k, v))


def test_gradients(attention):
    q, k, v = (x.double().requires_grad_() for x in sample(1, 4, 6, 8))
    module = copy.deepcopy(attention).double()
    assert torch.autograd.gradcheck(module, (q, k, v))


def test_stream_equals_the_causal_call(attention):
    q, k, v = sample(2, 4, 20, 8)
    attention.is_causal = True
    whole = attention(q, k, v)
    out, state = attention(q[:, :, :19], k[:, :, :19], v[:, :, :19], return_state=True)
    token, _ = fs.decode_step(q[:, :, 19:], k[:, :, 19:], v[:, :, 19:], state, attention.feature_map)
    torch.testing.assert_close(torch.cat([out, token], dim=2), whole)


@pytest.mark.slow
def test_export_and_compile(attention):
    """There is one graph, with the map's numbers as inputs, so a module that is calibrated again needs no new graph."""
    q, k, v = sample(2, 4, 50, 8)
    exported = torch.export.export(attention, (q, k, v)).module()
    torch.testing.assert_close(exported(q, k, v), attention(q, k, v))
    assert {name for name, _ in exported.named_buffers()} == {name for name, _ in attention.named_buffers()}
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))
    attention.calibrate(k, q).redraw(3)
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "shape"), [(0, (3, 4, 50, 8)), (2, (2, 4, 77, 8))], ids=["batch", "length"])
def test_export_with_a_symbolic_size(attention, axis, shape):
    sizes = {axis: torch.export.Dim("size", min=2, max=1024)}
    exported = torch.export.export(attention, sample(2, 4, 50, 8), dynamic_shapes=dict.fromkeys("qkv", sizes))
    with fs.use("reference"):
        torch.testing.assert_close(exported.module()(*sample(*shape)), attention(*sample(*shape)))


def made_of_landmarks(num_features=6, **options):
    return LinearAttention(8, 2, method="landmarks", num_features=num_features, rng=3, **options)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": 8}, {"is_causal": True, "window": 8}], ids=str)
def test_landmarks_are_linear_attention_with_their_settings(options):
    q, k, v = sample(2, 4, 50, 8)
    k, v = k[:, :2], v[:, :2]
    mask = torch.arange(50) < torch.tensor([50, 31])[:, None, None]
    module = made_of_landmarks(scale=0.5, enable_gqa=True, **options)
    lm = fs.landmarks(6, scale=0.5, rng=3)
    assert module.feature_map == lm
    assert module.is_calibrated
    want = fs.linear_attention(q, k, v, lm, key_mask=mask, enable_gqa=True, **options)
    torch.testing.assert_close(module(q, k, v, mask), want)


def test_landmarks_continue_streams_and_packed_sequences():
    q, k, v = sample(2, 50, 8)
    module = made_of_landmarks(is_causal=True, window=4)
    first, state = module(q[:, :30], k[:, :30], v[:, :30], return_state=True)
    second = module(q[:, 30:], k[:, 30:], v[:, 30:], state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), module(q, k, v), rtol=1e-5, atol=1e-5)
    packed = module(q, k, v, cu_seqlens=[0, 30, 50])
    torch.testing.assert_close(packed[:, 30:], module(q[:, 30:], k[:, 30:], v[:, 30:]))


def test_landmarks_need_no_buffers():
    q, k, v = sample(2, 2, 50, 8)
    module = made_of_landmarks(window=4)
    assert not module.state_dict()
    assert not list(module.buffers())
    want = module(q, k, v)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.to("meta").to_empty(device="cpu")):
        assert torch.equal(other(q, k, v), want)
    module.reset_parameters()
    module.load_state_dict({}, strict=True)
    with pytest.raises(RuntimeError, match="projection"):
        module.load_state_dict(LinearAttention(8, 2, num_features=6).state_dict())
    assert torch.equal(module(q, k, v), want)
    assert "landmarks" in repr(module)


def test_landmarks_have_no_map_to_change(attention):
    module = made_of_landmarks()
    q, k, _ = sample(2, 2, 50, 8)
    changes = {
        "calibrate": lambda: module.calibrate(q, k),
        "redraw": module.redraw,
        "set_parameters": lambda: module.set_parameters(fs.fit(q, k)),
    }
    for name, change in changes.items():
        with pytest.raises(ValueError, match=f"{name} changes a map.*chosen anew"):
            change()
    with pytest.raises(ValueError, match="takes no draw"):
        made_of_landmarks(draw="iid")


def test_landmarks_carry_gradients_and_dtypes():
    q, k, v = (x.double().requires_grad_() for x in sample(2, 2, 12, 8))
    module = made_of_landmarks(20)
    got = torch.autograd.grad(module(q, k, v).square().sum(), (q, k, v))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for a, b in zip(got, torch.autograd.grad(exact.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)
    few = made_of_landmarks(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(few(q, k, v), fs.linear_attention(q, k, v, few.feature_map))
    assert few(*(x.bfloat16() for x in (q, k, v))).dtype == torch.bfloat16


@pytest.mark.slow
def test_landmarks_compile():
    q, k, v = (x.requires_grad_() for x in sample(1, 2, 14, 8))
    module = made_of_landmarks(3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got, want = compiled(q, k, v), module(q, k, v)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_bad_arguments():
    q, k, _ = sample(2, 4, 50, 8)
    for options, error, message in (
        ({"method": "trig"}, ValueError, "'trig' has signed features"),
        ({"method": "best"}, ValueError, "method 'best' is unknown; accepted: posrf"),
        ({"draw": "random"}, ValueError, "draw 'random' is unknown; accepted: iid"),
        ({"draw": torch.ones(3, 8)}, ValueError, r"draw has shape \(3, 8\); accepted: \(m, d\) = \(256, 8\)"),
        ({"num_features": 0}, ValueError, "num_features must be an integer of 1 or more, got 0"),
        ({"scale": -1.0}, ValueError, "scale must be a positive finite number"),
        ({"is_causal": q}, TypeError, "is_causal must be True or False"),
        ({"enable_gqa": 1}, TypeError, "enable_gqa must be True or False"),
        ({"window": -1}, ValueError, "window must be an integer of 0 or more"),
        ({"rng": "seed"}, TypeError, "rng must be None, an int"),
    ):
        with pytest.raises(error, match=message):
            LinearAttention(8, **options)
    with pytest.raises(TypeError, match="q must be a torch tensor, got ndarray"):
        LinearAttention(8, method="posrf")(q.numpy(), q, q)
    module = LinearAttention(8, 3)
    with pytest.raises(ValueError, match=r"k has shape \(2, 4, 50, 8\); accepted: .*3, s, d"):
        module.calibrate(q, k)
    with pytest.raises(TypeError, match="q must be a torch tensor, got ndarray"):
        module.calibrate(q.numpy(), k.numpy())
    with pytest.raises(ValueError, match="not finite"):
        LinearAttention(8, 4).calibrate(q * torch.nan, k)
    with pytest.raises(ValueError, match=r"leading axes \(2, 4\); accepted: \(4,\)"):
        LinearAttention(8, 4).calibrate(fs.moments(q, k))
    with pytest.raises(ValueError, match="method 'optimal'"):
        LinearAttention(8, 4).set_parameters(fs.fit(q[0], k[0], method="sderf"))
    with pytest.raises(ValueError, match="given its rows as an array"):
        LinearAttention(8, num_features=16, draw=torch.randn(16, 8)).redraw(0)
