"""The op `landmark_window`: attention with a window around landmarks, on the CPU."""

from typing import Any

from favorsharp_numba.host.arguments import broadcast, empty, indices, members, name_of, promoted
from favorsharp_numba.host.landmarks import LandmarkProblem
from favorsharp_numba.host.threads import share
from favorsharp_numba.kernels.landmark_windows import Windows, kept_items
from favorsharp_numba.kernels.landmark_windows import landmark_window as run
from favorsharp_numba.kernels.workspace import items_of


def landmark_window(
    q: Any,
    k: Any,
    log_weight: Any,
    v: Any,
    points: Any,
    used: Any,
    metric: Any,
    *,
    window: int,
    kernel: str,
    scale: float,
) -> Any:
    """As `favorsharp.landmarks.attention.landmark_window`."""
    problem = LandmarkProblem.around(k, log_weight, v, points, used, metric, kernel=kernel, scale=scale)
    s, held = problem.s, problem.held
    batch = broadcast(q.shape[:-2], problem.batch)
    out = empty(q, (*batch, s.n, s.e), promoted(*(name_of(x) for x in (q, k, v))))
    order, starts = members(problem.batch, batch)
    p = Windows(min(window, s.n), held.constant(order), held.constant(starts))
    near = min(3 * p.window, s.n)
    work = float(len(indices(problem.batch, batch).values) * s.n * (s.m + near) * (s.d + s.e))
    given = held.points(q, batch), problem.k, problem.weight, problem.v, problem.sides
    share(
        run, problem.heads, work, items_of(run, s) + kept_items(s, p.window), problem.one, s, p, *given,
        held.place(problem.points), held.place(problem.used), held.points(out, batch),
    )  # fmt: skip
    return out
