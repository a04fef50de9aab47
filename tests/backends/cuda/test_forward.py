"""The forward kernels, run by the shim on the CPU, against the references in float64."""

import dataclasses

import ml_dtypes  # noqa: F401  np.dtype("bfloat16")
import numpy as np
import on_host  # noqa: F401  builds are then shared with the other tests
import pytest
from host_module import SCHEDULES, SHARED_LIMITS, HostModule, scheduled
from problems import attention_problem, key_mask
from segments import short_segments

import favorsharp as fs
from favorsharp import choice, discovery, dispatch, testing
from favorsharp._values import astype
from favorsharp.ops.attention import attention
from favorsharp.ops.causal_attention import causal_attention
from favorsharp.ops.exponential_features import exponential_features
from favorsharp.ops.kernel_matvec import kernel_matvec
from favorsharp.ops.state import decode_step, empty_state, read, update
from favorsharp_cuda import BACKEND
from favorsharp_cuda.host import arrays, launch, plain, tile_sizes
from favorsharp_cuda.host.source import expression

pytestmark = pytest.mark.own_backend
TOLERANCES = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 3e-5, "float64": 1e-12}


def for_host(kernel):
    """The same kernel, declared for arrays in host memory."""
    library = {"cupy": "numpy"}.get(*kernel.libraries, *kernel.libraries)
    return dataclasses.replace(kernel, libraries={library}, devices={"cpu"}, differentiable=False)


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch):
    """The backend for NumPy arrays, run by the shim; new arrays are full of NaN, and segments are short."""
    backend = dispatch.Backend("cuda", (), tuple(map(for_host, BACKEND.kernels)))
    find, empty = choice.backend_named, arrays.empty

    def full_of_nan(like, shape, dtype):
        x = empty(like, shape, dtype)
        if arrays.is_numpy(x) and x.size:
            x.view(np.uint8).fill(255)
        return x

    monkeypatch.setattr(launch, "module_class", HostModule)
    monkeypatch.setattr(HostModule, "shared_limit", 163 * 1024)  # of the oldest card
    monkeypatch.setattr(arrays, "empty", full_of_nan)
    for module in (choice, discovery):
        monkeypatch.setattr(module, "backend_named", lambda name: backend if name == "cuda" else find(name))
    choice.choose.cache_clear()
    launch.forget()
    with short_segments():
        yield
    choice.choose.cache_clear()
    launch.forget()


class Problem:
    """Points in a dtype, a map in the dtype that it is computed in, and both in float64."""

    def __init__(self, dtype="float32", *, n=100, d=32, e=32, m=48, batch=(2,), s=None, mask="holes", seed=0,
                 kernel="softmax", method="optimal"):  # fmt: skip
        self.points = [x.astype(dtype) for x in attention_problem(seed, batch, n=n, s=s, d=d, e=e)]
        self.mask = key_mask(seed, self.points[1].shape[:-1], mask)
        exact = [x.astype(np.float64) for x in self.points]
        drawn = fs.feature_map(fs.fit(*exact[:2], method=method, kernel=kernel), m, rng=0)
        self.map = astype(drawn, np.dtype(arrays.WIDER[dtype]))
        self.exact, self.exact_map = exact, astype(self.map, np.dtype(np.float64))
        self.tolerance = TOLERANCES[dtype]

    def compare(self, op, **options):
        """The largest error; the result must be the same in every order of threads and blocks."""
        options.setdefault("key_mask", self.mask)
        runs = []
        for schedule in SCHEDULES:
            with scheduled(schedule), fs.use("cuda"):
                runs.append(testing._arrays_of(op(*self.points, self.map, **options)))
        for run in runs[1:]:
            assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(runs[0], run, strict=True))
        want = testing._arrays_of(op.reference(*self.exact, self.exact_map, **options))
        for got, exact in zip(runs[0], want, strict=True):
            assert got.shape == exact.shape
            both = np.isfinite(exact)
            np.testing.assert_array_equal(np.isfinite(got), both)
            got, exact = got[both].astype(np.float64), exact[both].astype(np.float64)  # masks of recent keys, too
            error = np.max(np.abs(got - exact), initial=0) / np.max(np.abs(exact), initial=1e-30)
            assert error <= self.tolerance, error
        assert runs[0][0].dtype == self.points[0].dtype


