"""Functions for the gradients of attention, which run the backward kernels; `vjp` and `torch_ops` call them."""

from typing import Any

import numpy as np

from favorsharp.backend import map_gradients
from favorsharp_numba.host.arguments import empty, like_array, summed_to
from favorsharp_numba.host.problem import AttentionProblem
from favorsharp_numba.kernels.attention_gradients import sweep
from favorsharp_numba.kernels.block_sums import kept_sums
from favorsharp_numba.kernels.gradient_rows import Backward
from favorsharp_numba.kernels.packed_sequences import packed_gradients, packed_near_gradients
from favorsharp_numba.kernels.point_gradients import map_sums_at
from favorsharp_numba.kernels.two_sided_gradients import two_sided_sweep
from favorsharp_numba.kernels.window_gradients import near_gradients
from favorsharp_numba.kernels.workspace import on_host


def attention_with_stats(
    q: Any, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None, window: int = 0, causal: bool = False,
    bounds: list[int] | None = None,
) -> tuple[Any, Any, Any, dict[str, Any] | None]:  # fmt: skip
    """Attention, and what a backward pass needs; with `bounds`, within packed sequences.

    Returns
    -------
    out : array, shape (*b, n, e)
    exact : array, shape (*b, n, e)
        `out` in the dtype that was computed in. The backward pass needs it: the rounding of `out` to a narrower dtype
        would change the gradients of all features.
    stats : array, shape (heads, n, 2)
        1 / total and the reference of every query.
    state : dict of arrays or None
        The arrays of the state after all keys, for causal attention that is not packed.
    """
    problem = AttentionProblem(feature_map, q, k, v, key_mask=key_mask, window=window)
    exact = empty(q, (*problem.batch, q.shape[-2], v.shape[-1]), problem.dtype)
    stats = problem.keep_stats()
    if bounds is not None:
        problem.each_sequence(exact, bounds, causal=causal)
    elif window > 0 and k.shape[-2] > 0:
        problem.new_sums()
        problem.windowed(exact, causal=causal)
    elif causal:
        problem.new_sums()
        problem.causal(exact)
    else:
        problem.gather()
        problem.read(exact)
    out = exact
    if problem.result != problem.dtype:
        out = empty(q, tuple(exact.shape), problem.result)
        out[...] = exact
    return out, exact, stats, problem.state_arrays() if causal and bounds is None else None


