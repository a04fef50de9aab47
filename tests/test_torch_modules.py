"""Modules: calibrated once, then frozen; saved, moved, compiled and differentiated like any other."""

import copy
import gc
import pickle
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import favorsharp as fs  # noqa: E402
from favorsharp.torch import LinearAttention, MultiheadAttention  # noqa: E402


def sample(*shape, seed=0):
    """Queries, keys and values with means."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, *shape, generator=generator)
    return q + 0.3, k - 0.2, v


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def attention():
    q, k, _ = sample(2, 4, 50, 8)
    return LinearAttention(8, 4, num_features=16, rng=0).calibrate(q, k)


# LinearAttention -----------------------------------------------------------------------------------------------------


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
    """A loop validates before it trains, and may calibrate and draw again there."""
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
    """Into a module with other rows, whether it has parameters already or not."""
    q, k, v = sample(2, 4, 50, 8)
    other = LinearAttention(8, 4, num_features=16, rng=1)
    if calibrated:
        other.calibrate(k, q)
    other.load_state_dict(attention.state_dict())
    assert torch.equal(other(q, k, v), attention(q, k, v))


def test_state_dict_loads_after_a_call(attention):
    """The frozen map that calls share is made anew."""
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
    with fs.use("reference"):  # made of products that autocast would take
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
    """One graph, with the map's numbers as inputs: a module that is calibrated again needs no new graph."""
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


# MultiheadAttention --------------------------------------------------------------------------------------------------

KINDS = [
    {"batch_first": True},
    {"bias": False},
    {"kdim": 20, "vdim": 12, "batch_first": True},
    {"add_bias_kv": True, "batch_first": True},
    {"add_zero_attn": True},
    {"dtype": torch.float64},
]


def inputs(options, n=30, s=30):
    """Query, key and value in the layout of a module with these options."""
    torch.manual_seed(0)
    made = [
        torch.randn(2, length, width, dtype=options.get("dtype"))
        for length, width in ((n, 32), (s, options.get("kdim", 32)), (s, options.get("vdim", 32)))
    ]
    return made if options.get("batch_first") else [x.transpose(0, 1) for x in made]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_exact_is_torch_with_its_weights(options, masked):
    theirs = torch.nn.MultiheadAttention(32, 4, **options)
    ours = MultiheadAttention(32, 4, **options, method="exact")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    mask = torch.arange(30) >= torch.tensor([30, 17])[:, None] if masked else None
    given = inputs(options)
    torch.testing.assert_close(
        ours(*given, key_padding_mask=mask)[0], theirs(*given, key_padding_mask=mask, need_weights=False)[0]
    )


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_features_approach_torch(options):
    theirs = torch.nn.MultiheadAttention(32, 4, **options)
    ours = MultiheadAttention.from_torch(theirs, num_features=2048, rng=0)
    given = inputs(options, n=25)
    want = theirs(*given, need_weights=False)[0]
    out, weights = ours.calibrate(*given[:2])(*given)
    assert weights is None
    assert out.dtype == want.dtype
    assert (out - want).norm() < 0.2 * want.norm()


def test_same_initial_weights_as_torch():
    torch.manual_seed(3)
    theirs = torch.nn.MultiheadAttention(32, 4, add_bias_kv=True)
    torch.manual_seed(3)
    ours = MultiheadAttention(32, 4, add_bias_kv=True, method="exact")
    for name, weight in theirs.state_dict().items():
        assert ours.state_dict()[name].shape == weight.shape
        assert abs(float(ours.state_dict()[name].std()) - float(weight.std())) < 0.02


@pytest.mark.parametrize("masked", [False, True])
def test_as_many_landmarks_as_keys_are_torch(masked):
    exact = torch.nn.MultiheadAttention(16, 2, batch_first=True, add_zero_attn=masked)
    landmarks = MultiheadAttention.from_torch(exact, method="landmarks", num_features=13)
    assert landmarks.state_dict().keys() == exact.state_dict().keys()
    x = torch.randn(2, 12, 16)
    mask = torch.arange(12) >= torch.tensor([12, 9])[:, None] if masked else None
    got, want = (module(x, x, x, key_padding_mask=mask, need_weights=False)[0] for module in (landmarks, exact))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="calibrate changes a map"):
        landmarks.calibrate(x)


