"""The gradients of attention through landmarks in array functions, for arrays without automatic differentiation.

They equal those of autograd: the metric, the seeds and the assignment of keys to landmarks are constants. A stream is
processed backwards, segment by segment. A bidirectional call is one compression and one read; `window_gradients` has
the read with a window.
"""

from dataclasses import replace
from itertools import pairwise

from favorsharp._arrays import broadcast_shapes, cast, compute_dtype, namespace_of, on_device_of
from favorsharp._nonfinite import hide
from favorsharp._typing import Array
from favorsharp.landmarks.compressions import Held, compress_backwards, compression
from favorsharp.landmarks.metric import RIDGE, STREAM_RIDGE
from favorsharp.landmarks.settings import Landmarks
from favorsharp.landmarks.state import (
    condensed,
    conserves_means,
    empty_landmarks,
    extended,
    log_weights,
    moments_of,
    segments_of,
)
from favorsharp.landmarks.window_gradients import windowed_backwards
from favorsharp.ops.tiles import tiles_of


def gradients_of(
    q: Array,
    k: Array,
    v: Array,
    settings: Landmarks,
    gradient: Array,
    *,
    is_causal: bool,
    window: int,
    key_mask: Array | None,
    bounds: list[int] | None,
) -> tuple[Array, Array, Array]:
    """The gradients of q (*b, g, n, d), k (*b, s, d) and v (*b, s, e), given that of the result (*b, g, n, e).

    With `bounds`, sequences are packed.
    """
    xp, dtype = namespace_of(q, k, v), compute_dtype(namespace_of(q), q, k, v)
    masked = () if key_mask is None else key_mask.shape[:-1]
    batch = broadcast_shapes(q.shape[:-3], k.shape[:-2], v.shape[:-2], masked)
    x = xp.broadcast_to(cast(q, dtype), (*batch, *q.shape[-3:]))
    y, values = (xp.broadcast_to(cast(z, dtype), (*batch, *z.shape[-2:])) for z in (k, v))
    g = xp.broadcast_to(cast(gradient, dtype), (*batch, *q.shape[-3:-1], v.shape[-1]))
    parts = []
    for span in [slice(None)] if bounds is None else [slice(a, b) for a, b in pairwise(bounds)]:
        x_own, y_own, v_own, g_own = (z[..., span, :] for z in (x, y, values, g))
        mask = None if key_mask is None else xp.broadcast_to(key_mask[..., span], y_own.shape[:-1])
        run = _stream if is_causal else _whole
        parts.append(run(x_own, y_own, v_own, g_own, settings, mask, window))
    joined = (z[0] if len(z) == 1 else xp.concat(z, axis=-2) for z in zip(*parts, strict=True))
    found = (cast(_summed(z, like.shape), like.dtype) for z, like in zip(joined, (q, k, v), strict=True))
    dq, dk, dv = found
    return dq, dk, dv


def _whole(
    q: Array, k: Array, v: Array, g: Array, settings: Landmarks, mask: Array | None, window: int
) -> tuple[Array, Array, Array]:  # fmt: skip
    held: Held = k, log_weights(k, mask, k.dtype), v
    if k.shape[-2] <= settings.num_landmarks:
        dq, (dk, _, dv) = _read_backwards(q, held, settings, g)
        return dq, dk, dv
    made = compression(held, moments_of(q, k, mask, grouped=True), settings, RIDGE, 0)
    if window:
        root = settings.scale_of(q.shape[-1]) ** 0.5
        center = made.chosen.metric.center[..., None, :, :] if settings.kernel == "gaussian" else 0.0
        dq, dk, dv = windowed_backwards(q * root - center, g, made, window)
        return dq * root, dk * root, dv
    dq, after = _read_backwards(q, condensed(made.chosen, *held), settings, g)
    dk, _, dv = compress_backwards(made, after)
    return dq, dk, dv


