"""`vjp` gives the gradients of torch's autograd for arrays without automatic differentiation."""

import numpy as np
import pytest
from problems import attention_problem, key_mask

import favorsharp as fs

pytestmark = pytest.mark.own_backend
torch = pytest.importorskip("torch")
pytest.importorskip("numba")

OPTIONS = [
    {},
    {"is_causal": True},
    {"window": 8},
    {"is_causal": True, "window": 8, "cu_seqlens": [0, 20, 20, 50]},
    {"cu_seqlens": (0, 50)},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("of_map", [False, True])
def test_numpy_gets_the_gradients_of_torch(options, of_map):
    q, k, v = attention_problem(0, (2, 4), n=50)
    k, v = k[:, :2], v[:, :2]
    mask = key_mask(1, k.shape[:-1], "holes")
    gradient = np.random.default_rng(1).standard_normal((2, 4, 50, 5))

    def run(to, backend):
        fm = fs.feature_map(fs.fit(to(q), to(k), enable_gqa=True), 12, rng=0)
        with fs.use(backend):
            out, pullback = fs.vjp(
                fs.linear_attention,
                to(q),
                to(k),
                to(v),
                fm,
                key_mask=to(mask),
                enable_gqa=True,
                of_map=of_map,
                **options,
            )
            return [out, *pullback(to(gradient))]

    got, want = run(np.asarray, "numba"), run(torch.asarray, "reference")
    assert len(got) == (6 if of_map else 4)
    for a, b in zip(got, want, strict=True):
        assert type(a) is np.ndarray
        np.testing.assert_allclose(a, b.numpy(), atol=1e-10 * float(b.abs().max()))


def test_a_step_along_the_gradient_changes_the_loss_as_it_says():
    q, k, v = attention_problem(2, n=30)
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    out, pullback = fs.vjp("linear_attention", q, k, v, fm, is_causal=True, window=4)
    gradients = pullback(2 * out)  # of the sum of squares
    step = 1e-6
    moved = fs.linear_attention(
        *(x + step * g for x, g in zip((q, k, v), gradients, strict=True)), fm, is_causal=True, window=4
    )
    slope = (np.sum(moved**2) - np.sum(out**2)) / step
    assert slope == pytest.approx(sum(np.sum(g * g) for g in gradients), rel=1e-4)


def test_features_have_a_pullback_too():
    rng = np.random.default_rng(0)
    u, rows, row, column = (rng.standard_normal(shape) for shape in ((20, 3), (7, 3), (20, 1), (1, 7)))
    out, pullback = fs.vjp("exponential_features", u, rows, row, column)
    g = rng.standard_normal(out.shape)
    slopes = g * out
    wanted = slopes @ rows, slopes.T @ u, slopes.sum(1, keepdims=True), slopes.sum(0, keepdims=True)
    for got, want in zip(pullback(g), wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-10 * np.abs(want).max())


@pytest.mark.parametrize("of_map", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_products_on_numpy_get_the_gradients_of_torch(single, of_map):
    x, y, v = attention_problem(5, (), n=45, s=70)
    v = v[:, 0] if single else v
    gradient = np.random.default_rng(1).standard_normal(45 if single else (45, 5))

    def run(to, backend):
        fm = fs.feature_map(fs.fit(to(x), to(y), kernel="gaussian"), 12, rng=0)
        with fs.use(backend):
            out, pullback = fs.vjp(fs.kernel_matvec, to(x), to(y), to(v), fm, of_map=of_map)
            np.testing.assert_array_equal(out, fs.kernel_matvec(to(x), to(y), to(v), fm))
        return pullback(to(gradient))

    got, want = run(np.asarray, "numba"), run(torch.asarray, "reference")
    assert len(got) == (5 if of_map else 3)
    assert [a.shape for a in got[:3]] == [x.shape, y.shape, v.shape]
    for a, b in zip(got, want, strict=True):
        assert type(a) is np.ndarray
        assert a.shape == tuple(b.shape)
        np.testing.assert_allclose(a, b.numpy(), atol=1e-10 * float(b.abs().max()))


def test_a_step_along_the_gradient_changes_a_product_as_it_says():
    given = attention_problem(6, (2,), n=20, s=30)
    fm = fs.feature_map(fs.fit(*given[:2], kernel="gaussian"), 16, rng=0)
    out, pullback = fs.vjp("kernel_matvec", *given, fm)
    gradients = pullback(2 * out)  # of the sum of squares
    size = sum(np.sum(g * g) for g in gradients)
    step = 1e-6 * np.sum(out**2) / size
    moved = fs.kernel_matvec(*(x + step * g for x, g in zip(given, gradients, strict=True)), fm)
    assert (np.sum(moved**2) - np.sum(out**2)) / step == pytest.approx(size, rel=1e-4)


@pytest.mark.parametrize("method", ["trig", "relu"])
def test_products_of_other_maps_are_differentiated_by_the_library(method):
    x, y, v = (torch.asarray(a) for a in attention_problem(7, n=20, s=30))
    fm = fs.feature_map(fs.fit(x, y, method=method, kernel="gaussian"), 8, rng=0)
    leaves = [a.clone().requires_grad_() for a in (x, y, v)]
    out = fs.kernel_matvec(*leaves, fm)
    want = torch.autograd.grad(out.square().sum(), leaves)
    result, pullback = fs.vjp(fs.kernel_matvec, x, y, v, fm)
    for a, b in zip((result, *pullback(2 * result)), (out, *want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.jax
def test_jax_arrays_are_differentiated_by_jax():
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    q, k, v = attention_problem(3, n=12)
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    jq, jk, jv = (jax.numpy.asarray(x) for x in (q, k, v))
    jax_map = fs.feature_map(fs.fit(jq, jk), 8, rng=0)
    out, pullback = fs.vjp(fs.linear_attention, jq, jk, jv, jax_map)
    _, ours = fs.vjp(fs.linear_attention, q, k, v, fm)
    for got, want in zip(pullback(out), ours(np.asarray(out)), strict=True):
        np.testing.assert_allclose(np.asarray(got), want, atol=1e-9)
    out, pullback = fs.vjp(fs.kernel_matvec, jq, jk, jv, jax_map, of_map=True)
    _, ours = fs.vjp(fs.kernel_matvec, q, k, v, fm, of_map=True)
    for got, want in zip(pullback(out), ours(np.asarray(out)), strict=True):
        np.testing.assert_allclose(np.asarray(got), want, atol=1e-9 * np.abs(want).max())


def test_refusals_say_what_is_accepted():
    q, k, v = attention_problem(4)
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    with pytest.raises(ValueError, match="function .*accepted.*linear_attention"):
        fs.vjp(fs.softmax_attention, q, k, v)
    with fs.use("reference"), pytest.raises(TypeError, match=r"numpy arrays.*favorsharp\[cpu\]"):
        fs.vjp(fs.linear_attention, q, k, v, fm)
    relu = fs.feature_map(fs.fit(q, k, method="relu"), 8, rng=0)
    with pytest.raises(ValueError, match="of_map needs a dense-exponential map.*relu"):
        fs.vjp(fs.linear_attention, q, k, v, relu, of_map=True)
    with pytest.raises(ValueError, match="of_map needs a dense-exponential map.*relu"):
        fs.vjp(fs.kernel_matvec, q, k, v, relu, of_map=True)
    with pytest.raises(ValueError, match="y has s=37, v has s=36"):
        fs.vjp(fs.kernel_matvec, q, k, v[:36], fm)
    with fs.use("reference"), pytest.raises(TypeError, match=r"numpy arrays.*favorsharp\[cpu\]"):
        fs.vjp(fs.kernel_matvec, q, k, v, fm)


@pytest.mark.parametrize("function", [fs.linear_attention, fs.kernel_matvec])
def test_a_gradient_of_another_shape_is_refused(function):
    q, k, v = attention_problem(4)
    out, pullback = fs.vjp(function, q, k, v, fs.feature_map(fs.fit(q, k), 8, rng=0))
    with pytest.raises(ValueError, match=r"gradient has shape \(36, 5\); accepted: .*\(37, 5\)"):
        pullback(out[:36])
    with pytest.raises(TypeError, match="one library"):
        pullback(torch.asarray(out))
