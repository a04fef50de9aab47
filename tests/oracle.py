"""Independent NumPy oracles: full matrices, written from the definitions and not from the library."""

import numpy as np


def log_sum_exp(x: np.ndarray, axis: int) -> np.ndarray:
    with np.errstate(divide="ignore"):
        top = np.max(x, axis=axis, keepdims=True, initial=-np.inf)
        safe = np.where(np.isfinite(top), top, 0)
        return (np.log(np.sum(np.exp(x - safe), axis=axis, keepdims=True)) + safe).squeeze(axis)


def log_kernel(x: np.ndarray, y: np.ndarray, kernel: str, scale: float) -> np.ndarray:
    dots = np.einsum("...nd,...sd->...ns", x, y)
    if kernel == "softmax":
        return scale * dots
    squares = (x * x).sum(-1)[..., :, None] + (y * y).sum(-1)[..., None, :] - 2 * dots
    return -0.5 * scale * squares


def visible_pairs(n: int, s: int, mask: np.ndarray | None, is_causal: bool) -> np.ndarray:
    """Which query may see which key, broadcastable to (*b, n, s)."""
    pairs = np.ones((n, s), dtype=bool)
    if is_causal:
        pairs &= np.arange(s)[None, :] <= np.arange(n)[:, None]
    return pairs if mask is None else pairs & mask[..., None, :]


def near_pairs(n: int, window: int, is_causal: bool) -> np.ndarray:
    """Which pairs a window scores exactly, as `linear_attention` describes `window`."""
    block = np.arange(n) // window
    apart = block[:, None] - block[None, :]
    return (apart == 0) | (apart == 1) | ((apart == -1) & (not is_causal))


def attention(
    log_scores: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None, is_causal: bool = False
) -> np.ndarray:
    """Normalised attention of given log scores (*b, n, s); zeros where nothing is visible."""
    n, s = log_scores.shape[-2:]
    logits = np.where(visible_pairs(n, s, mask, is_causal), log_scores, -np.inf)
    top = np.max(logits, axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(logits - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    return np.where(total == 0, 0, weights @ v / np.where(total == 0, 1, total))


def log_scores(
    lq: np.ndarray, lk: np.ndarray, exact: np.ndarray | None = None, window: int = 0, is_causal: bool = False
) -> np.ndarray:
    """Log of the estimated kernel, pair by pair, with the near pairs of a window exact."""
    estimated = log_sum_exp(lq[..., :, None, :] + lk[..., None, :, :], axis=-1)
    if window == 0:
        return estimated
    return np.where(near_pairs(lq.shape[-2], window, is_causal), exact, estimated)


def log_feature(
    w: np.ndarray, x: np.ndarray, a: np.ndarray, g: np.ndarray, center: np.ndarray, other: np.ndarray, kernel: str
) -> np.ndarray:
    """One side's log features of scaled points, feature by feature from the definition, without 1/sqrt(m)."""
    u = (x - center) @ np.swapaxes(g, -1, -2)
    quadratic = (a * w * w).sum(-1)
    linear = u @ np.swapaxes(np.sqrt(1 - 4 * a) * w, -1, -2)
    shift = (x * other).sum(-1) - 0.5 * (center * other).sum(-1)  # half of exp(b2.x) exp(b1.y) exp(-b1.b2)
    if kernel == "gaussian":
        shift = shift - 0.5 * (x * x).sum(-1)
    row = shift - 0.5 * (u * u).sum(-1) + 0.25 * np.log(1 - 4 * a).sum(-1)
    return linear + row[..., None] + quadratic[..., None, :]


def excess(a: np.ndarray, u: np.ndarray, v: np.ndarray) -> float:
    """Mean over all pairs of (1) minus 2 mean u.v, by forming every pair."""
    squares = ((u[:, None, :] + v[None, :, :]) ** 2).mean((0, 1))
    return float((np.log(1 - 4 * a) - 0.5 * np.log(1 - 8 * a) + squares / (1 - 8 * a)).sum())