SIZES = (
    *((130, 64, 64, 64), (70, 128, 128, 130), (129, 33, 96, 20), (65, 96, 33, 512), (64, 16, 128, 16), (3, 7, 1, 1)),
)
"""n, d, e, m: whole tiles, a little more, a little less."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", [attention, causal_attention], ids=lambda op: op.name)
def test_more_than_one_tile_of_everything(op, dtype):
    Problem(dtype, n=130, d=33, e=20, m=70).compare(op)
    Problem(dtype, n=130, d=33, e=20, m=70, kernel="gaussian").compare(op, window=24)


@pytest.mark.parametrize("op", [attention, causal_attention], ids=lambda op: op.name)
def test_points_as_they_are_may_lie_far_from_zero(op):
    """Points of bfloat16 are not centred before products with the map, so their center is in its column."""
    problem = Problem("bfloat16", n=130, d=16, e=8, m=40, mask="none")
    far = [x + 40 for x in problem.exact[:2]]
    problem.points[:2] = [x.astype("bfloat16") for x in far]
    problem.exact[:2] = [x.astype(np.float64) for x in problem.points[:2]]
    drawn = fs.feature_map(fs.fit(*problem.exact[:2]), 40, rng=0)
    problem.map, problem.exact_map = astype(drawn, np.dtype(np.float32)), drawn
    problem.compare(op)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention_of_every_size(size, dtype):
    n, d, e, m = size
    Problem(dtype, n=n, d=d, e=e, m=m).compare(attention)
    Problem(dtype, n=n, d=d, e=e, m=m, s=n // 2 + 40, kernel="gaussian").compare(attention)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_causal_attention_of_every_size(size, dtype):
    n, d, e, m = size
    Problem(dtype, n=n, d=d, e=e, m=m).compare(causal_attention)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("window", [1, 7, 16, 63, 64, 65, 200])
def test_windows(window, kernel):
    problem = Problem(n=210, d=16, e=8, m=40, kernel=kernel, mask="padding")
    problem.compare(causal_attention, window=window)
    problem.compare(attention, window=window)


@pytest.mark.parametrize("op", [attention, causal_attention])
def test_sizes_and_dtypes_that_tiles_do_not_have(op):
    Problem(n=20, d=130, e=3, m=9).compare(op, window=8)
    Problem(n=20, d=3, e=140, m=9).compare(op)
    Problem("float64", n=20, d=5, e=3, m=9).compare(op, window=3)


def test_a_state_is_gone_on_from():
    problem = Problem(n=150, d=16, e=8, m=40, mask="none")
    q, k, v = problem.points
    for window in (0, 20, 64):
        whole, _ = causal_attention.reference(*problem.exact, problem.exact_map, window=window)
        outs, state = [], None
        with fs.use("cuda"):
            for a, b in ((0, 70), (70, 71), (71, 150)):
                part = (x[..., a:b, :] for x in (q, k, v))
                out, state = causal_attention(*part, problem.map, window=window, state=state)
                outs.append(out)
        np.testing.assert_allclose(np.concatenate(outs, axis=-2), whole, rtol=0, atol=2e-5 * np.abs(whole).max())


def test_grouped_heads_read_the_sums_of_their_key_head():
    problem = Problem(n=90, d=16, e=8, m=24, mask="none")
    q, k, v = problem.points
    queries = np.stack([q, 2 * q, q - 1], axis=-3)
    fm, exact_map = problem.map.expanded(), problem.exact_map.expanded()
    for op, options in ((attention, {}), (attention, {"window": 16}), (causal_attention, {})):
        with fs.use("cuda"):
            got = testing._arrays_of(op(queries, k[:, None], v[:, None], fm, **options))
        exact = (x.astype(np.float64) for x in (queries, k[:, None], v[:, None]))
        for a, b in zip(got, testing._arrays_of(op.reference(*exact, exact_map, **options)), strict=True):
            assert testing.relative_error(a, b) < 1e-5


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_what_is_not_finite_stays_in_its_rows(which, bad, dtype, tolerance):
    problem = Problem(dtype, n=100, d=16, e=8, m=24, mask="none", batch=())
    points = dict(zip("qkv", problem.points, strict=True))
    clean = {}
    for window in (0, 8, 64):
        with fs.use("cuda"):
            clean[window] = causal_attention(*points.values(), problem.map, window=window)[0].astype(np.float32)
    points[which] = points[which].copy()
    points[which][70, 3] = bad
    for window in (0, 8, 64):
        with fs.use("cuda"):
            out = causal_attention(*points.values(), problem.map, window=window)[0].astype(np.float32)
        before = np.allclose(out[:70], clean[window][:70], rtol=0, atol=tolerance * np.abs(clean[window]).max())
        assert before, window
        assert not np.isfinite(out[70]).all()
        if which == "q":
            np.testing.assert_allclose(out[71:], clean[window][71:], rtol=0, atol=tolerance)
        else:
            assert not np.isfinite(out[71:]).all(axis=-1).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hidden_key_may_be_anything(dtype):
    problem = Problem(dtype, n=100, d=16, e=8, m=24)
    hidden = ~problem.mask
    spoiled = [problem.points[0], problem.points[1].copy(), problem.points[2].copy()]
    spoiled[1][hidden], spoiled[2][hidden] = np.nan, np.inf
    for op, window in ((attention, 0), (attention, 8), (causal_attention, 0), (causal_attention, 64)):
        with fs.use("cuda"):
            got, want = (
                testing._arrays_of(op(*points, problem.map, key_mask=problem.mask, window=window))[0]
                for points in (spoiled, problem.points)
            )
        np.testing.assert_array_equal(got, want)


def test_later_keys_that_tower_over_earlier_ones_cost_no_accuracy():
    q, k, v = attention_problem(3, (2,), n=70, d=16, e=8)
    k[:, 40:] *= 12  # their features are larger by a factor of two to the power of many hundreds
    k[:, 41] = 0
    problem = Problem(n=70, d=16, e=8, m=24, mask="none", method="posrf")
    problem.points = [x.astype(np.float32) for x in (4 * q, k, v)]
    problem.exact = [x.astype(np.float64) for x in problem.points]
    problem.tolerance = 1e-4
    problem.compare(causal_attention)


@pytest.fixture
def launches(monkeypatch):
    """The names of all plain kernels that are launched."""
    names = []
    monkeypatch.setattr(plain, "run", lambda name, *given: names.append(name) or launch.run(name, *given))
    return names


TOKENS = ((64, 64, 64), (33, 20, 300), (1, 1, 1), (300, 7, 5), (5, 140, 513), (40, 129, 31))
"""d, e, m: whole pieces and parts of them, more features and more columns than a block takes at once."""


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", TOKENS, ids=str)
def test_tokens_one_after_the_other(size, dtype, processors, launches, monkeypatch):
    """The first token enters an empty state.

    Each token is one launch, however values are cut, and does not change the old state.
    """
    monkeypatch.setattr(plain, "PROCESSORS", processors)
    d, e, m = size
    problem = Problem(dtype, n=3, d=d, e=e, m=m, mask="none")
    state = empty_state(problem.map, (2,), d, e, 0, problem.points[1])
    exact = empty_state(problem.exact_map, (2,), d, e, 0, problem.exact[1])
    for i in range(3):
        token, exact_token = ([x[:, i : i + 1] for x in points] for points in (problem.points, problem.exact))
        before = [x.copy() for x in (state.kv, state.z, state.c)]
        runs = []
        for schedule in SCHEDULES:
            with scheduled(schedule), fs.use("cuda"):
                runs.append(testing._arrays_of(decode_step(*token, state, problem.map)))
        for run in runs[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(runs[0], run, strict=True))
        for kept, x in zip(before, (state.kv, state.z, state.c), strict=True):
            np.testing.assert_array_equal(x, kept)
        with fs.use("cuda"):
            out, state = decode_step(*token, state, problem.map)
        want, exact = decode_step.reference(*exact_token, exact, problem.exact_map)
        assert out.dtype == token[0].dtype
        for got, right in ((out, want), (state.c, exact.c), (state.z, exact.z), (state.kv, exact.kv)):
            assert testing.relative_error(got, right) <= problem.tolerance
    assert len(launches) == 12
    assert set(launches) == {expression("decode", dtype, 1, 0)}


STATE = ("kv", "z", "c", "recent_k", "recent_v", "recent_mask")
WINDOWED = (
    *((64, 64, 64, 5), (33, 20, 300, 1), (1, 1, 1, 2), (300, 7, 5, 9), (5, 140, 513, 2), (8, 4, 7, 40)),
    *((40, 129, 31, 3), (16, 8, 40, 16)),
)
"""d, e, m and window: fewer leave than a block takes at once, as many, and more."""


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", WINDOWED, ids=str)
def test_tokens_with_a_window(size, dtype, processors, launches, monkeypatch):
    """Tokens before the recent keys are full, while they overflow, and after: each is one launch.

    Some keys are hidden.
    """
    monkeypatch.setattr(plain, "PROCESSORS", processors)
    d, e, m, window = size
    before = 3 * window - 1
    problem = Problem(dtype, n=before + 3, d=d, e=e, m=m, mask="holes")
    first, mask = [x[:, :before] for x in problem.points[1:]], problem.mask
    empty = [
        empty_state(fm, (2,), d, e, window, x)
        for fm, x in ((problem.map, first[0]), (problem.exact_map, problem.exact[0]))
    ]
    with fs.use("cuda"):
        state = update(empty[0], *first, problem.map, key_mask=mask[:, :before])
    exact = update.reference(
        empty[1], *(x[:, :before] for x in problem.exact[1:]), problem.exact_map, key_mask=mask[:, :before]
    )
    launches.clear()
    for i in range(before, before + 3):
        token, exact_token = ([x[:, i : i + 1] for x in points] for points in (problem.points, problem.exact))
        options = {"key_mask": mask[:, i : i + 1]}
        kept = {name: getattr(state, name).copy() for name in STATE}
        runs = []
        for schedule in SCHEDULES:
            with scheduled(schedule), fs.use("cuda"):
                out, after = decode_step(*token, state, problem.map, **options)
            runs.append([out, *(getattr(after, name) for name in STATE)])
        for run in runs[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(runs[0], run, strict=True))
        for name in STATE:
            np.testing.assert_array_equal(getattr(state, name), kept[name])
        state = after
        want, exact = decode_step.reference(*exact_token, exact, problem.exact_map, **options)
        assert out.dtype == token[0].dtype
        for got, right in ((out, want), (state.c, exact.c), (state.z, exact.z), (state.kv, exact.kv)):
            assert testing.relative_error(got, right) <= problem.tolerance
        for name in STATE[3:]:
            np.testing.assert_array_equal(getattr(state, name), getattr(exact, name))
    assert state.recent_k.dtype == state.recent_v.dtype == problem.points[0].dtype
    assert launches == [expression("decode", dtype, 1, 1)] * 9


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
def test_a_window_from_its_first_token_on(kernel, launches):
    """The sums become another array only when a key enters them."""
    problem = Problem("float64", n=12, d=7, e=6, m=20, mask="none", kernel=kernel)
    state = exact = empty_state(problem.map, (2,), 7, 6, 2, problem.points[1])
    for i in range(12):
        token = [x[:, i : i + 1] for x in problem.points]
        before = state
        with fs.use("cuda"):
            out, state = decode_step(*token, state, problem.map)
        want, exact = decode_step.reference(*token, exact, problem.map)
        assert (state.kv is before.kv) == (before.recent_k.shape[-2] < 4)
        for a, b in ((out, want), *((getattr(state, name), getattr(exact, name)) for name in STATE)):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    assert launches == [expression("decode", "float64", 1, 1)] * 12


@pytest.mark.parametrize("recent", [3, 4])
@pytest.mark.parametrize("shapes", [
    ((2, 3), (), (), (), ()),
    ((2, 3), (3,), (3,), (2, 1), (3,)),
    ((), (3,), (2, 1), (1,), (2, 1)),
    ((), (), (), (2, 3), ()),
    ((2, 11), (2, 1), (2, 1), (2, 1), (2, 1)),
    ((), (), (), (), (2, 3)),
], ids=str)  # fmt: skip
def test_heads_of_a_windowed_token_that_share_keys_or_states(shapes, recent, launches):
    """Leading axes of q, k, v, the recent keys and the sums: every new array is as the reference's."""
    rng = np.random.default_rng(0)
    of_q, of_k, of_v, of_recent, of_sums = shapes
    problem = Problem("float64", n=40, d=7, e=6, m=20, mask="none", batch=())
    fm = problem.map
    keys, values = (rng.standard_normal((*of_sums, 9, size)) for size in (7, 6))
    state = update.reference(empty_state(fm, of_sums, 7, 6, 0, keys), keys, values, fm)
    state = dataclasses.replace(
        state, window=2, recent_k=rng.standard_normal((*of_recent, recent, 7)),
        recent_v=rng.standard_normal((*of_recent, recent, 6)), recent_mask=rng.random((*of_recent, recent)) < 0.7,
    )  # fmt: skip
    q, k = (rng.standard_normal((*batch, 1, 7)) for batch in (of_q, of_k))
    v = rng.standard_normal((*of_v, 1, 6))
    want, exact = decode_step.reference(q, k, v, state, fm)
    with fs.use("cuda"):
        out, after = decode_step(q, k, v, state, fm)
    for a, b in ((out, want), *((getattr(after, name), getattr(exact, name)) for name in STATE)):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    assert len(launches) == 1


