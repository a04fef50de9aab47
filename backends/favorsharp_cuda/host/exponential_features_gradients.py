"""The gradients of exp(u W^T + row + column) (kernels/exponential_features_gradients.cu).

`vjp` and `torch.operators` call it.
"""

from typing import Any

from favorsharp.backend import broadcast_shapes
from favorsharp_cuda.host import arrays
from favorsharp_cuda.host.declarations import GRADIENT_ROWS, GRADIENT_THREADS, GRADIENTS
from favorsharp_cuda.host.gradient_sizes import segments_of, width_of
from favorsharp_cuda.host.gradient_sums import sum_members
from favorsharp_cuda.host.launch import run
from favorsharp_cuda.host.problem import Problem
from favorsharp_cuda.host.source import expression


def exponential_features_backward(gradient: Any, u: Any, rows: Any, row: Any, column: Any) -> tuple[Any, Any, Any, Any]:
    """The gradients of u, rows, row and column, in their shapes and dtypes."""
    dtype = arrays.name_of(u)
    wide = arrays.WIDER[dtype]
    item = arrays.computed_item(dtype)
    n, d, m = u.shape[-2], u.shape[-1], rows.shape[-2]
    width = width_of(d)
    size = (64 if width == 64 else 32) * 4 // item
    slices = -(-m // size)
    p = Problem(broadcast_shapes(*(tuple(x.shape[:-2]) for x in (u, rows, row, column))), GRADIENTS)
    segments, span = segments_of(p.heads, n, GRADIENT_ROWS)
    for name, x in (("q", u), ("k", rows), ("v", row), ("out", column), ("gradient", gradient)):
        p.array(name, x)
    features = slices * size
    partial = arrays.empty(u, (p.heads, slices, segments, size, width + 1), wide)
    of_map = arrays.empty(u, (p.heads, features, width + 1), wide)
    du, drow = (arrays.empty(u, (p.heads, n, columns), wide) for columns in (d, 1))
    p.set(
        m=m, d=d, slices=slices, num_queries=n, segments=segments, span=span, heads=p.heads, dq=p.hold(du),
        query_slopes=p.hold(drow), map_sums=p.hold(partial), to=p.hold(of_map), outer=p.heads * slices,
        inner=size * (width + 1), **{"from": p.hold(partial)},
    )  # fmt: skip
    shared = item * ((GRADIENT_ROWS + size) * (width + 4) + GRADIENT_ROWS * (size + 4))
    kernel = expression("exponential_features_gradients", dtype, width)
    run(kernel, u, p.heads * segments, GRADIENT_THREADS, p.values, shared)
    numbers = p.heads * slices * size * (width + 1)
    run(expression("sum_segments", wide), u, -(-numbers // GRADIENT_THREADS), GRADIENT_THREADS, p.values)
    head = features * (width + 1)
    first = p.hold(of_map)
    targets = [arrays.empty(x, tuple(x.shape), arrays.name_of(x)) for x in (u, rows, row, column)]
    sources = (p.hold(du), first, p.hold(drow), first + width * item)
    steps = ((d, 1, n * d), (width + 1, 1, head), (1, 1, n), (0, width + 1, head))
    for target, source, step in zip(targets, sources, steps, strict=True):
        sum_members(p, target, source, step)
    return tuple(targets)