def _stream(
    q: Array, k: Array, v: Array, g: Array, settings: Landmarks, mask: Array | None, window: int
) -> tuple[Array, Array, Array]:  # fmt: skip
    xp, m = namespace_of(q), settings.num_landmarks
    state = empty_landmarks(settings, tuple(k.shape[:-2]), k.shape[-1], v.shape[-1], window, k)
    records = []
    for segment in segments_of(state, k.shape[-2]):
        part, made = slice(segment.start, segment.stop), None
        if segment.due:
            old, new = _split((state.keys, state.log_weight, state.values), segment.before - window)
            made = compression(old, state.moments, settings, STREAM_RIDGE, segment.seen)
            keys, weight, values = _joined(condensed(made.chosen, *old, conserving=conserves_means(settings)), new)
            state = replace(state, keys=keys, log_weight=weight, values=values)
        own = None if mask is None else mask[..., part]
        state = extended(state, q[..., part, :], k[..., part, :], v[..., part, :], own, grouped=True)
        records.append((segment, made, (state.keys, state.log_weight, state.values)))
    after: Held | None = None
    found = []
    for segment, made, held in reversed(records):
        part = slice(segment.start, segment.stop)
        dq, own = _read_backwards(q[..., part, :], held, settings, g[..., part, :], causal_from=segment.held)
        if after is not None:
            own = own[0] + after[0], own[1] + after[1], own[2] + after[2]
        after, (dk, _, dv) = _split(own, segment.held)
        found.append((dq, dk, dv))
        if made is not None:
            old, new = _split(after, m)
            after = _joined(compress_backwards(made, old, conserving=conserves_means(settings)), new)
    dq, dk, dv = (z[0] if len(z) == 1 else xp.concat(z[::-1], axis=-2) for z in zip(*found, strict=True))
    return dq, dk, dv


def _split(held: Held, at: int) -> tuple[Held, Held]:
    k, w, v = held
    return (k[..., :at, :], w[..., :at], v[..., :at, :]), (k[..., at:, :], w[..., at:], v[..., at:, :])


def _joined(a: Held, b: Held) -> Held:
    xp = namespace_of(a[0])
    k, w, v = (xp.concat([x, y], axis=axis) for x, y, axis in zip(a, b, (-2, -1, -2), strict=True))
    return k, w, v


def _summed(gradient: Array, shape: tuple[int, ...]) -> Array:
    """The sum over the axes along which an array of a shape was broadcast."""
    xp = namespace_of(gradient)
    extra = gradient.ndim - len(shape)
    if extra:
        gradient = xp.sum(gradient, axis=tuple(range(extra)))
    axes = tuple(i for i, size in enumerate(shape) if size == 1 and gradient.shape[i] != 1)
    return xp.sum(gradient, axis=axes, keepdims=True) if axes else gradient


# Reading --------------------------------------------------------------------------------------------------------------


def _read_backwards(
    q: Array, held: Held, settings: Landmarks, g: Array, causal_from: int | None = None
) -> tuple[Array, Held]:  # fmt: skip
    """The gradients of queries (*b, g, n, d) and of the keys that they read (see `weighted_attention`)."""
    xp, scale = namespace_of(q), settings.scale_of(q.shape[-1])
    if held[0].shape[-2] == 0:
        return xp.zeros_like(q), held
    seen = held[1] != -xp.inf
    keys, values = hide(held[0], seen)[..., None, :, :], hide(held[2], seen)[..., None, :, :]
    weight, seen = xp.where(seen, held[1], 0.0)[..., None, None, :], seen[..., None, None, :]
    if settings.kernel == "gaussian":
        weight = weight - scale / 2 * xp.sum(keys * keys, axis=-1)[..., None, :]
    dk, dw, dv = xp.zeros_like(keys), xp.zeros_like(weight), xp.zeros_like(values)
    order, found = xp.arange(keys.shape[-2], **on_device_of(q)), []
    for start, stop in tiles_of(q.shape[-2], keys.shape[-2], tuple(q.shape[:-2])):
        x, own = q[..., start:stop, :], g[..., start:stop, :]
        visible = seen
        if causal_from is not None:
            visible = seen & (order <= causal_from + order[start:stop, None])
        share = _softmax(scale * (x @ xp.matrix_transpose(keys)) + weight, visible)
        slope = own @ xp.matrix_transpose(values)
        slope = share * (slope - xp.sum(share * slope, axis=-1, keepdims=True))
        found.append(scale * (slope @ keys))
        dk = dk + _over_group(scale * (xp.matrix_transpose(slope) @ x))
        dw = dw + _over_group(xp.sum(slope, axis=-2, keepdims=True))
        dv = dv + _over_group(xp.matrix_transpose(share) @ own)
    if settings.kernel == "gaussian":
        dk = dk - scale * keys * xp.matrix_transpose(dw)
    dq = found[0] if len(found) == 1 else xp.concat(found, axis=-2)
    return dq, (dk[..., 0, :, :], dw[..., 0, 0, :], dv[..., 0, :, :])


def _over_group(x: Array) -> Array:
    return namespace_of(x).sum(x, axis=-3, keepdims=True)


def _softmax(logits: Array, visible: Array) -> Array:
    """The weights of visible keys; zeros where a row sees none."""
    xp = namespace_of(logits)
    logits = xp.where(visible, logits, -xp.inf)
    top = xp.max(logits, axis=-1, keepdims=True)
    p = xp.exp(logits - xp.where(top == -xp.inf, 0.0, top))
    total = xp.sum(p, axis=-1, keepdims=True)
    return p / xp.where(total == 0, 1.0, total)
