"""The backward kernels, run by the shim, against torch's derivative of the references in float64."""

from dataclasses import replace

import numpy as np
import pytest
from host_module import SCHEDULES, SHARED_LIMITS, HostModule, scheduled
from problems import attention_problem, key_mask
from segments import short_segments
from shape_classes import Shape, has_gradients

import favorsharp as fs
from favorsharp._values import astype
from favorsharp.features.map_gradients import MAP_ARRAYS, map_gradients
from favorsharp.ops.vjp import attention_vjp, exponential_features_vjp

torch = pytest.importorskip("torch")
from favorsharp_cuda import vjp  # noqa: E402
from favorsharp_cuda.host import (  # noqa: E402
    arrays,
    gradient_sizes,
    launch,
)
from favorsharp_cuda.host import attention_gradients as gradients  # noqa: E402

pytestmark = pytest.mark.own_backend
PARAMETERS = ("a", "g1", "g2", "center_x", "center_y")
# narrow gradients are rounded to 2^-11 and 2^-8; bfloat16 products that need no more are of one plane, 2^-9 each
ERROR = {"float64": 1e-12, "float32": 5e-5, "float16": 1e-3, "bfloat16": 2e-2}
WIDE = {"float64": "float64", "float32": "float32", "float16": "float32", "bfloat16": "float32"}


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch):
    monkeypatch.setattr(launch, "module_class", HostModule)
    empty = arrays.empty
    monkeypatch.setattr(arrays, "empty", lambda like, shape, dtype: filled(empty(like, shape, dtype)))
    launch.forget()
    with short_segments():
        yield
    launch.forget()


def filled(x):
    """NaN in every place that kernels have to write."""
    return x.fill_(float("nan")) if x.dtype.is_floating_point else x


def to(x, dtype):
    return torch.asarray(np.asarray(x)).to(getattr(torch, dtype))


def wide(x):
    return x.to(torch.float64)


def map_in(feature_map, dtype):
    """The map with tensors of a dtype."""
    arrays = {name: to(getattr(feature_map.parameters, name), dtype) for name in PARAMETERS}
    own = {name: to(getattr(feature_map, name), dtype) for name in ("rows", "log_weight", "projection")}
    return replace(feature_map, parameters=replace(feature_map.parameters, **arrays), **own)


class Problem:
    """Tensors in a dtype, and the same values in float64. `sample` points are fitted to, if given."""

    def __init__(self, dtype, *, batch=(2,), n=100, s=None, d=8, e=5, m=12, masked=None, method="optimal",
                 kernel="softmax", grouped=False, seed=0, sample=None):  # fmt: skip
        q, k, v = attention_problem(seed, batch, n=n, s=s, d=d, e=e)
        if grouped:  # the last leading axis runs over the query heads of a key head
            k, v = k[..., :1, :, :], v[..., :1, :, :]
        mask = None if masked is None else key_mask(1, k.shape[:-1], masked)
        data = (q[..., :1, :, :] if grouped else q, k)
        if sample is not None:
            data = attention_problem(seed, batch, n=sample, d=d, e=e)[:2]
        fitted = fs.fit(*data, method=method, kernel=kernel)
        feature_map = astype(fs.feature_map(fitted, m, rng=0), np.dtype(WIDE[dtype]))
        self.points = [to(x, dtype) for x in (q, k, v)]
        self.feature_map = map_in(feature_map, WIDE[dtype])
        self.exact_map = map_in(feature_map, "float64")
        self.mask = None if mask is None else torch.asarray(mask)
        self.dtype = dtype

    def compare(self, *, of_map=True, **options):
        """Largest errors of the result and of the gradients, which must have the same bits in every schedule."""
        options = {"key_mask": self.mask, "of_map": of_map, **options}
        rng = np.random.default_rng(5)
        runs = []
        gradient = None
        for schedule in SCHEDULES:
            with scheduled(schedule):
                out, pullback = vjp.attention_vjp(*self.points, self.feature_map, **options)
                gradient = to(rng.standard_normal(out.shape), self.dtype) if gradient is None else gradient
                runs.append([out, *pullback(gradient)])
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
        exact = [wide(x) for x in self.points]
        want_out, want = attention_vjp.reference(*exact, self.exact_map, **options)
        compare(runs[0], [want_out, *want(wide(gradient))], ERROR[self.dtype])


def compare(got, want, error):
    size = max((float(x.abs().max()) for x in want[1:] if x.numel()), default=0.0)
    for a, b in zip(got, want, strict=True):
        assert tuple(a.shape) == tuple(b.shape)
        if b.numel():
            # gradients that are 0 in exact arithmetic are compared with the size of the others
            assert float((wide(a) - b).abs().max()) <= error * max(float(b.abs().max()), 1e-2 * size)


