"""An oracle for landmarks of one head, in NumPy and key by key, written from the definition and not from the
library."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Held:
    """The constants of differentiation: the metric, the labels that made the centres, and the labels by which keys are
    read."""

    center: np.ndarray
    matrix: np.ndarray
    direction: np.ndarray
    made_by: np.ndarray
    labels: np.ndarray
    seeds: np.ndarray


def covariance(x: np.ndarray) -> np.ndarray:
    away = x - x.mean(0)
    return away.T @ away / len(x)


def metric(x: np.ndarray, y: np.ndarray, tilt: float, kernel: str, ridge: float = 1e-6):
    """Mean of the keys, M = (S_x^-1 + t S_y)^-1 and mu_t = M S_x^-1 mu, for scaled points, by inverses."""
    d = x.shape[1]
    center, mean = y.mean(0), x.mean(0)
    cov_x, cov_y = covariance(x), covariance(y)
    if kernel == "gaussian":
        mean = mean - center
        cov_y = np.linalg.inv(np.linalg.inv(cov_y) + np.eye(d))
    precision = np.linalg.inv(cov_x + ridge * np.trace(cov_x) / d * np.eye(d))
    matrix = np.linalg.inv(precision + tilt * cov_y)
    return center, matrix, matrix @ precision @ mean


def distance(a: np.ndarray, b: np.ndarray, matrix: np.ndarray) -> float:
    return float((a - b) @ matrix @ (a - b))


def log_norm(y: np.ndarray, held) -> float:
    return float(held.direction @ y + y @ held.matrix @ y)


def own_mass(y: np.ndarray, kernel: str) -> float:
    return -0.5 * float(y @ y) if kernel == "gaussian" else 0.0


def choose(x: np.ndarray, y: np.ndarray, settings, noise, kernel: str) -> tuple[np.ndarray, Held]:
    """The landmarks of scaled and centred keys, no more than needed, and the constants of differentiation."""
    held = Held(*metric(x, y, settings.tilt, kernel), None, None, None)
    y = y - held.center
    return condense(y, np.array([own_mass(row, kernel) for row in y]), held, settings, noise), held


def condense(y: np.ndarray, mass: np.ndarray, held: Held, settings, noise) -> np.ndarray:
    """The landmarks of centred keys with log masses; the constants of differentiation are recorded."""
    weight = mass + [log_norm(row, held) for row in y]
    _, first = np.unique(y @ noise.direction, return_index=True)  # one of each value, in the order of projections
    first = first[mass[first] > -np.inf]
    slots = min(len(noise.offsets), len(y))
    pool = first
    if len(first) > slots:
        pool = first[[int((j + noise.offsets[j]) * len(first) / slots) for j in range(slots)]]
    seeds = []
    for _ in range(settings.num_landmarks):
        scores = []
        for j, i in enumerate(pool):
            near = min((distance(y[i], y[c], held.matrix) for c in seeds), default=np.inf)
            share = -np.expm1(-near) if near > 1e-13 else 0.0
            scores.append(-np.inf if share == 0 else 2 * weight[i] + np.log(share) + noise.gumbel[j])
        if max(scores) == -np.inf:
            break
        seeds.append(pool[int(np.argmax(scores))])
    held.seeds = np.array(seeds)
    points = y[held.seeds]
    for _ in range(settings.steps):
        held.made_by = nearest(points, y, held)
        points = centres(y, points, held, mass)
    held.labels = nearest(points, y, held)
    return points


def nearest(points: np.ndarray, y: np.ndarray, held: Held) -> np.ndarray:
    return np.array([np.argmin([distance(row, c, held.matrix) for c in points]) for row in y])


def centres(y: np.ndarray, before: np.ndarray, held: Held, mass: np.ndarray) -> np.ndarray:
    """Means of the keys of each landmark with weights exp(s)."""
    logs = mass + [log_norm(row, held) for row in y]
    points = before.copy()
    for c in range(len(before)):
        mine = (held.made_by == c) & (mass > -np.inf)
        if mine.any():
            weight = np.exp(logs[mine] - logs[mine].max())
            points[c] = weight @ y[mine] / weight.sum()
    return points


def log_weights(y: np.ndarray, points: np.ndarray, held: Held) -> np.ndarray:
    """The log weight of each key at its landmark, without its mass."""
    pairs = zip(y, points[held.labels], strict=True)
    return np.array([log_norm(y, held) - log_norm(c, held) - 0.5 * distance(y, c, held.matrix) for y, c in pairs])


def conserving_log_weights(y: np.ndarray, points: np.ndarray, held: Held) -> np.ndarray:
    """The log weights that conserve the means of kernels over queries, E exp(x.y) = exp(mu.y + y'My / 2)."""
    mean = lambda z: held.direction @ z + z @ held.matrix @ z / 2  # noqa: E731
    return np.array([mean(row) - mean(c) for row, c in zip(y, points[held.labels], strict=True)])


def attention(
    x: np.ndarray, y: np.ndarray, v: np.ndarray, points: np.ndarray, held: Held, kernel: str, near: np.ndarray | None
) -> np.ndarray:
    """Attention to keys through their landmarks, or exactly for the pairs in `near` (n, s), with one normaliser."""
    y = y - held.center
    x = x - held.center if kernel == "gaussian" else x
    mass = np.array([own_mass(row, kernel) for row in y])
    logits = x @ points[held.labels].T + log_weights(y, points, held) + mass
    if near is not None:
        logits = np.where(near, x @ y.T + mass, logits)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights @ v / weights.sum(1, keepdims=True)


def held_attention(q, k, v, scale: float, held: Held, kernel: str, near: np.ndarray | None = None) -> np.ndarray:
    """Attention as a function of q, k and v while the assignments and the metric are held."""
    x, y = q * scale**0.5, k * scale**0.5
    away = y - held.center
    mass = np.array([own_mass(row, kernel) for row in away])
    points = away[held.seeds] if held.made_by is None else centres(away, away[held.seeds], held, mass)
    return attention(x, y, v, points, held, kernel, near)


def stream(x, y, v, settings, window: int, kernel: str, noise_at) -> np.ndarray:
    """A causal stream of scaled queries and keys, token by token: every key but the oldest is exact."""
    keys, weight, values, out = y[:0], np.zeros(0), v[:0], np.zeros_like(v)
    m = settings.num_landmarks
    for t in range(len(y)):
        old = len(keys) - window  # the previous block stays
        if t % max(window, 1) == 0 and old >= m + settings.room:
            held = Held(*metric(x[:t], y[:t], settings.tilt, kernel, ridge=1e-3), None, None, None)
            away = keys[:old] - held.center
            mass = weight[:old] + [own_mass(row, kernel) for row in away]
            points = condense(away, mass, held, settings, noise_at(t))
            weigh = conserving_log_weights if kernel == "softmax" else log_weights
            logs = mass + weigh(away, points, held)
            mine = held.labels[None, :] == np.arange(m)[: len(points), None]
            share = np.where(mine, np.exp(logs), 0)
            log_mass = np.log(share.sum(1)) - [own_mass(c, kernel) for c in points]
            keys = np.concatenate([points + held.center, keys[old:]])
            weight = np.concatenate([log_mass, weight[old:]])
            values = np.concatenate([share @ values[:old] / share.sum(1, keepdims=True), values[old:]])
        keys, weight = np.concatenate([keys, y[t : t + 1]]), np.append(weight, 0.0)
        values = np.concatenate([values, v[t : t + 1]])
        logits = keys @ x[t] if kernel == "softmax" else -0.5 * ((x[t] - keys) ** 2).sum(1)
        p = np.exp(logits + weight - (logits + weight).max())
        out[t] = p @ values / p.sum()
    return out