def test_masks_of_torch():
    """Causal masks in each of torch's forms; floating padding; unbatched inputs; padding without influence."""
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    exact = MultiheadAttention.from_torch(theirs, method="exact")
    x = inputs({"batch_first": True})[0]
    square = torch.nn.Transformer.generate_square_subsequent_mask(30)
    want = theirs(x, x, x, attn_mask=square, need_weights=False)[0]
    for mask in (square, square < 0, (square < 0).expand(8, 30, 30)):
        for is_causal in (False, True):
            torch.testing.assert_close(exact(x, x, x, attn_mask=mask, is_causal=is_causal)[0], want)
    torch.testing.assert_close(exact(x, x, x, is_causal=True)[0], want)
    torch.testing.assert_close(exact(x, x, x, attn_mask=torch.zeros(30, 30))[0], exact(x, x, x)[0])
    torch.testing.assert_close(exact(x[0], x[0], x[0])[0], exact(x, x, x)[0][0])
    padding = torch.arange(30) >= torch.tensor([30, 17])[:, None]
    additive = torch.zeros(2, 30).masked_fill(padding, -torch.inf)
    linear = MultiheadAttention.from_torch(theirs, num_features=32, rng=0).calibrate(x, key_padding_mask=padding)
    out = linear(x, x, x, key_padding_mask=padding)[0]
    torch.testing.assert_close(linear(x, x, x, key_padding_mask=additive)[0], out)
    torch.testing.assert_close(linear(x[1, :17], x[1, :17], x[1, :17])[0], out[1, :17])
    spoiled = x.masked_fill(padding[..., None], 1e3)
    again = MultiheadAttention.from_torch(theirs, num_features=32, rng=0).calibrate(spoiled, key_padding_mask=padding)
    torch.testing.assert_close(again(spoiled, spoiled, spoiled, key_padding_mask=padding)[0][1, :17], out[1, :17])


def test_causal_features_do_not_see_the_future():
    x = inputs({"batch_first": True})[0]
    module = MultiheadAttention(32, 4, batch_first=True, num_features=32, rng=0, window=8).calibrate(x)
    out = module(x, x, x, is_causal=True)[0]
    changed = torch.cat([x[:, :20], -x[:, 20:]], dim=1)
    assert torch.equal(module(changed, changed, changed, is_causal=True)[0][:, :20], out[:, :20])


def test_inside_an_encoder_layer_of_torch():
    """In evaluation torch's layer computes exact attention by itself, past any module that looks like its own."""
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = inputs({"batch_first": True})[0]
    with torch.no_grad():
        exact = layer(x)
        layer.self_attn = MultiheadAttention.from_torch(layer.self_attn, dropout=0.0, num_features=8, rng=0).calibrate(
            x
        )
        padding = torch.zeros(2, 30, dtype=torch.bool)
        out = layer(x)
        torch.testing.assert_close(layer(x, src_key_padding_mask=padding), out)
        causal = layer(x, src_mask=torch.nn.Transformer.generate_square_subsequent_mask(30), is_causal=True)
    with torch.enable_grad():
        torch.testing.assert_close(layer(x), out)
    assert (out - exact).abs().max() > 1e-3
    assert (out - causal).abs().max() > 1e-3


def test_state_dict_of_the_whole_module():
    x = inputs({"batch_first": True})[0]
    one = MultiheadAttention(32, 4, batch_first=True, num_features=16, rng=0).calibrate(x)
    two = MultiheadAttention(32, 4, batch_first=True, num_features=16, rng=1)
    two.load_state_dict(one.state_dict())
    assert torch.equal(two(x, x, x)[0], one(x, x, x)[0])
    rows = one.attention.projection.clone()
    one.load_state_dict(torch.nn.MultiheadAttention(32, 4).state_dict())
    assert torch.equal(one.attention.projection, rows)
    with pytest.raises(RuntimeError, match=r"Missing key.*in_proj_weight"):
        one.load_state_dict({})


