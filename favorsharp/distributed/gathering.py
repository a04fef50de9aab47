"""Moments and states of all ranks as one."""

from dataclasses import replace
from functools import reduce
from typing import Any

from favorsharp._arrays import dtype_name, from_host, is_array, named_dtype, namespace_of, to_host
from favorsharp.distributed.collectives import on_every_rank
from favorsharp.moments import Moments, combine
from favorsharp.ops.state import State
from favorsharp.parameters import map_arrays


def all_combine(value: Moments | State, *, group: Any = None) -> Any:
    """What `combine` makes of every rank's moments or states, in the order of the ranks; the same on every rank.

    `fit(all_combine(moments(q, k)))` is the fit to the whole of a sharded sequence. Values only: no gradient flows.

    Parameters
    ----------
    value : Moments or State
        Of any array library; the result is of the rank's own, on its device.
    group : ProcessGroup, optional
        None: the default group.

    Returns
    -------
    Moments or State

    Raises
    ------
    TypeError, ValueError
        On every rank, if a value is of another type or does not fit the others.
    """

    def on_host() -> Any:
        if not isinstance(value, Moments | State):
            raise TypeError(f"all_combine takes Moments or a State, got {type(value).__name__}")
        return map_arrays(value, to_host)

    _, parts = on_every_rank(group, on_host, lambda made: made)
    total = reduce(combine, parts)
    like = value.mean_x if isinstance(value, Moments) else value.kv
    xp = namespace_of(like)
    placed = {
        name: from_host(x, like, named_dtype(xp, dtype_name(own if is_array(own) else like).rstrip("_")))
        for name, x in vars(total).items()
        if is_array(x)
        for own in (getattr(value, name),)
    }
    return replace(total, **placed)