@pytest.mark.parametrize(("window", "dtype"), [(150, "float32"), (70, "float64"), (8, "float32")])
def test_many_keys_that_leave_at_once(window, dtype, launches, little_memory):
    """They leave in the launch of the token if a block has room for them, and otherwise in a launch before it."""
    problem = Problem(dtype, n=2 * window + 1, d=8, e=6, m=24)
    before = [x[:, :-1] for x in problem.points[1:]]
    token, exact_token = ([x[:, -1:] for x in points] for points in (problem.points, problem.exact))
    with fs.use("cuda"):
        state = update(
            empty_state(problem.map, (2,), 8, 6, window, before[0]), *before, problem.map, key_mask=problem.mask[:, :-1]
        )
        assert not launches
        out, after = decode_step(*token, state, problem.map)
    exact = dataclasses.replace(
        empty_state(problem.exact_map, (2,), 8, 6, window, exact_token[1]), recent_k=state.recent_k.astype(np.float64),
        recent_v=state.recent_v.astype(np.float64), recent_mask=state.recent_mask,
    )  # fmt: skip
    want, exact = decode_step.reference(*exact_token, exact, problem.exact_map)
    for got, right in (
        (out, want),
        *((getattr(after, name), getattr(exact, name)) for name in STATE if name != "recent_mask"),
    ):
        assert testing.relative_error(got, right) <= problem.tolerance
    np.testing.assert_array_equal(after.recent_mask, exact.recent_mask)
    assert after.recent_k.shape[-2] == window + 1
    assert launches[-1] == expression("decode", dtype, 1, 1)
    of_tiles = {name for name in little_memory if "decode" not in name}
    assert bool(of_tiles) == (window > 8)


