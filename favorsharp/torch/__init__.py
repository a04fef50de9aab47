"""The public torch interface: attention as modules, and the refinement of fitted maps by gradient descent.

All functions of `favorsharp` itself accept tensors; this package adds modules, which keep a map between calls.
"""

from favorsharp.torch.attention import LinearAttention
from favorsharp.torch.buffers import MapBuffers
from favorsharp.torch.multihead import MultiheadAttention
from favorsharp.torch.refinement import Refinement, refine

__all__ = ["LinearAttention", "MapBuffers", "MultiheadAttention", "Refinement", "refine"]
