"""The backward kernels against torch's derivative of the references."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from problems import attention_problem, key_mask

import favorsharp as fs
from favorsharp._values import astype
from favorsharp.dispatch import watch
from favorsharp.features.map_gradients import MAP_ARRAYS, arrays_of, with_arrays
from favorsharp.ops.exponential_features import exponential_features

pytestmark = [pytest.mark.own_backend, pytest.mark.kernels]
torch = pytest.importorskip("torch")
pytest.importorskip("numba")

ERROR = {torch.float64: 1e-9, torch.float32: 1e-4}
MODES = list(product((False, True), (0, 5, 64, 100)))
PARAMETERS = ["g1", "g2", "center_x", "center_y"]


def trainable(feature_map):
    """A copy of the map whose arrays require gradients."""
    arrays = {name: getattr(feature_map.parameters, name).clone().requires_grad_() for name in PARAMETERS}
    own = {name: getattr(feature_map, name).clone().requires_grad_() for name in ("rows", "log_weight")}
    made = replace(feature_map, parameters=replace(feature_map.parameters, **arrays), **own)
    return made, [*arrays.values(), *own.values()]


def gradients(backend, dtype, *, method="optimal", kernel="softmax", train=False, masked=False, state=False, **options):
    q, k, v = (torch.asarray(x, dtype=dtype).requires_grad_() for x in attention_problem(0, (2, 2), n=150))
    mask = torch.asarray(key_mask(1, (2, 2, 150), "holes")) if masked else None
    fm = fs.feature_map(fs.fit(q.detach() / 2, k.detach() / 2, method=method, kernel=kernel), 12, rng=0)
    leaves = [q, k, v]
    if train:
        fm, of_map = trainable(fm)
        leaves += of_map
    with fs.use(backend), watch() as calls:
        result = fs.linear_attention(q / 2, k / 2, v, fm, key_mask=mask, return_state=state, **options)
    assert {name for _, name in calls} == {backend}
    out, kept = result if state else (result, None)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).reshape(out.shape)).sum()
    if state:
        loss = loss + kept.kv.square().sum() + kept.z.sum()
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def assert_same(got, want, error):
    size = max(float(x.abs().max()) for x in want if x is not None)
    for a, b in zip(got, want, strict=True):
        if a is None or b is None:
            assert a is None or a.abs().max() < 1e-9 * size
            assert b is None or b.abs().max() < 1e-9 * size
        else:
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            # gradients that are 0 in exact arithmetic are compared with the size of the others
            assert float((a - b).abs().max()) <= error * max(float(b.abs().max()), 1e-2 * size)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize(("is_causal", "window"), MODES)
def test_gradients_of_q_k_v_are_those_of_the_reference(is_causal, window, dtype):
    for masked in (False, True):
        options = {"is_causal": is_causal, "window": window, "masked": masked}
        assert_same(gradients("numba", dtype, **options), gradients("reference", dtype, **options), ERROR[dtype])


@pytest.mark.parametrize("n", [1, 64, 65, 330])
@pytest.mark.parametrize("window", [16, 33, 70])
def test_gradients_with_a_window_in_both_directions_in_one_pass(window, n):
    """Blocks and groups of blocks that end within the sequence, tops far apart, and a block that is hidden."""
    q, k, v = attention_problem(21, (2,), n=n, e=6)
    k = k + np.linspace(0, 10, n)[:, None] * np.sin(np.arange(n))[:, None]
    mask = key_mask(3, (2, n), "holes")
    mask[..., 2 * window : 3 * window] = False
    weights = torch.linspace(-1, 1, v.size, dtype=torch.float64).reshape(v.shape)
    fm = fs.feature_map(fs.fit(torch.asarray(q), torch.asarray(k)), 20, rng=0)

    def run(backend, dtype):
        leaves = [torch.asarray(x, dtype=dtype).requires_grad_() for x in (q, k, v)]
        with fs.use(backend):
            out = fs.linear_attention(*leaves, astype(fm, dtype), key_mask=torch.asarray(mask), window=window)
        return torch.autograd.grad(out, leaves, weights.to(dtype))

    want = run("reference", torch.float64)
    for dtype, error in ERROR.items():
        assert_same([x.double() for x in run("numba", dtype)], want, error)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize(("method", "kernel"), [("posrf", "softmax"), ("sderf", "gaussian"), ("optimal", "gaussian")])
@pytest.mark.parametrize(("is_causal", "window"), [(False, 0), (True, 0), (False, 16), (True, 16)])
def test_gradients_of_every_array_of_the_map(is_causal, window, method, kernel, dtype):
    options = {"is_causal": is_causal, "window": window, "method": method, "kernel": kernel, "train": True}
    got = gradients("numba", dtype, **options)
    want = gradients("reference", torch.float64, **options)
    assert_same([None if x is None else x.to(torch.float64) for x in got], want, ERROR[dtype])


@pytest.mark.parametrize("number", range(len(MAP_ARRAYS)), ids=MAP_ARRAYS)
def test_one_array_of_a_map_may_be_trained_alone(number):
    q, k, v = (torch.asarray(x) for x in attention_problem(5, (2,), n=40))
    fm, found = fs.feature_map(fs.fit(q[0], k[0]), 12, rng=0), []
    for name in ("numba", "reference"):
        own = [x.clone() for x in arrays_of(fm)]
        own[number].requires_grad_()
        with fs.use(name):
            fs.linear_attention(q, k, v, with_arrays(fm, *own), is_causal=True).square().sum().backward()
        found.append(own[number].grad)
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("window", [0, 16, 100])
def test_gradients_reach_keys_and_values_through_a_returned_state(window):
    options = {"is_causal": True, "window": window, "state": True, "train": True}
    got, want = (gradients(name, torch.float64, **options) for name in ("numba", "reference"))
    assert_same(got, want, 1e-9)


BOUNDS = [0, 0, 1, 70, 75, 75, 140, 150]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("is_causal", "window"), MODES)
def test_packed_sequences_are_one_call_forward_and_backward(is_causal, window, train):
    q, k, v = (torch.asarray(x).requires_grad_() for x in attention_problem(5, (2, 6), n=150))
    mask = torch.asarray(key_mask(1, (2, 2, 150), "holes"))
    fm = fs.feature_map(fs.fit(q.detach().flatten(0, -2) / 2, k.detach().flatten(0, -2) / 2), 12, rng=0)
    leaves = [q, k, v]
    if train:
        fm, of_map = trainable(fm)
        leaves += of_map
    weights = torch.linspace(-1, 1, 12 * 150 * 5, dtype=torch.float64).reshape(2, 6, 150, 5)
    given = (q / 2, k[:, ::3] / 2, v[:, ::3])
    options = {"is_causal": is_causal, "window": window, "enable_gqa": True}
    with fs.use("numba"):
        with watch() as calls:
            out = fs.linear_attention(*given, fm, cu_seqlens=BOUNDS, key_mask=mask, **options)
        assert len(calls) == 1
        pieces = [
            fs.linear_attention(*(x[..., a:b, :] for x in given), fm, key_mask=mask[..., a:b], **options)
            for a, b in pairwise(BOUNDS)
            if a < b
        ]
    alone = torch.cat(pieces, dim=-2)
    torch.testing.assert_close(out, alone, atol=1e-12, rtol=0)
    got, want = (
        torch.autograd.grad((x * weights).sum(), leaves, retain_graph=True, allow_unused=True) for x in (out, alone)
    )
    assert_same(got, want, 1e-10)


@pytest.mark.parametrize("of_map", [False, True])
def test_pullbacks_of_packed_sequences_are_one_call(of_map):
    q, k, v = attention_problem(5, (2, 3), n=150)
    fm = fs.feature_map(fs.fit(q, k), 12, rng=0)
    gradient = np.random.default_rng(0).standard_normal(v.shape)
    options = {"is_causal": True, "window": 5, "of_map": of_map}
    with fs.use("numba"), watch() as calls:
        out, pullback = fs.vjp("linear_attention", q, k, v, fm, cu_seqlens=BOUNDS, **options)
        found = pullback(gradient)
    assert len(calls) == 1
    total = [0.0, 0.0]
    for a, b in pairwise(BOUNDS):
        with fs.use("numba"):
            own, back = fs.vjp("linear_attention", *(x[..., a:b, :] for x in (q, k, v)), fm, **options)
            (*of_points,) = back(gradient[..., a:b, :])
        np.testing.assert_allclose(out[..., a:b, :], own, atol=1e-12)
        for x, y in zip(found, of_points[:3], strict=False):
            np.testing.assert_allclose(x[..., a:b, :], y, atol=1e-12)
        total = [x + y for x, y in zip(total, of_points[3:], strict=False)]
    for x, y in zip(found[3:], total, strict=True) if of_map else ():
        np.testing.assert_allclose(x, y, atol=1e-11)


def test_gradients_cross_from_one_call_to_the_next():
    def run(backend):
        q, k, v = (torch.asarray(x).requires_grad_() for x in attention_problem(2, (2,), n=40))
        fm = fs.feature_map(fs.fit(q.detach(), k.detach()), 8, rng=0)
        with fs.use(backend):
            _, state = fs.linear_attention(
                *(x[:, :25] for x in (q, k, v)), fm, is_causal=True, return_state=True, window=4
            )
            out = fs.linear_attention(*(x[:, 25:] for x in (q, k, v)), fm, is_causal=True, state=state, window=4)
        return torch.autograd.grad(out.square().sum(), (q, k, v))

    assert_same(run("numba"), run("reference"), 1e-9)


def test_gradients_where_tops_rise_steeply():
    """Here causal tiles are cut; the reference and the kernels must still agree."""

    def run(backend):
        q, k, v = attention_problem(3, n=64)
        k = k + np.linspace(0, 30, 64)[:, None]
        q, k, v = (torch.asarray(x).requires_grad_() for x in (q, k, v))
        fm = fs.feature_map(fs.fit(q.detach(), k.detach(), method="posrf"), 8, rng=0)
        with fs.use(backend):
            out = fs.linear_attention(q, k, v, fm, is_causal=True)
        return torch.autograd.grad(out.square().sum(), (q, k, v))

    assert_same(run("numba"), run("reference"), 1e-8)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("is_causal", "window"), list(product((False, True), (0, 3))))
def test_second_derivatives_are_those_of_the_reference(is_causal, window, packed):
    mask = torch.asarray(key_mask(1, (2, 20), "holes"))
    options = {"is_causal": is_causal, "window": window, "key_mask": mask}
    if packed:
        options["cu_seqlens"] = [0, 7, 7, 20]

    def second(backend):
        q, k, v = (torch.asarray(x).requires_grad_() for x in attention_problem(0, (2,), n=20))
        fm, of_map = trainable(fs.feature_map(fs.fit(q.detach(), k.detach()), 12, rng=0))
        leaves = [q, k, v, *of_map]
        with fs.use(backend):
            if is_causal and not packed:
                out, state = fs.linear_attention(q, k, v, fm, return_state=True, **options)
                loss = out.square().sum() + state.kv.square().sum()
            else:
                loss = fs.linear_attention(q, k, v, fm, **options).square().sum()
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    found, want = second("numba"), second("reference")
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("n", [0, 1, 71, 600])
def test_gradients_of_features(n, dtype):
    rng = np.random.default_rng(0)
    shapes = ((2, 3, n, 7), (3, 13, 7), (2, 3, n, 1), (1, 13))
    given = [torch.asarray(rng.standard_normal(shape) / 2, dtype=dtype).requires_grad_() for shape in shapes]
    weights = torch.asarray(rng.standard_normal((2, 3, n, 13)), dtype=dtype)

    def run(backend):
        with fs.use(backend):
            return torch.autograd.grad(exponential_features(*given), given, weights)

    for a, b in zip(run("numba"), run("reference"), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(
            a, b, rtol=ERROR[dtype], atol=ERROR[dtype] * (float(b.abs().max()) if b.numel() else 0)
        )


@pytest.mark.parametrize(("is_causal", "window"), [(False, 0), (True, 0), (False, 16), (True, 16)])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=str)
def test_narrow_gradients_are_off_by_their_own_rounding(dtype, rounding, is_causal, window):
    """The gradients of a float32 map show that no intermediate result was rounded to the narrow dtype."""
    q, k, v = (torch.asarray(x, dtype=dtype) for x in attention_problem(0, (2,), n=45, d=64, e=57))
    fm = fs.feature_map(fs.fit(q.double(), k.double()), 70, rng=0)

    def run(backend, wide, width):
        own, of_map = trainable(astype(fm, width))
        leaves = [x.to(wide).requires_grad_() for x in (q, k, v)]
        with fs.use(backend):
            out = fs.linear_attention(*leaves, own, is_causal=is_causal, window=window)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(dtype)
        return torch.autograd.grad(out, leaves + of_map, weights.to(wide), allow_unused=True)

    got, want = run("numba", dtype, torch.float32), run("reference", torch.float64, torch.float64)
    assert all(x.dtype == dtype for x in got[:3])
    assert_same([x.double() for x in got[:3]], want[:3], rounding)
    assert_same([None if x is None else x.double() for x in got[3:]], want[3:], 1e-4)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_write_to_out_is_seen_by_autograd(is_causal):
    q, k, v = (torch.asarray(x) for x in attention_problem(5, (2,), n=40))
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    want = fs.linear_attention(q, k, v, fm, is_causal=is_causal)
    factor = torch.ones_like(v).requires_grad_()
    held = torch.zeros_like(v)
    product = (factor * held).sum()  # its derivative needs what was in `held`
    fs.linear_attention(q, k, v, fm, is_causal=is_causal, out=held)
    torch.testing.assert_close(held, want, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with pytest.raises(RuntimeError, match="in-place operation"):
        fs.linear_attention(q, k, v, fm, is_causal=is_causal, out=factor)
    with pytest.raises(RuntimeError, match="single memory location"):
        fs.linear_attention(q, k, v, fm, is_causal=is_causal, out=torch.zeros(1, dtype=v.dtype).expand(v.shape))
    q.requires_grad_()
    out = fs.linear_attention(q, k, v, fm, is_causal=is_causal, out=torch.zeros_like(v))
    (got,) = torch.autograd.grad(out.sum(), q)
    torch.testing.assert_close(
        got, torch.autograd.grad(fs.linear_attention(q, k, v, fm, is_causal=is_causal).sum(), q)[0], rtol=0, atol=0
    )


def test_features_written_to_out_keep_their_gradients():
    u, rows, row, column = (torch.randn(shape, dtype=torch.float64) for shape in ((20, 4), (6, 4), (20, 1), (1, 6)))
    u.requires_grad_()
    results = []
    for out in (None, torch.zeros(20, 6, dtype=torch.float64)):
        got = exponential_features(u, rows, row, column, out=out)
        results.append(torch.autograd.grad(got.square().sum(), u)[0])
    torch.testing.assert_close(*results, rtol=0, atol=0)


LEADING = {"none": ((), (), ()), "x alone": ((3,), (), ()), "y alone": ((), (2, 1), ()), "each": ((3,), (2, 1), (1, 3))}


def products_problem(leading=((), (), ()), n=45, s=131, d=7, e=5, scale=1.0):
    rng = np.random.default_rng(0)
    shapes = ((*leading[0], n, d), (*leading[1], s, d), (*leading[2], s, e))
    x, y, v = (rng.standard_normal(shape) for shape in shapes)
    return scale * x, scale * y, v


def products_map(method="optimal", kernel="gaussian", m=12, d=7):
    rng = np.random.default_rng(1)
    x, y = (torch.asarray(rng.standard_normal((50, d)) + rng.standard_normal(d) / 2) for _ in range(2))
    return fs.feature_map(fs.fit(x, y, method=method, kernel=kernel), m, rng=0)


def of_product(backend, given, fm, of_map=()):
    """The gradients of a weighted sum of a product, by the backward kernels or by torch."""
    leaves = [x.requires_grad_() for x in given]
    with fs.use(backend), watch() as calls:
        out = fs.kernel_matvec(*leaves, fm)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        found = torch.autograd.grad((out * weights).sum(), [*leaves, *of_map], materialize_grads=True)
    assert calls == [("kernel_matvec", backend)]
    return found


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize(("n", "s"), [(45, 131), (1, 64), (130, 1), (0, 9), (9, 0)])
def test_gradients_of_products(n, s, leading, dtype):
    fm = products_map()
    for e in (1, 5, 33):
        given = products_problem(LEADING[leading], n, s, e=e)
        got, want = (
            of_product(name, [torch.asarray(x, dtype=kind) for x in given], fm)
            for name, kind in (("numba", dtype), ("reference", torch.float64))
        )
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape
            assert a.dtype == dtype
            largest = float(b.abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a.double(), b, rtol=0, atol=ERROR[dtype] * largest)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize(("method", "kernel"), [("posrf", "softmax"), ("sderf", "gaussian"), ("optimal", "gaussian")])
def test_gradients_of_products_reach_every_array_of_the_map(method, kernel, dtype):
    def run(backend, kind):
        fm, of_map = trainable(products_map(method, kernel))
        given = [torch.asarray(x, dtype=kind) for x in products_problem(LEADING["each"], n=300)]
        return of_product(backend, given, fm, of_map)

    got, want = run("numba", dtype), run("reference", torch.float64)
    assert_same([None if x is None else x.to(torch.float64) for x in got], want, ERROR[dtype])


def test_gradients_of_products_reach_the_map_of_each_head():
    """They do so too if threads share the points of one head, and each makes sums of its own."""
    x, y, v = (torch.asarray(a) for a in products_problem(((2,), (2,), (2,)), n=5000, s=6000))
    many = fs.feature_map(fs.fit(x, y, kernel="gaussian"), 12, rng=0)
    assert many.batch_shape == (2,)

    def run(backend, given):
        fm, of_map = trainable(many)
        return of_product(backend, [a.clone() for a in given], fm, of_map)

    assert_same(run("numba", (x, y, v)), run("reference", (x, y, v)), 1e-9)
    one = fs.feature_map(fs.fit(x[0], y[0], kernel="gaussian"), 12, rng=0)

    def single(backend):
        fm, of_map = trainable(one)
        return of_product(backend, [a[0].clone() for a in (x, y, v)], fm, of_map)

    assert_same(single("numba"), single("reference"), 1e-9)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize(
    ("scale", "kernel"),
    [(1e-3, "gaussian"), (1e-3, "softmax"), (3, "gaussian"), (10, "softmax"), (30, "softmax"), (10, "gaussian")],
)
def test_gradients_of_products_at_every_scale(scale, kernel, dtype):
    """Values are so large or small that gradients are near 1 although the weights leave float32's range."""
    fm = products_map("posrf", kernel)
    x, y, v = products_problem(n=30, s=40, scale=scale)
    size = np.abs(fs.kernel_matvec(*(torch.asarray(a) for a in (x, y, v)), fm).numpy()).max()
    given = x, y, v * min(1 / size, 1e30)
    got, want = (
        of_product(name, [torch.asarray(a, dtype=kind) for a in given], fm)
        for name, kind in (("numba", dtype), ("reference", torch.float64))
    )
    for a, b in zip(got, want, strict=True):
        largest = float(b.abs().max())
        if dtype == torch.float64 or largest > 1e-30:  # below this, float32 has no digits left
            torch.testing.assert_close(a.double(), b, rtol=0, atol=ERROR[dtype] * largest)


