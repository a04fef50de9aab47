"""Generated queries, keys and values that the tests share."""

from typing import Any

import numpy as np


def attention_problem(
    seed: int, batch: tuple[int, ...] = (), n: int = 37, s: int | None = None, d: int = 8, e: int = 5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries and keys with means, unequal scales and correlation, and values."""
    rng = np.random.default_rng(seed)
    s = n if s is None else s
    mix_q, mix_k = (rng.standard_normal((d, d)) / d**0.5 + np.diag(rng.uniform(0.3, 1.5, d)) for _ in range(2))
    q = rng.standard_normal((*batch, n, d)) @ mix_q + 0.4 * rng.standard_normal(d)
    k = rng.standard_normal((*batch, s, d)) @ mix_k + 0.4 * rng.standard_normal(d)
    return q, k, rng.standard_normal((*batch, s, e))


def key_mask(seed: int, shape: tuple[int, ...], kind: str) -> np.ndarray | None:
    """No mask, right padding, or holes; the last two leave one row of a batch without any key."""
    if kind == "none":
        return None
    rng = np.random.default_rng(seed)
    if kind == "padding":
        lengths = rng.integers(1, max(2, shape[-1] + 1), shape[:-1])
        mask = np.arange(shape[-1]) < lengths[..., None]
    else:
        mask = rng.random(shape) > 0.4
    if mask.ndim > 1:
        mask[(0,) * (mask.ndim - 1)] = False
    return mask


def rotated(d: int, rng: Any) -> np.ndarray:
    """A random orthogonal matrix."""
    q, r = np.linalg.qr(rng.standard_normal((d, d)))
    return q * np.sign(np.diag(r))
