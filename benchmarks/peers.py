"""Other implementations for a CPU user: the formulas in NumPy, torch and JAX. Inputs are contiguous, gradients off.

All of them subtract row and feature maxima as ours do, except those whose names or docstrings say otherwise.
"""

import functools
from typing import Any

import numpy as np
import torch

TILE = 64


def numpy_features(u: Any, rows: Any, row: Any, column: Any) -> Any:
    """The formula."""
    return np.exp(u @ rows.T + row + column)


def torch_features(u: Any, rows: Any, row: Any, column: Any) -> Any:
    """The formula with a new array for each step."""
    return torch.exp(u @ rows.T + row + column)


def _logs(x: Any, rows: Any, root: float) -> Any:
    x = x * root
    return x @ rows.mT - (x * x).sum(-1, keepdim=True) / 2


def torch_attention(q: Any, k: Any, v: Any, rows: Any, root: float) -> Any:
    """Bidirectional FAVOR+ with maxima, all features in memory."""
    lq, lk = _logs(q, rows, root), _logs(k, rows, root)
    top = lk.amax(-2, keepdim=True)
    features = torch.exp(lk - top)
    weights = lq + top
    weights = torch.exp(weights - weights.amax(-1, keepdim=True))
    return (weights @ (features.mT @ v)) / (weights @ features.sum(-2, keepdim=True).mT)


def torch_attention_plain(q: Any, k: Any, v: Any, rows: Any, root: float) -> Any:
    """Bidirectional FAVOR+ without maxima: what a user would write; it overflows on larger inputs than these."""
    pq, pk = torch.exp(_logs(q, rows, root)), torch.exp(_logs(k, rows, root))
    return (pq @ (pk.mT @ v)) / (pq @ pk.sum(-2, keepdim=True).mT)


def numpy_attention_tiled(q: Any, k: Any, v: Any, rows: Any, root: float, tile: int = 512) -> Any:
    """Bidirectional FAVOR+ head by head, tile by tile, without maxima."""
    out = np.empty_like(v)
    for head in np.ndindex(q.shape[:-2]):
        s, z = 0.0, 0.0
        for start in range(0, k.shape[-2], tile):
            x = k[head][start : start + tile] * np.float32(root)
            p = np.exp(x @ rows.T - (x * x).sum(-1, keepdims=True) / 2)
            s, z = s + p.T @ v[head][start : start + tile], z + p.sum(0)
        for start in range(0, q.shape[-2], tile):
            x = q[head][start : start + tile] * np.float32(root)
            p = np.exp(x @ rows.T - (x * x).sum(-1, keepdims=True) / 2)
            out[head][start : start + tile] = (p @ s) / (p @ z)[:, None]
    return out


def torch_causal_chunked(q: Any, k: Any, v: Any, rows: Any, root: float, chunk: int = TILE) -> Any:
    """Causal FAVOR+ in chunks of 64: pairs inside, cumulative sums before; without maxima, which would cost more."""
    pq, pk = torch.exp(_logs(q, rows, root)), torch.exp(_logs(k, rows, root))
    *batch, n, _ = q.shape
    pq, pk, v = (x.reshape(*batch, n // chunk, chunk, x.shape[-1]) for x in (pq, pk, v))
    sums = pk.mT @ v
    sums = sums.cumsum(-3) - sums
    ones = pk.sum(-2)
    ones = ones.cumsum(-2) - ones
    pairs = (pq @ pk.mT).tril()
    total = pairs.sum(-1, keepdim=True) + pq @ ones[..., None]
    return ((pairs @ v + pq @ sums) / total).reshape(*batch, n, -1)


def torch_step(q: Any, k: Any, v: Any, rows: Any, kv: Any, z: Any, root: float) -> Any:
    """One token of FAVOR+ without maxima, which returns new sums as ours does."""
    pq, pk = (torch.exp((x * root) @ rows.mT - (x * x).sum(-1, keepdim=True) * (root * root / 2)) for x in (q, k))
    kv, z = kv + pk.mT * v, z + pk
    return (pq @ kv) / (pq * z).sum(-1, keepdim=True), kv, z


def torch_matvec(x: Any, v: Any, rows: Any) -> Any:
    """A product with a Gaussian kernel matrix by its positive features, all of them in memory."""
    p = torch.exp(x @ rows.mT - (x * x).sum(-1, keepdim=True)) / len(rows) ** 0.5
    return p @ (p.mT @ v)


@functools.cache
def compiled(function: Any) -> Any:
    """The function under torch.compile, compiled for fixed shapes."""
    return torch.compile(function, dynamic=False)


@functools.cache
def jitted(name: str) -> Any:
    """The bidirectional formula, causal chunks of 64, or the features, under jax.jit."""
    import jax
    import jax.numpy as jnp

    def features(u: Any, rows: Any, row: Any, column: Any) -> Any:
        return jnp.exp(u @ rows.T + row + column)

    def attention(q: Any, k: Any, v: Any, rows: Any, root: float) -> Any:
        def logs(x: Any) -> Any:
            x = x * root
            return x @ rows.T - (x * x).sum(-1, keepdims=True) / 2

        lq, lk = logs(q), logs(k)
        top = lk.max(-2, keepdims=True)
        p = jnp.exp(lk - top)
        w = lq + top
        w = jnp.exp(w - w.max(-1, keepdims=True))
        return (w @ (p.swapaxes(-1, -2) @ v)) / (w @ p.sum(-2, keepdims=True).swapaxes(-1, -2))

    def causal(q: Any, k: Any, v: Any, rows: Any, root: float) -> Any:
        def features_of(x: Any) -> Any:
            x = x * root
            return jnp.exp(x @ rows.T - (x * x).sum(-1, keepdims=True) / 2)

        def chunk(sums: Any, tiles: Any) -> Any:
            pq, pk, v = features_of(tiles[0]), features_of(tiles[1]), tiles[2]
            kv, z = sums
            pairs = jnp.tril(pq @ pk.swapaxes(-1, -2))
            total = pairs.sum(-1, keepdims=True) + pq @ z[..., None]
            return (kv + pk.swapaxes(-1, -2) @ v, z + pk.sum(-2)), (pairs @ v + pq @ kv) / total

        *batch, n, _ = q.shape
        tiles = [jnp.moveaxis(x.reshape(*batch, n // TILE, TILE, x.shape[-1]), -3, 0) for x in (q, k, v)]
        m, e = rows.shape[0], v.shape[-1]
        _, out = jax.lax.scan(chunk, (jnp.zeros((*batch, m, e)), jnp.zeros((*batch, m))), tiles)
        return jnp.moveaxis(out, 0, -3).reshape(*batch, n, e)

    function = jax.jit({"features": features, "attention": attention, "causal": causal}[name])
    return lambda *arrays: function(*arrays).block_until_ready()


def exact(q: Any, k: Any, v: Any, *, is_causal: bool = False) -> Any:
    """Exact attention of torch. Its fast kernels take points with four axes only, so heads get an axis before them."""
    whole = [x[None] if x.ndim == 3 else x for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*whole, is_causal=is_causal)
    return out[0] if q.ndim == 3 else out
