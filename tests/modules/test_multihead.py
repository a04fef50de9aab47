"""`MultiheadAttention` in place of torch's module of that name."""

import pytest

torch = pytest.importorskip("torch")

import favorsharp as fs  # noqa: E402
from favorsharp.torch import MultiheadAttention  # noqa: E402

KINDS = [
    {"batch_first": True},
    {"bias": False},
    {"kdim": 20, "vdim": 12, "batch_first": True},
    {"add_bias_kv": True, "batch_first": True},
    {"add_zero_attn": True},
    {"dtype": torch.float64},
]


def inputs(options, n=30, s=30):
    """Queries, keys and values in the layout of a module with these options."""
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
    """Causal masks in each of torch's forms, floating padding masks and unbatched inputs work, and padding has no
    influence."""
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
    """In evaluation mode, torch's layer may compute exact attention itself instead of calling a module that looks like
    its own."""
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
        (
            lambda: module(x, x, x, need_weights=True),
            "need_weights must be False, got True: attention weights are never computed",
        ),
        (lambda: module(x, x, x, attn_mask=torch.eye(30).bool()), "attn_mask is neither causal nor empty"),
        (lambda: module(x, x, x, attn_mask=torch.eye(30)), "attn_mask holds numbers other than 0 and -inf"),
        (lambda: module(x, x, x, attn_mask=torch.eye(30).bool(), is_causal=True), "neither causal nor empty"),
        (lambda: module(x, x, x, key_padding_mask=torch.ones(2, 30)), "key_padding_mask holds numbers other than"),
        (lambda: module(x, x, x, key_padding_mask=torch.ones(3, 30).bool()), r"accepted: \(batch, s\) = \(2, 30\)"),
        (lambda: module(x[..., :5], x, x), r"query has shape \(2, 30, 5\); accepted: .* the last of 32"),
        (lambda: MultiheadAttention(32, 4, dropout=0.1), "dropout must be 0.0, got 0.1"),
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


def test_a_padding_mask_without_a_batch_is_for_one_sequence():
    module = MultiheadAttention(32, 4, batch_first=True, num_features=16, rng=0)
    x = torch.randn(2, 9, 32)
    module.calibrate(x)
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(9,\); accepted: \(batch, s\) = \(2, 9\)"):
        module(x, x, x, key_padding_mask=torch.arange(9) > 6)
