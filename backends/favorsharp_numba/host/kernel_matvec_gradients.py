"""A function for the gradients of K(x, y) @ v, which runs the backward kernel; `vjp` and `torch_ops` call it.

The gradient of x reads the sums that y and v made in the forward pass. The gradients of y and v read the sums that x
and the gradient of the result make, with the sides of the map exchanged.
"""

from typing import Any

import numpy as np

from favorsharp_numba.host.arguments import Held, empty, name_of
from favorsharp_numba.host.attention_gradients import in_shape_of, map_sums, map_sums_size
from favorsharp_numba.host.problem import AttentionProblem
from favorsharp_numba.host.threads import pieces_of
from favorsharp_numba.kernels.kernel_matvec_gradients import read_gradients


def kernel_matvec_backward(
    gradient: Any, x: Any, y: Any, v: Any, feature_map: Any, problem: AttentionProblem, *, of_map: bool = False
) -> tuple[Any, Any, Any, Any]:
    """The gradients of x, y and v, in their shapes and dtypes, and the sums for the gradients of a map.

    Parameters
    ----------
    gradient : array, shape (*b, n, e)
        The gradient of the result.
    problem : AttentionProblem
        From `with_sums`.
    of_map : bool
        Whether the gradients of the map are wanted.

    Returns
    -------
    dx, dy, dv : arrays
    maps : dict of arrays or None
        As `attention_backward` returns them.
    """
    if name_of(gradient) != problem.result:  # both problems are computed in the same dtype
        given, gradient = gradient, empty(gradient, tuple(gradient.shape), problem.result)
        gradient[...] = given
    dx, _, of_queries = _read_gradients(problem, gradient, of_map=of_map)
    other = AttentionProblem(feature_map, y, x, gradient, exchanged=True)
    other.gather(normalised=False)
    dy, dv, of_keys = _read_gradients(other, v, of_map=of_map, of_values=True)
    sums = map_sums(np.stack([of_queries, of_keys], axis=1), problem.s, problem.batch) if of_map else None
    return in_shape_of(dx, x), in_shape_of(dy, y), in_shape_of(dv, v), sums


def _read_gradients(
    problem: AttentionProblem, values: Any, *, of_map: bool, of_values: bool = False
) -> tuple[Any, Any, Any]:
    """The gradients of a problem's queries and of their values, and the sums for the map of each head."""
    s, heads, n, held = problem.s, problem.query_heads, problem.num_queries, Held()
    work = float(heads * n * s.m * 2 * (s.d + s.e))
    per_head = pieces_of(heads, n, work)
    size = map_sums_size(s) if of_map else 0
    points, own, maps = (
        np.zeros(shape, problem.packed.dtype)
        for shape in ((heads, n, s.d), (heads, n, s.e if of_values else 0), (heads, per_head, size))
    )
    problem.run(
        read_gradients, heads * per_head, work, problem.arguments(), problem.q, held.points(values, problem.batch),
        held.place(points), held.place(own) if of_values else 0, held.place(maps) if of_map else 0, size, per_head,
    )  # fmt: skip
    return *(x.reshape(*problem.batch, n, x.shape[-1]) for x in (points, own)), maps.sum(axis=1)