def test_training_under_autocast():
    """Weights get finite gradients, and the loss falls."""
    x = inputs({"batch_first": True})[0]
    module = MultiheadAttention(32, 4, batch_first=True, num_features=16, rng=0).calibrate(x)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16), fs.use("reference"):
            out = module(x, x, x)[0]
            assert out.dtype == torch.bfloat16
            loss = (out.float() - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_multihead_compiles_in_half_precision():
    x = inputs({"batch_first": True})[0].bfloat16()
    module = MultiheadAttention(32, 4, batch_first=True, num_features=16, rng=0).calibrate(x.float()).bfloat16()
    padding = torch.arange(30) >= torch.tensor([30, 17])[:, None]
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    got = compiled(x, x, x, key_padding_mask=padding, is_causal=True)[0]
    torch.testing.assert_close(got, module(x, x, x, key_padding_mask=padding, is_causal=True)[0], atol=0.02, rtol=0.02)


def test_multihead_refuses_what_it_cannot_do():
    x = inputs({"batch_first": True})[0]
    module = MultiheadAttention(32, 4, batch_first=True, method="posrf")
    for call, message in (
        (lambda: module(x, x, x, need_weights=True), "need_weights=True: attention weights never exist here"),
        (lambda: module(x, x, x, attn_mask=torch.eye(30).bool()), "attn_mask is neither causal nor empty"),
        (lambda: module(x, x, x, attn_mask=torch.eye(30)), "attn_mask holds numbers other than 0 and -inf"),
        (lambda: module(x, x, x, attn_mask=torch.eye(30).bool(), is_causal=True), "neither causal nor empty"),
        (lambda: module(x, x, x, key_padding_mask=torch.ones(2, 30)), "key_padding_mask holds numbers other than"),
        (lambda: module(x, x, x, key_padding_mask=torch.ones(3, 30).bool()), r"accepted: \(batch, s\) = \(2, 30\)"),
        (lambda: module(x[..., :5], x, x), r"query has shape \(2, 30, 5\); accepted: .* the last of 32"),
        (lambda: MultiheadAttention(32, 4, dropout=0.1), "dropout acts on attention weights"),
        (lambda: MultiheadAttention(32, 5), "embed_dim must be a multiple of num_heads, got 32 and 5"),
        (lambda: MultiheadAttention(32, 4, method="exact", window=4), "window is for features"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    extra = MultiheadAttention(32, 4, batch_first=True, method="posrf", add_zero_attn=True)
    with pytest.raises(ValueError, match="keys without a position"):
        extra(x, x, x, is_causal=True)
    with pytest.raises(TypeError, match=r"module must be a torch.nn.MultiheadAttention, got Linear"):
        MultiheadAttention.from_torch(torch.nn.Linear(2, 2))


# Memory, checkpoints and averages ------------------------------------------------------------------------------------

KINDS_OF_MODULE = {
    "attention": lambda **options: LinearAttention(8, 4, num_features=16, **options),
    "posrf": lambda **options: LinearAttention(8, num_features=16, method="posrf", **options),
    "multihead": lambda **options: MultiheadAttention(32, 4, batch_first=True, num_features=16, **options),
}


def result(module):
    """What a module makes of the same inputs each time; it is calibrated to them first, if its method is fitted."""
    x = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0))
    if isinstance(module, MultiheadAttention):
        return module.calibrate(x)(x, x, x)[0]
    q, k, v = sample(2, 4, 50, 8)
    return module.calibrate(q, k)(q, k, v)


@pytest.mark.parametrize("rng", [0, None, np.random.SeedSequence(3), np.random.default_rng(4)], ids=str)
@pytest.mark.parametrize("kind", KINDS_OF_MODULE)
def test_deferred_memory_is_filled_by_reset_parameters(kind, rng):
    """The same numbers as without, also where every part of the module is reset on its own."""
    make = KINDS_OF_MODULE[kind]
    torch.manual_seed(1)
    want = make(rng=copy.deepcopy(rng))
    deferred = make(rng=copy.deepcopy(rng), device="meta").to_empty(device="cpu")
    torch.manual_seed(1)
    deferred.reset_parameters()
    assert torch.equal(result(deferred), result(want))
    with torch.device("meta"):
        parts = make(rng=rng)
    parts.to_empty(device="cpu")
    for part in parts.modules():
        part.reset_parameters()
    rows, wanted = (next(x for name, x in m.named_buffers() if "projection" in name) for m in (parts, want))
    if rng is not None:
        assert torch.equal(rows, wanted)
    assert bool(result(parts).isfinite().all())


def test_reset_parameters_goes_back(attention):
    """To the rows of the seed, and to a module that is not calibrated."""
    rows = attention.projection.clone()
    attention.redraw(5).reset_parameters()
    assert torch.equal(attention.projection, rows)
    assert not attention.is_calibrated
    given = torch.randn(16, 8)
    for device in ("cpu", "meta"):
        module = LinearAttention(8, num_features=16, draw=given.numpy(), device=device).to_empty(device="cpu")
        module.reset_parameters()
        assert torch.equal(module.projection, given)
    module = LinearAttention(8, num_features=16, draw=given.to("meta")).to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="draw was an array on the 'meta' device"):
        module.reset_parameters()


