"""Attention of DTensors: ranks exchange data only along the mesh dimension that shards the sequence, if one does."""

import math
from typing import Any

from torch.distributed.tensor import DTensor, Replicate, Shard

from favorsharp._typing import Array
from favorsharp._values import map_arrays
from favorsharp.linear_attention import linear_attention


def is_dtensor(*arrays: Any) -> bool:
    """Whether any of the arrays is a DTensor."""
    return any(isinstance(x, DTensor) for x in arrays)


def over_dtensors(
    sharded: Any, q: Array, k: Array, v: Array, feature_map: Any, *, key_mask: Any, group: Any, **options: Any
) -> Array:
    """Attention of DTensors with equal placements: by `sharded` if the sequence is sharded, else locally."""
    if group is not None:
        raise ValueError("group must be None with DTensors: their mesh says which ranks share a sequence")
    _check_placed_alike(q, k, v)
    mesh, axes = k.device_mesh, _sharded_axes(q, k, v, options["enable_gqa"])
    own_map = feature_map
    if any(axis is not None and axis < -2 for axis in axes):  # only the maps of this rank's heads
        own_map = map_arrays(feature_map, lambda x: _part(x, [None if axis == -2 else axis for axis in axes], mesh))
    if key_mask is not None:
        key_mask = _part(key_mask, [axis if axis is None else axis + 1 for axis in axes], mesh)
    own_q, own_k, own_v = (x.to_local() for x in (q, k, v))
    if -2 in axes:
        own: Any = mesh.get_group(axes.index(-2))
        out = sharded(own_q, own_k, own_v, own_map, key_mask=key_mask, group=own, **options)
    else:
        out = linear_attention(own_q, own_k, own_v, own_map, key_mask=key_mask, **options)
    shape = [q.shape[i - out.ndim] if i - out.ndim in axes else size for i, size in enumerate(out.shape)]
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return DTensor.from_local(out, mesh, k.placements, run_check=False, shape=tuple(shape), stride=tuple(stride))


def _check_placed_alike(q: Any, k: Any, v: Any) -> None:
    """Raise an error unless all are DTensors with as many axes and equal placements on one mesh."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, DTensor):
            raise TypeError(f"q, k and v must all be DTensors or none, got {name} as {type(x).__name__}")
    for name, x in (("q", q), ("v", v)):
        if x.device_mesh != k.device_mesh or x.placements != k.placements or x.ndim != k.ndim:
            raise ValueError(
                f"q, k and v must be placed alike: {name} has {x.ndim} axes and {x.placements} on {x.device_mesh}, "
                f"k has {k.ndim} axes and {k.placements} on {k.device_mesh}"
            )


def _sharded_axes(q: Any, k: Any, v: Any, enable_gqa: bool) -> list[int | None]:
    """For each mesh dimension, the axis that it shards, counted from the end; None if it replicates."""
    axes: list[int | None] = []
    for dimension, placement in enumerate(k.placements):
        if isinstance(placement, Replicate):
            axes.append(None)
            continue
        axis = placement.dim % k.ndim - k.ndim if type(placement) is Shard else -1
        if axis == -1:
            raise ValueError(
                f"q, k and v are placed as {placement}; accepted: Replicate, or Shard of another axis than -1"
            )
        if axis == -2 and -2 in axes:
            raise ValueError("the sequence is cut by two mesh dimensions; accepted: one (redistribute q, k and v)")
        sizes = [x.shape[axis] for x in (q, k, v)]
        if axis == -3 and enable_gqa:
            if k.shape[-3] % k.device_mesh.size(dimension):
                raise ValueError(
                    f"k has {k.shape[-3]} heads on {k.device_mesh.size(dimension)} ranks; accepted: a multiple, so "
                    "that query heads lie beside the key heads that they read"
                )
        elif axis < -2 and len(set(sizes)) > 1:
            raise ValueError(f"q, k and v must agree in an axis that is cut, got {sizes} for axis {axis}")
        axes.append(axis)
    return axes


def _part(x: Any, axes: list[int | None], mesh: Any) -> Any:
    """The part of a DTensor on this rank, or this rank's part of a tensor that every rank holds whole."""
    whole = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    placements = [
        Shard(x.ndim + axis) if axis is not None and x.ndim >= -axis and x.shape[axis] > 1 else Replicate()
        for axis in axes
    ]
    return whole.redistribute(placements=placements).to_local()
