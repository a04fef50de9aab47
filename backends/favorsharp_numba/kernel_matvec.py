"""K(x, y) @ v through features."""

from typing import Any

from favorsharp_numba.arguments import empty
from favorsharp_numba.problem import AttentionProblem


def kernel_matvec(x: Any, y: Any, v: Any, feature_map: Any) -> Any:
    """As `favorsharp.ops.kernel_matvec.kernel_matvec`."""
    problem = AttentionProblem(feature_map, x, y, v)
    out = empty(x, (*problem.batch, x.shape[-2], v.shape[-1]), problem.result)
    problem.gather(normalised=False)
    problem.read(out, normalised=False)
    return out
