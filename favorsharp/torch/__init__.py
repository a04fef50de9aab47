"""The torch edge: attention as modules, and the refinement of fitted maps by gradient.

`favorsharp` itself takes tensors everywhere; what is here holds state between calls, as modules do.
"""

from favorsharp.torch.attention import LinearAttention
from favorsharp.torch.buffers import MapBuffers
from favorsharp.torch.multihead import MultiheadAttention
from favorsharp.torch.refinement import Refinement, refine

__all__ = ["LinearAttention", "MapBuffers", "MultiheadAttention", "Refinement", "refine"]
