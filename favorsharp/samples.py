"""Prepares the points from which maps are made: pools axes and grouped heads, draws a sample, and finds centres."""

from typing import Any

from favorsharp._arrays import broadcast_shapes, cast, from_host, namespace_of, on_device_of
from favorsharp._typing import Array
from favorsharp.moments import averaged_axes, pool_heads

SAMPLE = 1024
"""The largest number of points in a sample."""


def pooled(x: Array, mask: Array | None, axis: int | tuple[int, ...], group: int) -> tuple[Array, Array]:
    """Points with all averaged axes and grouped heads moved into the point axis, and a mask of those that count."""
    xp = namespace_of(x)
    seen = xp.ones(x.shape[:-1], dtype=xp.bool, **on_device_of(x)) if mask is None else mask
    shape = broadcast_shapes(seen.shape, x.shape[:-1])
    x, seen = xp.broadcast_to(x, (*shape, x.shape[-1])), xp.broadcast_to(seen, shape)[..., None]
    if group > 1:
        x, seen = pool_heads(x, group), pool_heads(seen, group)
    lead = x.ndim - 2
    over = [a + x.ndim for a in averaged_axes(axis, x.ndim)]
    order = (*(i for i in range(lead) if i not in over), *over, lead, lead + 1)
    kept = tuple(1 if i in over else x.shape[i] for i in range(lead))
    count = x.shape[-2]
    for i in over:
        count *= x.shape[i]
    x, seen = (xp.reshape(xp.permute_dims(a, order), (*kept, count, a.shape[-1])) for a in (x, seen))
    return x, seen[..., 0]


def sampled(x: Array, seen: Array, rng: Any, most: int = SAMPLE) -> tuple[Array, Array]:
    """Up to `most` of the points that count, one from each of as many strata, and a mask of the filled entries.

    No point is taken twice. The strata begin at a random point, so that all points have the same chance.
    """
    xp = namespace_of(x)
    slots = min(most, x.shape[-2])
    count = xp.sum(cast(seen, x.dtype), axis=-1, keepdims=True)
    offset = from_host(rng.random(most)[:slots], x)
    slot = xp.arange(slots, dtype=x.dtype, **on_device_of(x))
    width = xp.maximum(count / slots, xp.ones_like(count))
    start, stop = xp.floor(slot * width), xp.floor((slot + 1) * width)
    rank = start + xp.floor(offset * (stop - start))
    rank = rank + xp.where(count > slots, xp.floor(offset[:1] * count), xp.zeros_like(count))
    rank = rank - count * xp.floor(rank / xp.maximum(count, xp.ones_like(count)))
    order = xp.argsort(cast(~seen, xp.int8), axis=-1, stable=True)
    place = cast(xp.minimum(rank, xp.zeros_like(rank) + (x.shape[-2] - 1)), order.dtype)
    index = xp.take_along_axis(order, place, axis=-1)
    return xp.take_along_axis(x, index[..., None], axis=-2), slot < count


def k_means(x: Array, seen: Array, centres: Array, used: Array, steps: int) -> Array:
    """Centres (*b, m, d) after steps of k-means on the points that count; a centre without points stays.

    `used` (*b, 1, m) says which centres get points.
    """
    xp = namespace_of(x)
    slot = xp.arange(centres.shape[-2], **on_device_of(x))
    for _ in range(steps):
        halves = 0.5 * xp.matrix_transpose(xp.sum(centres * centres, axis=-1, keepdims=True))
        scores = x @ xp.matrix_transpose(centres) + xp.where(used, -halves, -xp.inf)
        own = xp.argmax(scores, axis=-1, keepdims=True) == slot
        shares = xp.matrix_transpose(cast(own & seen[..., None], x.dtype))
        counts = xp.sum(shares, axis=-1, keepdims=True)
        centres = xp.where(counts > 0, shares @ x / xp.where(counts > 0, counts, 1.0), centres)
    return centres
