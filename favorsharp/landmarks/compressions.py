"""Compressions for the gradients of landmarks: which keys make a landmark, and derivatives with this choice fixed."""

from dataclasses import dataclass, replace

from favorsharp._arrays import cast, namespace_of, on_device_of
from favorsharp._nonfinite import hide
from favorsharp._typing import Array
from favorsharp.landmarks.chosen import LandmarkMap
from favorsharp.landmarks.settings import Landmarks
from favorsharp.landmarks.state import landmark_map
from favorsharp.moments import Moments
from favorsharp.ops.landmark_metric import centred
from favorsharp.ops.landmark_seeds import choose_seeds, noise_of
from favorsharp.ops.landmarks import gather, lloyd_step, nearness
from favorsharp.ops.tiles import tiles_of

Held = tuple[Array, Array, Array]
"""Keys (*b, s, d), log weights (*b, s) and values (*b, s, e), or their gradients."""


@dataclass(frozen=True, eq=False)
class Compression:
    """A choice of landmarks for the keys of a state, in scaled and centred coordinates.

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


def compression(held: Held, seen: Moments, settings: Landmarks, ridge: float, event: int) -> Compression:
    """Compress the keys of a state, with the moments of all queries and keys seen (see `landmark_map`)."""
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
    return Compression(chosen, visible, y, log_mass, hide(v, visible), made_by, seeds, _owners(chosen, y))


def _owners(chosen: LandmarkMap, y: Array) -> Array:
    """The nearest landmark of each key, (*b, s)."""
    xp = namespace_of(y)
    tiles = tiles_of(y.shape[-2], chosen.num_features, tuple(y.shape[:-2]))
    near = (nearness(chosen.points, chosen.used, chosen.metric, y[..., a:b, :])[1] for a, b in tiles)
    return xp.concat([xp.argmax(cast(x, xp.int8), axis=-1) for x in near], axis=-1)


def compress_backwards(made: Compression, after: Held, *, conserving: bool = False) -> Held:
    """The gradients of keys, log weights and values, given those of the landmarks that replace them."""
    points = made.chosen.points
    dpoints, dweight, dvalues = after[0] / made.chosen.scale**0.5, after[1][..., None], after[2]
    if made.chosen.kernel == "gaussian":
        dpoints = dpoints + dweight * points
    share, means = _shares(made, made.own, log_weights_of(made, conserving=conserving), made.values)
    inner = row_sums(of_owner(dvalues, made.own) * (made.values - of_owner(means, made.own)))
    dlogs = share * (of_owner(dweight, made.own) + inner)
    dy, dlogs = through_weights(made, dlogs, dpoints, conserving=conserving)
    return dy * made.chosen.scale**0.5, dlogs[..., 0], share * of_owner(dvalues, made.own)


def log_weights_of(made: Compression, *, conserving: bool = False) -> Array:
    """The log weight of each key at its landmark, (*b, s, 1).

    Apart from the key's mass, it is s - s_c - |u - u_c|^2 / 2 or, conserving, s - s_c - (|u|^2 - |u_c|^2) / 2.
    """
    metric = made.chosen.metric
    (u, norm), (u_c, norm_c) = metric.coordinates(made.y), metric.coordinates(made.chosen.points)
    pull = of_owner(u_c, made.own)
    squares = row_sums(u * u) - row_sums(pull * pull) if conserving else row_sums((u - pull) ** 2)
    return made.log_mass + norm - of_owner(norm_c, made.own) - 0.5 * squares


def through_weights(
    made: Compression, dlogs: Array, dpoints: Array, *, conserving: bool = False
) -> tuple[Array, Array]:  # fmt: skip
    """The gradients of centred keys and of their log weights, given those of `log_weights_of` and of landmarks.

    Log weights depend on keys and landmarks, and landmarks are means of keys.
    """
    xp, metric, points = namespace_of(made.y), made.chosen.metric, made.chosen.points
    back = xp.matrix_transpose(metric.lift)
    (u, norm), (u_c, _) = metric.coordinates(made.y), metric.coordinates(points)
    slope, slope_c = metric.direction + 2 * (u @ back), metric.direction + 2 * (u_c @ back)
    if made.chosen.kernel == "gaussian":
        slope = slope - made.y
    pull = of_owner(u_c, made.own)
    away, pull = (u, pull) if conserving else (u - pull, u - pull)
    away, pull = away @ back, pull @ back
    dy = dlogs * (slope - away)
    dpoints = dpoints + _to_owner(dlogs * pull, made.own, points) - slope_c * _to_owner(dlogs, made.own, points)
    if made.made_by is None:
        return dy + _to_seeds(dpoints, made), dlogs
    share, _ = _shares(made, made.made_by, norm + made.log_mass, made.y)
    own = of_owner(dpoints, made.made_by)
    inner = share * row_sums(own * (made.y - of_owner(points, made.made_by)))
    return dy + share * own + inner * slope, dlogs + inner


def row_sums(x: Array) -> Array:
    """The sums of rows, (*b, s, d) -> (*b, s, 1)."""
    return namespace_of(x).sum(x, axis=-1, keepdims=True)


def _shares(made: Compression, owner: Array, logs: Array, rows: Array) -> tuple[Array, Array]:
    """The share of each key in the weight of a landmark (*b, s, 1), and the mean row of each landmark."""
    xp, m = namespace_of(logs), made.chosen.num_features
    slots, total = xp.arange(m, **on_device_of(logs)), None
    for a, b in tiles_of(logs.shape[-2], m, tuple(logs.shape[:-2])):
        member = (owner[..., a:b, None] == slots) & made.visible[..., a:b, None]
        total = gather(xp.where(member, logs[..., a:b, :], -xp.inf), rows[..., a:b, :], total)
    assert total is not None  # there is at least one key
    den = xp.where(total.den > 0, total.den, 1.0)
    level = xp.where(total.den > 0, total.ref, 0.0) + xp.log(den)
    share = xp.exp(xp.where(made.visible[..., None], logs - of_owner(level, owner), -xp.inf))
    return share, total.num / den


def of_owner(x: Array, owner: Array) -> Array:
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


def _to_seeds(dpoints: Array, made: Compression) -> Array:
    """The gradients of landmarks at the keys that are their seeds, (*b, m, d) -> (*b, s, d)."""
    xp, s = namespace_of(dpoints), made.y.shape[-2]
    used = xp.matrix_transpose(made.chosen.used)
    order, dpoints = xp.arange(s, **on_device_of(dpoints)), xp.where(used, dpoints, 0.0)
    assert made.seeds is not None
    seeds, parts = made.seeds[..., None, :], []
    for a, b in tiles_of(s, dpoints.shape[-2], tuple(dpoints.shape[:-2])):
        parts.append(cast(order[a:b, None] == seeds, dpoints.dtype) @ dpoints)
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=-2)
