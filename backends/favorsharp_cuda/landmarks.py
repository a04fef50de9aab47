"""The choice of landmarks: a kernel draws the seeds in m successive steps; array functions do the rest.

`dispatch` calls `choose_landmarks` for CuPy arrays and for torch's CUDA tensors.
"""

from typing import Any

from favorsharp.backend import broadcast_shapes, draw_seeds, namespace_of
from favorsharp.ops.landmarks import choose_landmarks as choosing_op
from favorsharp_cuda.host import arrays
from favorsharp_cuda.host.declarations import SEED_THREADS
from favorsharp_cuda.host.launch import run, shared_room
from favorsharp_cuda.host.problem import Problem
from favorsharp_cuda.host.source import expression


def choose_landmarks(k: Any, log_weight: Any, metric: Any, **options: Any) -> tuple[Any, Any]:
    """As `favorsharp.ops.landmarks.choose_landmarks`."""
    return choosing_op.reference(k, log_weight, metric, draw=drawn, **options)


def drawn(points: Any, logs: Any, *, num_seeds: int) -> tuple[Any, Any]:
    """As `draw_seeds`, in one launch.

    Or in `num_seeds` steps of array functions if the candidates do not fit into a block.
    """
    slots, d = points.shape[-2:]
    shared = 8 * (d + 3 * slots) + 16 * (SEED_THREADS // 32)
    if shared > shared_room(arrays.device_number(points)):
        return draw_seeds(points, logs, num_seeds=num_seeds)
    batch = broadcast_shapes(tuple(points.shape[:-2]), tuple(logs.shape[:-1]))
    dtype = arrays.name_of(points)
    columns = arrays.empty(points, (*points.shape[:-2], d, slots), dtype)  # so that loads are coalesced
    columns[...] = namespace_of(points).matrix_transpose(points)
    picks = arrays.empty(points, (*batch, 1, num_seeds), "int64")
    used = arrays.empty(points, (*batch, 1, num_seeds), "bool")
    p = Problem(batch)
    for name, x in (("q", columns), ("k", arrays.cast(logs, "float64")[..., None, :]), ("out", picks), ("mask", used)):
        p.array(name, x)
    p.set(m=num_seeds, d=d, num_keys=slots)
    run(expression("draw_seeds", dtype), points, p.heads, SEED_THREADS, p.values, shared)
    return picks[..., 0, :], used[..., 0, :]
