"""Queries, keys and values as tensors."""

import torch


def sample(*shape, seed=0):
    """Queries, keys and values with means."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, *shape, generator=generator)
    return q + 0.3, k - 0.2, v
