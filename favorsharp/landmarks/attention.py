"""Attention through landmarks, for whole sequences (`whole`) and for causal streams (`stream`)."""

from typing import Any

from favorsharp._arrays import cast, compute_dtype, namespace_of, result_dtype
from favorsharp._autodiff import has_fused_attention
from favorsharp._heads import add_mask_axis
from favorsharp._typing import Array
from favorsharp.dispatch import Op
from favorsharp.landmarks.chosen import LandmarkMap
from favorsharp.landmarks.fused_reading import read_fused
from favorsharp.landmarks.settings import Landmarks
from favorsharp.landmarks.state import (
    LandmarkState,
    condensed,
    entered,
    extended,
    landmark_map,
    log_weights,
    moments_of,
    read_landmarks,
    reduced,
    segments_of,
)
from favorsharp.ops.attention import attention as attention_op
from favorsharp.ops.landmark_metric import Metric
from favorsharp.ops.window_rule import num_leaving


def whole(
    q: Array,
    k: Array,
    v: Array,
    settings: Landmarks,
    *,
    key_mask: Array | None = None,
    window: int = 0,
    grouped: bool = False,
) -> Array:
    """Attention of every query to every visible key; grouped queries have one more axis than k and v.

    Shapes as in `linear_attention`; in the dtype that q, k and v promote to.
    """
    xp = namespace_of(q, k, v)
    out_dtype = result_dtype(xp, q, k, v)
    are_few = k.shape[-2] <= settings.num_landmarks
    if window == 0 and not are_few:
        run = landmark_keys if settings.kernel == "softmax" else landmark_keys.reference
        held = run(q, k, v, settings, key_mask=key_mask, grouped=grouped)
        return cast(_read(q, held, settings, grouped), out_dtype)
    weights = log_weights(k, key_mask, compute_dtype(xp, q, k, v))
    if are_few:  # every key is its own landmark
        return cast(_read(q, (k, weights, v), settings, grouped), out_dtype)
    chosen = landmark_map(k, weights, moments_of(q, k, key_mask, grouped=grouped), settings)
    if grouped:
        k, v, weights, chosen = k[..., None, :, :], v[..., None, :, :], add_mask_axis(weights), chosen.expanded()
    given = chosen.points, chosen.used, chosen.metric
    options: dict[str, Any] = {"kernel": chosen.kernel, "scale": chosen.scale}
    out: Array = landmark_window(q, k, weights, v, *given, window=window, **options)
    return out


@Op
def landmark_keys(
    q: Array, k: Array, v: Array, settings: Landmarks, *, key_mask: Array | None = None, grouped: bool = False
) -> tuple[Array, Array, Array]:
    """The landmarks that replace the keys of a call that is not causal. The reference calls other ops.

    Kernels need not serve the Gaussian kernel.

    Parameters
    ----------
    q : array, shape (*b, n, d), or (*b, g, n, d) if `grouped`
    k : array, shape (*b, s, d)
        One or more keys.
    v : array, shape (*b, s, e)
    settings : Landmarks
    key_mask : array of bool, shape (*b, s), optional
        True where a key is visible; if there are as many queries as keys, it applies to queries too.
    grouped : bool
        Whether g heads of queries read each head of keys.

    Returns
    -------
    keys : array, shape (*b, m, d)
        Not scaled. In the dtype to compute in, like the others.
    log_weight : array, shape (*b, m)
        -inf for unused landmarks.
    values : array, shape (*b, m, e)
    """
    weights = log_weights(k, key_mask, compute_dtype(namespace_of(q, k, v), q, k, v))
    chosen = landmark_map(k, weights, moments_of(q, k, key_mask, grouped=grouped), settings)
    return condensed(chosen, k, weights, v)


@Op
def landmark_window(
    q: Array,
    k: Array,
    log_weight: Array,
    v: Array,
    points: Array,
    used: Array,
    metric: Metric,
    *,
    window: int,
    kernel: str,
    scale: float,
) -> Array:
    """Attention with a window in both directions: near keys exactly, all others through landmarks.

    Each key belongs to its nearest landmark. The keys of a query's own block and of the neighbouring blocks are scored
    exactly, and take no part in the landmarks that this query reads.

    Parameters
    ----------
    q : array, shape (*b, n, d)
    k : array, shape (*b, n, d)
        One or more keys, not scaled.
    log_weight : array, shape (*b, n)
        0, and -inf for hidden keys, whose points and values may hold anything. In the dtype to compute in.
    v : array, shape (*b, n, e)
    points : array, shape (*b, m, d)
        Landmarks, scaled and centred.
    used : array of bool, shape (*b, 1, m)
    metric : Metric
    window : int
        The length of a block, at least 1.
    kernel : {"softmax", "gaussian"}
    scale : float

    Returns
    -------
    array, shape (*b, n, e)
        In the dtype that q, k and v promote to; zeros where no key is visible.
    """
    chosen, visible = LandmarkMap(points, used, metric, kernel, scale), log_weight != -namespace_of(q).inf
    out: Array = attention_op.reference(q, k, v, chosen, key_mask=visible, window=window)
    return out


