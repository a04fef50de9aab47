"""What the backward kernels add up after the sweeps: sums over heads, and the sums that the gradients of a map need."""

import math
from typing import TYPE_CHECKING, Any

from favorsharp_cuda.host import arrays
from favorsharp_cuda.host.declarations import GRADIENT_ROWS, GRADIENT_THREADS
from favorsharp_cuda.host.launch import run
from favorsharp_cuda.host.problem import Problem
from favorsharp_cuda.host.source import expression

if TYPE_CHECKING:
    from favorsharp_cuda.host.attention_gradients import Backward


def set_target(problem: Problem, target: Any) -> int:
    """Let kernels write a gradient to `target`, in the shape of its array; the number of heads of that array.

    Each of these heads receives the sum over the heads of the batch that it was broadcast to.
    """
    problem.array("target", target)
    shape = (1,) * (len(problem.batch) - target.ndim + 2) + tuple(target.shape[:-2])
    targets: int = math.prod(shape)
    problem.axes("member", [size if own == 1 else 1 for size, own in zip(problem.batch, shape, strict=True)])
    problem.set(targets=targets)
    return targets


def sum_members(problem: Problem, target: Any, source: int, steps: tuple[int, int, int]) -> None:
    """Write a gradient to `target`, summed over the heads that its array was broadcast to.

    Parameters
    ----------
    source : int
        The address of the gradients of all heads.
    steps : tuple of int
        The strides of these gradients, in items, along rows, columns and heads.
    """
    targets = set_target(problem, target)
    rows, columns = target.shape[-2:]
    problem.set(
        **{"from": source}, num_rows=rows, num_columns=columns, row_step=steps[0], column_step=steps[1],
        head_step=steps[2],
    )  # fmt: skip
    blocks = -(-targets * rows * columns // GRADIENT_THREADS)
    run(expression("sum_members", arrays.name_of(target)), target, blocks, GRADIENT_THREADS, problem.values)


class MapSums:
    """The sums over points of each head from which the gradients of a map follow.

    `finished` returns them as `favorsharp.features.map_gradients` takes them, and `rows_and_weights` returns the
    gradients of two arrays of the map.
    """

    def __init__(self, backward: "Backward") -> None:
        self.b = backward
        self.partial: list[Any] = [None, None]
        self.segments = [0, 0]

    def of_features(self, keys: int, segments: int, *, zero: bool = False) -> int:
        """The address to which a sweep writes the sums of each segment; `zero` fills it if no sweep will run."""
        b = self.b
        if self.partial[keys] is None:  # sweeps for later columns of the values add to the same array
            self.segments[keys] = segments
            self.partial[keys] = arrays.empty(b.q, (b.heads, b.slices, segments, b.slice, b.width + 1), b.wide)
            if zero:
                self.partial[keys][...] = 0
        return b.problem.hold(self.partial[keys])

    def finished(self) -> dict[str, Any]:
        """All sums, (*b, ., .), by the names that `map_gradients` gives them."""
        b, sums = self.b, {}
        for keys, side in enumerate(("query", "key")):
            segments = self.segments[keys]
            whole = self._summed(self.partial[keys], b.heads * b.slices, segments, b.slice * (b.width + 1))
            features = whole.reshape(*b.batch, b.slices * b.slice, b.width + 1)[..., : b.m, :]
            sums[f"{side}_points"] = features[..., : b.d]
            sums[f"{side}_column"] = features[..., -1:].swapaxes(-1, -2)
            width = b.wider
            size = width * width + width + 1
            partial = arrays.empty(b.q, (b.heads, segments, size), b.wide)
            span = b.spans[keys]
            b.problem.set(keys_read=keys, segments=segments, span=span, factor_sums=b.problem.hold(partial))
            shared = b.item * 2 * GRADIENT_ROWS * (width + 4)
            b.run("gradient_factor_sums", b.heads * segments * (width // 32), shared, over=(b.dtype, width))
            factors = self._summed(partial, b.heads, segments, size).reshape(*b.batch, 1, size)
            products = factors[..., 0, : width * width].reshape(*b.batch, width, width)
            sums[f"{side}_factor_products"] = products[..., : b.d, : b.d]
            sums[f"{side}_factor_points"] = factors[..., width * width : width * width + b.d]
            sums[f"{side}_factor"] = factors[..., -1:]
        return sums

    def _summed(self, partial: Any, outer: int, segments: int, inner: int) -> Any:
        b = self.b
        result = arrays.empty(b.q, (outer, inner), b.wide)
        b.problem.set(
            **{"from": b.problem.hold(partial), "to": b.problem.hold(result)}, outer=outer, segments=segments,
            inner=inner,
        )  # fmt: skip
        b.run("sum_segments", -(-outer * inner // GRADIENT_THREADS), over=(b.wide,))
        return result

    def rows_and_weights(self, feature_map: Any) -> tuple[Any, Any]:
        """The gradients of the map's rows and log_weight, in their shapes."""
        b, p = self.b, feature_map.parameters
        problem = b.problem
        whole = []
        for keys in (0, 1):
            sums = self._summed(self.partial[keys], b.heads * b.slices, self.segments[keys], b.slice * (b.width + 1))
            whole.append(sums)
        problem.array("q", p.g1)
        problem.array("k", p.g2)
        problem.set(**{"from": problem.hold(whole[0]), "to": problem.hold(whole[1])}, inner=b.slices * b.slice)
        found = []
        for of_weights, like in enumerate((feature_map.rows, feature_map.log_weight)):
            target = arrays.empty(like, tuple(like.shape), b.wide)
            targets = set_target(problem, target)
            problem.set(keys_read=of_weights)
            numbers = targets * like.shape[-1] * like.shape[-2]
            b.run("gradient_map", -(-numbers // GRADIENT_THREADS), over=(b.wide,))
            found.append(arrays.cast(target, arrays.name_of(like)))
        return found[0], found[1]