def test_weights_of_products_may_leave_the_range():
    """Weights of some 2**160, which no float32 holds, on values of 2**-120."""
    x, y, v = products_problem(n=30, s=40)
    x, y, v = x + 6.5, y + 6.5, v * 2.0**-120
    fm = fs.feature_map(fs.fit(torch.asarray(x), torch.asarray(y)), 12, rng=0)
    got, want = (
        of_product(name, [torch.asarray(a.astype(np.float32), dtype=kind) for a in (x, y, v)], fm)
        for name, kind in (("numba", torch.float32), ("reference", torch.float64))
    )
    assert float(want[2].abs().max()) > 2.0**128
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-3 * float(b.abs().max()))


def test_products_of_arrays_that_lie_anyhow_and_cannot_be_written_to():
    given = products_problem(((2,), (2,), (2,)))
    fm = fs.feature_map(fs.fit(given[0][0], given[1][0], kernel="gaussian"), 12, rng=0)
    gradient = np.random.default_rng(3).standard_normal((2, 45, 5))
    with fs.use("numba"):
        out, pullback = fs.vjp(fs.kernel_matvec, *given, fm)
        want = pullback(gradient)
        laid = [np.repeat(x, 2, axis=-1)[:, ::-1, ::2][:, ::-1] for x in (*given, gradient)]
        for x in laid:
            x.flags.writeable = False
        other, back = fs.vjp(fs.kernel_matvec, *laid[:3], fm)
        for a, b in zip((other, *back(laid[3])), (out, *want), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=str)