def stream(
    q: Array, k: Array, v: Array, state: LandmarkState, *, key_mask: Array | None = None, grouped: bool = False
) -> tuple[Array, LandmarkState]:
    """The op `landmark_stream` for the softmax kernel, and its reference for the Gaussian kernel."""
    run = landmark_stream if state.settings.kernel == "softmax" else landmark_stream.reference
    result: tuple[Array, LandmarkState] = run(q, k, v, state, key_mask=key_mask, grouped=grouped)
    return result


@Op
def landmark_stream(
    q: Array, k: Array, v: Array, state: LandmarkState, *, key_mask: Array | None = None, grouped: bool = False
) -> tuple[Array, LandmarkState]:
    """Attention of query i to the visible keys 0 .. i and to those of the state, and the state after all of them.

    The keys are taken in segments that end where the state has to be compressed. The reference calls other ops.

    Parameters
    ----------
    q : array, shape (*b, n, d), or (*b, g, n, d) if `grouped`
    k : array, shape (*b, n, d)
    v : array, shape (*b, n, e)
    state : LandmarkState
    key_mask : array of bool, shape (*b, n), optional
        True where a key is visible.
    grouped : bool
        Whether g heads of queries read each head of keys.

    Returns
    -------
    out : array, shape (*b, n, e) or (*b, g, n, e)
        In the dtype of the state.
    state : LandmarkState
    """
    outs: list[Array] = []
    for segment in segments_of(state, k.shape[-2]):
        state = entered(state, segment)
        part = slice(segment.start, segment.stop)
        mask = None if key_mask is None else key_mask[..., part]
        state = extended(state, q[..., part, :], k[..., part, :], v[..., part, :], mask, grouped=grouped)
        held = state.keys, state.log_weight, state.values
        outs.append(_read(q[..., part, :], held, state.settings, grouped, causal_from=segment.held))
    return outs[0] if len(outs) == 1 else namespace_of(q, k, v).concat(outs, axis=-2), state


def absorbed(state: LandmarkState, k: Array, v: Array, key_mask: Array | None) -> LandmarkState:
    """The state after further keys without queries (`update`)."""
    for segment in segments_of(state, k.shape[-2]) if k.shape[-2] > 0 else ():
        state = entered(state, segment)
        part = slice(segment.start, segment.stop)
        mask = None if key_mask is None else key_mask[..., part]
        state = extended(state, None, k[..., part, :], v[..., part, :], mask)
    return state


def gathered(
    q: Array, k: Array, v: Array, state: LandmarkState, *, key_mask: Array | None = None, grouped: bool = False
) -> LandmarkState:
    """The state after the keys of a bidirectional call, compressed once.

    Without a window, reading it gives the result of the call.
    """
    state = extended(state, q, k, v, key_mask, grouped=grouped)
    return reduced(state, num_recent(state))


def num_recent(state: LandmarkState) -> int:
    """The number of keys in the current and the previous block of a window."""
    length, window = state.num_seen, state.window
    return length - num_leaving(length, window) if window else 0


def read_state(state: LandmarkState, q: Array, *, grouped: bool = False) -> Array:
    """Attention of queries to all keys of a state, in the dtype of the state."""
    return _read(q, (state.keys, state.log_weight, state.values), state.settings, grouped)


def _read(
    q: Array, held: tuple[Array, Array, Array], settings: Landmarks, grouped: bool, causal_from: int | None = None
) -> Array:
    keys, weight, values = held
    sees_all = causal_from is None or q.shape[-2] == 1
    if sees_all and settings.kernel == "softmax" and keys.shape[-2] > 0 and has_fused_attention(q, *held):
        return read_fused(q, *held, settings, grouped=grouped)
    if grouped:
        keys, weight, values = keys[..., None, :, :], add_mask_axis(weight), values[..., None, :, :]
    return read_landmarks(q, keys, weight, values, settings, causal_from)
