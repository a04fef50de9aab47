"""The op `kernel_matvec`: K(x, y) @ v through features on the CPU."""

from typing import Any

from favorsharp_numba.host.arguments import empty
from favorsharp_numba.host.problem import AttentionProblem


def kernel_matvec(x: Any, y: Any, v: Any, feature_map: Any) -> Any:
    """As `favorsharp.ops.kernel_matvec.kernel_matvec`."""
    return with_sums(x, y, v, feature_map)[0]


def with_sums(x: Any, y: Any, v: Any, feature_map: Any) -> tuple[Any, AttentionProblem]:
    """The product, and the problem with the sums of y and v, which the backward pass reads."""
    problem = AttentionProblem(feature_map, x, y, v)
    out = empty(x, (*problem.batch, x.shape[-2], v.shape[-1]), problem.result)
    problem.gather(normalised=False)
    problem.read(out, normalised=False)
    return out, problem
