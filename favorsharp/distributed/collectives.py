"""Collectives as autograd nodes, and the agreement that comes before them.

A backward pass runs collectives of its own, which every rank must enter in the same order. So a call exchanges through
one node only, and every rank's result depends on that node, and that node on every rank's inputs, whether numbers flow
that way or not: ranks without keys, and ranks that use nothing of what they were sent, would be missed otherwise, and
the others' gradients would be silently incomplete. Second derivatives are refused: in a backward pass over a backward
pass that dependence would have to be made a second time.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


class Sum(torch.autograd.Function):
    """The sum over the ranks, on every rank; of gradients too. Ties are inputs that the node only has to know of."""

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
        """Every rank read the sum: its gradient is the sum of theirs."""
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return (None, total, *ctx.ties)


class Exchange(torch.autograd.Function):
    """Rows sent to the ranks that they are for; gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, group: Any, counts: Any, *tensors: Any) -> Any:
        """Send rows of the leading tensors, whose counts say how many go to and come from each rank; ties follow."""
        ctx.group, ctx.counts, ctx.ties = group, counts, _gradients_of(tensors[len(counts) :])
        return tuple(_sent(x, to, come, group) for x, (to, come) in zip(tensors, counts, strict=False))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Send each row's gradient to where the row came from."""
        back = [_sent(x, come, to, ctx.group) for x, (to, come) in zip(gradients, ctx.counts, strict=True)]
        return (None, None, *back, *ctx.ties)


class Tied(torch.autograd.Function):
    """A result that depends on what was exchanged, by a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, out: Any, exchanged: Any) -> Any:
        """The result as it is."""
        ctx.save_for_backward(exchanged)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        """The result's own gradient, and zeros."""
        return gradient, torch.zeros_like(ctx.saved_tensors[0])


def _sent(x: Any, to: list[int], come: list[int], group: Any) -> Any:
    rows = x.new_empty((sum(come), *x.shape[1:]))
    dist.all_to_all_single(rows, x.contiguous(), come, to, group=group)
    return rows


def _gradients_of(ties: tuple[Any, ...]) -> list[Any]:
    """Gradients of ties: none, but zeros for what is empty, which gets no other."""
    return [torch.zeros_like(x) if x.numel() == 0 else None for x in ties]


def check_group(group: Any) -> None:
    """Check that there is a group and that this process is in it."""
    if group is None and not dist.is_initialized():
        raise ValueError(
            "group=None means the default process group, and there is none: call "
            "torch.distributed.init_process_group first"
        )
    outsider = group == dist.GroupMember.NON_GROUP_MEMBER
    if group is not None and not outsider and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    if outsider or dist.get_rank(group) < 0:
        raise ValueError("group does not hold this process; accepted: a group that it is a member of")


def on_every_rank(group: Any, make: Callable[[], Any], tell: Callable[[Any], Any]) -> tuple[Any, list[Any]]:
    """What make() gives here, and what every rank tells of its own; an error on one rank is raised on all.

    A rank that raised alone would leave the others waiting.
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
