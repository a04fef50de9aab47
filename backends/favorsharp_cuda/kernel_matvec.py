"""K(x, y) @ v through features: runs the tensor-core kernels (`tiles`) if they fit the call, otherwise the plain ones.

`dispatch` calls it for CuPy arrays; `torch_ops`, `torch.operators` and `vjp` call it too.
"""

from typing import Any

from favorsharp_cuda.host import plain, tile_sizes, tiles


def kernel_matvec(x: Any, y: Any, v: Any, feature_map: Any) -> Any:
    """As `favorsharp.ops.kernel_matvec.kernel_matvec`."""
    if tile_sizes.fit(x, v.shape[-1]):
        return tiles.attention(x, y, v, feature_map, None, normalised=False)
    return plain.attention(x, y, v, feature_map, None, 0, normalised=False)
