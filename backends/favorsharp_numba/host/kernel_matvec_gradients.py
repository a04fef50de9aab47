"""Gradients of K(x, y) @ v through features, as a plain function of arrays.

What x gets are reads of the sums that y and v made; what y and v get, reads of the sums that x and the gradient make
with the map's sides exchanged.
"""

from typing import Any

import numpy as np

from favorsharp_numba.host.arguments import Held, empty, name_of
from favorsharp_numba.host.attention_gradients import in_shape_of, map_sums
from favorsharp_numba.host.problem import AttentionProblem
from favorsharp_numba.host.threads import share
from favorsharp_numba.kernels import attention_gradients as kernels


def kernel_matvec_backward(
    gradient: Any, x: Any, y: Any, v: Any, feature_map: Any, problem: AttentionProblem, *, of_map: bool = False
) -> tuple[Any, Any, Any, dict[str, Any] | None]:
    """The gradients of x, y and v, in their shapes and dtypes, and the sums that the gradients of a map are made of.

    Parameters
    ----------
    gradient : array, shape (*b, n, e)
        Of the result.
    problem : AttentionProblem
        From `with_sums`.
    of_map : bool
        Whether the gradients of the map are wanted.

    Returns
    -------
    dx, dy, dv : arrays
    maps : dict of arrays or None
        As `attention_backward` gives them.
    """
    if name_of(gradient) != problem.result:  # both halves are computed in one dtype
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
    """The gradients of a problem's queries, of their values, and for each head the sums for the map."""
    s, heads, n, held = problem.s, problem.query_heads, problem.num_queries, Held()
    work = float(heads * n * s.m * 2 * (s.d + s.e))
    per_head = problem.pieces(heads, n, work)
    size = 2 * kernels.map_sums_size(s) if of_map else 0
    points, own, maps = (
        np.zeros(shape, problem.packed.dtype)
        for shape in ((heads, n, s.d), (heads, n, s.e if of_values else 0), (heads, per_head, size))
    )
    share(
        kernels.read_gradients, heads * per_head, work, kernels.read_gradients_scratch(s), problem.one, s,
        problem.arguments(), problem.q, held.points(values, problem.batch), held.place(points),
        held.place(own) if of_values else 0, held.place(maps) if of_map else 0, size, per_head,
    )  # fmt: skip
    return *(x.reshape(*problem.batch, n, x.shape[-1]) for x in (points, own)), maps.sum(axis=1)
