"""Collectives as autograd nodes, and the comparison of arguments that comes before them.

A backward pass runs collectives of its own, which every rank must enter in the same order. So a call exchanges data
through one autograd node. Every rank's result depends on that node, and the node depends on every input of every rank,
even where no numbers flow. Otherwise autograd would skip the node on ranks that hold no keys, or that use nothing of
what they were sent, and the gradients of the other ranks would be silently incomplete. Second derivatives are refused:
a backward pass through a backward pass would need the same dependence again.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


class Sum(torch.autograd.Function):
    """Sum x over the ranks.

    The backward pass sums the gradients. The node depends on `ties`, but does not read them.
    """

    @staticmethod
    def forward(ctx: Any, group: Any, x: Any, *ties: Any) -> Any:
        """All-reduce a copy of x."""
        ctx.group, ctx.ties = group, _gradients_of(ties)
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Any) -> Any:
        """Sum the gradients of all ranks, as every rank has read the sum."""
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return (None, total, *ctx.ties)


class Exchange(torch.autograd.Function):
    """Send rows to other ranks; the backward pass sends the gradients of the rows back."""

    @staticmethod
    def forward(ctx: Any, group: Any, counts: Any, *tensors: Any) -> Any:
        """Send rows of the leading tensors; `counts` says how many go where. The other tensors are ties."""
        ctx.group, ctx.counts, ctx.ties = group, counts, _gradients_of(tensors[len(counts) :])
        return tuple(_sent(x, to, come, group) for x, (to, come) in zip(tensors, counts, strict=False))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Send the gradient of each row back to the rank that sent the row."""
        back = [_sent(x, come, to, ctx.group) for x, (to, come) in zip(gradients, ctx.counts, strict=True)]
        return (None, None, *back, *ctx.ties)


class Tied(torch.autograd.Function):
    """Make a result depend on what was exchanged, with a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, out: Any, exchanged: Any) -> Any:
        """Return the result unchanged."""
        ctx.save_for_backward(exchanged)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        """Return the gradient of the result, and zeros for what was exchanged."""
        return gradient, torch.zeros_like(ctx.saved_tensors[0])


def _sent(x: Any, to: list[int], come: list[int], group: Any) -> Any:
    rows = x.new_empty((sum(come), *x.shape[1:]))
    dist.all_to_all_single(rows, x.contiguous(), come, to, group=group)
    return rows


def _gradients_of(ties: tuple[Any, ...]) -> list[Any]:
    """Gradients of ties: None, but zeros for an empty tensor, which gets no gradient from elsewhere."""
    return [torch.zeros_like(x) if x.numel() == 0 else None for x in ties]


def check_group(group: Any) -> None:
    """Check that there is a process group and that this process belongs to it."""
    if group is None and not dist.is_initialized():
        raise ValueError(
            "group=None means the default process group, and there is none: call "
            "torch.distributed.init_process_group first"
        )
    outsider = group == dist.GroupMember.NON_GROUP_MEMBER
    if group is not None and not outsider and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    if outsider or dist.get_rank(group) < 0:
        raise ValueError("group does not contain this process; accepted: a group that it is a member of")


def on_every_rank(group: Any, make: Callable[[], Any], tell: Callable[[Any], Any]) -> tuple[Any, list[Any]]:
    """Return the result of make() on this rank, and the results of `tell` for it on all ranks.

    An error on one rank is raised on all: if one rank raised alone, the others would wait for it.
    """
    check_group(group)
    made, error = None, None
    try:
        made = make()
    except (TypeError, ValueError) as refusal:
        error = refusal
    told: list[Any] = [None] * dist.get_world_size(group)
    own = (tell(made), None) if error is None else (None, f"{type(error).__name__}: {error}")
    dist.all_gather_object(told, own, group=group)
    if error is not None:
        raise error
    for rank, (_, refused) in enumerate(told):
        if refused is not None:
            raise ValueError(f"rank {rank} of the group refuses its arguments: {refused}")
    return made, [one for one, _ in told]
