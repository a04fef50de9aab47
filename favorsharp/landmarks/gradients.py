"""The gradients of attention through landmarks in array functions, for arrays whose library differentiates nothing.

They are those of autograd: the metric, the seeds and the assignment of keys to landmarks are constants. A stream is
gone through backwards, segment by segment; a bidirectional call is one compression and one read.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

from favorsharp._arrays import broadcast_shapes, cast, compute_dtype, namespace_of, on_device_of
from favorsharp._typing import Array
from favorsharp.landmarks.chosen import LandmarkMap
from favorsharp.landmarks.metric import RIDGE, STREAM_RIDGE
from favorsharp.landmarks.settings import Landmarks
from favorsharp.landmarks.state import (
    condensed,
    conserves_means,
    empty_landmarks,
    extended,
    landmark_map,
    log_weights,
    moments_of,
    segments_of,
)
from favorsharp.moments import Moments
from favorsharp.ops.landmark_metric import centred
from favorsharp.ops.landmark_seeds import choose_seeds, noise_of
from favorsharp.ops.landmarks import gather, lloyd_step, nearness
from favorsharp.ops.state import hide, tiles_of

Held = tuple[Array, Array, Array]
"""Keys (*b, s, d), log weights (*b, s) and values (*b, s, e), or their gradients."""


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

    The window counts in causal calls only. With `bounds`, sequences are packed.
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
    made = _compression(held, moments_of(q, k, mask, grouped=True), settings, RIDGE, 0)
    dq, after = _read_backwards(q, condensed(made.chosen, *held), settings, g)
    dk, _, dv = _compress_backwards(made, after)
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
            made = _compression(old, state.moments, settings, STREAM_RIDGE, segment.seen)
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
            after = _joined(_compress_backwards(made, old, conserving=conserves_means(settings)), new)
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


# Compressions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Compression:
    """A choice of landmarks for keys that are held, in scaled and centred coordinates.

    `made_by` (*b, s) is the landmark whose centre a key is part of, and `own` the landmark that the key belongs to.
    Without Lloyd steps, `seeds` (*b, m) are the positions of the keys that are landmarks.
    """

    chosen: LandmarkMap
    visible: Array
    y: Array
    log_mass: Array
    values: Array
    made_by: Array | None
    seeds: Array | None
    own: Array


def _compression(held: Held, seen: Moments, settings: Landmarks, ridge: float, event: int) -> _Compression:
    xp = namespace_of(held[0])
    k, weight, v = held
    m, visible = settings.num_landmarks, weight != -xp.inf
    before = landmark_map(
        k, weight, seen, replace(settings, steps=max(0, settings.steps - 1)), ridge=ridge, event=event
    )
    metric, kernel, scale = before.metric, before.kernel, before.scale
    y, log_mass = centred(hide(k, visible), xp.where(visible, weight, 0.0), metric, kernel, scale)
    if settings.steps == 0:
        noise = noise_of(settings.seed, event, m, k.shape[-1])
        made_by, seeds = None, choose_seeds(k, weight, metric, m, noise, kernel=kernel, scale=scale)[0]
        chosen = before
    else:
        made_by, seeds = _owners(before, y), None
        chosen = replace(before, points=lloyd_step(y, log_mass, visible, before.points, before.used, metric))
    return _Compression(chosen, visible, y, log_mass, hide(v, visible), made_by, seeds, _owners(chosen, y))


def _owners(chosen: LandmarkMap, y: Array) -> Array:
    """The nearest landmark of each key, (*b, s)."""
    xp = namespace_of(y)
    tiles = tiles_of(y.shape[-2], chosen.num_features, tuple(y.shape[:-2]))
    near = (nearness(chosen.points, chosen.used, chosen.metric, y[..., a:b, :])[1] for a, b in tiles)
    return xp.concat([xp.argmax(cast(x, xp.int8), axis=-1) for x in near], axis=-1)


def _compress_backwards(made: _Compression, after: Held, *, conserving: bool = False) -> Held:
    """The gradients of keys, log weights and values, given those of the landmarks that replace them.

    The log weight of a key, apart from its mass, is s - s_c - |u - u_c|^2 / 2 or, conserving,
    s - s_c - (|u|^2 - |u_c|^2) / 2.
    """
    xp, metric, points = namespace_of(made.y), made.chosen.metric, made.chosen.points
    back = xp.matrix_transpose(metric.lift)
    dpoints, dweight, dvalues = after[0] / made.chosen.scale**0.5, after[1][..., None], after[2]
    (u, norm), (u_c, norm_c) = metric.coordinates(made.y), metric.coordinates(points)
    slope, slope_c = metric.direction + 2 * (u @ back), metric.direction + 2 * (u_c @ back)
    if made.chosen.kernel == "gaussian":
        slope, dpoints = slope - made.y, dpoints + dweight * points
    pull = _of_owner(u_c, made.own)
    away, pull = (u, pull) if conserving else (u - pull, u - pull)
    squares = xp.sum(away * away, axis=-1, keepdims=True)
    if conserving:
        squares = squares - xp.sum(pull * pull, axis=-1, keepdims=True)
    logs = made.log_mass + norm - _of_owner(norm_c, made.own) - 0.5 * squares
    share, means = _shares(made, made.own, logs, made.values)
    inner = xp.sum(_of_owner(dvalues, made.own) * (made.values - _of_owner(means, made.own)), axis=-1, keepdims=True)
    dlogs = share * (_of_owner(dweight, made.own) + inner)
    away, pull = away @ back, pull @ back
    dy, dv = dlogs * (slope - away), share * _of_owner(dvalues, made.own)
    dpoints = dpoints + _to_owner(dlogs * pull, made.own, points) - slope_c * _to_owner(dlogs, made.own, points)
    if made.made_by is None:
        dy = dy + _to_seeds(dpoints, made)
    else:
        share, _ = _shares(made, made.made_by, norm + made.log_mass, made.y)
        own = _of_owner(dpoints, made.made_by)
        inner = share * xp.sum(own * (made.y - _of_owner(points, made.made_by)), axis=-1, keepdims=True)
        dy, dlogs = dy + share * own + inner * slope, dlogs + inner
    return dy * made.chosen.scale**0.5, dlogs[..., 0], dv


def _shares(made: _Compression, owner: Array, logs: Array, rows: Array) -> tuple[Array, Array]:
    """The share of each key in the weight of a landmark (*b, s, 1), and the mean row of each landmark."""
    xp, m = namespace_of(logs), made.chosen.num_features
    slots, total = xp.arange(m, **on_device_of(logs)), None
    for a, b in tiles_of(logs.shape[-2], m, tuple(logs.shape[:-2])):
        member = (owner[..., a:b, None] == slots) & made.visible[..., a:b, None]
        total = gather(xp.where(member, logs[..., a:b, :], -xp.inf), rows[..., a:b, :], total)
    assert total is not None  # there are keys
    den = xp.where(total.den > 0, total.den, 1.0)
    level = xp.where(total.den > 0, total.ref, 0.0) + xp.log(den)
    share = xp.exp(xp.where(made.visible[..., None], logs - _of_owner(level, owner), -xp.inf))
    return share, total.num / den


def _of_owner(x: Array, owner: Array) -> Array:
    """The row of each key's landmark, (*b, m, d) -> (*b, s, d)."""
    xp = namespace_of(x)
    x = xp.broadcast_to(x, (*owner.shape[:-1], *x.shape[-2:]))
    return xp.take_along_axis(x, owner[..., None], axis=-2)