def test_recent_keys_of_another_dtype_are_an_update_and_a_read():
    problem = Problem("float32", n=6, d=8, e=6, m=24, mask="none")
    token = [x[:, 5:].astype(np.float16) for x in problem.points]
    state = update.reference(
        empty_state(problem.map, (2,), 8, 6, 2, token[1][:, :0]), *(x[:, :3] for x in problem.points[1:]), problem.map
    )
    want, exact = decode_step.reference(*token, state, problem.map)
    with fs.use("cuda"):
        out, after = decode_step(*token, state, problem.map)
    assert out.dtype == after.recent_k.dtype == np.float16
    assert testing.relative_error(out, want.astype(np.float64)) < 1e-3
    np.testing.assert_array_equal(after.recent_k, exact.recent_k)


def test_recent_keys_and_values_are_read_wherever_they_lie():
    """Aligned rows are read in pieces, others number by number; both give the same bits."""
    for dtype in ("float16", "float64"):
        problem = Problem(dtype, n=5, d=7, e=8, m=24)
        q, k, v = problem.points
        with fs.use("cuda"):
            state = update(
                empty_state(problem.map, (2,), 7, 8, 2, k),
                k[:, :4],
                v[:, :4],
                problem.map,
                key_mask=problem.mask[:, :4],
            )
            token = [x[:, 4:] for x in (q, k, v)]
            want = decode_step(*token, state, problem.map)
            for axes in ((0, 2, 1), (1, 0, 2), (2, 1, 0)):
                moved = {
                    name: np.ascontiguousarray(getattr(state, name).transpose(axes)).transpose(np.argsort(axes))
                    for name in ("recent_k", "recent_v", "kv")
                }
                moved["recent_mask"] = np.asfortranarray(state.recent_mask)
                got = decode_step(*token, dataclasses.replace(state, **moved), problem.map)
                np.testing.assert_array_equal(got[0], want[0])
                for name in STATE:
                    np.testing.assert_array_equal(getattr(got[1], name), getattr(want[1], name))


