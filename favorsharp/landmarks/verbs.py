"""What the public functions call if they get `Landmarks` in place of a feature map: checks, and then the work."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

from favorsharp._arrays import (
    cast,
    library_of,
    namespace_of,
    result_dtype,
    signature_of,
    under_own_settings,
)
from favorsharp._autodiff import differentiate, mode_of_library, records_gradients
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
    check_window,
    check_window_of_state,
)
from favorsharp._heads import merge_heads, merged_batch, split_heads
from favorsharp._typing import Array
from favorsharp.dispatch import circumstances
from favorsharp.landmarks.attention import absorbed, gathered, landmark_stream, read_state, stream, whole
from favorsharp.landmarks.gradients import gradients_of
from favorsharp.landmarks.settings import Landmarks, landmarks
from favorsharp.landmarks.state import LandmarkState, empty_landmarks, no_keys


def landmark_call(q: Array, k: Array, v: Array, num_landmarks: int, given: dict[str, Any], **options: Any) -> Array:
    """`attention(method="landmarks")`; `given` holds `draw` and `calibration`, which must have their defaults."""
    check_attention(
        q, k, v, is_causal=options["is_causal"], key_mask=options["key_mask"], enable_gqa=options["enable_gqa"]
    )
    check_in_memory(q=q, k=k, v=v)
    check_landmark_options(given["draw"], calibrated=given["calibration"] is not None)
    settings = landmarks(num_landmarks, scale=options.pop("scale"), rng=options.pop("rng"))
    options |= {"bounds": None, "state": None, "return_state": False, "out": None}
    out: Array = landmark_attention(q, k, v, settings, **options)
    return out


def check_landmark_options(draw: Any, *, calibrated: bool = False) -> None:
    """Raise if a caller asks for a draw or a calibration, which landmarks have no use for."""
    if calibrated:
        raise ValueError("method='landmarks' takes no calibration: landmarks are chosen anew in each call, causal too")
    if not isinstance(draw, str) or draw != "orthogonal":
        raise ValueError("method='landmarks' takes no draw: it draws no random rows")


@under_own_settings
def landmark_attention(
    q: Array,
    k: Array,
    v: Array,
    settings: Landmarks,
    *,
    is_causal: bool,
    window: int,
    key_mask: Array | None,
    enable_gqa: bool,
    bounds: list[int] | None,
    state: LandmarkState | None,
    return_state: bool,
    out: Array | None,
) -> Any:
    """`linear_attention` with landmarks; the caller has run `check_attention` and, for `bounds`, `check_bounds`."""
    xp = namespace_of(q, k, v)
    window = check_window(window, q, k)
    check_flag("return_state", return_state)
    if state is not None:
        _check_state(state, settings, window, is_causal, k=k, v=v)
    group = q.shape[-3] // k.shape[-3] if enable_gqa else 1
    batches = [k.shape[:-2], v.shape[:-2], () if key_mask is None else key_mask.shape[:-1]]
    batches += [] if state is None else [state.batch_shape]
    options: dict[str, Any] = {"is_causal": is_causal, "window": window, "grouped": group > 1}
    x = split_heads(group, q)
    if out is not None:
        inner = batches if group == 1 else [(*batch, 1) if batch else batch for batch in batches]
        batch = merged_batch(group, x.shape[:-2], *inner)
        check_out(out, q, (*batch, q.shape[-2], v.shape[-1]), result_dtype(xp, q, k, v))
    if bounds is not None:
        if state is not None or return_state:
            raise ValueError("cu_seqlens with state or return_state is not supported: run the sequences one by one")
        result = _packed(x, k, v, settings, bounds, key_mask, options)
    else:
        if state is None and (is_causal or return_state):
            state = no_keys(settings, q, k, v, key_mask, window)
        result, state = _run(x, k, v, settings, state, key_mask, **options)
    result = cast(merge_heads(group, result), result_dtype(xp, q, k, v))
    if out is not None:
        out[...] = result
        result = out
    return (result, state) if return_state else result


def _run(
    q: Array,
    k: Array,
    v: Array,
    settings: Landmarks,
    state: LandmarkState | None,
    key_mask: Array | None,
    *,
    is_causal: bool,
    window: int,
    grouped: bool,
) -> tuple[Array, LandmarkState | None]:
    if state is None:
        return whole(q, k, v, settings, key_mask=key_mask, window=window, grouped=grouped), None
    if is_causal:
        return stream(q, k, v, state, key_mask=key_mask, grouped=grouped)
    state = gathered(q, k, v, state, key_mask=key_mask, grouped=grouped)
    if window:  # the output is read from landmarks of all keys, including those that the state keeps exact
        return whole(q, k, v, settings, key_mask=key_mask, window=window, grouped=grouped), state
    return read_state(state, q, grouped=grouped), state


def _packed(
    q: Array,
    k: Array,
    v: Array,
    settings: Landmarks,
    bounds: list[int],
    key_mask: Array | None,
    options: dict[str, Any],
) -> Array:
    """Attention within each of the packed sequences."""
    xp = namespace_of(q, k, v)
    pieces = []
    for a, b in pairwise(bounds):
        mask = None if key_mask is None else key_mask[..., a:b]
        x, y, values = (points[..., a:b, :] for points in (q, k, v))
        state = no_keys(settings, x, y, values, mask, options["window"]) if options["is_causal"] else None
        pieces.append(_run(x, y, values, settings, state, mask, **options)[0])
    return pieces[0] if len(pieces) == 1 else xp.concat(pieces, axis=-2)


def landmark_init(settings: Landmarks, v_size: int, *, like: Array, window: int) -> LandmarkState:
    """`init_state` with landmarks."""
    check_floats(like=like)
    check_points("like", like, "(*b, s, d)")
    e, window = check_integer("v_size", v_size, 0), check_integer("window", window, 0)
    state: LandmarkState = empty_landmarks(settings, tuple(like.shape[:-2]), like.shape[-1], e, window, like)
    return state


@under_own_settings
def landmark_update(state: Any, k: Array, v: Array, settings: Landmarks, *, key_mask: Array | None) -> LandmarkState:
    """`update` with landmarks."""
    check_floats(k=k, v=v)
    check_points("k", k, "(*b, s, d)")
    check_points("v", v, "(*b, s, e)")
    check_same_size("s", k=(-2, k.shape[-2]), v=(-2, v.shape[-2]))
    check_mask("key_mask", key_mask, "(*b, s)", k=k)
    _check_state(state, settings, k=k, v=v)
    return absorbed(state, k, v, key_mask)


@under_own_settings
def landmark_read(state: Any, q: Array, settings: Landmarks, *, enable_gqa: bool) -> Array:
    """`read` with landmarks."""
    check_floats(q=q)
    check_points("q", q, "(*b, n, d)")
    _check_state(state, settings, q=q)
    group = check_group_of_state(enable_gqa, q, state.batch_shape)
    out = read_state(state, split_heads(group, q), grouped=group > 1)
    return cast(merge_heads(group, out), q.dtype)


@under_own_settings
def landmark_step(
    q: Array, k: Array, v: Array, state: Any, settings: Landmarks, *, enable_gqa: bool
) -> tuple[Array, LandmarkState]:
    """`decode_step` with landmarks.

    A token with the layout of the previous one is not checked again (see `favorsharp.plans`).
    """
    key, known = _key_of_token(q, k, v, state, enable_gqa), getattr(state, "next_token", None)
    if known is None or known.key != key or state.settings != settings:
        known = _checked_token(q, k, v, state, settings, enable_gqa, key)
    out, after = known.run(split_heads(known.group, q), k, v, state, grouped=known.group > 1)
    if known.key is not None:
        after.remember("next_token", known)
    return cast(merge_heads(known.group, out), known.dtype), after


class _Token(NamedTuple):
    """The outcome of the checks of `decode_step`: the key for which they hold, the function to run, and settings."""

    key: Any
    run: Callable[..., Any]
    group: int
    dtype: Any


def _key_of_token(q: Array, k: Array, v: Array, state: Any, enable_gqa: Any) -> Any:
    """A key of what the checks of a token read besides the state; None if the checks must not be skipped."""
    mode, around = mode_of_library(), circumstances()
    held = [getattr(state, name, None) for name in ("keys", "log_weight", "values")]
    if mode is None or around is None or records_gradients(held):
        return None
    parts = [signature_of(x, with_layout=True) for x in (q, k, v)]
    return None if None in parts else (mode, around, signature_of(enable_gqa), *parts)


def _checked_token(
    q: Array, k: Array, v: Array, state: Any, settings: Landmarks, enable_gqa: bool, key: Any
) -> _Token:  # fmt: skip
    """Check the arguments of `landmark_step`, and choose what runs it."""
    xp, group = check_attention(q, k, v, is_causal=False, key_mask=None, enable_gqa=enable_gqa)
    if q.shape[-2] != 1 or k.shape[-2] != 1:
        raise ValueError(
            f"decode_step takes one token: q has n={q.shape[-2]}, k has s={k.shape[-2]}; accepted: 1 and 1"
        )
    _check_state(state, settings, k=k, v=v)
    dtype, plan = result_dtype(xp, q, k, v), None
    if key is not None and settings.kernel == "softmax":
        x = split_heads(group, q)
        make = landmark_stream.implementation(x, k, v, state).plan
        plan = make and make(x, k, v, state, grouped=group > 1)
    return _Token(None, stream, group, dtype) if plan is None else _Token(key, plan, group, dtype)


@under_own_settings
def landmark_means(x: Array, y: Array, v: Array, settings: Landmarks) -> Array:
    """`nadaraya_watson` with landmarks, for values (*b, s, e)."""
    check_in_memory(x=x, y=y, v=v)
    check_means(x, y, v)
    return whole(x, y, v, settings)


def check_means(x: Array, y: Array, v: Array) -> None:
    """Check the arrays of `nadaraya_watson`, with values (*b, s, e)."""
    check_floats(x=x, y=y, v=v)
    for name, points, letters in (("x", x, "(*b, n, d)"), ("y", y, "(*b, s, d)"), ("v", v, "(*b, s, e)")):
        check_points(name, points, letters)
    check_same_size("d", x=(-1, x.shape[-1]), y=(-1, y.shape[-1]))
    check_same_size("s", y=(-2, y.shape[-2]), v=(-2, v.shape[-2]))
    check_broadcast("*b", x=x.shape[:-2], y=y.shape[:-2], v=v.shape[:-2])


def landmark_vjp(
    q: Array, k: Array, v: Array, settings: Landmarks, **options: Any
) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
    """`vjp` of `linear_attention` with landmarks; the choice of landmarks is constant in differentiation."""
    options |= {"state": None, "return_state": False, "out": None}
    if library_of(q) not in ("torch", "jax"):
        return _own_vjp(q, k, v, settings, options)

    def function(q: Array, k: Array, v: Array) -> Array:
        return landmark_attention(q, k, v, settings, **options)

    return differentiate(function, (q, k, v))


def _own_vjp(
    q: Array, k: Array, v: Array, settings: Landmarks, options: dict[str, Any]
) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
    """`landmark_vjp` for arrays whose library differentiates nothing."""
    out = landmark_attention(q, k, v, settings, **options)
    group = q.shape[-3] // k.shape[-3] if options["enable_gqa"] else 1

    @under_own_settings
    def pullback(gradient: Array) -> tuple[Array, ...]:
        x, g = (split_heads(group, z) if group > 1 else z[..., None, :, :] for z in (q, gradient))
        names = "is_causal", "window", "key_mask", "bounds"
        dq, dk, dv = gradients_of(x, k, v, settings, g, **{name: options[name] for name in names})
        return namespace_of(q).reshape(dq, q.shape), dk, dv

    return out, pullback


def _check_state(
    state: Any, settings: Landmarks, window: int | None = None, is_causal: bool = True, **named: Array
) -> None:
    """Check that a state was made with these settings, and fits the arrays and the call."""
    if not isinstance(state, LandmarkState):
        raise TypeError(f"state must be a favorsharp.LandmarkState, as landmarks make it, got {type(state).__name__}")
    check_floats(**named, state=state.keys)
    if state.settings != settings:
        raise ValueError(
            f"state comes from other landmarks: it has {state.settings}, feature_map is {settings}; accepted: the same"
        )
    for name, x in named.items():
        letter, held = ("e", state.values) if name == "v" else ("d", state.keys)
        check_same_size(letter, **{"state": (-1, held.shape[-1]), name: (-1, x.shape[-1])})
        if name != "q":
            check_broadcast("(*b, s, d)", **{name: x.shape[:-2], "state": state.batch_shape})
    if window is not None:
        check_window_of_state(state.window, window, is_causal)
