"""Matrix products, in vector instructions: the inner loops in which kernels spend most of their time.

A product is computed by register tiles: some rows by some vectors of the result, whose sums stay in registers. The
right factor B is stored in *panels* of VECTORS vectors of columns. Places and strides are as in `vectors/blocks.py`.
"""

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.emitter import CACHE_LINE, I64, LOG2E, VECTORS, Emitter, function_in, prefetch

SET, ADD, TERMS, TAKE = 0, 1, 2, 3
"""How a product begins: SET at 0; ADD at the result so far; TERMS at row[i] + column[j]; TAKE at 0, and then the result
takes the product with its low parts, which are at the place `row`, in rows like those of the result."""
STORE, EXP, STREAM, SUMS, SUM, NEAREST, POWER, POWER_STREAM, NATURAL_STREAM = range(9)
"""What is done with a product: STORE it; EXP, store its exponential; STREAM, store that past the caches; SUMS, add up
the powers of two with two weights and store nothing (`ColumnSums`); SUM, the same with the second weight alone;
NEAREST, find the largest entry of each column and its row, and store nothing else; POWER, store the powers of two;
POWER_STREAM, store these past the caches; NATURAL_STREAM, store log(2) times the product past the caches."""
PAST_CACHES = (STREAM, POWER_STREAM, NATURAL_STREAM)


class Ahead(NamedTuple):
    """What is prefetched while a product runs: rows of `size` bytes, `step` bytes apart, from an address on.

    Each register tile prefetches a few cache lines: a processor drops requests that come faster than its memory answers
    (docs/design/memory-ahead.md).
    """

    address: int
    step: int
    rows: int
    size: int


NOTHING = Ahead(0, 0, 0, 0)


class ColumnSums(NamedTuple):
    """Where `product_sums` finds the weights of the rows of its result C, and where it puts sums down the columns.

    `weight` and `other` are the places of two weights for each row, with their strides. `total` and `other_total`
    receive the sums of weight * 2**C, and `largest` the largest C of each column.
    """

    weight: int
    weight_step: int
    other: int
    other_step: int
    total: int
    other_total: int
    largest: int


NO_SUMS = ColumnSums(0, 0, 0, 0, 0, 0, 0)


