"""Linear attention with random features: the public functions for whole sequences and for streams."""

from collections.abc import Hashable
from dataclasses import replace
from itertools import pairwise
from typing import Any

from favorsharp._arrays import (
    broadcast_shapes,
    cast,
    compute_dtype,
    dtype_name,
    is_array,
    is_compiling,
    is_followed,
    is_traced,
    library_of,
    namespace_of,
    records_gradients,
    result_dtype,
    signature_of,
    to_host,
    without_gradient,
)
from favorsharp._checks import (
    check_array,
    check_broadcast,
    check_flag,
    check_floats,
    check_in_memory,
    check_integer,
    check_mask,
    check_points,
    check_same_size,
)
from favorsharp._typing import Array
from favorsharp.dispatch import Known, Op, call_signature, recall, settle
from favorsharp.exact import add_group_axis, check_attention, merge_heads, split_heads
from favorsharp.features import FeatureMap, PositiveFeatureMap
from favorsharp.features import feature_map as draw_feature_map
from favorsharp.landmarks.settings import Landmarks
from favorsharp.landmarks.verbs import (
    landmark_attention,
    landmark_call,
    landmark_init,
    landmark_read,
    landmark_step,
    landmark_update,
)
from favorsharp.ops.attention import attention as attention_op
from favorsharp.ops.causal_attention import causal_attention
from favorsharp.ops.state import State, empty_state
from favorsharp.ops.state import decode_step as decode_step_op
from favorsharp.ops.state import read as read_op
from favorsharp.ops.state import update as update_op
from favorsharp.parameters import Method, astype, check_method, fit_named, is_fitted


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    num_features: int = 256,
    method: Method = "optimal",
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
    k and v as inputs of the features, but not through the fit: the estimate is unbiased for any fit.

    Parameters
    ----------
    q : array, shape (*b, n, d)
    k : array, shape (*b, s, d)
    v : array, shape (*b, s, e)
    num_features : int
        m, 1 or more.
    method : str or callable
        As in `fit`; only methods whose features are positive. Or "landmarks": `num_features` landmarks with the default
        settings of `landmarks`, which take neither `draw` nor `calibration`, causal or not. They are biased.
    draw, rng
        As in `feature_map`.
    is_causal, window, key_mask, enable_gqa
        As in `linear_attention`. Masked keys do not enter the fit; if n == s, neither do the queries at their
        positions.
    scale : float, optional
        Positive and finite; None means d**-0.5.
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
    if isinstance(method, str) and method == "landmarks":
        shared = {"is_causal": is_causal, "window": window, "key_mask": key_mask, "enable_gqa": enable_gqa}
        given = {"draw": draw, "calibration": calibration}
        return landmark_call(q, k, v, num_features, given, scale=scale, rng=rng, **shared)
    check_attention(q, k, v, is_causal=is_causal, key_mask=key_mask, enable_gqa=enable_gqa)
    check_in_memory(q=q, k=k, v=v)
    check_method(method)
    if calibration is not None and not (isinstance(calibration, tuple | list) and len(calibration) == 2):
        raise TypeError(f"calibration must be a pair (queries, keys) of arrays, got {type(calibration).__name__}")
    if is_causal and is_fitted(method) and calibration is None:
        raise ValueError(
            f"attention(is_causal=True) with the fitted method {method!r} needs calibration=(q0, k0): fitting on the "
            "sequence itself would show it its own future; or pass method='posrf', which fits nothing"
        )
    if calibration is None:
        names, data = ("q", "k"), (q, k)
        masks: dict[str, Any] = {"mask_x": key_mask if q.shape[-2] == k.shape[-2] else None, "mask_y": key_mask}
        if masks["mask_x"] is not None and enable_gqa:
            masks["mask_x"] = _repeat_heads(key_mask, q, k)
    else:
        names, data, masks = ("calibration[0]", "calibration[1]"), tuple(calibration), {}
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


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
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
    key_mask : boolean array, shape (*b, s), optional
        True where a key is visible.
    enable_gqa : bool
        q has g times the heads of k and v; query head h reads key head h // g. A batched map has as many heads as k.
    cu_seqlens : integers, optional
        Boundaries, from 0 to n, of sequences that are packed along the point axis and do not see each other; needs
        n == s. A list, a tuple or an integer array.
    state : State or LandmarkState, optional
        The state of keys seen before, made by the same map.
    return_state : bool
        Also return the state of all keys, from which a later call can go on.
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
    signature = None
    if cu_seqlens is None and state is None and out is None and return_state is False and enable_gqa is False:
        signature = call_signature(feature_map, q, k, v, key_mask, is_causal, window)
    if (known := recall(feature_map, signature)) is not None:
        run, prepared = known
        result = run(q, k, v, prepared, key_mask=key_mask, window=window)
        return result[0] if is_causal else result
    xp, group = check_attention(q, k, v, is_causal=is_causal, key_mask=key_mask, enable_gqa=enable_gqa)
    if isinstance(feature_map, Landmarks):
        bounds = None if cu_seqlens is None else check_bounds(cu_seqlens, q.shape[-2], k.shape[-2])
        given: dict[str, Any] = {
            "is_causal": is_causal,
            "window": window,
            "key_mask": key_mask,
            "enable_gqa": enable_gqa,
        }
        given |= {"bounds": bounds, "state": state, "return_state": return_state, "out": out}
        return landmark_attention(q, k, v, feature_map, **given)
    check_map(feature_map, group, q=q, k=k)
    window = check_integer("window", window, 0)
    check_flag("return_state", return_state)
    n, s = q.shape[-2], k.shape[-2]
    if window and n != s:
        raise ValueError(f"window needs as many queries as keys: q has n={n}, k has s={s}")
    if state is not None:
        _check_state(state, feature_map, k=k)
        if v.shape[-1] != state.v_size:
            raise ValueError(f"state and v must agree in e: state has e={state.v_size}, v has e={v.shape[-1]}")
        if state.window != window:
            raise ValueError(f"window must be that of the state, {state.window}, got {window}")
        if window and not is_causal:
            raise ValueError("a window with a state needs is_causal=True: a bidirectional window takes no state")
    if out is not None:
        _check_out(out, q, k, v, feature_map, key_mask, group, state)
    op: Op[..., Any] = causal_attention if is_causal else attention_op
    if cu_seqlens is not None:
        if state is not None or return_state:
            raise ValueError("cu_seqlens with state or return_state is not supported: run the sequences one by one")
        bounds = check_bounds(cu_seqlens, n, s)
        if n > 0 and not is_followed(q):
            prepared = astype(feature_map, compute_dtype(xp, q, k, v))
            run = op.implementation(q, k, v, prepared, key_mask=key_mask, window=window)
            packed = getattr(run, "packed", None)
            if packed is not None:
                if group > 1:
                    q, k, v = split_heads(q, group), k[..., None, :, :], v[..., None, :, :]
                    key_mask, prepared = add_group_axis(key_mask), prepared.expanded()
                place = _into(run, out, group)
                result = packed(q, k, v, prepared, bounds, key_mask=key_mask, window=window, **place)
                return _deliver(result, out, group, place)
        pieces = [
            linear_attention(
                q[..., a:b, :],
                k[..., a:b, :],
                v[..., a:b, :],
                feature_map,
                is_causal=is_causal,
                window=window,
                key_mask=None if key_mask is None else key_mask[..., a:b],
                enable_gqa=enable_gqa,
            )
            for a, b in pairwise(bounds)
            if a < b or n == 0
        ]
        return _deliver(pieces[0] if len(pieces) == 1 else xp.concat(pieces, axis=-2), out)
    fingerprint = feature_map.fingerprint if state is not None or return_state else None
    dtype = compute_dtype(xp, q, k, v)
    prepared = astype(feature_map, dtype)
    into: dict[str, Array] = {}
    if group > 1:
        q, k, v, key_mask = split_heads(q, group), k[..., None, :, :], v[..., None, :, :], add_group_axis(key_mask)
        prepared = prepared.expanded()
        state = None if state is None else _with_group_axis(state)
    if is_causal or (state is None and not return_state):
        options: dict[str, Any] = {"key_mask": key_mask, "window": window, **({"state": state} if is_causal else {})}
        run = op.implementation(q, k, v, prepared, **options)
        settle(feature_map, signature, run, prepared)
        into = _into(run, out, group)
        result = run(q, k, v, prepared, **options, **into)
        if is_causal:
            result, state = result
    else:
        if state is None:
            batch = broadcast_shapes(
                k.shape[:-2], v.shape[:-2], prepared.batch_shape, () if key_mask is None else key_mask.shape[:-1]
            )
            state = empty_state(prepared, batch, k.shape[-1], v.shape[-1], window, k)
        state = update_op(state, k, v, prepared, key_mask=key_mask)
        result = (
            attention_op(q, k, v, prepared, key_mask=key_mask, window=window)
            if window
            else cast(read_op(state, q, prepared), result_dtype(xp, q, k, v))
        )
    result = _deliver(result, out, group, into)
    if state is None or not return_state:
        return result
    signed = replace(state, fingerprint=fingerprint)
    return result, _without_group_axis(signed) if group > 1 else signed


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
    positive = _check_positive(feature_map)
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
    feature_map: FeatureMap | Landmarks,
    *,
    key_mask: Array | None = None,
) -> Any:
    """The state after a further block of keys and values, of any length.

    Parameters
    ----------
    state : State or LandmarkState
    k : array, shape (*b, s, d)
    v : array, shape (*b, s, e)
    feature_map : FeatureMap or Landmarks
        The map that made the state.
    key_mask : boolean array, shape (*b, s), optional
        True where a key is visible.

    Returns
    -------
    State or LandmarkState
        A new state; the given one is unchanged.

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
    check_floats(k=k, v=v)
    check_points("k", k, "(*b, s, d)")
    check_points("v", v, "(*b, s, e)")
    check_same_size("s", k=(-2, k.shape[-2]), v=(-2, v.shape[-2]))
    check_mask("key_mask", key_mask, "(*b, s)", k=k)
    check_map(feature_map, 1, k=k)
    _check_state(state, feature_map, k=k)
    if v.shape[-1] != state.v_size:
        raise ValueError(f"state and v must agree in e: state has e={state.v_size}, v has e={v.shape[-1]}")
    prepared = astype(feature_map, state.kv.dtype)
    return replace(update_op(state, k, v, prepared, key_mask=key_mask), fingerprint=state.fingerprint)


def read(state: Any, q: Array, feature_map: FeatureMap | Landmarks, *, enable_gqa: bool = False) -> Array:
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
    group = _state_group(state, q, enable_gqa)
    check_map(feature_map, group, q=q)
    _check_state(state, feature_map, q=q)
    prepared = astype(feature_map, state.kv.dtype)
    if group == 1:
        return read_op(state, q, prepared)
    return merge_heads(read_op(_with_group_axis(state), split_heads(q, group), prepared.expanded()))


def decode_step(
    q: Array,
    k: Array,
    v: Array,
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
    signature = None
    if enable_gqa is False and isinstance(state, State):
        signature = call_signature(feature_map, q, k, v, with_layout=True, known=_layout_of(state))
    if (known := recall(feature_map, signature)) is not None:
        (planned, layout), prepared = known
        result: tuple[Array, State] = planned(q, k, v, state, prepared)
        object.__setattr__(result[1], "known_layout", layout)
        return result
    xp, group = check_attention(q, k, v, is_causal=False, key_mask=None, enable_gqa=enable_gqa)
    if q.shape[-2] != 1 or k.shape[-2] != 1:
        raise ValueError(
            f"decode_step takes one token: q has n={q.shape[-2]}, k has s={k.shape[-2]}; accepted: 1 and 1"
        )
    check_map(feature_map, group, q=q, k=k)
    _check_state(state, feature_map, k=k)
    if v.shape[-1] != state.v_size:
        raise ValueError(f"state and v must agree in e: state has e={state.v_size}, v has e={v.shape[-1]}")
    prepared = astype(feature_map, state.kv.dtype)
    fingerprint = state.fingerprint
    if group > 1:
        grouped = (split_heads(q, group), k[..., None, :, :], v[..., None, :, :], _with_group_axis(state))
        out, state = decode_step_op(*grouped, prepared.expanded())
        out, state = merge_heads(out), _without_group_axis(state)
    else:
        run: Any = decode_step_op
        if signature is not None:
            run = decode_step_op.implementation(q, k, v, state, prepared)
            plan = getattr(run, "plan", None)
            run = (None if plan is None else plan(q, k, v, state, prepared)) or run
        out, state = run(q, k, v, state, prepared)
        if q.dtype == k.dtype == v.dtype:
            settle(feature_map, signature, (run, _layout_of(state)), prepared)
    signed = state if state.fingerprint == fingerprint else replace(state, fingerprint=fingerprint)
    return cast(out, result_dtype(xp, q, k, v)), signed


def _layout_of(state: State) -> Hashable:
    """The part of a call signature that stands for the state; None if the checks must run each time."""
    if is_compiling():
        return None
    arrays = state.kv, state.z, state.c, state.recent_k, state.recent_v, state.recent_mask
    if state.known_layout is not None and not records_gradients(arrays):  # a tensor may need gradients by now
        return state.known_layout
    parts = [signature_of(x, with_layout=True) for x in arrays]
    return None if None in parts else Known((*parts, state.window, state.fingerprint))


def _check_positive(feature_map: Any) -> PositiveFeatureMap:
    if not isinstance(feature_map, FeatureMap):
        raise TypeError(f"feature_map must be a favorsharp.FeatureMap, got {type(feature_map).__name__}")
    if not isinstance(feature_map, PositiveFeatureMap):
        raise ValueError(
            f"feature_map of method {feature_map.parameters.method_name!r} is signed: its denominators can vanish, so "
            "attention refuses it; accepted: positive maps (kernel_matvec and nadaraya_watson take signed ones)"
        )
    return feature_map


def check_map(feature_map: Any, group: int, **named: Array) -> None:
    """Check that a map is positive and fits the library, device and shapes of the points."""
    _check_positive(feature_map)
    check_floats(**named, feature_map=feature_map.projection)
    size = feature_map.parameters.size
    for name, x in named.items():
        check_same_size("d", **{name: (-1, x.shape[-1]), "feature_map": (-1, size)})
    batch = feature_map.batch_shape
    for name, x in named.items():
        leading = x.shape[:-2]
        if name == "q" and group > 1:
            leading = (*leading[:-1], leading[-1] // group)
        check_broadcast("(*b, n, d)", **{name: leading, "feature_map": batch})


def _check_state(state: Any, feature_map: FeatureMap, **named: Array) -> None:
    """Check that a state was made by this map, and fits the library, device and leading axes of these arrays."""
    if not isinstance(state, State):
        raise TypeError(f"state must be a favorsharp.State, got {type(state).__name__}")
    check_floats(**named, state=state.kv)
    own = feature_map.fingerprint if state.fingerprint is not None else None
    if state.num_features != feature_map.num_features or (own is not None and own != state.fingerprint):
        raise ValueError(
            f"state comes from another feature map: it is {state!r}, the map is {feature_map!r}; accepted: the map "
            "that made it, or one with the same numbers"
        )
    for name, x in named.items():
        if name != "q":
            check_broadcast("(*b, s, d)", **{name: x.shape[:-2], "state": state.kv.shape[:-2]})


def _state_group(state: Any, q: Array, enable_gqa: bool) -> int:
    if not check_flag("enable_gqa", enable_gqa):
        if isinstance(state, State):
            check_broadcast("q (*b, n, d)", q=q.shape[:-2], state=state.kv.shape[:-2])
        return 1
    if not isinstance(state, State):
        raise TypeError(f"state must be a favorsharp.State, got {type(state).__name__}")
    heads, key_heads = (x.shape[-3] if x.ndim > 2 else 0 for x in (q, state.kv))
    if key_heads == 0 or heads == 0 or heads % key_heads:
        raise ValueError(
            f"enable_gqa needs a multiple of the key heads: q has {heads} heads, the state has {key_heads}"
        )
    return int(heads // key_heads)


def check_bounds(cu_seqlens: Any, n: int, s: int) -> list[int]:
    """Check the boundaries of packed sequences, and return them as host integers."""
    if n != s:
        raise ValueError(f"cu_seqlens needs as many queries as keys: q has n={n}, k has s={s}")
    if is_array(cu_seqlens):
        check_array("cu_seqlens", cu_seqlens)
        if not dtype_name(cu_seqlens).startswith(("int", "uint")):
            raise TypeError(f"cu_seqlens must hold integers, got dtype {dtype_name(cu_seqlens)}")
        if cu_seqlens.ndim != 1:
            raise ValueError(f"cu_seqlens must have one axis, got shape {tuple(cu_seqlens.shape)}")
        if is_traced(cu_seqlens):
            raise TypeError("cu_seqlens must be known while tracing: pass a list or tuple of ints")
        bounds = [int(bound) for bound in to_host(cu_seqlens)]
    elif isinstance(cu_seqlens, list | tuple):
        bounds = [check_integer("cu_seqlens", bound, 0) for bound in cu_seqlens]
    else:
        raise TypeError(f"cu_seqlens must be an integer array or a list of ints, got {type(cu_seqlens).__name__}")
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != n or any(b < a for a, b in pairwise(bounds)):
        shown = bounds if len(bounds) <= 12 else [*bounds[:6], "...", *bounds[-3:]]
        raise ValueError(f"cu_seqlens must start at 0, end at n={n} and ascend, got {shown}")
    return bounds


def _check_out(
    out: Any,
    q: Array,
    k: Array,
    v: Array,
    feature_map: FeatureMap,
    key_mask: Array | None,
    group: int,
    state: State | None,
) -> None:
    """Check that out has the library, device, shape and dtype of the result."""
    xp = check_floats(q=q, k=k, v=v, out=out)
    if library_of(out) == "jax":
        raise TypeError("out must be an array that can be written to; JAX arrays cannot: use the returned value")
    batches = [k.shape[:-2], v.shape[:-2], feature_map.batch_shape, () if key_mask is None else key_mask.shape[:-1]]
    if state is not None:
        batches.append(state.kv.shape[:-2])
    if group > 1:
        inner = [(*batch, 1) if batch else batch for batch in batches]
        batch = broadcast_shapes(split_heads(q, group).shape[:-2], *inner)
        batch = (*batch[:-2], batch[-2] * batch[-1])
    else:
        batch = broadcast_shapes(q.shape[:-2], *batches)
    shape, dtype = (*batch, q.shape[-2], v.shape[-1]), result_dtype(xp, q, k, v)
    if tuple(out.shape) != shape or out.dtype != dtype:
        raise ValueError(
            f"out has shape {tuple(out.shape)} and dtype {dtype_name(out)}; accepted: {shape} and {dtype_name(dtype)}"
        )
    if library_of(out) == "numpy" and not out.flags.writeable:
        raise ValueError("out must be an array that can be written to, got a read-only one")


def _into(run: Any, out: Array | None, group: int) -> dict[str, Array]:
    """The keyword argument `out` for an implementation that can write its result there; else nothing."""
    if out is None or not getattr(run, "takes_out", False) or is_followed(out):
        return {}
    return {"out": split_heads(out, group) if group > 1 else out}


def _deliver(result: Array, out: Array | None, group: int = 1, into: dict[str, Array] | None = None) -> Array:
    """The result with merged heads, in `out` if it is given; `into` says whether the implementation wrote it there."""
    if out is not None and into and result is into["out"]:
        return out
    result = merge_heads(result) if group > 1 else result
    if out is None:
        return result
    out[...] = result  # the only place where the package writes to an array of the caller
    return out


def _repeat_heads(mask: Array, q: Array, k: Array) -> Array:
    """Repeat a mask of key heads for the query heads that read them."""
    if mask.ndim < 2 or mask.shape[-2] == 1:
        return mask
    return namespace_of(mask).repeat(mask, q.shape[-3] // k.shape[-3], axis=-2)


_BATCHED = ("kv", "z", "c", "recent_k", "recent_v", "kv_low", "z_low")


def _with_group_axis(state: State) -> State:
    """The state with a further axis after the key heads, for the query heads that read each of them."""
    values = {name: x[..., None, :, :] for name, x in _batched(state)}
    return replace(state, **values, recent_mask=state.recent_mask[..., None, :])


def _without_group_axis(state: State) -> State:
    values = {name: x[..., 0, :, :] for name, x in _batched(state)}
    return replace(state, **values, recent_mask=state.recent_mask[..., 0, :])


def _batched(state: State) -> list[tuple[str, Array]]:
    return [(name, x) for name in _BATCHED if (x := getattr(state, name)) is not None]