@pytest.mark.parametrize("kind", KINDS_OF_MODULE)
def test_memory_that_nobody_filled_is_refused(kind):
    """Of to_empty and skip_init; and what a loader puts in place of keys that it does not find."""
    with torch.device("meta"):
        module = KINDS_OF_MODULE[kind](rng=0)
    with pytest.raises(RuntimeError, match="has no random rows: nobody filled its memory"):
        result(module.to_empty(device="cpu"))
    with pytest.raises(RuntimeError, match="has no random rows"):
        result(torch.nn.utils.skip_init(type(module), *((8, 4) if kind != "multihead" else (32, 4))))
    module = KINDS_OF_MODULE[kind](rng=0)
    attention = getattr(module, "attention", module)
    for garbage in (torch.zeros(16, 8), torch.full((16, 8), 1e-30), torch.rand(16, 8)):
        attention.projection = garbage
        with pytest.raises(RuntimeError, match="not those of any draw 'orthogonal'"):
            result(module)
    module.reset_parameters()
    for name in ("a", "g1", "g2", "center_x", "center_y"):
        setattr(attention, name, torch.zeros_like(getattr(attention, name)))
    with pytest.raises(RuntimeError, match=r"not those of one fit \(g1\^T g2 differs from I by 1\)"):
        _ = attention.feature_map
    assert not attention.is_calibrated


def test_conversions_keep_the_numbers(attention):
    q, k, v = sample(2, 4, 50, 8)
    want = attention(q, k, v)
    attention.to_empty(device="cpu")
    assert torch.equal(attention(q, k, v), want)
    doubled = copy.deepcopy(attention).double().half()
    assert {x.dtype for x in doubled.buffers()} == {torch.float64}
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        swapped = copy.deepcopy(attention).bfloat16().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(swapped(q, k, v), want)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_strict_loads_both_ways(attention, assign, device):
    """Calibrated and not, into either; and a module on meta, which only assignment fills."""
    if device == "meta" and not assign:
        return
    q, k, v = sample(2, 4, 50, 8)
    blank = LinearAttention(8, 4, num_features=16, rng=1)
    earlier = {"projection": blank.projection}
    for start in (copy.deepcopy(blank), copy.deepcopy(attention)):
        module = start.to(device)
        module.load_state_dict(attention.state_dict(), assign=assign)
        assert torch.equal(module(q, k, v), attention(q, k, v))
        module.load_state_dict(blank.state_dict(), assign=assign)
        assert not module.is_calibrated
        module.load_state_dict(earlier, assign=assign)
        with pytest.raises(RuntimeError, match="not calibrated"):
            module(q, k, v)


def test_modules_pickled_before_parameters_were_always_there():
    module = LinearAttention(8, 4, num_features=16, rng=0)
    state = module.__getstate__()
    for name in ("_source", "_orthogonal", "_last_fault"):
        del state[name]
    state["_buffers"] = {**state["_buffers"], **dict.fromkeys(("a", "g1", "g2", "center_x", "center_y"))}
    again = LinearAttention.__new__(LinearAttention)
    again.__setstate__(state)
    assert not again.is_calibrated
    assert torch.equal(result(again), result(module))