def test_what_a_window_hides_may_be_anything():
    """This holds for recent keys, for keys that leave them, and for the token."""
    problem = Problem(n=5, d=16, e=8, m=24, mask="none")
    q, k, v = problem.points
    visible = np.array([[True, False, False, True, False], [False, True, True, False, True]])
    spoiled = [np.where(visible[..., None], x, bad).astype(x.dtype) for x, bad in ((k, np.nan), (v, np.inf))]
    found = []
    for keys, values in ((k, v), spoiled):
        state = empty_state(problem.map, (2,), 16, 8, 2, k)
        state = dataclasses.replace(state, recent_k=keys[:, :4], recent_v=values[:, :4], recent_mask=visible[:, :4])
        with fs.use("cuda"):
            found.append(decode_step(q[:, 4:], keys[:, 4:], values[:, 4:], state, problem.map, key_mask=visible[:, 4:]))
    (want, clean), (got, after) = found
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got, want)
    for name in STATE[:3]:
        np.testing.assert_array_equal(getattr(after, name), getattr(clean, name))
    np.testing.assert_array_equal(after.recent_k, spoiled[0][:, 2:])
    np.testing.assert_array_equal(after.recent_v, spoiled[1][:, 2:])
    nothing = dataclasses.replace(state, recent_mask=np.zeros((2, 4), bool))
    with fs.use("cuda"):
        out, empty = decode_step(q[:, 4:], k[:, 4:], v[:, 4:], nothing, problem.map, key_mask=np.zeros((2, 1), bool))
    assert not out.any()
    assert np.isneginf(empty.c).all()


