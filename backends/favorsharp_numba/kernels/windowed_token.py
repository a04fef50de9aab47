"""The kernel of a token with a window: its key joins the recent keys, and its query reads these and the sums.

Recent keys are scored exactly, and the sums are read by features. All rows are read in vectors along their coordinates:
tiles of queries (`attention.py`) would fill a vector with one query.
"""

from collections import namedtuple

import numpy as np

from favorsharp_numba.kernels.arguments import ALPHA, NO_MASK, ONE, TILE, ZERO, Mask, is_hidden
from favorsharp_numba.kernels.decode_step import MAPS, POINTS, POINTS_SIZE, points_at, sizes_at
from favorsharp_numba.kernels.near_scores import load_near
from favorsharp_numba.kernels.sums import Sums
from favorsharp_numba.kernels.tiles import load_points, log_factors, log_keys, rest_of_tile, store_points
from favorsharp_numba.kernels.workspace import kernel
from favorsharp_numba.vectors.blocks import exp_block, scale_block, sum_block
from favorsharp_numba.vectors.compiling import inlined
from favorsharp_numba.vectors.dots import total_of
from favorsharp_numba.vectors.items import get, integer_at, lanes, put
from favorsharp_numba.vectors.picks import first_largest
from favorsharp_numba.vectors.products import NOTHING
from favorsharp_numba.vectors.rows import add_rows, combine, fill
from favorsharp_numba.vectors.tokens import mix_rows, row_dots

# A plan is that of `decode_step` with two more arrays, the keys and the values of a store; then follow the number of
# queries that read each head, the number of keys for which a store has room, and the address of the offsets of masks.
QUERIES = POINTS + 6 * POINTS_SIZE
ROOM, OFFSETS = QUERIES + 1, QUERIES + 2
PLAN_SIZE = OFFSETS + 1

NearTokenSpace = namedtuple(
    "NearTokenSpace", "points dense factors query near norms rows scores zeros ignored ones numerator total end"
)


@inlined
def near_token_space(sizes, points):
    """The parts of the workspace of `near_turn`; `sizes` are `Sizes`, and the room for keys in whole vectors."""
    s, room = sizes
    wide = max(max(s.m_pad, room), max(s.d_pad, s.e_pad))
    dense = points + s.d_pad
    factors = dense + s.d_pad
    query = factors + 2 * TILE
    near = query + s.m_pad
    norms = near + s.d_pad
    rows = norms + 2 * TILE
    scores = rows + TILE * max(s.d_pad, s.e_pad)
    zeros = scores + room
    ignored = zeros + wide
    ones = ignored + wide
    numerator = ones + wide
    total = numerator + s.e_pad
    end = total + TILE
    return NearTokenSpace(
        points, dense, factors, query, near, norms, rows, scores, zeros, ignored, ones, numerator, total, end
    )  # fmt: skip


@kernel(near_token_space)
def near_turn(one, plan, q, k, v, out, sums, keys, values, visible, held, low, high, scratch):
    """One token for heads low .. high: a key, a value, and one query or several.

    `plan` is the address of a plan; q, k, v, out, and the `keys` and `values` of the store are addresses. `held` rows
    of the store are in use. `visible` is the address of their mask, or 0. `sums` is the place of the sums as in
    `Problem`, for all heads.
    """
    s, room = sizes_at(plan), integer_at(plan + 8 * ROOM)
    w = near_token_space((s, rest_of_tile(room, lanes(one))), scratch)
    wide = w.ignored - w.zeros
    fill(one, w.zeros, wide, one - one)
    fill(one, w.ignored, wide, one - one)
    fill(one, w.ones, wide, one)
    queries_from, keys_from, values_from = points_at(plan, 0, q), points_at(plan, 1, k), points_at(plan, 2, v)
    near_keys, near_values = points_at(plan, 4, keys), points_at(plan, 5, values)
    mask = Mask(visible, integer_at(plan + 8 * OFFSETS) if visible != 0 else 0, 1)
    size = s.m * s.e_pad
    for head in range(low, high):
        number = integer_at(integer_at(plan + 8 * (MAPS + 2)) + 8 * head)
        query_side = integer_at(plan + 8 * MAPS) + number * s.total
        side = integer_at(plan + 8 * (MAPS + 1)) + number * s.total
        copy_row(one, side, w.zeros, keys_from, near_keys, head, held, s.d, s.d_pad, w)
        copy_row(one, side, w.zeros, values_from, near_values, head, held, s.e, s.e_pad, w)
        kv = sums + head * (size + 2 * s.m_pad)
        own = Sums(kv, kv + size, kv + size + s.m_pad, 0, 0)
        for row in range(integer_at(plan + 8 * QUERIES)):
            reference = score_far(one, s, query_side, queries_from, head, row, own, w)
            near = score_recent(
                one, s, query_side, side, queries_from, head, row, near_keys, mask, held + 1, w
            )  # fmt: skip
            if not near <= reference:
                reference = near
            put(one, w.total, one - one - reference if reference > -np.inf * one else one - one)
            mix(one, s, side, head, near_values, mask, held + 1, own, w)
            store_points(one, points_at(plan, 3, out), head, row, 1, s.e, s.e_pad, w.ones, w.numerator)


