"""exp(u W^T + row + column): runs the tensor-core kernel (`tiles`) if it fits the call, otherwise the plain one.

`dispatch` calls it for CuPy arrays; `torch_ops`, `torch.operators` and `vjp` call it too.
"""

from typing import Any

from favorsharp.backend import broadcast_shapes
from favorsharp_cuda.host import arrays, plain, tile_sizes, tiles


def exponential_features(u: Any, rows: Any, row: Any, column: Any, *, out: Any = None) -> Any:
    """As `favorsharp.ops.exponential_features.exponential_features`."""
    batch = broadcast_shapes(*(tuple(x.shape[:-2]) for x in (u, rows, row, column)))
    dtype = arrays.name_of(u)
    shape = (*batch, u.shape[-2], rows.shape[-2])
    result = arrays.target(out, (u, rows, row, column), shape, dtype)
    served = tile_sizes.fit(u, 1)
    (tiles if served else plain).features(u, rows, row, column, result)
    if out is None or out is result:
        return result
    out[...] = arrays.cast(result, arrays.name_of(out))
    return out
