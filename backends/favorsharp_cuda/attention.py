"""Bidirectional attention."""

from typing import Any

from favorsharp_cuda import plain


def attention(q: Any, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None, window: int = 0) -> Any:
    """As `favorsharp.ops.attention.attention`."""
    return plain.attention(q, k, v, feature_map, key_mask, window)
