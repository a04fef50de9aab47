"""Kernels of the backward pass of attention, and of products that are not normalised (`read_gradients`).

A query i reads a key j with weight exp2(lq_i + lk_j - r_i), r_i its reference, summed over features, or over the exact
score. With G_i = (dout_i, -dout_i.out_i) / total_i and V_j = (v_j, 1), the gradient of that weight is G_i.V_j. So one
procedure, `sweep`, serves both directions: the tiles of one side (keys with V, queries with G) are taken into sums, and
the other side reads them: its log features get the gradient weight * (sums.value), and where the readers are keys,
what they read is the gradient of v. Features are computed again, never stored.
"""

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from favorsharp_numba.kernels.attention import SMALL_RISE, query_side
from favorsharp_numba.kernels.near_scores import load_near
from favorsharp_numba.kernels.tiles import (
    ALPHA,
    BETA,
    GROUP,
    NO_MASK,
    ONE,
    TILE,
    ZERO,
    add_keys,
    ahead_of,
    get,
    integer_at,
    is_hidden,
    lanes,
    lanes_of,
    load_points,
    load_queries,
    log_factors,
    log_keys,
    log_queries,
    panel,
    put,
    raise_top,
    read_sums,
    rescale,
    rest_of_tile,
    transpose,
    zero_or_nan,
)
from favorsharp_numba.vectors.blocks import item_size
from favorsharp_numba.vectors.compiling import inlined, jit
from favorsharp_numba.vectors.primitives import (
    exp_block,
    fill_before,
    max_block,
    multiply_block,
    product,
    product_add,
    product_ahead,
    product_take,
    product_terms,
    scale_block,
)
from favorsharp_numba.vectors.products import NOTHING
from favorsharp_numba.vectors.rows import add_rows, dot_rows, fill, scale_rows, take_row, total_of

LARGEST_WEIGHT = 60
"""Log 2 of the weight that a hidden pair may have before a causal tile is cut."""


