"""A call that could use a plan behaves like a checked call, whichever argument differs from the planned call."""

import gc
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

import favorsharp as fs
from favorsharp import _derived, dispatch, plans

pytestmark = pytest.mark.compiled
torch = pytest.importorskip("torch")

N, D, E, M, HEADS = 8, 4, 3, 16, 2


def points(library, *, n=N, d=D, e=E, dtype="float64"):
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((HEADS, n, size)).astype(dtype) for size in (d, d, e)]
    return arrays if library == "numpy" else [torch.from_numpy(x) for x in arrays]


def made(library, **options):
    q, k, _ = points(library, n=50)
    return fs.feature_map(fs.fit(q, k, axis=(0, -2), **options), M, rng=0)


def outcome(call):
    """The outcome of a call: values, dtypes and `requires_grad` of its results, or its error."""
    try:
        result = call()
    except Exception as error:
        return type(error), str(error)
    if isinstance(result, tuple):
        out, state = result
        kept = (state.keys, state.held) if isinstance(state, fs.LandmarkState) else (state.kv, state.recent_k.shape)
        return (*described(out), *described(kept[0]), kept[1], state.window)
    return described(result)


def described(x):
    host = np.asarray(x.detach()) if isinstance(x, torch.Tensor) else np.asarray(x)
    return type(x).__name__, str(x.dtype), host.round(4).tolist(), getattr(x, "requires_grad", None)


def plans_of(feature_map):
    return _derived.made_from(feature_map).get("plans", {})


class Derived(np.ndarray):
    """A subclass of arrays."""


def changed_points(library):
    """Variants of one array argument."""
    q, k, v = points(library)
    narrow = points(library, dtype="float32")[0]
    for place, x in enumerate((q, k, v)):
        rest = [q, k, v]
        for other in (x[..., :-1], x[..., :-1, :], x[..., :1, :], x[:1], x[0], x[..., :0], None, x.tolist()):
            yield [*rest[:place], other, *rest[place + 1 :]]
        yield [*rest[:place], x.swapaxes(-1, -2), *rest[place + 1 :]]
        yield [*rest[:place], narrow[..., : x.shape[-1]], *rest[place + 1 :]]
        if library == "numpy":
            yield [*rest[:place], x.view(Derived), *rest[place + 1 :]]
            yield [*rest[:place], (x * 10).astype(int), *rest[place + 1 :]]
            yield [*rest[:place], torch.from_numpy(x), *rest[place + 1 :]]
        else:
            yield [*rest[:place], x.clone().requires_grad_(), *rest[place + 1 :]]
            yield [*rest[:place], x.to("meta"), *rest[place + 1 :]]
            yield [*rest[:place], x.numpy(), *rest[place + 1 :]]


def changed_options(library):
    """Variants of the options, as keyword arguments."""
    mask = np.arange(N) < 5
    masks = [mask, mask[:-1], mask.astype(np.float32), mask[None, None, None], mask.tolist()]
    if library == "torch":
        masks = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in masks]
    values = {
        "key_mask": masks,
        "window": [1, 4, -1, True, 2.0, "4", None, np.int64(4)],
        "is_causal": [True, 1, None, "yes", np.bool_(True)],
        "enable_gqa": [True, 1, None],
        "cu_seqlens": [[0, N], [0, 3, N], [0, N + 1]],
        "return_state": [True, 1],
    }
    return [{name: value} for name, choices in values.items() for value in choices]


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("base", [{}, {"is_causal": True}, {"window": 4}])
def test_one_other_argument_of_linear_attention(library, base):
    feature_map, own = made(library), points(library)
    calls = [(arguments, feature_map, base) for arguments in changed_points(library)]
    calls += [(own, feature_map, {**base, **options}) for options in changed_options(library)]
    calls += [(own, other, base) for other in (made(library, method="relu"), made(library, method="trig"), None)]
    for arguments, used_map, options in calls:
        with np.errstate(all="ignore"):
            _derived._stores.clear()
            fresh = outcome(lambda: fs.linear_attention(*arguments, used_map, **options))  # noqa: B023
            _derived._stores.clear()
            fs.linear_attention(*own, feature_map, **base)
            assert plans_of(feature_map), "the first call has no plan"
            assert outcome(lambda: fs.linear_attention(*arguments, used_map, **options)) == fresh  # noqa: B023


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("window", [0, 4])
def test_one_other_argument_of_decode_step(library, window):
    feature_map, own = made(library), [x[..., :1, :] for x in points(library)]
    state = fs.init_state(feature_map, E, like=own[1], window=window)
    state = fs.update(state, *points(library)[1:], feature_map)
    of_another_map = replace(state, fingerprint="another")
    wide = replace(state, kv=state.kv + 0, kv_low=None, z_low=None)
    calls = [([x if x is None or isinstance(x, list) else x[..., :1, :] for x in arguments], state)
             for arguments in changed_points(library)]  # fmt: skip
    calls += [(own, other) for other in (of_another_map, wide, None, fs.init_state(feature_map, E + 1, like=own[1]))]
    if library == "torch":
        calls.append((own, replace(state, kv=state.kv.clone().requires_grad_())))
    for arguments, used in calls:
        _derived._stores.clear()
        fresh = outcome(lambda: fs.decode_step(*arguments, used, feature_map))  # noqa: B023
        _derived._stores.clear()
        fs.decode_step(*own, state, feature_map)
        assert plans_of(feature_map), "the first call has no plan"
        assert outcome(lambda: fs.decode_step(*arguments, used, feature_map)) == fresh  # noqa: B023


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("grouped", [False, True])
def test_one_other_argument_of_a_token_of_landmarks(library, grouped):
    lm, (q, k, v) = fs.landmarks(4, room=4), points(library)
    q = q.repeat(2, 1, 1) if grouped and library == "torch" else np.repeat(q, 2, axis=0) if grouped else q
    options = {"enable_gqa": grouped}
    own = [x[..., :1, :] for x in (q, k, v)]
    _, state = fs.linear_attention(q, k, v, lm, is_causal=True, return_state=True, **options)
    _, state = fs.decode_step(*own, state, lm, **options)
    assert state.next_token is not None, "the first call has no plan"
    calls = [([x if x is None or isinstance(x, list) else x[..., :1, :] for x in arguments], lm, options)
             for arguments in changed_points(library)]  # fmt: skip
    calls += [(own, lm, {"enable_gqa": flag}) for flag in (not grouped, int(grouped), None)]
    calls += [(own, other, options) for other in (fs.landmarks(5, room=4), fs.landmarks(4, room=5), made(library))]
    for arguments, used, given in calls:
        fresh = outcome(lambda: fs.decode_step(*arguments, replace(state), used, **given))  # noqa: B023
        assert outcome(lambda: fs.decode_step(*arguments, state, used, **given)) == fresh  # noqa: B023


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_one_other_argument_of_update(library):
    feature_map, own = made(library), points(library)[1:]
    state = fs.init_state(feature_map, E, like=own[0])
    hidden = (own[0] * 0)[..., 0] != 0
    states = (replace(state, fingerprint="another"), replace(state, c=state.c[..., :-1]), None)
    calls = [(*arguments[1:], state, None) for arguments in changed_points(library)]
    calls += [(*own, other, None) for other in (*states, fs.init_state(feature_map, E + 1, like=own[0]))]
    calls += [(*own, state, mask) for mask in (hidden, hidden[..., 1:], "no mask")]
    for k, v, used, mask in calls:
        call = lambda: (k, fs.update(used, k, v, feature_map, key_mask=mask))  # noqa: B023, E731
        _derived._stores.clear()
        fresh = outcome(call)
        _derived._stores.clear()
        fs.update(state, *own, feature_map)
        assert plans_of(feature_map), "the first call has no plan"
        assert outcome(call) == fresh