def test_recent_keys_that_tower_over_the_sums_cost_no_accuracy():
    """Neither do sums that exceed those of recent keys by a factor beyond the range of float32."""
    problem = Problem("float64", n=12, d=16, e=8, m=600, mask="none", method="posrf")
    q, k, v = problem.points
    k *= np.array([1, 1, 40, 1, 40, 40, 1, 1, 1, 1, 1, 1])[:, None]
    q *= 5
    state = exact = empty_state(problem.map, (2,), 16, 8, 2, k)
    for i in range(12):
        token = [x[:, i : i + 1] for x in (q, k, v)]
        with fs.use("cuda"):
            out, state = decode_step(*token, state, problem.map)
        want, exact = decode_step.reference(*token, exact, problem.map)
        for a, b in ((out, want), (state.kv, exact.kv), (state.z, exact.z), (state.c, exact.c)):
            assert np.isfinite(out).all()
            assert testing.relative_error(a, b) < 1e-10


def test_a_token_equals_a_read_of_the_updated_state():
    problem = Problem("float64", n=41, d=9, e=6, m=300, kernel="gaussian")
    q, k, v = problem.points
    mask = np.array([[True], [False]])
    with fs.use("cuda"):
        state = update(empty_state(problem.map, (2,), 9, 6, 0, k), k[:, :40], v[:, :40], problem.map)
        out, after = decode_step(*(x[:, 40:] for x in (q, k, v)), state, problem.map, key_mask=mask)
        wanted = update(state, k[:, 40:], v[:, 40:], problem.map, key_mask=mask)
        want = read(wanted, q[:, 40:], problem.map)
    for a, b in ((out, want), (after.kv, wanted.kv), (after.z, wanted.z), (after.c, wanted.c)):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("heads", [2, 8, 11])
def test_query_heads_of_a_token_share_a_state(heads, launches):
    """Their axis may be any of the leading axes.

    More than eight heads take two blocks, of which one writes the state.
    """
    problem = Problem("float64", n=41, d=7, e=6, m=300, batch=(3,), mask="none")
    q, k, v = problem.points
    queries = np.stack([q[:, 40:] + i / 8 for i in range(heads)])
    state = update.reference(empty_state(problem.map, (3,), 7, 6, 0, k), k[:, :40], v[:, :40], problem.map)
    want, wanted = decode_step.reference(queries, k[:, 40:], v[:, 40:], state, problem.map)
    with fs.use("cuda"):
        out, after = decode_step(queries, k[:, 40:], v[:, 40:], state, problem.map)
        grouped = dataclasses.replace(state, **{name: getattr(state, name)[:, None] for name in ("kv", "z", "c")})
        given = queries.swapaxes(0, 1), k[:, None, 40:], v[:, None, 40:], grouped, problem.map.expanded()
        last, of_last = decode_step(*given)
    for a, b in ((out, want), (after.kv, wanted.kv), (after.z, wanted.z), (after.c, wanted.c)):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(last.swapaxes(0, 1), out)
    np.testing.assert_array_equal(of_last.kv[:, 0], after.kv)
    assert launches == [expression("decode", "float64", 8, 0)] * 2


def test_a_hidden_token_may_be_anything_and_changes_nothing():
    problem = Problem(n=41, d=16, e=8, m=24, mask="none")
    q, k, v = problem.points
    with fs.use("cuda"):
        state = update(empty_state(problem.map, (2,), 16, 8, 0, k), k[:, :40], v[:, :40], problem.map)
        want = read(state, q[:, 40:], problem.map)
        k, v = np.full_like(k[:, 40:], np.nan), np.full_like(v[:, 40:], np.inf)
        hidden, visible = np.zeros((2, 1), bool), np.array([[False], [True]])
        out, after = decode_step(q[:, 40:], k, v, state, problem.map, key_mask=hidden)
        spoiled, _ = decode_step(q[:, 40:], k, v, state, problem.map, key_mask=visible)
        nothing, empty = decode_step(
            q[:, 40:], k, v, empty_state(problem.map, (2,), 16, 8, 0, k), problem.map, key_mask=hidden
        )
    for name in ("kv", "z", "c"):
        np.testing.assert_array_equal(getattr(after, name), getattr(state, name))
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(spoiled[0], out[0])
    assert not np.isfinite(spoiled[1]).any()
    assert not nothing.any()
    assert np.isneginf(empty.c).all()


def test_a_token_whose_features_tower_over_earlier_ones_costs_no_accuracy():
    """Neither does a token whose features are smaller than earlier ones by a factor beyond the range of float32."""
    problem = Problem("float64", n=3, d=16, e=8, m=600, mask="none", method="posrf")
    q, k, v = problem.points
    k *= np.array([1, 40, 1])[:, None]
    q *= 5
    state = empty_state(problem.map, (2,), 16, 8, 0, k)
    exact = state
    for i in range(3):
        token = [x[:, i : i + 1] for x in (q, k, v)]
        with fs.use("cuda"):
            out, state = decode_step(*token, state, problem.map)
        want, exact = decode_step.reference(*token, exact, problem.map)
        for a, b in ((out, want), (state.kv, exact.kv), (state.z, exact.z), (state.c, exact.c)):
            assert testing.relative_error(a, b) < 1e-10