def test_narrow_gradients_of_products_are_off_by_their_own_rounding(dtype, rounding):
    fm = products_map()
    narrow = [torch.asarray(x, dtype=dtype) for x in products_problem()]
    got = of_product("numba", [x.clone() for x in narrow], fm)
    leaves = [x.double().requires_grad_() for x in narrow]
    out = fs.kernel_matvec(*leaves, fm)
    weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).reshape(out.shape).double()
    for a, b in zip(got, torch.autograd.grad((out * weights).sum(), leaves), strict=True):
        assert a.dtype == dtype
        assert float((a.double() - b).abs().max()) <= rounding * float(b.abs().max())


def test_products_are_differentiated_twice_by_the_reference():
    def second(backend):
        fm, of_map = trainable(products_map())
        leaves = [torch.asarray(x).requires_grad_() for x in products_problem(LEADING["x alone"], n=9, s=11)]
        with fs.use(backend):
            loss = fs.kernel_matvec(*leaves, fm).square().sum()
            first = torch.autograd.grad(loss, [*leaves, *of_map], create_graph=True)
            return torch.autograd.grad(sum(x.square().sum() for x in first), [*leaves, *of_map])

    for a, b in zip(second("numba"), second("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_products_pass_gradcheck():
    fm = products_map(d=3)
    leaves = [torch.asarray(x).requires_grad_() for x in products_problem(LEADING["each"], n=4, s=5, d=3, e=2)]
    with fs.use("numba"):
        assert torch.autograd.gradcheck(lambda *given: fs.kernel_matvec(*given, fm), leaves)
        assert torch.autograd.gradgradcheck(lambda *given: fs.kernel_matvec(*given, fm), leaves)


def test_a_gradient_of_another_dtype_is_taken_in_that_of_the_product():
    x, y, v = products_problem()
    x, y = x.astype(np.float32), y.astype(np.float32)
    fm = fs.feature_map(fs.fit(x, y, kernel="gaussian"), 12, rng=0)
    gradient = np.random.default_rng(3).standard_normal((45, 5)).astype(np.float32)
    for values, other in ((v, gradient), (v.astype(np.float32), gradient.astype(np.float64))):
        with fs.use("numba"):
            out, pullback = fs.vjp(fs.kernel_matvec, x, y, values, fm, of_map=True)
            got, want = pullback(other), pullback(other.astype(out.dtype))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
