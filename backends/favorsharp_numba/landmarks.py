"""The ops `landmark_keys`, `choose_landmarks` and `condense`: landmarks from keys, on the CPU."""

from typing import Any

import numpy as np

from favorsharp.backend import CANDIDATES
from favorsharp_numba.host.arguments import numpy_or_torch
from favorsharp_numba.host.landmark_call import CallProblem
from favorsharp_numba.host.landmarks import LandmarkProblem


def landmark_keys(
    q: Any, k: Any, v: Any, settings: Any, *, key_mask: Any | None = None, grouped: bool = False
) -> tuple[Any, Any, Any]:
    """As `favorsharp.landmarks.attention.landmark_keys`."""
    return CallProblem(q, k, v, settings, key_mask, grouped).run()


def choose_landmarks(
    k: Any,
    log_weight: Any,
    metric: Any,
    *,
    num_landmarks: int,
    steps: int,
    kernel: str,
    scale: float,
    seed: int,
    event: int,
) -> tuple[Any, Any]:
    """As `favorsharp.ops.landmarks.choose_landmarks`."""
    options: dict[str, Any] = {"num_landmarks": num_landmarks, "kernel": kernel, "scale": scale}
    problem = LandmarkProblem(k, log_weight, None, metric, slots=CANDIDATES * num_landmarks, **options)
    problem.draw(seed, event)
    problem.run(steps, problem.points, np.empty(0, problem.dtype))
    used = problem.used[..., None, :num_landmarks] == 0
    return tuple(numpy_or_torch(k, np.ascontiguousarray(x)) for x in (problem.points[..., : problem.s.d], used))


def condense(
    k: Any,
    log_weight: Any,
    v: Any,
    points: Any,
    used: Any,
    metric: Any,
    *,
    kernel: str,
    scale: float,
    conserving: bool = False,
) -> tuple[Any, Any, Any]:
    """As `favorsharp.ops.landmarks.condense`."""
    options: dict[str, Any] = {"kernel": kernel, "scale": scale, "conserving": conserving}
    problem = LandmarkProblem.around(k, log_weight, v, points, used, metric, **options)
    s = problem.s
    values = problem.rows(None, s.m, s.width)
    masses = np.empty((*problem.batch, s.m_pad), problem.dtype)
    problem.run(1, values, masses)
    found = (problem.uncentred(metric, scale), problem.log_weights(masses), values[..., : s.e])
    return tuple(numpy_or_torch(k, np.ascontiguousarray(x)) for x in found)