def test_circumstances_are_part_of_the_key(monkeypatch):
    feature_map, own = made("numpy"), points("numpy")

    def planned():
        return plans.find(feature_map, plans.key_of(feature_map, *own, None, False, 0)) is not None

    fs.linear_attention(*own, feature_map)
    assert planned()
    with fs.use("reference"):
        assert not planned()
    dispatch.rediscover()
    assert not planned()
    monkeypatch.setenv("FAVORSHARP_BACKEND", "no such backend")
    with pytest.raises(ValueError, match="no such backend"):
        fs.linear_attention(*own, feature_map)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
def test_modes_of_torch_are_part_of_the_key(context):
    feature_map, own = made("torch"), points("torch")
    own[0].requires_grad_()
    state = fs.init_state(feature_map, E, like=own[1])
    for call in (
        lambda: fs.linear_attention(*own, feature_map),
        lambda: fs.decode_step(*(x[..., :1, :] for x in own), state, feature_map)[0],
    ):
        for inside in (False, True, False):
            with context() if inside else nullcontext():
                assert call().requires_grad == (context is nullcontext or not inside)
        _derived._stores.clear()
        for inside in (True, False):
            with context() if inside else nullcontext():
                assert call().requires_grad == (context is nullcontext or not inside)


def test_a_map_whose_tensors_change_has_no_old_plan():
    feature_map, own = made("torch"), points("torch")
    before = fs.linear_attention(*own, feature_map)
    feature_map.rows.mul_(0.5)
    after = fs.linear_attention(*own, feature_map)
    _derived._stores.clear()
    assert torch.equal(after, fs.linear_attention(*own, feature_map))
    assert not torch.allclose(before, after, atol=1e-3)


def test_plans_are_few_and_die_with_their_map():
    feature_map = made("numpy")
    for n in range(1, plans.MOST + 10):
        fs.linear_attention(*points("numpy", n=n), feature_map)
    assert len(plans_of(feature_map)) == plans.MOST
    count = len(_derived._stores)
    del feature_map
    gc.collect()
    assert len(_derived._stores) == count - 1


def test_a_prepared_map_is_the_same_object_until_its_numbers_change():
    fm = made("torch")
    prepared = plans.prepared_map(fm, torch.float32, grouped=True)
    assert prepared.rows.dtype == torch.float32
    assert prepared.parameters.g1.ndim == fm.parameters.g1.ndim + 1
    assert plans.prepared_map(fm, torch.float32, grouped=True) is prepared
    assert plans.prepared_map(fm, torch.float32) is not prepared
    assert plans.prepared_map(fm, torch.float64) is fm
    fm.rows.mul_(2)
    rows = plans.prepared_map(fm, torch.float32, grouped=True).rows
    torch.testing.assert_close(rows.reshape(fm.rows.shape), fm.rows.float())


def test_a_prepared_map_that_is_trained_belongs_to_one_call():
    fm = made("torch")
    before = plans.prepared_map(fm, torch.float32)
    fm.rows.requires_grad_()
    with torch.no_grad():
        plans.prepared_map(fm, torch.float32)
    for _ in range(2):
        prepared = plans.prepared_map(fm, torch.float32)
        assert prepared is not before
        prepared.rows.sum().backward()
    assert (fm.rows.grad == 2).all()