class Backward(NamedTuple):
    """What `sweep` and `near_gradients` take. All arrays are indexed by query head; gradients are contiguous places.

    `causal` 1: keys up to the query's own; `window` > 0: only blocks that are not near. `maps`, where it is not 0,
    takes the gradients of the maps' constants and their low parts, `maps_size` items in all a head and side.
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
def load_gradients(one, s, constants, gradient, out, stats, f, start, count, values, other):
    """Rows G of queries: (dout, -dout.out) / total."""
    e = s.e - 1
    zeros = constants + s.total - s.e_pad
    everything = NO_MASK
    load_points(one, gradient, everything, f, start, count, e, s.e_pad, constants + ONE, zeros, values)
    load_points(one, out, everything, f, start, count, e, s.e_pad, constants + ONE, zeros, other)
    dots, inverses = other, other + TILE
    dot_rows(one, values, other, s.e_pad, count, s.e_pad, dots)
    for t in range(count):
        row, inverse = values + t * s.e_pad, get(one, stats + 2 * (start + t))
        put(one, row + e, -get(one, dots + t))
        put(one, inverses + t, inverse)
        if inverse == 0:
            fill(one, row, s.e, one - one)
    scale_rows(one, values, s.e_pad, count, s.e_pad, inverses)


@inlined
def load_values(one, s, constants, v, mask, f, start, count, values):
    """Rows V of keys: (v, 1); zeros for hidden ones."""
    e = s.e - 1
    zeros = constants + s.total - s.e_pad
    load_points(one, v, mask, f, start, count, e, s.e_pad, constants + ONE, zeros, values)
    for t in range(count):
        put(one, values + t * s.e_pad + e, one - one if is_hidden(mask, f, start + t) else one)


@inlined
def load_side(
    one, s, p, keys, constants, x, second, out, mask, stats, f, start, count, z, dense, factors, values, other
):  # fmt: skip
    """A tile of keys (points x, values second) or of queries (points x, gradients second): z, log factors, values."""
    if keys:
        load_points(one, x, mask, f, start, count, s.d, s.d_pad, constants + ALPHA, constants + s.center, z)
        log_factors(one, s, constants, z, count, dense, factors)
        for t in range(count):
            if is_hidden(mask, f, start + t):
                put(one, factors + t, -np.inf * one)
        load_values(one, s, constants, second, mask, f, start, count, values)
    else:
        everything = NO_MASK
        load_points(one, x, everything, f, start, count, s.d, s.d_pad, constants + ALPHA, constants + s.center, z)
        if p.with_factors:
            log_factors(one, s, constants, z, count, dense, factors)
        else:
            zero_or_nan(one, s, constants, z, count, factors)
        for t in range(count):
            put(one, factors + t, get(one, factors + t) - get(one, stats + 2 * (start + t) + 1))
        load_gradients(one, s, constants, second, out, stats, f, start, count, values, other)


@jit
def sweep(
    one, s, p, keys_read, backwards, reader, reader_values, taken, taken_values, out, mask, low, high, scratch
):  # fmt: skip
    """One side reads the sums of the other, for query heads low .. high, in ascending or descending order of blocks.

    keys_read 1: keys read queries, and their gradients and those of their values are added to dk and dv; 0: queries
    read keys, and dq is added to.
    """
    p_step = s.m_pad + lanes(one)
    points = scratch
    dense = points + TILE * s.d_pad
    factors = dense + TILE * s.d_pad
    values = factors + 2 * TILE
    other = values + TILE * s.e_pad
    features = other + TILE * s.e_pad
    new_top = features + TILE * p_step
    safe_top = new_top + s.m_pad
    scales = safe_top + s.m_pad
    trash = scales + s.m_pad
    ones = trash + max(s.m_pad, TILE)
    top = ones + max(s.m_pad, max(s.e_pad, TILE))
    sums = top + s.m_pad
    lows = sums + s.m * s.e_pad
    reader_points = lows + s.m * s.e_pad
    reader_factors = reader_points + TILE * s.d_pad
    reader_rows = reader_factors + 2 * TILE
    reader_columns = reader_rows + TILE * s.e_pad
    columns = reader_columns + s.e * TILE
    weights = columns + s.d * TILE
    slopes = weights + s.m * TILE
    pairs = slopes + s.m * TILE
    products = pairs + TILE * TILE
    gradient = products + TILE * TILE
    zeros = gradient + TILE * max(s.d_pad, s.e_pad)
    extra = zeros + TILE
    fill(one, ones, max(s.m_pad, max(s.e_pad, TILE)), one)
    fill(one, zeros, TILE, one - one)
    width, lane = panel(one), lanes(one)
    num_readers = p.num_keys if keys_read else p.num_queries
    num_taken = p.num_queries if keys_read else p.num_keys
    block = p.window if p.window > 0 else TILE
    if not p.causal and p.window == 0:
        block = max(num_taken, max(num_readers, 1))
    num_blocks = (max(num_readers, num_taken) + block - 1) // block
    pairwise = p.causal and p.window == 0
    lag = 0 if p.window == 0 else 2
    for f in range(low, high):
        query_constants = p.query_side + integer_at(p.map_of + 8 * f) * s.total
        key_constants = p.key_side + integer_at(p.map_of + 8 * f) * s.total
        mine = key_constants if keys_read else query_constants
        theirs = query_constants if keys_read else key_constants
        stats = p.stats + 2 * f * p.num_queries
        fill(one, sums, 2 * s.m * s.e_pad, one - one)  # with their low parts
        fill(one, top, s.m_pad, -np.inf * one)
        for number in range(num_blocks):
            current = num_blocks - 1 - number if backwards else number
            if not pairwise:
                entering = current + lag if backwards else current - lag
                if 0 <= entering < num_blocks:
                    stop = min(num_taken, (entering + 1) * block)
                    for start in range(entering * block, stop, TILE):
                        count = min(TILE, stop - start)
                        load_side(
                            one, s, p, not keys_read, theirs, taken, taken_values, out, mask, stats, f, start, count,
                            points, dense, factors, values, other,
                        )  # fmt: skip
                        log_keys(one, s, theirs, points, count, factors, features, p_step, NOTHING)
                        if raise_top(one, s, theirs, features, p_step, count, top, new_top, safe_top) > 0:
                            rescale(one, s, top, new_top, sums, trash, lows, trash, 0, scales, ones)
                        exp_block(one, features, p_step, count, s.m_pad, theirs + ZERO, 0, safe_top, ones, 0, trash)
                        add_keys(one, s, features, p_step, values, s.e_pad, count, sums, lows, 0, NOTHING)
            begin, end = current * block, min(num_readers, (current + 1) * block)
            done, size = 0, TILE
            while done < end - begin:
                count = min(size, end - begin - done)
                start = end - done - count if backwards else begin + done
                n = rest_of_tile(count, lane)
                coming = max(0, start - TILE) if backwards else start + count
                behind = start if backwards else min(num_readers, coming + TILE)
                load_side(
                    one, s, p, keys_read, mine, reader, reader_values, out, mask, stats, f, start, count,
                    reader_points, dense, reader_factors, reader_rows, other,
                )  # fmt: skip
                transpose(one, reader_points, s.d_pad, count, s.d, columns, TILE, n)
                transpose(one, reader_rows, s.e_pad, count, s.e, reader_columns, TILE, n)
                fill(one, reader_factors + count, n - count, one - one)
                ahead = ahead_of(reader, f, coming, behind, s.d)
                log_queries(one, s, mine, columns, count, reader_factors, weights, ahead)
                if pairwise:
                    load_side(
                        one, s, p, not keys_read, theirs, taken, taken_values, out, mask, stats, f, start, count,
                        points, dense, factors, values, other,
                    )  # fmt: skip
                    log_keys(
                        one,
                        s,
                        theirs,
                        points,
                        count,
                        factors,
                        features,
                        p_step,
                        ahead_of(taken, f, coming, behind, s.d),
                    )
                    rise = raise_top(one, s, theirs, features, p_step, count, top, new_top, safe_top)
                    if count > 1:
                        fill(one, gradient, n, -np.inf * one)
                        max_block(one, weights, TILE, s.m, n, new_top, 1, gradient, gradient)
                        for t in range(count):
                            rise = max(rise, get(one, gradient + t) - (LARGEST_WEIGHT - SMALL_RISE))
                        if rise > SMALL_RISE:
                            size = max(1, count // 4)
                            continue
                    rescale(one, s, top, new_top, sums, trash, lows, trash, 0, scales, ones)
                    exp_block(one, features, p_step, count, s.m_pad, theirs + ZERO, 0, safe_top, ones, 0, trash)
                exp_block(one, weights, TILE, s.m, n, top, 1, zeros, theirs + ZERO, 0, trash)
                product(one, s.m, n, s.e, sums, s.e_pad, 1, reader_columns, width, TILE, slopes, TILE)
                if pairwise:
                    product_pairs(one, count, n, s.e, values, s.e_pad, reader_columns, products, keys_read)
                    for t in range(0, n, GROUP):
                        part = min(GROUP, n - t)
                        low_row, high_row = (t, count) if keys_read else (0, min(count, t + part))
                        product_add(
                            one, s.m, part, max(0, high_row - low_row), features + low_row * p_step, 1, p_step,
                            products + low_row * TILE + t, width, TILE, slopes + t, TILE,
                        )  # fmt: skip
                if keys_read:
                    e_own = rest_of_tile(s.e - 1, lane)  # the value 1 has no gradient
                    product(one, count, e_own, s.m, weights, 1, TILE, sums, width, s.e_pad, gradient, s.e_pad)
                    if pairwise:
                        product_pairs(one, count, n, s.m, features, p_step, weights, pairs, keys_read)
                        for t in range(0, count, 6):
                            part = min(6, count - t)
                            product_add(
                                one, part, e_own, count - t, pairs + t * TILE + t, 1, TILE, values + t * s.e_pad,
                                width, s.e_pad, gradient + t * s.e_pad, s.e_pad,
                            )  # fmt: skip
                    target = p.dv + (f * num_readers + start) * (s.e - 1)
                    add_rows(one, target, s.e - 1, gradient, s.e_pad, count, one)
                fill(one, zeros, n, one - one)
                multiply_block(one, slopes, TILE, s.m, n, weights, zeros)
                add_point_gradients(
                    one, s, mine, reader_points, dense, slopes, zeros, count, keys_read or p.with_factors, gradient,
                    extra, (p.dk if keys_read else p.dq) + (f * num_readers + start) * s.d,
                    p.maps + (2 * f + keys_read) * p.maps_size if p.maps else 0,
                    ahead_of(reader_values, f, coming, behind, s.e - 1),
                )  # fmt: skip
                fill(one, zeros, TILE, one - one)
                if pairwise:
                    ahead = ahead_of(taken_values, f, coming, behind, s.e - 1)
                    add_keys(one, s, features, p_step, values, s.e_pad, count, sums, lows, 0, ahead)
                done += count
                size = TILE if size == TILE or done % TILE == 0 else size


@inlined
def product_pairs(one, count, n, k, taken, step, columns, pairs, keys_read):
    """pairs[taken, reader], products over k; 0 where the key comes after the query."""
    for j in range(0, count, GROUP):
        size = min(GROUP, count - j)
        left, right = (0, min(n, j + GROUP)) if keys_read else (j, n)
        product(
            one, size, right - left, k, taken + j * step, step, 1, columns + left, panel(one), TILE,
            pairs + j * TILE + left, TILE,
        )  # fmt: skip
        if not keys_read:
            fill_before(one, pairs + j * TILE, TILE, size, n, j, one - one)
        for i in range(j, j + size if keys_read else j):
            fill(one, pairs + i * TILE + i + 1, n - i - 1, one - one)


@inlined
def add_point_gradients(
    one, s, constants, z, dense, slopes, factor_slopes, count, with_factors, gradient, extra, target, maps, ahead
):  # fmt: skip
    """Take the gradients of log features, `slopes`, and their sums to a tile of points at `target`, and to maps."""
    width = panel(one)
    product_ahead(
        one, count, s.d_pad, s.m, slopes, 1, TILE, constants + s.rows, width, s.d_pad, gradient, s.d_pad, ahead
    )
    if with_factors:
        add_factor_gradients(one, s, constants, z, dense, factor_slopes, count, gradient, extra)
    scale = one * np.log(2.0) * get(one, constants + ALPHA)
    add_rows(one, target, s.d, gradient, s.d_pad, count, one * scale)
    if maps:
        add_map_gradients(one, s, slopes, z, factor_slopes, count, maps, extra, with_factors)


@inlined
def add_factor_gradients(one, s, constants, z, dense, slopes, count, gradient, extra):
    """Add slope * (linear - 2 beta z - 2 dense^T dense z), the gradient through the log factor, to rows."""
    width = panel(one)
    # a single column and row: their steps are of no account, and are those of other calls
    product_add(one, count, s.d_pad, 1, slopes, 1, TILE, constants + s.linear, width, s.d_pad, gradient, s.d_pad)
    fill(one, extra, s.d_pad, one)
    scale_block(one, z, s.d_pad, count, s.d_pad, slopes, extra, dense, s.d_pad)
    add_rows(one, gradient, s.d_pad, dense, s.d_pad, count, -2 * get(one, constants + BETA))
    if s.has_dense:
        product(one, count, s.d_pad, s.d, z, s.d_pad, 1, constants + s.dense, s.d * width, width, dense, s.d_pad)
        for t in range(count):
            for j in range(s.d):
                place = dense + t * s.d_pad + j
                put(one, place, -2 * get(one, slopes + t) * get(one, place))
        product_add(
            one, count, s.d_pad, s.d, dense, s.d_pad, 1, constants + s.dense_back, s.d * width, width, gradient,
            s.d_pad,
        )  # fmt: skip


@inlined
def add_map_gradients(one, s, slopes, z, factor_slopes, count, maps, weighted, with_factors):
    """Add sums of slopes: times z (m, d_pad), alone (m_pad); of factor slopes: alone, times z, times z z^T.

    Their low parts lie behind them.
    """
    width = panel(one)
    lows = maps + map_sums_size(s)
    product_take(one, s.m, s.d_pad, count, slopes, TILE, 1, z, width, s.d_pad, maps, s.d_pad, lows, NOTHING)
    column = s.m * s.d_pad
    for i in range(s.m):
        put(one, weighted, total_of(one, slopes + i * TILE, count))
        take_row(one, 1, weighted, maps + column + i, lows + column + i)
    if with_factors:
        first = column + s.m_pad
        second = first + s.d_pad
        alone = second + s.d * s.d_pad
        sums = weighted + TILE * s.d_pad
        fill(one, sums, s.d_pad, one - one)
        for t in range(count):
            slope = get(one, factor_slopes + t)
            for j in range(s.d_pad):
                value = slope * get(one, z + t * s.d_pad + j)
                put(one, weighted + t * s.d_pad + j, value)
                put(one, sums + j, get(one, sums + j) + value)
        take_row(one, s.d_pad, sums, maps + first, lows + first)
        product_take(
            one, s.d, s.d_pad, count, weighted, 1, s.d_pad, z, width, s.d_pad, maps + second, s.d_pad, lows + second,
            NOTHING,
        )  # fmt: skip
        put(one, sums, total_of(one, factor_slopes, count))
        take_row(one, 1, sums, maps + alone, lows + alone)


@register_jitable
def map_sums_size(s):
    """Items that `add_map_gradients` adds to; as many low parts lie behind them."""
    return s.m * s.d_pad + s.m_pad + s.d_pad + s.d * s.d_pad + 8


def sweep_scratch(one, s):
    """Items of scratch that `sweep` needs."""
    p_step = s.m_pad + lanes_of(one)
    wide = max(s.m_pad, max(s.e_pad, TILE))
    taken = TILE * (2 * s.d_pad + 2 + 2 * s.e_pad + p_step) + 3 * s.m_pad + 2 * wide + s.m_pad + 2 * s.m * s.e_pad
    reader = (
        TILE * (s.d_pad + 2 + s.e_pad + s.e + s.d + 2 * s.m + 2 * TILE + 1 + max(s.d_pad, s.e_pad) + s.d_pad) + s.d_pad
    )
    return taken + reader


@jit
def near_gradients(one, s, p, q, k, v, gradient, out, mask, low, high, scratch):
    """Gradients through the exactly scored keys, for query heads low .. high."""
    queries = scratch
    norms = queries + TILE * s.d_pad
    columns = norms + TILE
    slopes = columns + s.d * TILE
    slope_columns = slopes + TILE * s.e_pad
    other = slope_columns + s.e * TILE
    keys = other + TILE * s.e_pad
    key_norms = keys + TILE * s.d_pad
    values = key_norms + TILE
    scores = values + TILE * s.e_pad
    products = scores + TILE * TILE
    query_rows = products + TILE * TILE
    key_rows = query_rows + TILE * s.d_pad
    value_rows = key_rows + TILE * s.d_pad
    totals = value_rows + TILE * s.e_pad
    references = totals + TILE
    sums = references + TILE
    width = panel(one)
    w, length = p.window, p.num_keys
    natural = one * np.log(2.0)
    for f in range(low, high):
        query_constants = p.query_side + integer_at(p.map_of + 8 * f) * s.total
        key_constants = p.key_side + integer_at(p.map_of + 8 * f) * s.total
        stats = p.stats + 2 * f * p.num_queries
        root = get(one, query_constants + ALPHA)
        for piece in range((length + w - 1) // w * ((w + TILE - 1) // TILE)):
            block = piece // ((w + TILE - 1) // TILE)
            first = block * w + piece % ((w + TILE - 1) // TILE) * TILE
            count = min(TILE, min(length, (block + 1) * w) - first)
            if count <= 0:
                continue
            n = rest_of_tile(count, lanes(one))
            load_near(one, s, query_constants, q, NO_MASK, f, first, count, True, queries, norms)
            transpose(one, queries, s.d_pad, count, s.d, columns, TILE, n)
            fill(one, norms + count, n - count, one - one)
            load_gradients(one, s, query_constants, gradient, out, stats, f, first, count, slopes, other)
            transpose(one, slopes, s.e_pad, count, s.e, slope_columns, TILE, n)
            for t in range(n):
                put(one, references + t, get(one, stats + 2 * (first + t) + 1) if t < count else one - one)
            fill(one, query_rows, TILE * s.d_pad, one - one)
            fill(one, sums, n, one - one)
            last = first + count if p.causal else min(length, (block + 2) * w)
            for start in range(max(0, (block - 1) * w), last, TILE):
                size = min(TILE, last - start)
                load_near(one, s, key_constants, k, mask, f, start, size, False, keys, key_norms)
                load_values(one, s, key_constants, v, mask, f, start, size, values)
                product_terms(one, size, n, s.d, keys, s.d_pad, 1, columns, width, TILE, scores, TILE, key_norms, norms)
                for j in range(size):
                    if is_hidden(mask, f, start + j):
                        fill(one, scores + j * TILE, n, -np.inf * one)
                    elif p.causal and start + j > first:
                        fill(one, scores + j * TILE, min(start + j - first, n), -np.inf * one)
                exp_block(
                    one, scores, TILE, size, n, key_constants + ZERO, 0, references, key_constants + ZERO, 0, totals
                )
                product(one, size, s.e_pad, count, scores, TILE, 1, slopes, width, s.e_pad, value_rows, s.e_pad)
                add_rows(one, p.dv + (f * length + start) * (s.e - 1), s.e - 1, value_rows, s.e_pad, size, one)
                product(one, size, n, s.e, values, s.e_pad, 1, slope_columns, width, TILE, products, TILE)
                multiply_block(one, products, TILE, size, n, scores, sums)
                product_add(one, count, s.d_pad, size, products, 1, TILE, keys, width, s.d_pad, query_rows, s.d_pad)
                product(one, size, s.d_pad, count, products, TILE, 1, queries, width, s.d_pad, key_rows, s.d_pad)
                target = p.dk + (f * length + start) * s.d
                add_rows(one, target, s.d, key_rows, s.d_pad, size, root * natural)  # queries were scaled to base 2
                if s.gaussian:
                    for j in range(size):
                        put(one, key_norms + j, -total_of(one, products + j * TILE, count))
                    scale_rows(one, keys, s.d_pad, size, s.d_pad, key_norms)
                    add_rows(one, target, s.d, keys, s.d_pad, size, root)
            if s.gaussian:
                scale_rows(one, queries, s.d_pad, count, s.d_pad, sums)
                add_rows(one, query_rows, s.d_pad, queries, s.d_pad, count, -natural)
            add_rows(one, p.dq + (f * length + first) * s.d, s.d, query_rows, s.d_pad, count, root)


def near_gradients_scratch(s):
    """Items of scratch that `near_gradients` needs."""
    return TILE * (4 * s.d_pad + s.d + s.e + 5 + 4 * s.e_pad + 2 * TILE)


@jit
def read_gradients(one, s, p, readers, values, of_points, of_values, maps, maps_size, per_head, low, high, scratch):
    """Readers' gradients of sums that are not normalised; task = head * per_head + a share of its readers.

    A reader i with values g_i and weights w_i = exp2(lq_i + top) reads sums kv: its log features get w_i (kv.g_i), and,
    where `of_values` is not 0, its values get w_i kv. Powers of 2 are split between weights and values, halves of what
    would be a reference: either may leave the range where the product does not. `maps`, where it is not 0, has
    `maps_size` items for each task.
    """
    points = scratch
    dense = points + TILE * s.d_pad
    factors = dense + TILE * s.d_pad
    columns = factors + 2 * TILE
    weights = columns + s.d * TILE
    slopes = weights + s.m * TILE
    rows = slopes + s.m * TILE
    value_columns = rows + TILE * s.e_pad
    shifts = value_columns + s.e * TILE
    scales = shifts + TILE
    totals = scales + TILE
    gradient = totals + TILE
    extra = gradient + TILE * max(s.d_pad, s.e_pad)
    width = panel(one)
    largest = 126 if item_size(one) == 4 else 1022
    row, step = (1, s.m_pad) if p.transposed else (s.e_pad, 1)
    for task in range(low, high):
        head, share = task // per_head, task % per_head
        key_head = integer_at(p.key_head_of + 8 * head)
        side, kv = query_side(s, p, key_head), p.sums + key_head * p.segments * p.sums_size
        top = kv + p.kv_size + s.m_pad
        stop = p.num_queries * (share + 1) // per_head
        for start in range(p.num_queries * share // per_head, stop, TILE):
            count = min(TILE, stop - start)
            n = rest_of_tile(count, lanes(one))
            after = min(stop, start + count + TILE)
            load_queries(one, s, side, readers, head, start, count, True, points, dense, factors, columns)
            log_queries(
                one, s, side, columns, count, factors, weights, ahead_of(readers, head, start + count, after, s.d)
            )
            fill(one, shifts, n, -np.inf * one)
            max_block(one, weights, TILE, s.m, n, top, 1, shifts, shifts)
            for t in range(n):
                reference = get(one, shifts + t)
                shift = max(reference / 2, reference - largest) if reference > -np.inf else 0
                put(one, shifts + t, one * shift)
                put(one, scales + t, one * np.exp2(shift))
            fill(one, totals, n, one - one)
            exp_block(one, weights, TILE, s.m, n, top, 1, shifts, side + ZERO, 0, totals)
            load_points(
                one, values, NO_MASK, head, start, count, s.e, s.e_pad, side + ONE, side + s.total - s.e_pad, rows
            )
            scale_rows(one, rows, s.e_pad, count, s.e_pad, scales)
            transpose(one, rows, s.e_pad, count, s.e, value_columns, TILE, n)
            product(one, s.m, n, s.e, kv, row, step, value_columns, width, TILE, slopes, TILE)
            if of_values:
                read_sums(one, s, weights, count, kv, p.transposed, gradient, value_columns, NOTHING)
                scale_rows(one, gradient, s.e_pad, count, s.e_pad, scales)
                add_rows(one, of_values + (head * p.num_queries + start) * s.e, s.e, gradient, s.e_pad, count, one)
            fill(one, totals, n, one - one)
            multiply_block(one, slopes, TILE, s.m, n, weights, totals)
            add_point_gradients(
                one, s, side, points, dense, slopes, totals, count, True, gradient, extra,
                of_points + (head * p.num_queries + start) * s.d, maps + task * maps_size if maps else 0,
                ahead_of(values, head, start + count, after, s.e),
            )  # fmt: skip


def read_gradients_scratch(s):
    """Items of scratch that `read_gradients` needs."""
    return TILE * (3 * s.d_pad + s.d + 2 * s.m + s.e_pad + s.e + 5 + max(s.d_pad, s.e_pad)) + s.d_pad
