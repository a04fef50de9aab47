"""The public functions of linear attention, for whole sequences and for streams.

Each function checks its arguments (`favorsharp.calls`), and runs an op of `favorsharp.ops`, whose implementation
`favorsharp.dispatch` chooses: a kernel of a backend, or the reference. `favorsharp.plans` keeps the outcome of checks
and choice for later calls. Calls with `Landmarks` in place of a feature map go to `favorsharp.landmarks.verbs`.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

from favorsharp._arrays import cast, namespace_of, result_dtype
from favorsharp._autodiff import is_followed, without_gradient
from favorsharp._checks import (
    check_attention,
    check_broadcast,
    check_flag,
    check_floats,
    check_group_of_state,
    check_in_memory,
    check_integer,
    check_mask,
    check_out,
    check_points,
    check_same_size,
)
from favorsharp._heads import grouped, join_queries, merge_heads, part_queries, split_heads
from favorsharp._typing import Array
from favorsharp.calls import (
    Call,
    check_bounds,
    check_continued,
    check_map,
    check_positive,
    check_state,
    check_values,
    checked,
)
from favorsharp.dispatch import Op
from favorsharp.features import FeatureMap
from favorsharp.features import feature_map as draw_feature_map
from favorsharp.fitting import fit_named
from favorsharp.landmarks.settings import Landmarks
from favorsharp.landmarks.verbs import (
    landmark_attention,
    landmark_call,
    landmark_init,
    landmark_read,
    landmark_step,
    landmark_update,
)
from favorsharp.methods import LANDMARKS, MethodLike, check_method, method_of
from favorsharp.ops.attention import attention as attention_op
from favorsharp.ops.causal_attention import causal_attention
from favorsharp.ops.state import State, empty_state, with_group_axis, without_group_axis
from favorsharp.ops.state import decode_step as decode_step_op
from favorsharp.ops.state import read as read_op
from favorsharp.ops.state import update as update_op
from favorsharp.plans import Plan, find, keep, key_of, layout_of, prepared_map


def attention(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    num_features: int = 256,
    method: MethodLike = "optimal",
    draw: str | Array | tuple[Array, Array] = "orthogonal",
    rng: Any = None,
    is_causal: bool = False,
    window: int = 0,
    key_mask: Array | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    calibration: tuple[Array, Array] | None = None,
) -> Array:
    """Approximate softmax attention in one call: fit, draw and apply.

    Each leading index (each key head with `enable_gqa`) has its own fit; all share one draw. Gradients flow through q,
    k and v as inputs of the features, but not through the fit, because the estimate is unbiased for any fit.

    Parameters
    ----------
    q : array, shape (*b, n, d)
    k : array, shape (*b, s, d)
    v : array, shape (*b, s, e)
    num_features : int
        m, 1 or more.
    method : str or callable
        As in `fit`; only methods whose features are positive. Or "landmarks", for `num_features` landmarks with the
        default settings of `landmarks`. These are biased. They take neither `draw` nor `calibration`, which they do not
        need in causal calls either.
    draw, rng
        As in `feature_map`.
    is_causal, window, key_mask
        As in `linear_attention`. Masked keys do not enter the fit; if n == s, neither do the queries at their
        positions.
    scale : float, optional
        Positive and finite; None means d**-0.5.
    enable_gqa : bool
        As in `linear_attention`.
    calibration : pair of arrays, optional
        Queries (*b, n0, d) and keys (*b, s0, d) to fit to, instead of q and k. A causal call with a fitted method needs
        it: a fit to the sequence itself would let outputs depend on later keys.

    Returns
    -------
    array, shape (*b, n, e)
        In the dtype that q, k and v promote to.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 64, 8))
    >>> fs.attention(q, k, v, num_features=128, rng=0).shape
    (2, 64, 8)
    >>> fs.attention(q, k, v, is_causal=True, calibration=(q[:, :32], k[:, :32]), rng=0).shape
    (2, 64, 8)
    """
    if isinstance(method, str) and method == LANDMARKS:
        shared = {"is_causal": is_causal, "window": window, "key_mask": key_mask, "enable_gqa": enable_gqa}
        given = {"draw": draw, "calibration": calibration}
        return landmark_call(q, k, v, num_features, given, scale=scale, rng=rng, **shared)
    check_attention(q, k, v, is_causal=is_causal, key_mask=key_mask, enable_gqa=enable_gqa)
    check_in_memory(q=q, k=k, v=v)
    check_method(method, also=(LANDMARKS,))
    if calibration is None:
        if is_causal and method_of(method).is_fitted:
            raise ValueError(
                f"attention(is_causal=True) with the fitted method {method!r} needs calibration=(q0, k0): fitting on "
                "the sequence itself would show it its own future; or pass method='posrf' or 'landmarks', which "
                "fit nothing"
            )
        names, data, masks = ("q", "k"), (q, k), _masks_of_fit(q, k, key_mask, enable_gqa)
    else:
        names, data, masks = ("calibration[0]", "calibration[1]"), _pair(calibration), {}
        check_floats(**dict(zip(names, data, strict=True)), q=q)
    parameters = fit_named(
        names,
        *(without_gradient(x) for x in data),
        method=method,
        kernel="softmax",
        scale=scale,
        enable_gqa=enable_gqa,
        **masks,
    )
    drawn = draw_feature_map(parameters, num_features, draw=draw, rng=rng)
    out: Array = linear_attention(
        q, k, v, drawn, is_causal=is_causal, window=window, key_mask=key_mask, enable_gqa=enable_gqa
    )
    return out


def _pair(calibration: Any) -> tuple[Array, Array]:
    """Check that calibration is a pair; its arrays are checked by `check_floats` later."""
    if not (isinstance(calibration, tuple | list) and len(calibration) == 2):
        raise TypeError(f"calibration must be a pair (queries, keys) of arrays, got {type(calibration).__name__}")
    return calibration[0], calibration[1]


def _masks_of_fit(q: Array, k: Array, key_mask: Array | None, enable_gqa: bool) -> dict[str, Any]:
    """The masks for a fit to q and k; if n == s, queries at the positions of hidden keys are hidden too."""
    if key_mask is None or q.shape[-2] != k.shape[-2]:
        return {"mask_y": key_mask}
    shared = enable_gqa and key_mask.ndim > 1 and key_mask.shape[-2] > 1
    repeats = q.shape[-3] // k.shape[-3] if shared else 1
    mask_x = namespace_of(key_mask).repeat(key_mask, repeats, axis=-2) if shared else key_mask
    return {"mask_x": mask_x, "mask_y": key_mask}


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    /,
    feature_map: FeatureMap | Landmarks,
    *,
    is_causal: bool = False,
    window: int = 0,
    key_mask: Array | None = None,
    enable_gqa: bool = False,
    cu_seqlens: Any = None,
    state: Any = None,
    return_state: bool = False,
    out: Array | None = None,
) -> Any:
    """Attention through the features of a given map, in time and memory linear in the lengths.

    Parameters
    ----------
    q : array, shape (*b, n, d)
    k : array, shape (*b, s, d)
    v : array, shape (*b, s, e)
    feature_map : FeatureMap or Landmarks
        A map with positive features, or the settings of landmarks (`landmarks`), which are biased.
    is_causal : bool
        Query i sees keys 0 .. i, and the keys of the state; needs n == s.
    window : int
        Positions are cut into blocks of this length from the start of each sequence. A query scores the keys of its own
        block and of the two neighbouring blocks exactly, and reads the other keys through features. If causal, these
        are its own block up to itself and the block before. Needs n == s. 0 means features only.
    key_mask : array of bool, shape (*b, s), optional
        True where a key is visible.
    enable_gqa : bool
        q has g times the heads of k and v; query head h reads key head h // g. A batched map has as many heads as k.
    cu_seqlens : integers, optional
        Boundaries, from 0 to n, of sequences that are packed along the point axis and do not see each other; needs
        n == s. A list, a tuple or an integer array.
    state : State or LandmarkState, optional
        The state of keys seen before, made by the same map.
    return_state : bool
        Also return the state of all keys, from which a later call can continue.
    out : array, shape (*b, n, e), optional
        The array to write the result to; it is also returned. Libraries with immutable arrays do not take it.

    Returns
    -------
    out : array, shape (*b, n, e)
        In the dtype that q, k and v promote to; sums are in float32 at least. A query that may see no key gets zeros.
    state : State or LandmarkState
        Only with `return_state`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 64, 8))
    >>> feature_map = fs.feature_map(fs.fit(q, k), 128, rng=0)
    >>> fs.linear_attention(q, k, v, feature_map).shape
    (2, 64, 8)
    >>> out, state = fs.linear_attention(q, k, v, feature_map, is_causal=True, window=16, return_state=True)
    >>> state
    State(num_features=128, v_size=8, batch=(2,), window=16, recent=32)
    """
    key = None
    if cu_seqlens is None and state is None and out is None and return_state is False and enable_gqa is False:
        key = key_of(feature_map, q, k, v, key_mask, is_causal, window)
    if (plan := find(feature_map, key)) is not None:
        result = plan.run(q, k, v, plan.feature_map, key_mask=key_mask, window=window)
        return result[0] if is_causal else result
    if isinstance(feature_map, Landmarks):
        check_attention(q, k, v, is_causal=is_causal, key_mask=key_mask, enable_gqa=enable_gqa)
        bounds = None if cu_seqlens is None else check_bounds(cu_seqlens, q.shape[-2], k.shape[-2])
        given: dict[str, Any] = {"is_causal": is_causal, "window": window, "key_mask": key_mask}
        given |= {"enable_gqa": enable_gqa, "bounds": bounds, "state": state, "return_state": return_state, "out": out}
        return landmark_attention(q, k, v, feature_map, **given)
    call = checked(q, k, v, feature_map, is_causal=is_causal, window=window, key_mask=key_mask, enable_gqa=enable_gqa)
    check_flag("return_state", return_state)
    before = None if state is None else check_continued(call, state, feature_map, k)
    if out is not None:
        check_out(out, call.q, call.shape_with(before), call.dtype)
    if cu_seqlens is not None:
        if state is not None or return_state:
            raise ValueError("cu_seqlens with state or return_state is not supported: run the sequences one by one")
        return _packed(call, check_bounds(cu_seqlens, q.shape[-2], k.shape[-2]), out)
    result, after = _attend(call, before, return_state, out, (feature_map, key))
    if after is None or not return_state:
        return result
    return result, replace(without_group_axis(call.group, after), fingerprint=feature_map.fingerprint)


def _attend(
    call: Call, state: State | None, return_state: bool, out: Array | None, known: tuple[Any, Any]
) -> tuple[Array, State | None]:
    """The result of a call and the state after it, if one is returned; `known` is the map and the key for a plan."""
    if not call.is_causal and (state is not None or return_state):
        state = call.empty_state(call.window, call.k) if state is None else state
        state = update_op(state, *call.arguments[1:], key_mask=call.key_mask)
        result = (
            attention_op(*call.arguments, **call.options)
            if call.window
            else cast(read_op(state, call.q, call.feature_map), call.dtype)
        )
        return call.deliver(result, out), state
    op: Op[..., Any] = causal_attention if call.is_causal else attention_op
    options = {**call.options, "state": state} if call.is_causal else call.options
    chosen = op.implementation(*call.arguments, **options)
    if known[1] is not None:
        keep(*known, Plan(chosen.run, call.feature_map))
    place = call.place(chosen, out)
    result = chosen.run(*call.arguments, **options, **place)
    result, after = result if call.is_causal else (result, None)
    return call.deliver(result, out, place), after


def _packed(call: Call, bounds: list[int], out: Array | None) -> Array:
    """Attention within each of the sequences that are packed along the point axis."""
    op: Op[..., Any] = causal_attention if call.is_causal else attention_op
    chosen = op.implementation(*call.arguments, **call.options)
    if chosen.packed is not None and call.q.shape[-2] > 0 and not is_followed(call.q):
        place = call.place(chosen, out)
        result = chosen.packed(*call.arguments, bounds, **call.options, **place)
        return call.deliver(result, out, place)
    pieces = []
    for a, b in pairwise(bounds):
        if a < b or bounds[-1] == 0:
            mask = None if call.key_mask is None else call.key_mask[..., a:b]
            points = (x[..., a:b, :] for x in (call.q, call.k, call.v))
            piece = op(*points, call.feature_map, key_mask=mask, window=call.window)
            pieces.append(piece[0] if call.is_causal else piece)
    return call.deliver(pieces[0] if len(pieces) == 1 else call.xp.concat(pieces, axis=-2), out)


def init_state(feature_map: FeatureMap | Landmarks, v_size: int, *, like: Array, window: int = 0) -> Any:
    """The state of no keys: the identity of `combine`.

    Parameters
    ----------
    feature_map : FeatureMap or Landmarks
        A positive one.
    v_size : int
        Size e of a value.
    like : array, shape (*b, ., .)
        An array shaped like the keys, which gives the library, device, dtype and leading axes. Its values are not read.
    window : int
        Block length of exactly scored keys; 0 for none.

    Returns
    -------
    State or LandmarkState

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 64, 8))
    >>> feature_map = fs.feature_map(fs.fit(q, k), 32, rng=0)
    >>> fs.init_state(feature_map, v_size=8, like=k)
    State(num_features=32, v_size=8, batch=(), window=0, recent=0)
    """
    if isinstance(feature_map, Landmarks):
        return landmark_init(feature_map, v_size, like=like, window=window)
    positive = check_positive(feature_map)
    check_floats(like=like, feature_map=feature_map.projection)
    e, window = check_integer("v_size", v_size, 0), check_integer("window", window, 0)
    own = feature_map.batch_shape
    batch = check_broadcast("like (*b, s, d)", like=like.shape[:-2], feature_map=own)
    state = empty_state(positive, batch, feature_map.parameters.size, e, window, like)
    return replace(state, fingerprint=feature_map.fingerprint)


def update(
    state: Any,
    k: Array,
    v: Array,
    /,
    feature_map: FeatureMap | Landmarks,
    *,
    key_mask: Array | None = None,
) -> Any:
    """The state after further keys and values, of any number.

    Parameters
    ----------
    state : State or LandmarkState
    k : array, shape (*b, s, d)
    v : array, shape (*b, s, e)
    feature_map : FeatureMap or Landmarks
        The map that made the state.
    key_mask : array of bool, shape (*b, s), optional
        True where a key is visible.

    Returns
    -------
    State or LandmarkState
        A new state; the given one is unchanged.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or if another map made the state.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 64, 8))
    >>> feature_map = fs.feature_map(fs.fit(q, k), 32, rng=0)
    >>> state = fs.init_state(feature_map, v_size=8, like=k)
    >>> for part in (slice(0, 40), slice(40, 64)):
    ...     state = fs.update(state, k[part], v[part], feature_map)
    >>> np.allclose(fs.read(state, q, feature_map), fs.linear_attention(q, k, v, feature_map))
    True
    """
    if isinstance(feature_map, Landmarks):
        return landmark_update(state, k, v, feature_map, key_mask=key_mask)
    key = None
    if isinstance(state, State) and state.window == 0 and key_mask is None:
        key = key_of(feature_map, "update", k, v, state=layout_of(state))
    if (plan := find(feature_map, key)) is None:
        plan = _plan_of_update(state, k, v, feature_map, key_mask, key)
    after: State = plan.run(state, k, v, plan.feature_map, key_mask=key_mask)
    if after.fingerprint != state.fingerprint:
        after = replace(after, fingerprint=state.fingerprint)
    if after.single_tokens is not None:
        after.remember("known_layout", plan.layout)
    return after


def _plan_of_update(
    state: Any, k: Array, v: Array, feature_map: FeatureMap, key_mask: Array | None, key: Any
) -> Plan:  # fmt: skip
    """Check the arguments of `update`, and choose what runs it; the plan is kept if the call has a key."""
    check_floats(k=k, v=v)
    check_points("k", k, "(*b, s, d)")
    check_points("v", v, "(*b, s, e)")
    check_same_size("s", k=(-2, k.shape[-2]), v=(-2, v.shape[-2]))
    check_mask("key_mask", key_mask, "(*b, s)", k=k)
    check_map(feature_map, 1, k=k)
    check_state(state, feature_map, k=k)
    check_values(state, v)
    prepared: Any = prepared_map(feature_map, state.like.dtype)
    chosen = update_op.implementation(state, k, v, prepared, key_mask=key_mask)
    plan = Plan(chosen.run, prepared, None if key is None else layout_of(state))
    if key is not None:
        keep(feature_map, key, plan)
    return plan


def read(state: Any, q: Array, /, feature_map: FeatureMap | Landmarks, *, enable_gqa: bool = False) -> Array:
    """Attention of queries to every key that a state has seen.

    Parameters
    ----------
    state : State or LandmarkState
    q : array, shape (*b, n, d)
    feature_map : FeatureMap or Landmarks
        The map that made the state.
    enable_gqa : bool
        q has g times the heads of the state.

    Returns
    -------
    array, shape (*b, n, e)
        In the dtype of q; zeros where no key is visible.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or if another map made the state.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 64, 8))
    >>> feature_map = fs.feature_map(fs.fit(q, k), 32, rng=0)
    >>> state = fs.update(fs.init_state(feature_map, v_size=8, like=k), k, v, feature_map)
    >>> fs.read(state, q, feature_map).shape
    (64, 8)
    """
    if isinstance(feature_map, Landmarks):
        return landmark_read(state, q, feature_map, enable_gqa=enable_gqa)
    check_floats(q=q)
    check_points("q", q, "(*b, n, d)")
    check_positive(feature_map)
    check_state(state, feature_map, q=q)
    group = check_group_of_state(enable_gqa, q, state.like.shape[:-2])
    check_map(feature_map, group, q=q)
    prepared = prepared_map(feature_map, state.like.dtype, grouped=group > 1)
    return merge_heads(group, read_op(with_group_axis(group, state), split_heads(group, q), prepared))


def decode_step(
    q: Array,
    k: Array,
    v: Array,
    /,
    state: Any,
    feature_map: FeatureMap | Landmarks,
    *,
    enable_gqa: bool = False,
) -> tuple[Array, Any]:
    """One token of causal attention: its key and value enter the state, then its query reads the state.

    Parameters
    ----------
    q : array, shape (*b, 1, d)
    k : array, shape (*b, 1, d)
    v : array, shape (*b, 1, e)
    state : State or LandmarkState
    feature_map : FeatureMap or Landmarks
        The map that made the state.
    enable_gqa : bool
        q has g times the heads of k, v and the state.

    Returns
    -------
    out : array, shape (*b, 1, e)
        In the dtype that q, k and v promote to.
    state : State or LandmarkState
        A new state; the given one is unchanged.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or if another map made the state.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 64, 8))
    >>> feature_map = fs.feature_map(fs.fit(q, k), 32, rng=0)
    >>> state = fs.init_state(feature_map, v_size=8, like=k)
    >>> for t in range(64):
    ...     out, state = fs.decode_step(q[t : t + 1], k[t : t + 1], v[t : t + 1], state, feature_map)
    >>> np.allclose(out, fs.linear_attention(q, k, v, feature_map, is_causal=True)[-1:])
    True
    """
    if isinstance(feature_map, Landmarks):
        return landmark_step(q, k, v, state, feature_map, enable_gqa=enable_gqa)
    key = None
    if isinstance(state, State):
        key = key_of(feature_map, q, k, v, enable_gqa, with_layout=True, state=layout_of(state))
    if (plan := find(feature_map, key)) is not None:
        group = q.shape[-3] // k.shape[-3] if enable_gqa else 1
        out, after = plan.run(join_queries(group, q), k, v, state, plan.feature_map)
        after.remember("known_layout", plan.layout)
        return part_queries(group, out), after
    xp, group = check_attention(q, k, v, is_causal=False, key_mask=None, enable_gqa=enable_gqa)
    if q.shape[-2] != 1 or k.shape[-2] != 1:
        raise ValueError(
            f"decode_step takes one token: q has n={q.shape[-2]}, k has s={k.shape[-2]}; accepted: 1 and 1"
        )
    check_map(feature_map, group, q=q, k=k)
    check_state(state, feature_map, k=k)
    check_values(state, v)
    prepared: Any = prepared_map(feature_map, state.like.dtype)
    arguments = join_queries(group, q), k, v, state, prepared
    chosen = decode_step_op.implementation(*grouped(group, q, k, v, None)[:3], with_group_axis(group, state), prepared)
    planned = chosen.plan(*arguments) if key is not None and chosen.plan is not None else None
    run = planned or (chosen.run if group == 1 else partial(_by_group, chosen.run))
    out, after = run(*arguments)
    if after.fingerprint != state.fingerprint:
        after = replace(after, fingerprint=state.fingerprint)
    if key is not None and q.dtype == k.dtype == v.dtype:
        layout = layout_of(state)
        keep(feature_map, key, Plan(run, prepared, layout))
        if planned is not None:  # the next token finds this plan, even if the window holds one key more by then
            after.remember("known_layout", layout)
    return cast(part_queries(group, out), result_dtype(xp, q, k, v)), after


def _by_group(run: Any, q: Array, k: Array, v: Array, state: State, feature_map: Any) -> tuple[Array, State]:
    """Run the op `decode_step`, which takes grouped heads by a group axis, with joined queries (*b, h, g, d)."""
    group = q.shape[-2]
    points = q[..., :, None, :], k[..., None, :, :], v[..., None, :, :]
    prepared = prepared_map(feature_map, state.like.dtype, grouped=True)
    out, after = run(*points, with_group_axis(group, state), prepared)
    return out[..., 0, :], without_group_axis(group, after)
