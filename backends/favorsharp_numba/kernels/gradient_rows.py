"""Parts that the backward kernels of attention share: their arguments, and rows of gradients and of values.

A query i reads a key j with the weight exp2(lq_i + lk_j - r_i), summed over features, where r_i is the reference of the
query. With G_i = (dout_i, -dout_i.out_i) / total_i and V_j = (v_j, 1), the gradient of that weight is G_i.V_j. So
values have a further column here: e counts it.
"""

from typing import NamedTuple

from favorsharp_numba.kernels.arguments import NO_MASK, ONE, TILE, is_hidden
from favorsharp_numba.kernels.tiles import load_points
from favorsharp_numba.vectors.compiling import inlined
from favorsharp_numba.vectors.dots import dot_rows
from favorsharp_numba.vectors.items import get, put
from favorsharp_numba.vectors.rows import fill, scale_rows


class Backward(NamedTuple):
    """What the backward kernels of attention take besides arrays, all of which are indexed by query head.

    `causal` 1: a query reads the keys up to its own. `window` > 0: `sweep` covers only blocks that are not near. `dq`,
    `dk` and `dv` are the places of the gradients, arrays without gaps. `maps`, if it is not 0, is the place of the sums
    of the map's gradients with their low parts: for each head those of the query side and of the key side, `maps_size`
    items each.
    """

    num_keys: int
    num_queries: int
    window: int
    causal: int
    with_factors: int
    query_side: int
    key_side: int
    map_of: int
    stats: int
    dq: int
    dk: int
    dv: int
    maps: int
    maps_size: int


@inlined
def load_gradients(one, s, constants, gradient, out, stats, f, start, count, rows, room):
    """Rows G of queries: (dout, -dout.out) / total. `room` has a tile of values."""
    e = s.e - 1
    zeros = constants + s.total - s.e_pad
    load_points(one, gradient, NO_MASK, f, start, count, e, s.e_pad, constants + ONE, zeros, rows)
    load_points(one, out, NO_MASK, f, start, count, e, s.e_pad, constants + ONE, zeros, room)
    dots, inverses = room, room + TILE
    dot_rows(one, rows, room, s.e_pad, count, s.e_pad, dots)
    for t in range(count):
        row, inverse = rows + t * s.e_pad, get(one, stats + 2 * (start + t))
        put(one, row + e, -get(one, dots + t))
        put(one, inverses + t, inverse)
        if inverse == 0:
            fill(one, row, s.e, one - one)
    scale_rows(one, rows, s.e_pad, count, s.e_pad, inverses)


@inlined
def load_values(one, s, constants, v, mask, f, start, count, rows):
    """Rows V of keys: (v, 1), or zeros for hidden keys."""
    e = s.e - 1
    zeros = constants + s.total - s.e_pad
    load_points(one, v, mask, f, start, count, e, s.e_pad, constants + ONE, zeros, rows)
    for t in range(count):
        put(one, rows + t * s.e_pad + e, one - one if is_hidden(mask, f, start + t) else one)