@intrinsic(prefer_literal=True)
def _product(
    context, one, start, finish, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead, sums
):
    """C (m, n) from A (m, k) and B (k, n), by register tiles of 6, 4, 2 or 1 rows and several vectors, or 8 rows and
    one.

    The panels of B are `b_panel` items apart, and the rows of a panel `b_step` items. The other strides are those of
    A's and C's rows and of A's columns.
    """
    start_at, finish_by = start.literal_value, finish.literal_value

    def emit(context, builder, signature, args):
        m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead, sums = args[3:]
        address, ahead_step, ahead_rows, ahead_size = cgutils.unpack_tuple(builder, ahead)
        weight, weight_step, other, other_step, total, other_total, largest = cgutils.unpack_tuple(builder, sums)
        e = Emitter(builder, signature.args[0])
        # the compiler would copy the function for calls that share a constant
        builder.function.attributes.add("noduplicate")
        number = lambda value: ir.Constant(I64, value)  # noqa: E731

        def bring(top, bottom, j):
            """Prefetch the share of the rows top .. bottom of the result, in its first columns."""
            some = builder.icmp_signed(">", ahead_rows, number(0))
            with builder.if_then(builder.and_(some, builder.icmp_signed("==", j, number(0)))):
                low, high = (builder.udiv(builder.mul(x, ahead_rows), m) for x in (top, bottom))
                builder.call(_bring(builder.module), [address, ahead_step, low, high, ahead_size])

        def add_up(found, i, j):
            """Add a register tile of logarithms to the sums, and to the maxima, of its columns."""
            sides = [(weight, weight_step), (other, other_step)]
            places = [e.pointer(builder.add(x, j)) for x in (total, other_total)]
            if finish_by == SUM:
                sides, places = sides[1:], places[1:]
            tops = e.pointer(builder.add(largest, j))
            factors = [
                [
                    e.broadcast(e.pointer(builder.add(x, builder.mul(builder.add(i, number(r)), step))))
                    for x, step in sides
                ]
                for r in range(len(found))
            ]
            for v in range(len(found[0])):
                top, *added = (e.load(e.at(place, v * e.lanes)) for place in (tops, *places))
                for line, own in zip(found, factors, strict=True):
                    value = e.get(line[v])
                    top = e.larger(top, value)
                    power = e.exp2(value)
                    added = [e.multiply_add(power, x, y) for x, y in zip(own, added, strict=True)]
                for value, place in zip((top, *added), (tops, *places), strict=True):
                    e.store(value, e.at(place, v * e.lanes))

        def keep_nearest(found, i, j):
            """Compare a register tile with the largest entries of its columns so far, `largest`, in rows `total`."""
            bests, owners = (e.pointer(builder.add(x, j)) for x in (largest, total))
            first = builder.sitofp(i, e.scalar)
            owner_of = [e.filled(builder.fadd(first, ir.Constant(e.scalar, float(r)))) for r in range(len(found))]
            for v in range(len(found[0])):
                best, owner = (e.load(e.at(place, v * e.lanes)) for place in (bests, owners))
                for line, own in zip(found, owner_of, strict=True):
                    value = e.get(line[v])
                    closer = builder.fcmp_ordered(">", value, best)
                    best, owner = builder.select(closer, value, best), builder.select(closer, own, owner)
                e.store(best, e.at(bests, v * e.lanes))
                e.store(owner, e.at(owners, v * e.lanes))

        def tile(rows, vectors, i, j):
            bring(i, builder.add(i, number(rows)), j)  # first: for a call, vectors in registers would be stored
            panel = builder.mul(builder.udiv(j, number(VECTORS * e.lanes)), b_panel)
            inside = builder.urem(j, number(VECTORS * e.lanes))
            right = e.pointer(builder.add(b, builder.add(panel, inside)))
            left = e.pointer(builder.add(a, builder.mul(i, a_row)))
            result = e.pointer(builder.add(c, builder.add(builder.mul(i, c_row), j)))
            left_rows = [builder.mul(number(r), a_row) for r in range(rows)]
            result_rows = [e.at(result, builder.mul(number(r), c_row)) for r in range(rows)]
            if start_at == TERMS:
                row_terms, column_terms = e.pointer(builder.add(row, i)), e.pointer(builder.add(column, j))
                columns = [e.load(e.at(column_terms, v * e.lanes)) for v in range(vectors)]
            found = []
            for r in range(rows):
                if start_at == TERMS:
                    term = e.broadcast(e.at(row_terms, r))
                    first = [builder.fadd(term, x) for x in columns]
                elif start_at == ADD:
                    first = [e.load(e.at(result_rows[r], v * e.lanes)) for v in range(vectors)]
                else:
                    first = [e.constant(0.0)] * vectors
                found.append([e.accumulator(x) for x in first])
            with cgutils.for_range(builder, k) as loop:
                line = e.at(right, builder.mul(loop.index, b_step))
                entry = e.at(left, builder.mul(loop.index, a_step))
                factors = [e.load(e.at(line, v * e.lanes)) for v in range(vectors)]
                for r in range(rows):
                    factor = e.broadcast(e.at(entry, left_rows[r]))
                    for v in range(vectors):
                        builder.store(e.multiply_add(factor, factors[v], e.get(found[r][v])), found[r][v])
            if finish_by in (SUMS, SUM):
                add_up(found, i, j)
                return
            if finish_by == NEAREST:
                keep_nearest(found, i, j)
                return
            if start_at == TAKE:
                lows = e.pointer(builder.add(row, builder.add(builder.mul(i, c_row), j)))
                low_rows = [e.at(lows, builder.mul(number(r), c_row)) for r in range(rows)]
            for r in range(rows):
                for v in range(vectors):
                    value = e.get(found[r][v])
                    if start_at == TAKE:
                        place, low_place = (e.at(x[r], v * e.lanes) for x in (result_rows, low_rows))
                        value, low = e.add_with_low(e.load(place), e.load(low_place), value)
                        e.store(low, low_place)
                    if finish_by in (EXP, STREAM):
                        value = builder.fmul(value, e.constant(LOG2E))
                    elif finish_by == NATURAL_STREAM:
                        value = builder.fmul(value, e.constant(1 / LOG2E))
                    if finish_by not in (STORE, NATURAL_STREAM):
                        value = e.exp2(value, above=True)
                    e.store(value, e.at(result_rows[r], v * e.lanes), stream=finish_by in PAST_CACHES)

        left_column = number(0)
        for vectors in dict.fromkeys((VECTORS, VECTORS // 2, 1)):
            width = number(vectors * e.lanes)
            right_column = builder.add(
                left_column, builder.mul(builder.udiv(builder.sub(n, left_column), width), width)
            )
            with cgutils.for_range_slice(builder, left_column, right_column, width) as (j, _):
                top = number(0)
                for rows in (6 if vectors > 1 else 8, 4, 2, 1):
                    height = number(rows)
                    bottom = builder.add(top, builder.mul(builder.udiv(builder.sub(m, top), height), height))
                    with cgutils.for_range_slice(builder, top, bottom, height) as (i, _):
                        tile(rows, vectors, i, j)
                    top = bottom
            left_column = right_column
        return context.get_dummy_value()

    return types.void(one, start, finish, *[types.int64] * 13, ahead, sums), emit


def _bring(module):
    """The function that prefetches rows low .. high, which all kinds of register tiles share."""

    def body(builder, address, step, low, high, size):
        with cgutils.for_range_slice(builder, low, high, ir.Constant(I64, 1)) as (r, _):
            line = builder.add(address, builder.mul(r, step))
            with cgutils.for_range_slice(builder, line, builder.add(line, size), ir.Constant(I64, CACHE_LINE)) as (
                place,
                _,
            ):
                prefetch(builder, place)

    return function_in(module, "favorsharp_bring", [I64] * 5, body)


@outlined
def _multiply(one, start, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead):
    _product(one, start, STORE, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead, NO_SUMS)


@inlined
def _multiplied(one, start, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead):
    """As `_multiply`. It is compiled for each start and each constant stride of A, but for no other constants."""
    m, n, k, b_step, c_row = np.int64(m), np.int64(n), np.int64(k), np.int64(b_step), np.int64(c_row)
    _multiply(one, start, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead)


@inlined
def product(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row):
    """C = A B."""
    product_ahead(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, NOTHING)


@inlined
def product_ahead(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, ahead):
    """C = A B."""
    _multiplied(one, SET, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, c, c, ahead)


@inlined
def product_add(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row):
    """C = C + A B."""
    product_add_ahead(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, NOTHING)


@inlined
def product_add_ahead(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, ahead):
    """C = C + A B."""
    _multiplied(one, ADD, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, c, c, ahead)


@inlined
def product_take(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, low, ahead):
    """C = C + A B with low parts: what rounding took off C so far is added, and what it takes off now is kept."""
    _multiplied(one, TAKE, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, low, low, ahead)


@inlined
def product_terms(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C = A B + row + column."""
    product_terms_ahead(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, NOTHING)


@inlined
def product_terms_ahead(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead):
    """C = A B + row + column."""
    _multiplied(one, TERMS, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead)


@outlined
def product_exp(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C = exp(A B + row + column)."""
    _product(one, TERMS, EXP, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, NOTHING, NO_SUMS)


@outlined
def product_exp_stream(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C = exp(A B + row + column), stored past the caches. C and c_row are multiples of a vector."""
    _product(one, TERMS, STREAM, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, NOTHING, NO_SUMS)


@outlined
def product_power(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C = 2**(A B + row + column)."""
    _product(one, TERMS, POWER, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, NOTHING, NO_SUMS)


@outlined
def product_power_stream(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C = 2**(A B + row + column), stored past the caches. C and c_row are multiples of a vector."""
    _product(
        one, TERMS, POWER_STREAM, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, NOTHING, NO_SUMS
    )  # fmt: skip


@outlined
def product_natural_stream(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C = log(2) (A B + row + column), stored past the caches. C and c_row are multiples of a vector."""
    _product(
        one, TERMS, NATURAL_STREAM, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, NOTHING,
        NO_SUMS,
    )  # fmt: skip


@outlined
def product_sums(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, row, column, sums, ahead):
    """Add the powers of two of A B + row + column to sums, and take maxima; no logarithm may be larger than 127."""
    _product(one, TERMS, SUMS, m, n, k, a, a_row, a_step, b, b_panel, b_step, b, b_step, row, column, ahead, sums)


@outlined
def product_sum(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, row, column, sums, ahead):
    """As `product_sums`, for the second weight alone."""
    _product(one, TERMS, SUM, m, n, k, a, a_row, a_step, b, b_panel, b_step, b, b_step, row, column, ahead, sums)


@outlined
def product_nearest(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, row, column, best, owner):
    """Compare the entries of A B + row + column with best[j], the largest of column j so far, whose row is owner[j].

    Of equal entries the first one stays. NaN is never the largest.
    """
    sums = ColumnSums(0, 0, 0, 0, owner, 0, best)
    _product(one, TERMS, NEAREST, m, n, k, a, a_row, a_step, b, b_panel, b_step, b, b_step, row, column, NOTHING, sums)