MODES = [
    {"is_causal": False},
    {"is_causal": True},
    {"is_causal": False, "window": 16},
    {"is_causal": True, "window": 16},
    {"is_causal": False, "window": 5},
    {"is_causal": True, "window": 45},
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_gradients_are_those_of_the_reference(mode):
    Problem("float64", masked="holes").compare(**mode)


@pytest.mark.parametrize("mode", [MODES[0], MODES[3]], ids=str)
def test_gradients_on_tensor_cores(mode):
    Problem("float32", masked="holes").compare(**mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gradients_without_a_mask(dtype, mode):
    Problem(dtype).compare(**mode)


@pytest.mark.parametrize(("method", "kernel"), [("posrf", "softmax"), ("sderf", "gaussian"), ("optimal", "gaussian")])
@pytest.mark.parametrize("mode", MODES[1:3], ids=str)
def test_every_kernel_and_kind_of_map(mode, method, kernel):
    Problem("float64", n=70, method=method, kernel=kernel).compare(**mode)


@pytest.mark.parametrize(("n", "s"), [(0, 5), (5, 0), (1, 1), (33, 100), (100, 31)])
def test_any_length(n, s):
    Problem("float64", n=n, s=s).compare()
    if n == s:
        Problem("float64", n=n).compare(is_causal=True, window=4)


@pytest.mark.parametrize("mode", MODES[1:3], ids=str)
def test_heads_that_share_keys_give_them_their_sum(mode):
    Problem("float64", batch=(2, 3), grouped=True, n=40, masked="padding").compare(**mode)


def test_arrays_are_read_where_they_lie():
    problem = Problem("float64", n=40)
    problem.points = [x.mT.contiguous().mT for x in problem.points]
    problem.points[0] = problem.points[0].expand(3, 2, 40, 8)
    assert not any(x.is_contiguous() for x in problem.points)
    problem.compare(is_causal=True)


def test_more_features_and_wider_values_than_a_slice():
    Problem("float64", n=33, d=3, e=40, m=150).compare(is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True])
def test_tops_that_rise_steeply(is_causal):
    """Here a causal tile is cut, because a later key has such large features that those of earlier keys would be
    lost."""
    problem = Problem("float64", n=64, method="posrf", m=8)
    problem.points[1] = problem.points[1] + torch.linspace(0, 40, 64, dtype=torch.float64)[:, None]
    problem.compare(is_causal=is_causal)


@pytest.mark.parametrize("mode", MODES[:4], ids=str)
def test_narrow_points_get_narrow_gradients(mode):
    """The term of the normaliser in the gradient of a query must not be computed from the rounded result."""
    Problem("bfloat16", n=45, d=64, e=57, m=70, masked="padding").compare(**mode)


@pytest.mark.parametrize("mode", MODES[:4], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_a_query_sees_alone_gets_no_gradient_of_points(dtype, mode):
    """A query that sees one key returns its value, whatever the points are.

    So weights must add up to 1 with more than 16 bits.
    """
    problem = Problem(dtype, batch=(8,), n=1, d=64, e=57, m=70)
    out, pullback = vjp.attention_vjp(*problem.points, problem.feature_map, **mode)
    gradient = to(np.random.default_rng(5).standard_normal(out.shape), dtype)
    dq, dk, dv = pullback(gradient)
    assert torch.equal(out, problem.points[2])
    assert torch.equal(dv, gradient)
    assert all(float(x.abs().max()) <= 2e-5 * float(dv.abs().max()) for x in (dq, dk))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_one_feature_gives_queries_no_gradient(dtype, is_causal):
    """With one feature, weights do not depend on the query.

    So dq consists of rounding errors, which must be small beside other gradients.
    """
    problem = Problem(dtype, n=90, d=33, e=40, m=1)
    out, pullback = vjp.attention_vjp(*problem.points, problem.feature_map, is_causal=is_causal)
    dq, *others = pullback(to(np.random.default_rng(5).standard_normal(out.shape), dtype))
    assert float(dq.abs().max()) <= 2e-5 * max(float(x.abs().max()) for x in others)


@pytest.mark.slow
@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_every_instance(dtype, width):
    for mode in (MODES[0], MODES[1], MODES[3]):
        # with fewer points than coordinates, transforms would be large and float32 results inaccurate
        Problem(dtype, n=45, d=width, e=width - 7, m=70, masked="padding", sample=4 * width).compare(**mode)
    for masked in (None, "holes"):
        gradients_of_every_array(dtype, is_causal=True, window=16, d=width - 5, e=width, masked=masked)


def gradients_of_every_array(dtype, *, is_causal, window, **options):
    problem = Problem(dtype, n=70, **options)
    q, k, v = (wide(x).requires_grad_() for x in problem.points)
    leaves = [getattr(problem.exact_map, name, None) for name in MAP_ARRAYS[:2]]
    leaves += [getattr(problem.exact_map.parameters, name) for name in MAP_ARRAYS[2:]]
    leaves = [x.clone().requires_grad_() for x in leaves]
    of_parameters = dict(zip(MAP_ARRAYS[2:], leaves[2:], strict=True))
    exact = replace(
        problem.exact_map,
        parameters=replace(problem.exact_map.parameters, **of_parameters),
        rows=leaves[0],
        log_weight=leaves[1],
    )
    with fs.use("reference"):
        want = fs.linear_attention(q, k, v, exact, is_causal=is_causal, window=window, key_mask=problem.mask)
    weight = to(np.random.default_rng(1).standard_normal(want.shape), dtype)
    expected = torch.autograd.grad(want, leaves, wide(weight), allow_unused=True)
    mode = {"key_mask": problem.mask, "window": window}
    if is_causal:
        out, stats, _ = vjp.causal_attention_with_stats(*problem.points, problem.feature_map, **mode)
    else:
        out, stats = vjp.attention_with_stats(*problem.points, problem.feature_map, **mode)
    *_, sums = gradients.attention_backward(
        weight, *problem.points, problem.feature_map, out, stats, causal=is_causal, of_map=True, **mode
    )
    found = map_gradients(problem.feature_map, sums.finished())
    expected = [torch.zeros_like(x) if g is None else g for g, x in zip(expected, leaves, strict=True)]
    compare([out, *found], [want.detach(), *expected], ERROR[dtype])


@pytest.mark.parametrize(("is_causal", "window"), [(False, 0), (True, 0), (False, 16)])
@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
def test_gradients_of_every_array_of_the_map(kernel, is_causal, window):
    gradients_of_every_array("float64", is_causal=is_causal, window=window, kernel=kernel, masked="holes")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("n", "m"), [(0, 5), (71, 13), (100, 70)])
def test_gradients_of_features(n, m, dtype):
    rng = np.random.default_rng(0)
    shapes = ((2, 3, n, 7), (3, m, 7), (2, 3, n, 1), (1, m))
    given = [to(rng.standard_normal(shape) / 2, dtype) for shape in shapes]
    weights = to(rng.standard_normal((2, 3, n, m)), dtype)
    want_out, want = exponential_features_vjp.reference(*(wide(x) for x in given))
    for schedule in SCHEDULES:
        with scheduled(schedule):
            out, pullback = vjp.exponential_features_vjp(*given)
            compare([out, *pullback(weights)], [want_out, *want(wide(weights))], ERROR[dtype])


@pytest.mark.parametrize("mode", MODES[:4], ids=str)
def test_values_of_any_size(mode):
    """Values of more than 128 entries are processed in parts, whose gradients of points are added up."""
    Problem("float64", n=40, e=261, masked="holes").compare(**mode)


def test_wide_values_in_narrow_types_and_shared_heads():
    Problem("bfloat16", n=40, d=32, e=140, masked="padding").compare(window=16, is_causal=True)
    Problem("float32", batch=(2, 3), grouped=True, n=40, e=130).compare()


def test_points_that_are_too_wide_are_refused_before_any_work():
    q = torch.zeros(4, 129)
    with pytest.raises(ValueError, match="d of at most 128, got d=129"):
        vjp.attention_vjp(q, q, q[:, :3], None)


@pytest.mark.parametrize(
    ("mode", "sizes"),
    [
        (MODES[0], {"d": 65, "e": 130, "m": 19}),
        (MODES[1], {"d": 97, "e": 57, "m": 33, "kernel": "gaussian"}),
        (MODES[2], {"d": 113, "e": 70, "m": 16, "grouped": True, "batch": (2, 3)}),
        (MODES[3], {"d": 128, "e": 1, "m": 5, "method": "sderf"}),
        (MODES[5], {"d": 121, "e": 128, "m": 35}),
    ],
    ids=str,
)
def test_float64_in_the_shared_memory_of_an_old_card(mode, sizes, monkeypatch):
    monkeypatch.setattr(HostModule, "shared_limit", SHARED_LIMITS["sm_80"])
    Problem("float64", n=47, masked="holes", **sizes).compare(**mode)


def test_maps_of_wide_float64_points_in_the_shared_memory_of_an_old_card(monkeypatch):
    monkeypatch.setattr(HostModule, "shared_limit", SHARED_LIMITS["sm_80"])
    gradients_of_every_array("float64", is_causal=False, window=16, d=103, e=71, m=21, masked="holes")


def test_every_size_of_points_fits_every_card_that_is_compiled_for(monkeypatch):
    for limit in SHARED_LIMITS.values():
        monkeypatch.setattr(HostModule, "shared_limit", limit)
        for dtype in ERROR:
            like = to(np.zeros(1), dtype)
            widest = 64 if dtype == "float64" and limit == SHARED_LIMITS["sm_86"] else 128
            sizes = [d for d in (1, 40, 64, 65, 96, 97, 128) if d <= widest]
            assert all(gradient_sizes.sweep_of(like, d, e).points >= d for d in sizes for e in (0, 1, 65, 300))


def test_a_larger_card_keeps_the_larger_sweeps(monkeypatch):
    """Instances for cards with less memory process fewer features at once, and would be slower."""
    monkeypatch.setattr(HostModule, "shared_limit", SHARED_LIMITS["sm_90"])
    for dtype, features in (("float32", (64, 64, 32, 32)), ("float64", (32, 32, 16, 16))):
        like = to(np.zeros(1), dtype)
        for d, most in zip((32, 64, 96, 128), features, strict=True):
            assert all(gradient_sizes.sweep_of(like, d, e).features == most for e in (1, 20, d))


def test_shape_classes_ask_for_the_gradients_that_a_card_has():
    """They depend on its shared memory, as in the library; `make gpu-check` compares these."""
    for dtype, d, cards in (("float64", 64, 2), ("float64", 65, 1), ("float32", 128, 2), ("float32", 129, 0)):
        served = [has_gradients(Shape(dtype, d, 8, 8), SHARED_LIMITS[card]) for card in ("sm_80", "sm_86")]
        assert served == [True] * cards + [False] * (2 - cards), (dtype, d)
        assert has_gradients(Shape(dtype, d, 8, 8, card="sm_86")) == served[1]


def test_a_card_with_too_little_shared_memory_is_refused_before_any_work(monkeypatch):
    given = (*(torch.zeros(4, size, dtype=torch.float64) for size in (70, 70, 5)), None)
    monkeypatch.setattr(HostModule, "shared_limit", 155 * 1000)
    with pytest.raises(
        ValueError, match="float64 of d=70 need 155136 .* device 0 has 155000; accepted there: .* 64, or"
    ):
        vjp.attention_vjp(*given)
    monkeypatch.setattr(HostModule, "shared_limit", 99 * 1024)
    with pytest.raises(
        ValueError, match="float64 of d=70 need .* device 0 has 101376; accepted there: d of at most 64, or float32$"
    ):
        vjp.attention_vjp(*given)
    monkeypatch.setattr(HostModule, "shared_limit", 64 * 1024)
    with pytest.raises(ValueError, match="float32 of d=70 need .* device 0 has 65536; accepted there: none$"):
        vjp.attention_vjp(*(x.float() for x in given[:3]), None)


@pytest.mark.parametrize(
    ("dtype", "mode", "sizes"),
    [
        ("float32", MODES[3], {"d": 64, "e": 64, "m": 70}),
        ("float32", MODES[0], {"d": 128, "e": 128, "m": 35}),
        ("bfloat16", MODES[1], {"d": 90, "e": 70, "m": 33}),
        ("float64", MODES[2], {"d": 64, "e": 70, "m": 19}),
    ],
    ids=str,
)
def test_gradients_in_99_KB_of_shared_memory(dtype, mode, sizes, monkeypatch):
    monkeypatch.setattr(HostModule, "shared_limit", SHARED_LIMITS["sm_86"])
    Problem(dtype, n=47, masked="holes", **sizes).compare(**mode)


def test_gradients_of_features_fit_99_KB_of_shared_memory(monkeypatch):
    monkeypatch.setattr(HostModule, "shared_limit", SHARED_LIMITS["sm_86"])
    rng = np.random.default_rng(0)
    for dtype in ("float64", "float32"):
        given = [to(rng.standard_normal(shape) / 8, dtype) for shape in ((40, 128), (70, 128), (40, 1), (1, 70))]
        out, pullback = vjp.exponential_features_vjp(*given)
        want_out, want = exponential_features_vjp.reference(*(wide(x) for x in given))
        compare([out, *pullback(out)], [want_out, *want(wide(out))], ERROR[dtype])


def test_a_launch_that_does_not_fit_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(HostModule, "shared_limit", 64 * 1024)
    x = torch.zeros(1)
    monkeypatch.setitem(launch._kernels, (arrays.device_number(x), "some_kernel"), len)
    with pytest.raises(ValueError, match="^some_kernel needs 65537 .* device 0 has 65536; accepted there: smaller"):
        launch.run("some_kernel", x, 1, 128, None, 64 * 1024 + 1)