def test_a_state_is_read_wherever_it_lies():
    """Aligned rows are read in pieces of 16 bytes, others number by number; both give the same bits."""
    problem = Problem(n=41, d=16, e=8, m=24, mask="none")
    q, k, v = problem.points
    with fs.use("cuda"):
        state = update(empty_state(problem.map, (2,), 16, 8, 0, k), k[:, :40], v[:, :40], problem.map)
        want = testing._arrays_of(decode_step(*(x[:, 40:] for x in (q, k, v)), state, problem.map))
        shifted, turned = np.empty((2, 24, 9), np.float32)[..., 1:], np.empty((2, 8, 24), np.float32).swapaxes(-1, -2)
        for kv in (shifted, turned):
            kv[...] = state.kv
            given = dataclasses.replace(state, kv=kv)
            got = testing._arrays_of(decode_step(*(x[:, 40:] for x in (q, k, v)), given, problem.map))
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a, b)


def test_tokens_that_decode_has_no_room_for(launches, monkeypatch):
    """Query heads are processed one by one; if not even one fits, the token is an update and a read."""
    monkeypatch.setattr(HostModule, "shared_limit", 48 * 1024)
    one_head, two_launches = [expression("decode", "float64", 1, 0)], [expression("plain_attention", "float64")] * 2
    for d, heads, said in ((300, 3, one_head), (2500, 1, two_launches)):
        problem = Problem("float64", n=1, d=d, e=3, m=5, mask="none", method="posrf", batch=())
        q, k, v = problem.points
        queries = np.stack([q] * heads)
        state = empty_state(problem.map, (), d, 3, 0, k)
        launches.clear()
        with fs.use("cuda"):
            out, _ = decode_step(queries, k, v, state, problem.map)
        np.testing.assert_allclose(out, np.stack([v] * heads), rtol=1e-12)
        assert launches == said


@pytest.fixture
def little_memory(monkeypatch):
    """Limit blocks to 99 KB of shared memory, as on compute capability 8.6, 8.9 and 12.0.

    The names of launched kernels.
    """
    monkeypatch.setattr(HostModule, "shared_limit", SHARED_LIMITS["sm_86"])
    launched = set()
    monkeypatch.setattr(HostModule, "launched", launched)
    return launched


def test_what_has_room_beside_points():
    """The tables of docs/guide/gpu.md: the parts of values that `walk` processes, and those of `absorb` and `read`."""
    wanted = {
        "sm_86": {
            "float32": ((48, 64, 128), (64, 32, 128), (80, 16, 128), (81, 0, 128), (112, 0, 128), (128, 0, 96)),
            "bfloat16": ((64, 64, 128), (80, 64, 128), (96, 16, 128), (97, 0, 128), (128, 0, 128)),
        },
        "sm_80": {"float32": ((64, 64, 128), (128, 64, 128)), "bfloat16": ((64, 64, 128), (128, 64, 128))},
    }
    for card, dtypes in wanted.items():
        room = SHARED_LIMITS[card]
        for dtype, sizes in dtypes.items():
            for d, part, values in sizes:
                assert tile_sizes.walked_size(dtype, d, 128, room) == part, (card, dtype, d)
                assert tile_sizes.widest_value(dtype, d, room) == values, (card, dtype, d)
    assert tile_sizes.walked_size("float32", 64, 32, SHARED_LIMITS["sm_80"]) == 32
    assert tile_sizes.walked_size("float16", 128, 64, SHARED_LIMITS["sm_80"]) == 64


