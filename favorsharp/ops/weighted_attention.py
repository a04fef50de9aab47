"""Softmax attention to keys with log weights: how queries read landmarks."""

from collections.abc import Callable

from favorsharp._arrays import broadcast_shapes, cast, namespace_of, on_device_of
from favorsharp._nonfinite import hide
from favorsharp._typing import Array
from favorsharp.dispatch import Op
from favorsharp.exact import log_softmax_kernel
from favorsharp.ops.partials import exact_partial, finish
from favorsharp.ops.tiles import tiles_of


@Op
def weighted_attention(
    q: Array, keys: Array, log_weight: Array, values: Array, *, scale: float, causal_from: int | None = None
) -> Array:
    """Attention of queries to weighted keys.

    Parameters
    ----------
    q : array, shape (*b, n, d)
    keys : array, shape (*b, s, d)
    log_weight : array, shape (*b, s)
        Added to the scores scale q.k; -inf for hidden keys, whose points and values may hold anything.
    values : array, shape (*b, s, e)
    scale : float
    causal_from : int, optional
        The keys from this position on belong to the queries, and each query sees those up to its own.

    Returns
    -------
    array, shape (*b, n, e)
        In the dtype of the log weights; zeros where no key is visible.
    """
    seen, dtype, root = log_weight != -namespace_of(q).inf, log_weight.dtype, scale**0.5
    x, y = cast(q, dtype) * root, hide(cast(keys, dtype), seen) * root
    batch = broadcast_shapes(q.shape[:-2], keys.shape[:-2], log_weight.shape[:-1], values.shape[:-2])
    rows = lambda start, stop: log_softmax_kernel(x[..., start:stop, :], y)  # noqa: E731
    return read_rows(rows, (*batch, q.shape[-2]), log_weight, values, causal_from)


def read_rows(
    rows: Callable[[int, int], Array],
    shape: tuple[int, ...],
    log_weight: Array,
    values: Array,
    causal_from: int | None,
) -> Array:
    """`weighted_attention` with any log kernel.

    `rows(start, stop)` computes rows of its matrix, and shape is (*b, n).
    """
    xp = namespace_of(values)
    held, dtype = values.shape[-2], log_weight.dtype
    if held == 0:
        return xp.zeros((*shape, values.shape[-1]), dtype=dtype, **on_device_of(values))
    seen = log_weight != -xp.inf
    values = hide(cast(values, dtype), seen)
    bias, seen = xp.where(seen, log_weight, 0.0)[..., None, :], seen[..., None, :]
    order = xp.arange(held, **on_device_of(values))
    tiles = []
    for start, stop in tiles_of(shape[-1], held, shape[:-1], like=values):
        visible = seen
        if causal_from is not None:
            visible = seen & (order[None, :] <= causal_from + order[start:stop, None])
        part = exact_partial(rows(start, stop) + bias, visible, values, mixed=causal_from is not None)
        tiles.append(xp.broadcast_to(finish(part), (*shape[:-1], stop - start, values.shape[-1])))
    return tiles[0] if len(tiles) == 1 else xp.concat(tiles, axis=-2)