@inlined
def copy_row(one, side, zeros, source, target, head, row, size, pad, w):
    """Copy the point of a head to a row of another array of the same dtype."""
    load_points(one, source, NO_MASK, head, 0, 1, size, pad, side + ONE, zeros, w.rows)
    store_points(one, target, head, row, 1, size, pad, w.ones, w.rows)


@inlined
def score_far(one, s, side, q, head, row, sums, w):
    """The logarithms of the weights with which a query reads the sums, to base 2. Return the largest one."""
    load_points(one, q, NO_MASK, head, row, 1, s.d, s.d_pad, side + ALPHA, side + s.center, w.points)
    log_factors(one, s, side, w.points, 1, w.dense, w.factors)
    log_keys(one, s, side, w.points, 1, w.factors, w.query, s.m_pad, NOTHING)
    add_rows(one, w.query, s.m_pad, sums.top, 0, 1, one)
    return get(one, w.query + first_largest(one, s.m_pad, w.query))


@inlined
def score_recent(one, s, side, key_side, q, head, row, keys, mask, count, w):
    """The exact scores of `count` recent keys, to base 2; -inf for hidden ones. Return the largest one."""
    load_near(one, s, side, q, NO_MASK, head, row, 1, True, w.near, w.norms)
    own = get(one, w.norms)
    for start in range(0, count, TILE):
        size = min(TILE, count - start)
        load_near(one, s, key_side, keys, mask, head, start, size, False, w.rows, w.norms)
        row_dots(one, w.rows, s.d_pad, size, s.d_pad, w.near, w.scores + start)
        combine(one, size, own, one, w.scores + start, one, w.norms, w.scores + start)
        for i in range(size if mask.offsets != 0 else 0):
            if is_hidden(mask, head, start + i):
                put(one, w.scores + start + i, -np.inf * one)
    pad = rest_of_tile(count, lanes(one))
    fill(one, w.scores + count, pad - count, -np.inf * one)
    return get(one, w.scores + first_largest(one, pad, w.scores))


@inlined
def mix(one, s, side, head, values, mask, count, sums, w):
    """Compute the numerator of a query; `total` holds minus the reference of its scores.

    The weights are divided by their total first, so that no product is larger than a value or a sum.
    """
    pad = rest_of_tile(count, lanes(one))
    exp_block(one, w.query, 0, 1, s.m_pad, w.total, 0, w.zeros, side + ZERO, 0, w.ignored)
    exp_block(one, w.scores, 0, 1, pad, w.total, 0, w.zeros, side + ZERO, 0, w.ignored)
    row_dots(one, sums.z, s.m_pad, 1, s.m_pad, w.query, w.total)
    total = get(one, w.total) + total_of(one, w.scores, count)
    put(one, w.total, one / total if total != 0 else total)
    scale_block(one, w.query, s.m_pad, 1, s.m_pad, w.total, w.ones, w.query, s.m_pad)
    scale_block(one, w.scores, pad, 1, pad, w.total, w.ones, w.scores, pad)
    mix_rows(one, sums.kv, s.m, s.e_pad, w.query, w.numerator)
    for start in range(0, count, TILE):
        size = min(TILE, count - start)
        load_points(one, values, mask, head, start, size, s.e, s.e_pad, side + ONE, w.zeros, w.rows)
        sum_block(one, w.rows, s.e_pad, size, s.e_pad, w.scores + start, 1, w.numerator)
