"""The ops `landmark_means` and `condense`: landmarks from keys, on the CPU."""

from typing import Any

import numpy as np

from favorsharp_numba.host.arguments import numpy_or_torch
from favorsharp_numba.host.landmarks import LandmarkProblem


def landmark_means(
    k: Any, log_weight: Any, points: Any, used: Any, metric: Any, *, steps: int, kernel: str, scale: float
) -> Any:
    """As `favorsharp.ops.landmarks.landmark_means`."""
    problem = LandmarkProblem(k, log_weight, None, points, used, metric, kernel=kernel, scale=scale)
    problem.run(steps, problem.points, np.empty(0, problem.dtype))
    return numpy_or_torch(k, np.ascontiguousarray(problem.points[..., : problem.s.d]))


def condense(
    k: Any, log_weight: Any, v: Any, points: Any, used: Any, metric: Any, *, kernel: str, scale: float
) -> tuple[Any, Any, Any]:
    """As `favorsharp.ops.landmarks.condense`."""
    problem = LandmarkProblem(k, log_weight, v, points, used, metric, kernel=kernel, scale=scale)
    s = problem.s
    values = problem.rows(None, s.m, s.width)
    masses = np.empty((*problem.batch, s.m_pad), problem.dtype)
    problem.run(1, values, masses)
    found = (problem.uncentred(metric, scale), problem.log_weights(masses), values[..., : s.e])
    return tuple(numpy_or_torch(k, np.ascontiguousarray(x)) for x in found)
