"""Combine the moments or states of all ranks: the function that `favorsharp.distributed` exports."""

from dataclasses import replace
from functools import reduce
from typing import Any

from favorsharp._arrays import dtype_name, from_host, is_array, named_dtype, namespace_of, to_host
from favorsharp._values import map_arrays
from favorsharp.distributed.collectives import on_every_rank
from favorsharp.landmarks import LandmarkState
from favorsharp.moments import Moments, combine
from favorsharp.ops.state import State


def all_combine(value: Moments | State | LandmarkState, *, group: Any = None) -> Any:
    """Combine the moments or states of all ranks, in the order of the ranks; every rank gets the same result.

    `fit(all_combine(moments(q, k)))` fits to the whole of a sharded sequence. No gradients flow through it.

    Parameters
    ----------
    value : Moments, State or LandmarkState
        Its arrays may be of any library; the result has the library and device of the rank's own value.
    group : ProcessGroup, optional
        None means the default group.

    Returns
    -------
    Moments, State or LandmarkState

    Raises
    ------
    TypeError, ValueError
        On every rank, if the value of any rank has another type or does not fit the others.

    Examples
    --------
    A group of one process; with more processes, each passes the moments of its own points.

    >>> import torch, torch.distributed as dist
    >>> import favorsharp as fs
    >>> from favorsharp.distributed import all_combine
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> q, k = torch.randn(2, 16, 4)
    >>> all_combine(fs.moments(q, k))
    Moments(d=4, batch=(), dtype='float32')
    >>> dist.destroy_process_group()
    """

    def on_host() -> Any:
        if not isinstance(value, Moments | State | LandmarkState):
            raise TypeError(f"all_combine takes Moments or a State, got {type(value).__name__}")
        return map_arrays(value, to_host)

    _, parts = on_every_rank(group, on_host, lambda made: made)
    return _placed(reduce(combine, parts), value)


def _placed(total: Any, own: Any) -> Any:
    """A combined value with the library, device and dtypes of the rank's own value."""
    like = next(x for x in vars(own).values() if is_array(x))
    xp = namespace_of(like)
    placed = {}
    for name, x in vars(total).items():
        before = getattr(own, name)
        if isinstance(x, Moments):
            placed[name] = _placed(x, before)
        elif is_array(x):
            kind = dtype_name(before if is_array(before) else like)
            placed[name] = from_host(x, like, named_dtype(xp, kind.rstrip("_")))
    return replace(total, **placed)