def _to_owner(rows: Array, owner: Array, points: Array) -> Array:
    """The sum of the rows of each landmark's keys, (*b, s, d) -> (*b, m, d)."""
    xp, m = namespace_of(rows), points.shape[-2]
    slots, total = xp.arange(m, **on_device_of(rows)), xp.zeros_like(points[..., :1])
    for a, b in tiles_of(rows.shape[-2], m, tuple(rows.shape[:-2])):
        member = cast(owner[..., a:b, None] == slots, rows.dtype)
        total = total + xp.matrix_transpose(member) @ rows[..., a:b, :]
    return total


def _to_seeds(dpoints: Array, made: _Compression) -> Array:
    """The gradients of landmarks at the keys that are their seeds, (*b, m, d) -> (*b, s, d)."""
    xp, s = namespace_of(dpoints), made.y.shape[-2]
    used = xp.matrix_transpose(made.chosen.used)
    order, dpoints = xp.arange(s, **on_device_of(dpoints)), xp.where(used, dpoints, 0.0)
    assert made.seeds is not None
    seeds, parts = made.seeds[..., None, :], []
    for a, b in tiles_of(s, dpoints.shape[-2], tuple(dpoints.shape[:-2])):
        parts.append(cast(order[a:b, None] == seeds, dpoints.dtype) @ dpoints)
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=-2)