def attention_backward(
    gradient: Any,
    q: Any,
    k: Any,
    v: Any,
    feature_map: Any,
    exact: Any,
    stats: Any,
    *,
    key_mask: Any = None,
    window: int = 0,
    causal: bool = False,
    of_map: bool = False,
    bounds: list[int] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """The gradients of q, k and v, in their shapes and dtypes, and the sums for the gradients of a map.

    Parameters
    ----------
    gradient : array, shape (*b, n, e)
        The gradient of the result.
    exact, stats : arrays
        From `attention_with_stats`.
    of_map : bool
        Whether the gradients of the map are wanted.
    bounds : list of int, optional
        Where packed sequences begin, as for `attention_with_stats`.

    Returns
    -------
    dq, dk, dv : arrays
    maps : dict of arrays or None
        The sums that `favorsharp.backend.map_gradients` takes.
    """
    problem = AttentionProblem(feature_map, q, k, v, key_mask=key_mask, window=window, backward=True)
    s, held = problem.s, problem.held
    dtype, heads = problem.packed.dtype, problem.query_heads
    n, length = problem.num_queries, problem.num_keys
    dq, dk, dv = (np.zeros((heads, size, width), dtype) for size, width in ((n, s.d), (length, s.d), (length, s.e - 1)))
    maps = np.zeros((heads, 2, map_sums_size(s) if of_map else 0), dtype)
    given, result = held.points(gradient, problem.batch), held.points(exact, problem.batch)
    sides = {name: problem.fixed[name] for name in ("query_side", "key_side", "map_of")}
    p = Backward(
        num_keys=length, num_queries=n, window=window, causal=int(causal), with_factors=int(window > 0), **sides,
        stats=held.place(stats), dq=held.place(dq), dk=held.place(dk), dv=held.place(dv),
        maps=held.place(maps) if of_map else 0, maps_size=maps.shape[-1],
    )  # fmt: skip
    cost = float(heads * max(n, length) * s.m * 6 * (s.d + s.e))
    if bounds is None:
        _whole(problem, p, given, result, cost)
    else:
        _packed(problem, p, given, result, cost, bounds)
    sums = map_sums(maps, s, problem.batch) if of_map else None
    return (
        in_shape_of(dq.reshape(*problem.batch, n, s.d), q),
        in_shape_of(dk.reshape(*problem.batch, length, s.d), k),
        in_shape_of(dv.reshape(*problem.batch, length, s.e - 1), v),
        sums,
    )


def _whole(problem: AttentionProblem, p: Any, given: Any, result: Any, cost: float) -> None:
    """The backward pass over whole heads."""
    heads = problem.query_heads
    queries, keys = (problem.q, given), (problem.k, problem.v)
    if problem.in_one_pass(bool(p.causal)):
        extra = kept_sums(problem.s, p.num_keys, p.window)
        problem.run(two_sided_sweep, heads, cost, p, 0, *queries, *keys, result, problem.mask, extra=extra)
        problem.run(two_sided_sweep, heads, cost, p, 1, *keys, *queries, result, problem.mask, extra=extra)
    else:
        both = p.window > 0 and not p.causal
        for backwards in (0, 1):
            if not backwards or both:
                problem.run(sweep, heads, cost, p, 0, backwards, *queries, *keys, result, problem.mask)
            if backwards or both:
                problem.run(sweep, heads, cost, p, 1, backwards, *keys, *queries, result, problem.mask)
    if p.window > 0:
        problem.run(near_gradients, heads, cost, p, problem.q, *keys, given, result, problem.mask)


def _packed(problem: AttentionProblem, p: Any, given: Any, result: Any, cost: float, bounds: list[int]) -> None:
    """The backward pass within packed sequences."""
    heads, sequences = problem.query_heads, len(bounds) - 1
    together = sequences if p.maps else 1
    starts = problem.held.keep(np.array(bounds, np.int64))
    arrays = (problem.q, given, problem.k, problem.v, result, problem.mask, starts, sequences)
    problem.run(packed_gradients, heads * sequences // together, cost, p, *arrays, together, heads)
    if p.window > 0:
        problem.run(packed_near_gradients, heads * sequences, cost, p, *arrays, heads)


def of_arrays_of_map(feature_map: Any, sums: dict[str, Any]) -> tuple[Any, ...]:
    """The gradients of a map's arrays, in the order of `favorsharp.backend.map_gradients`, from the sums."""
    return map_gradients(feature_map, {name: like_array(x, feature_map.rows) for name, x in sums.items()})


def map_sums_size(s: Any) -> int:
    """The number of items that the kernels need for the sums of one side of a map, with their low parts."""
    return 2 * int(on_host(map_sums_at)(s, 0).end)


def map_sums(maps: Any, s: Any, batch: tuple[int, ...]) -> dict[str, Any]:
    """The sums that kernels made for a map, (heads, sides, items), named as `favorsharp.backend.map_gradients` does."""
    sums, at = {}, on_host(map_sums_at)(s, 0)
    for index, side in enumerate(("query", "key")):
        x = maps[:, index]
        parts = {
            "points": x[:, at.points : at.column].reshape(-1, s.m, s.d_pad)[:, :, : s.d],
            "column": x[:, None, at.column : at.column + s.m],
            "factor_points": x[:, None, at.factor_points : at.factor_points + s.d],
            "factor_products": x[:, at.factor_products : at.factor].reshape(-1, s.d, s.d_pad)[:, :, : s.d],
            "factor": x[:, None, at.factor : at.factor + 1],
        }
        sums.update({f"{side}_{name}": part.reshape(*batch, *part.shape[-2:]) for name, part in parts.items()})
    return sums


def in_shape_of(gradient: Any, x: Any) -> Any:
    """A gradient of an array that was broadcast, in the shape, library and dtype of the array."""
    return like_array(summed_to(gradient, tuple(x.shape)), x)