@pytest.mark.parametrize(
    ("dtype", "d", "e", "m", "kernels"),
    [
        ("float32", 64, 64, 130, {"walk<float, 32>", "absorb<float, 64>", "read<float, 64>"}),
        ("float32", 80, 70, 66, {"walk<float, 16>", "absorb<float, 96>", "read<float, 96>"}),
        ("float16", 128, 128, 70, {"plain_attention<favorsharp::half>", "absorb<favorsharp::half, 64>"}),
        ("float32", 128, 101, 130, {"plain_attention<float>", "absorb<float, 64>", "read<float, 64>"}),
        ("float64", 64, 20, 30, {"plain_attention<double>"}),
    ],
)
def test_every_op_in_99_KB_of_shared_memory(dtype, d, e, m, kernels, little_memory):
    problem = Problem(dtype, n=70, d=d, e=e, m=m)
    tolerance = problem.tolerance
    problem.compare(causal_attention)
    problem.compare(causal_attention, window=16)
    problem.compare(attention, window=16)
    problem.compare(attention)
    q, k, v = problem.points
    empty = empty_state(problem.map, (2,), d, e, 0, k)
    exact_empty = empty_state(problem.exact_map, (2,), d, e, 0, problem.exact[1])
    with fs.use("cuda"):
        state = update(empty, k, v, problem.map, key_mask=problem.mask)
        got = [read(state, q, problem.map), kernel_matvec(q, k, v / 64, problem.map)]
        state = update(state, k, v, problem.map)
    exact = update.reference(exact_empty, *problem.exact[1:], problem.exact_map, key_mask=problem.mask)
    want = [read.reference(exact, problem.exact[0], problem.exact_map)]
    exact_q, exact_k, exact_v = problem.exact
    want += [kernel_matvec.reference(exact_q, exact_k, exact_v / 64, problem.exact_map)]  # / 64: float16 ends at 65504
    exact = update.reference(exact, *problem.exact[1:], problem.exact_map)
    got += [x * np.exp(state.c).swapaxes(-1, -2) for x in (state.kv, state.z.swapaxes(-1, -2))]
    want += [x * np.exp(exact.c).swapaxes(-1, -2) for x in (exact.kv, exact.z.swapaxes(-1, -2))]
    for a, b in zip(got, want, strict=True):
        assert testing.relative_error(a, b) <= 2 * tolerance
    assert {f"favorsharp::{name}" for name in kernels} <= little_memory


def test_points_that_walk_has_no_room_for_go_without_it_only_where_it_would_walk(little_memory):
    problem = Problem(n=70, d=96, e=96, m=70)
    with fs.use("cuda"):
        attention(*problem.points, problem.map)
        assert not any("plain" in name for name in little_memory)
        causal_attention(*problem.points, problem.map)
    assert not any("walk" in name for name in little_memory)
    assert "favorsharp::plain_attention<float>" in little_memory


def test_features_of_every_size_fit_99_KB(little_memory):
    rng = np.random.default_rng(0)
    for d, name in ((128, "features<float>"), (200, "plain_features<float>")):
        given = [rng.standard_normal(size).astype(np.float32) / 8 for size in ((70, d), (65, d), (70, 1), (1, 65))]
        with fs.use("cuda"):
            got = exponential_features(*given)
        want = exponential_features.reference(*(x.astype(np.float64) for x in given))
        assert testing.relative_error(got, want) < 3e-5
        assert f"favorsharp::{name}" in little_memory


@pytest.mark.parametrize(
    ("dtype", "d", "served"),
    [
        ("float64", 16, "m of at most 4172 beside these d and e, or float32"),
        ("float32", 96, "m of at most 8369 beside"),
    ],
)
def test_features_that_a_card_has_no_room_for_are_refused_before_any_work(dtype, d, served, little_memory):
    problem = Problem(dtype, n=20, d=d, e=8, m=8400)
    said = rf"^{dtype} of d={d} and e=8 with m=8400 features needs \d+ bytes .* device 0 has 101376; .* there: {served}"
    state = empty_state(problem.map, (2,), d, 8, 4, problem.points[1])
    calls = [
        lambda: causal_attention(*problem.points, problem.map),
        lambda: attention(*problem.points, problem.map, window=4),
        lambda: read(state, problem.points[0][..., :1, :], problem.map),
    ]
    for call in calls:
        with fs.use("cuda"), pytest.raises(ValueError, match=said):
            call()
    assert not little_memory


@pytest.mark.parametrize("window", [0, 1])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_token_of_more_features_than_a_card_holds(dtype, window, little_memory):
    problem = Problem(dtype, n=20, d=8, e=8, m=8400, mask="none")
    given = [problem.map, problem.exact_map], [problem.points, problem.exact]
    outs = []
    for fm, points in zip(*given, strict=True):
        with fs.use("cuda" if fm is problem.map else "reference"):
            q, k, v = points
            state = empty_state(fm, (2,), 8, 8, window, k)
            for i in range(4):
                out, state = decode_step(*(x[:, i : i + 1] for x in (q, k, v)), state, fm)
        outs.append(out)
    assert testing.relative_error(*outs) < problem.tolerance
    assert little_memory == {expression("decode", dtype, 1, window)}


@pytest.mark.parametrize("op", [k.op for k in BACKEND.kernels if "cupy" in k.libraries and "vjp" not in k.op])
@pytest.mark.slow
def test_every_case_of_check_backend(op):
    """They run with short segments, which the sweep does not use, and also on torch tensors."""
    testing.check_backend("cuda", ops=[op], libraries=["numpy"])
