"""Gradients of attention, as plain functions of arrays."""

from typing import Any

import numpy as np

from favorsharp.backend import map_gradients
from favorsharp_numba.host.arguments import empty, like_array, summed_to
from favorsharp_numba.host.problem import AttentionProblem
from favorsharp_numba.host.threads import share
from favorsharp_numba.kernels import attention_gradients as kernels
from favorsharp_numba.kernels.packed_sequences import packed_gradients, packed_gradients_scratch, packed_near_gradients


def attention_with_stats(
    q: Any, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None, window: int = 0, causal: bool = False,
    bounds: list[int] | None = None,
) -> tuple[Any, Any, Any, dict[str, Any] | None]:  # fmt: skip
    """Attention, and what a backward pass needs; with `bounds`, within packed sequences.

    Returns
    -------
    out : array, shape (*b, n, e)
    exact : array, shape (*b, n, e)
        `out` in the dtype computed in: a derivative made of a rounded result is off by that rounding in every feature.
    stats : array, shape (heads, n, 2)
        1 / total and the reference of every query.
    state : dict of arrays or None
        Where causal and not packed, those of the state.
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
    """The gradients of q, k and v, in their shapes and dtypes, and the sums that the gradients of a map are made of.

    Parameters
    ----------
    gradient : array, shape (*b, n, e)
        Of the result.
    exact, stats : arrays
        From `attention_with_stats`.
    of_map : bool
        Whether the gradients of the map are wanted.
    bounds : list of int, optional
        Of packed sequences, as `attention_with_stats` was given them.

    Returns
    -------
    dq, dk, dv : arrays
    maps : dict of arrays or None
        For each side sums over points of the gradients of its log features: times the point, alone; and of its log
        factors: alone, times the point, times the point's products. Points are alpha x - center.
    """
    problem = AttentionProblem(feature_map, q, k, v, key_mask=key_mask, window=window, backward=True)
    s, held = problem.s, problem.held
    dtype, heads = problem.packed.dtype, problem.query_heads
    n, length = problem.num_queries, problem.num_keys
    dq, dk, dv = (np.zeros((heads, size, width), dtype) for size, width in ((n, s.d), (length, s.d), (length, s.e - 1)))
    maps_size = 2 * kernels.map_sums_size(s) if of_map else 0
    maps = np.zeros((heads, 2, maps_size), dtype)
    given, result = held.points(gradient, problem.batch), held.points(exact, problem.batch)
    fixed = problem.arguments_fixed()
    p = kernels.Backward(
        num_keys=length,
        num_queries=n,
        window=window,
        causal=int(causal),
        with_factors=int(window > 0),
        query_side=fixed["query_side"],
        key_side=fixed["key_side"],
        map_of=fixed["map_of"],
        stats=held.place(stats),
        dq=held.place(dq),
        dk=held.place(dk),
        dv=held.place(dv),
        maps=held.place(maps) if of_map else 0,
        maps_size=maps_size,
    )
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
    """The sweeps over whole heads."""
    s, one, heads = problem.s, problem.one, problem.query_heads
    scratch = kernels.sweep_scratch(one, s)
    both = p.window > 0 and not p.causal
    for backwards in (0, 1):
        if not backwards or both:
            share(
                kernels.sweep, heads, cost, scratch, one, s, p, 0, backwards, problem.q, given, problem.k, problem.v,
                result, problem.mask,
            )  # fmt: skip
        if backwards or both:
            share(
                kernels.sweep, heads, cost, scratch, one, s, p, 1, backwards, problem.k, problem.v, problem.q, given,
                result, problem.mask,
            )  # fmt: skip
    if p.window > 0:
        share(
            kernels.near_gradients, heads, cost, kernels.near_gradients_scratch(s), one, s, p, problem.q, problem.k,
            problem.v, given, result, problem.mask,
        )  # fmt: skip


def _packed(problem: AttentionProblem, p: Any, given: Any, result: Any, cost: float, bounds: list[int]) -> None:
    """The sweeps within packed sequences."""
    s, one, heads = problem.s, problem.one, problem.query_heads
    scratch, sequences = packed_gradients_scratch(one, s), len(bounds) - 1
    together = sequences if p.maps else 1
    arrays = (
        problem.q, given, problem.k, problem.v, result, problem.mask, problem.held.keep(np.array(bounds, np.int64)),
    )  # fmt: skip
    share(
        packed_gradients, heads * sequences // together, cost, scratch, one, s, p, *arrays, sequences, together, heads
    )  # fmt: skip
    if p.window > 0:
        share(packed_near_gradients, heads * sequences, cost, scratch, one, s, p, *arrays, sequences, heads)


def of_arrays_of_map(feature_map: Any, sums: dict[str, Any]) -> tuple[Any, ...]:
    """The gradients of a map's arrays, in the order of `favorsharp.features.map_gradients`, from the sums."""
    return map_gradients(feature_map, {name: like_array(x, feature_map.rows) for name, x in sums.items()})


def map_sums(maps: Any, s: Any, batch: tuple[int, ...]) -> dict[str, Any]:
    """What kernels added up for a map, (heads, sides, items), by name."""
    sums = {}
    column = s.m * s.d_pad
    first = column + s.m_pad
    second = first + s.d_pad
    alone = second + s.d * s.d_pad
    for index, side in enumerate(("query", "key")):
        x = maps[:, index]
        parts = {
            "points": x[:, :column].reshape(-1, s.m, s.d_pad)[:, :, : s.d],
            "column": x[:, None, column : column + s.m],
            "factor_points": x[:, None, first : first + s.d],
            "factor_products": x[:, second:alone].reshape(-1, s.d, s.d_pad)[:, :, : s.d],
            "factor": x[:, None, alone : alone + 1],
        }
        sums.update({f"{side}_{name}": part.reshape(*batch, *part.shape[-2:]) for name, part in parts.items()})
    return sums


def in_shape_of(gradient: Any, x: Any) -> Any:
    """A gradient of an array that was broadcast, in its shape, library and dtype."""
    return like_array(summed_to(gradient, tuple(x.shape)), x)