def test_a_distributed_checkpoint_loads(tmp_path):
    import torch.distributed.checkpoint as checkpoint

    saved, module = (KINDS_OF_MODULE["multihead"](rng=rng) for rng in (0, 1))
    want = result(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        checkpoint.save(saved.state_dict(), checkpoint_id=tmp_path, no_dist=True)
        checkpoint.load(module.state_dict(), checkpoint_id=tmp_path, no_dist=True)  # in place
    assert module.attention.is_calibrated
    x = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(x, x, x)[0], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pretrained_model_loads(tmp_path, dtype):
    transformers = pytest.importorskip("transformers")

    class Net(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.part = KINDS_OF_MODULE["multihead"]()
            self.post_init()

        def _init_weights(self, module):
            pass

    saved = Net(transformers.PretrainedConfig()).to(dtype)
    x = torch.randn(2, 30, 32, dtype=dtype)
    want = saved.part.calibrate(x)(x, x, x)[0]
    saved.save_pretrained(tmp_path)
    loaded, info = Net.from_pretrained(tmp_path, output_loading_info=True, dtype=dtype)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert torch.equal(loaded.part(x, x, x)[0], want)


AVERAGES = {
    "mean": {},
    "exponential": {"multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)},
    "one by one": {"avg_fn": torch.optim.swa_utils.get_ema_avg_fn(0.999)},
}


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("average", AVERAGES)
def test_averages_of_one_map_are_that_map(average, use_buffers):
    """Whether the copy was made before calibration or after."""
    for early in (True, False):
        module = KINDS_OF_MODULE["multihead"](rng=0)
        want = None if early else result(module)
        averaged = torch.optim.swa_utils.AveragedModel(module, use_buffers=use_buffers, **AVERAGES[average])
        want = result(module) if early else want
        for _ in range(50):
            averaged.update_parameters(module)
        x = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(averaged(x, x, x)[0], want)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize(
    ("change", "message"),
    [("calibrate", "averages of different calibrations"), ("redraw", "averages of different rows")],
)
def test_averages_of_different_maps_are_refused(change, message, average):
    """They are not unbiased: g1^T g2 is not I any more, or the rows are not normal."""
    module = KINDS_OF_MODULE["multihead"](rng=0)
    x = torch.randn(2, 30, 32)
    module.calibrate(x)
    averaged = torch.optim.swa_utils.AveragedModel(module, use_buffers=True, **AVERAGES[average])
    averaged.update_parameters(module)
    averaged(x, x, x)
    module.calibrate(x @ torch.diag(torch.linspace(0, 5, 32))) if change == "calibrate" else module.redraw(1)
    for _ in range(300 if average == "one by one" else 1):
        averaged.update_parameters(module)
    with pytest.raises(RuntimeError, match=message):
        averaged(x, x, x)


def test_numbers_are_looked_at_only_where_they_changed(attention, monkeypatch):
    """As a look waits for the device."""
    looks = []
    look = LinearAttention._fault_of_rows
    monkeypatch.setattr(LinearAttention, "_fault_of_rows", lambda self: looks.append(1) or look(self))
    q, k, v = sample(2, 4, 50, 8)
    for _ in range(3):
        attention(q, k, v)
        assert attention.is_calibrated
    assert len(looks) == 1
    with torch.no_grad():
        attention.center_x.add_(0.1)
    attention(q, k, v), attention(q, k, v)
    assert len(looks) == 2


def test_graphs_are_not_made_of_nothing():
    """Neither export nor a transform takes a module that is not calibrated; stacked modules are taken."""
    q, k, v = sample(2, 4, 20, 8)
    blank = LinearAttention(8, 4, num_features=16)
    for call in (
        lambda: torch.export.export(blank, (q, k, v)),
        lambda: torch.func.grad(lambda x: blank(x, k, v).sum())(q),
        lambda: torch.vmap(lambda x: blank(x, k, v))(q[None]),
    ):
        with pytest.raises(RuntimeError, match="not calibrated"):
            call()
    modules = [LinearAttention(8, 4, num_features=16, rng=i).calibrate(q + i, k) for i in range(2)]
    parameters, buffers = torch.func.stack_module_state(modules)

    def call(parameters, buffers):
        return torch.func.functional_call(blank.to("meta"), (parameters, buffers), (q, k, v))

    want = torch.stack([module(q, k, v) for module in modules])
    torch.testing.assert_close(torch.vmap(call)(parameters, buffers), want)


# Several processes ---------------------------------------------------------------------------------------------------


def _train_in_parallel(rank, folder, calibrated):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save(_trained_in_parallel(rank, calibrated), f"{folder}/{rank}.pt")
    # A DistributedDataParallel that dies after its process group was destroyed waits, with the interpreter's lock, for
    # a thread of gloo that may wait for the lock.
    gc.collect()
    torch.distributed.destroy_process_group()


def _trained_in_parallel(rank, calibrated):
    x = torch.randn(4, 20, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    module = MultiheadAttention(16, 2, batch_first=True, num_features=8, rng=rank)  # rows differ by rank
    if rank in calibrated:
        module.calibrate(x)
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    with fs.use("reference"):
        own = x[2 * rank : 2 * rank + 2]
        parallel(own, own, own)[0].square().mean().backward()
    return {"projection": module.attention.projection, "gradient": module.in_proj_weight.grad.clone()}


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [(0, 1), (0,)], ids=str)
def test_data_parallel_training(tmp_path, calibrated):
    """Every process uses the map of the first, and gradients are those of one process."""
    torch.multiprocessing.spawn(_train_in_parallel, args=(str(tmp_path), calibrated), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first["projection"], second["projection"])
    x = torch.randn(4, 20, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    module = MultiheadAttention(16, 2, batch_first=True, num_features=8, rng=0).calibrate(x)
    module(x, x, x)[0].square().mean().backward()
    torch.testing.assert_close(first["gradient"], module.in_proj_weight.grad)
    torch.testing.assert_close(second["gradient"], module.in_proj_weight.grad)


def test_a_padding_mask_without_a_batch_is_for_one_sequence():
    module = MultiheadAttention(32, 4, batch_first=True, num_features=16, rng=0)
    x = torch.randn(2, 9, 32)
    module.calibrate(x)
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(9,\); accepted: \(batch, s\) = \(2, 9\)"):
        module(x, x, x, key_padding_mask=torch.arange(9) > 6)
