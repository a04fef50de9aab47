"""Autograd Functions for traced calls (`torch.compile`, `torch.func`, fake tensors); `torch_ops` applies them.

Forward and backward passes call the custom operators of `operators`. Forward-mode and second derivatives raise an
error, because no kernel computes them.
"""

from functools import partial
from typing import Any

import torch

from favorsharp_cuda.torch.operators import (
    absorb_backward_op,
    absorb_op,
    after_zeros,
    attention_backward_op,
    attention_op,
    exponential_features_backward_op,
    exponential_features_op,
    gradients_of_map,
    kernel_matvec_backward_op,
    kernel_matvec_op,
    parted,
    read_backward_op,
    read_with_stats_op,
)


class Features(torch.autograd.Function):
    """exp(u W^T + row + column)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Any, rows: Any, row: Any, column: Any) -> Any:
        return exponential_features_op(u, rows, row, column)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return _gradients(exponential_features_backward_op, gradient, *ctx.saved_tensors)


class _OfMap(torch.autograd.Function):
    """A Function of options, tensors, and the six tensors of a map.

    `forward` names each of the six and has no *arrays: if no gradients are wanted, torch.compile counts the parameters
    to tell such a `forward` from one that takes ctx.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options, *tensors = inputs
        results = output if isinstance(output, tuple) else ()  # a single result is not needed for its gradients
        ctx.save_for_backward(*tensors, *results)


class _WithStats(_OfMap):
    """A Function with two results: the one that is wanted, and its stats, which have no gradients."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _OfMap.setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])


class Attention(_WithStats):
    """Attention; if it is causal, the recent keys of a state come before the other keys."""

    @staticmethod
    def forward(
        options: Any, q: Any, k: Any, v: Any, key_mask: Any, kv: Any, z: Any, c: Any,
        rows: Any, log_weight: Any, g1: Any, g2: Any, center_x: Any, center_y: Any,
    ) -> Any:  # fmt: skip
        return attention_op(q, k, v, key_mask, rows, log_weight, g1, g2, center_x, center_y, *options, kv, z, c)

    @staticmethod
    def backward(ctx: Any, gradient: Any, _: Any) -> Any:
        (q, k, v, key_mask, *sums), arrays, (out, stats) = parted(ctx.saved_tensors, 7)
        of_map, before = any(ctx.needs_input_grad[8:]), 0
        if sums[0] is not None:  # then attention is causal
            before = k.shape[-2] - q.shape[-2]
            gradient, q, out, stats = (after_zeros(x, before) for x in (gradient, q, out, stats))
        given = (gradient, q, k, v, key_mask, *arrays, *ctx.options, *sums, out, stats)
        of_q, of_k, of_v, *rest = _gradients(attention_backward_op, *given, of_map=of_map)
        of_q = of_q.narrow(-2, before, q.shape[-2] - before)
        return None, of_q, of_k, of_v, None, *_of_sums_and_map(rest, sums, arrays, ctx.options)


class Absorb(_OfMap):
    """The sums after keys."""

    @staticmethod
    def forward(
        options: Any, k: Any, v: Any, key_mask: Any, kv: Any, z: Any, c: Any,
        rows: Any, log_weight: Any, g1: Any, g2: Any, center_x: Any, center_y: Any,
    ) -> Any:  # fmt: skip
        return absorb_op(k, v, key_mask, rows, log_weight, g1, g2, center_x, center_y, *options, kv, z, c)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (k, v, key_mask, *sums), arrays, after = parted(ctx.saved_tensors, 6)
        given = (*gradients, k, v, key_mask, *arrays, *ctx.options, *sums, *after)
        of_k, of_v, *rest = _gradients(absorb_backward_op, *given, of_map=any(ctx.needs_input_grad[7:]))
        return None, of_k, of_v, None, *_of_sums_and_map(rest, sums, arrays, ctx.options)


class Read(_WithStats):
    """What queries read from a state, its recent keys and values included."""

    @staticmethod
    def forward(
        options: Any, q: Any, kv: Any, z: Any, c: Any, recent_k: Any, recent_v: Any, recent_mask: Any,
        rows: Any, log_weight: Any, g1: Any, g2: Any, center_x: Any, center_y: Any,
    ) -> Any:  # fmt: skip
        of_map = (rows, log_weight, g1, g2, center_x, center_y)
        return read_with_stats_op(q, kv, z, c, recent_k, recent_v, recent_mask, *of_map, *options)

    @staticmethod
    def backward(ctx: Any, gradient: Any, _: Any) -> Any:
        tensors, arrays, (out, stats) = parted(ctx.saved_tensors, 7)
        given = (gradient, *tensors, *arrays, *ctx.options, out, stats)
        found = _gradients(read_backward_op, *given, of_map=any(ctx.needs_input_grad[8:]))
        return None, *found[:6], None, *_of_map(found[6:], arrays, ctx.options)


class Matvec(_OfMap):
    """K(x, y) @ v."""

    @staticmethod
    def forward(
        options: Any, x: Any, y: Any, v: Any,
        rows: Any, log_weight: Any, g1: Any, g2: Any, center_x: Any, center_y: Any,
    ) -> Any:  # fmt: skip
        return kernel_matvec_op(x, y, v, rows, log_weight, g1, g2, center_x, center_y, *options)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        points, arrays, _ = parted(ctx.saved_tensors, 3)
        given = (gradient, *points, *arrays, *ctx.options)
        found = _gradients(kernel_matvec_backward_op, *given, of_map=any(ctx.needs_input_grad[4:]))
        return None, *found[:3], *_of_map(found[3:], arrays, ctx.options)


def _of_sums_and_map(found: Any, sums: Any, arrays: Any, options: Any) -> Any:
    """The gradients of a state's sums (None three times if there are no sums), and those of a map's arrays."""
    count = 0 if sums[0] is None else 3
    return *(found[:count] or (None, None, None)), *_of_map(found[count:], arrays, options)


def _of_map(sums: Any, arrays: Any, options: Any) -> Any:
    """The gradients of a map's arrays from the ten sums, or None for each array if there are no sums."""
    return gradients_of_map(sums, arrays, options) if len(sums) else [None] * len(arrays)


def _gradients(op: Any, *given: Any, **options: Any) -> Any:
    """The results of a backward operator, which cannot be differentiated again."""
    if torch.compiler.is_compiling():  # compilers refuse second derivatives, and cannot trace a Function in a Function
        return op(*given, **options)
    return _Once.apply(partial(op, **options), *given)


class _Once(torch.autograd.Function):
    """Runs a backward operator, and raises an error if its results are differentiated.

    `torch.func` records backward passes, and would otherwise not notice that the operator has no derivative.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(op: Any, *given: Any) -> Any:
        return tuple(op(*given))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("favorsharp's CUDA kernels have no second derivatives; use('reference') has them")
