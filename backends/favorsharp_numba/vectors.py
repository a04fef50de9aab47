"""The inner loops, in vector instructions: a register tile of a matrix product, and exponentials of a block.

Numba does not use a processor's vectors for such loops by itself; here they are spelled out as LLVM vectors, of the
width that `compiling.vector_bytes` names. `plain.py` has the same functions in plain Numba.

An array is a *place*: its address divided by the size of an item, so that places are counted in items. Strides are in
items too, and block lengths are multiples of `lanes`. The dtype is that of the argument `one`.
"""

from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from favorsharp_numba.compiling import jit
from favorsharp_numba.emitter import CACHE_LINE, I64, LOG2E, VECTORS, Emitter

# The matrix product --------------------------------------------------------------------------------------------------

SET, ADD, TERMS = 0, 1, 2
"""Where the sums of a product begin: at 0, at what the result holds, at row[i] + column[j]."""
STORE, EXP, STREAM, SUMS, SUM = 0, 1, 2, 3, 4
"""What becomes of them: stored, exp stored, exp stored past the caches, 2** of them added up and not stored, with two
weights or the second alone."""


class Ahead(NamedTuple):
    """What is brought nearer while a product runs: some rows of `size` bytes, `step` bytes apart, from an address on.

    A few lines at a time: a processor drops prefetches that come faster than its memory answers.
    """

    address: int
    step: int
    rows: int
    size: int


NOTHING = Ahead(0, 0, 0, 0)


class Sums(NamedTuple):
    """Places of two weights of the rows of a result C, and how far apart they are from row to row; and, column by
    column, of the sums of 2**C with either weight and of the largest C.
    """

    weight: int
    weight_step: int
    other: int
    other_step: int
    total: int
    other_total: int
    largest: int


NO_SUMS = Sums(0, 0, 0, 0, 0, 0, 0)


@intrinsic(prefer_literal=True)
def _product(
    context, one, start, finish, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead, sums
):
    """C (m, n) from A (m, k) and B (k, n), a register tile at a time: 6, 4, 2 or 1 rows by some vectors, or 8 by one.

    B lies in panels of VECTORS vectors, `b_panel` items apart; its rows are `b_step` apart inside a panel.
    """
    start_at, finish_by = start.literal_value, finish.literal_value

    def emit(context, builder, signature, args):
        m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead, sums = args[3:]
        address, ahead_step, ahead_rows, ahead_size = cgutils.unpack_tuple(builder, ahead)
        weight, weight_step, other, other_step, total, other_total, largest = cgutils.unpack_tuple(builder, sums)
        e = Emitter(builder, signature.args[0])
        number = lambda value: ir.Constant(I64, value)  # noqa: E731

        def bring(top, bottom, j):
            """The rows ahead that fall to the rows top .. bottom of the result, in its first columns."""
            some = builder.icmp_signed(">", ahead_rows, number(0))
            with builder.if_then(builder.and_(some, builder.icmp_signed("==", j, number(0)))):
                low, high = (builder.udiv(builder.mul(x, ahead_rows), m) for x in (top, bottom))
                with cgutils.for_range_slice(builder, low, high, number(1)) as (r, _):
                    line = builder.add(address, builder.mul(r, ahead_step))
                    end = builder.add(line, ahead_size)
                    with cgutils.for_range_slice(builder, line, end, number(CACHE_LINE)) as (place, _):
                        e.prefetch(place)

        def add_up(found, i, j):
            """Take a register tile of logarithms into the sums and the maxima of its columns."""
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

        def tile(rows, vectors, i, j):
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
            bring(i, builder.add(i, number(rows)), j)
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
            for r in range(rows):
                for v in range(vectors):
                    value = e.get(found[r][v])
                    if finish_by != STORE:
                        value = e.exp2(builder.fmul(value, e.constant(LOG2E)), above=True)
                    e.store(value, e.at(result_rows[r], v * e.lanes), stream=finish_by == STREAM)

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


@jit
def product(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row):
    """C = A B."""
    _product(one, SET, STORE, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, c, c, NOTHING, NO_SUMS)


@jit
def product_ahead(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, ahead):
    """C = A B."""
    _product(one, SET, STORE, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, c, c, ahead, NO_SUMS)


@jit
def product_add(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row):
    """C = C + A B."""
    _product(one, ADD, STORE, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, c, c, NOTHING, NO_SUMS)


@jit
def product_add_ahead(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, ahead):
    """C = C + A B."""
    _product(one, ADD, STORE, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, c, c, ahead, NO_SUMS)


@jit
def product_terms(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C = A B + row + column."""
    _product(one, TERMS, STORE, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, NOTHING, NO_SUMS)


@jit
def product_terms_ahead(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead):
    """C = A B + row + column."""
    _product(one, TERMS, STORE, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead, NO_SUMS)


@jit
def product_exp(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C = exp(A B + row + column)."""
    _product(one, TERMS, EXP, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, NOTHING, NO_SUMS)


@jit
def product_exp_stream(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C = exp(A B + row + column), past the caches: C and c_row are multiples of a vector."""
    _product(one, TERMS, STREAM, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, NOTHING, NO_SUMS)


@jit
def product_sums(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, row, column, sums, ahead):
    """Take the logarithms A B + row + column, to base 2, into sums and maxima; right where none is over 127."""
    _product(one, TERMS, SUMS, m, n, k, a, a_row, a_step, b, b_panel, b_step, b, b_step, row, column, ahead, sums)


@jit
def product_sum(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, row, column, sums, ahead):
    """As `product_sums`, with the second weight alone."""
    _product(one, TERMS, SUM, m, n, k, a, a_row, a_step, b, b_panel, b_step, b, b_step, row, column, ahead, sums)


# Blocks: x has `rows` rows, `step` apart, of n columns ---------------------------------------------------------------


@intrinsic
def lanes(context, one):
    """How many items a vector holds: what block lengths are multiples of."""

    def emit(context, builder, signature, args):
        return ir.Constant(I64, Emitter(builder, signature.args[0]).lanes)

    return types.int64(one), emit


@intrinsic
def item_size(context, one):
    """Bytes of an item."""

    def emit(context, builder, signature, args):
        return ir.Constant(I64, Emitter(builder, signature.args[0]).item)

    return types.int64(one), emit


@intrinsic
def panel(context, one):
    """How many columns a panel of B has."""

    def emit(context, builder, signature, args):
        return ir.Constant(I64, VECTORS * Emitter(builder, signature.args[0]).lanes)

    return types.int64(one), emit


WAYS = 4
"""Rows of one vector that are worked on side by side."""


def _blocks(builder, e, n, body):
    """Emit body(first column, vectors) for columns 0 .. n, VECTORS vectors at a time and then one by one."""
    start = ir.Constant(I64, 0)
    for vectors in dict.fromkeys((VECTORS, 1)):
        width = ir.Constant(I64, vectors * e.lanes)
        stop = builder.add(start, builder.mul(builder.udiv(builder.sub(n, start), width), width))
        with cgutils.for_range_slice(builder, start, stop, width) as (j, _):
            body(j, vectors)
        start = stop


def _by_rows(builder, e, rows, vectors, found, take, join):
    """Emit take(row, accumulators) for all rows. One vector of a row waits for that of the row before, so several rows
    have accumulators of their own, which start as the first of those found and are joined.
    """
    ways = WAYS if vectors == 1 else 1
    groups = [found, *([e.accumulator(e.get(x)) for x in found] for _ in range(ways - 1))]
    whole = builder.mul(builder.udiv(rows, ir.Constant(I64, ways)), ir.Constant(I64, ways))
    with cgutils.for_range_slice(builder, ir.Constant(I64, 0), whole, ir.Constant(I64, ways)) as (i, _):
        for way, group in enumerate(groups):
            take(builder.add(i, ir.Constant(I64, way)), group)
    if ways > 1:
        with cgutils.for_range_slice(builder, whole, rows, ir.Constant(I64, 1)) as (i, _):
            take(i, found)
    for group in groups[1:]:
        for x, other in zip(found, group, strict=True):
            builder.store(join(e.get(x), e.get(other)), x)


@intrinsic
def _max_block(context, one, x, step, rows, n, shift, shift_step, first, top):
    def emit(context, builder, signature, args):
        _, x, step, rows, n, shift, shift_step, first, top = args
        e = Emitter(builder, signature.args[0])
        block, firsts, tops, shifts = (e.pointer(place) for place in (x, first, top, shift))

        def body(j, vectors):
            offsets = [builder.add(j, ir.Constant(I64, v * e.lanes)) for v in range(vectors)]
            found = [e.accumulator(e.load(e.at(firsts, offset))) for offset in offsets]

            def take(i, best):
                line = e.at(block, builder.add(builder.mul(i, step), j))
                term = e.broadcast(e.at(shifts, builder.mul(i, shift_step)))
                for v in range(vectors):
                    value = builder.fadd(e.load(e.at(line, v * e.lanes)), term)
                    builder.store(e.larger(e.get(best[v]), value), best[v])

            _by_rows(builder, e, rows, vectors, found, take, e.larger)
            for offset, best in zip(offsets, found, strict=True):
                e.store(e.get(best), e.at(tops, offset))

        _blocks(builder, e, n, body)
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 8), emit


@jit
def max_block(one, x, step, rows, n, shift, shift_step, first, top):
    """top[j] = max(first[j], x[i, j] + shift[i] over i), passing over NaN; shift_step 0 for one shift."""
    _max_block(one, x, step, rows, n, shift, shift_step, first, top)


@intrinsic
def _exp_block(context, one, x, step, rows, n, shift, shift_step, top, weight, weight_step, total):
    def emit(context, builder, signature, args):
        _, x, step, rows, n, shift, shift_step, top, weight, weight_step, total = args
        e = Emitter(builder, signature.args[0])
        block, tops, shifts, weights, totals = (e.pointer(p) for p in (x, top, shift, weight, total))

        def body(j, vectors):
            offsets = [builder.add(j, ir.Constant(I64, v * e.lanes)) for v in range(vectors)]
            reference = [e.load(e.at(tops, offset)) for offset in offsets]
            sums = [e.accumulator(e.load(e.at(totals, offset))) for offset in offsets]
            with cgutils.for_range(builder, rows) as loop:
                line = e.at(block, builder.add(builder.mul(loop.index, step), j))
                term = e.broadcast(e.at(shifts, builder.mul(loop.index, shift_step)))
                factor = e.broadcast(e.at(weights, builder.mul(loop.index, weight_step)))
                for v in range(vectors):
                    place = e.at(line, v * e.lanes)
                    value = e.exp2(builder.fsub(builder.fadd(e.load(place), term), reference[v]))
                    e.store(value, place)
                    builder.store(e.multiply_add(value, factor, e.get(sums[v])), sums[v])
            for v in range(vectors):
                e.store(e.get(sums[v]), e.at(totals, offsets[v]))

        _blocks(builder, e, n, body)
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 10), emit


@jit
def exp_block(one, x, step, rows, n, shift, shift_step, top, weight, weight_step, total):
    """x[i, j] = 2**(x[i, j] + shift[i] - top[j]), and total[j] = total[j] + sum of weight[i] x[i, j]."""
    _exp_block(one, x, step, rows, n, shift, shift_step, top, weight, weight_step, total)


@intrinsic
def _sum_block(context, one, x, step, rows, n, weight, weight_step, total):
    def emit(context, builder, signature, args):
        _, x, step, rows, n, weight, weight_step, total = args
        e = Emitter(builder, signature.args[0])
        block, weights, totals = (e.pointer(p) for p in (x, weight, total))

        def body(j, vectors):
            places = [e.at(totals, builder.add(j, ir.Constant(I64, v * e.lanes))) for v in range(vectors)]
            sums = [e.accumulator(e.load(place)) for place in places]
            with cgutils.for_range(builder, rows) as loop:
                line = e.at(block, builder.add(builder.mul(loop.index, step), j))
                factor = e.broadcast(e.at(weights, builder.mul(loop.index, weight_step)))
                for v in range(vectors):
                    value = e.load(e.at(line, v * e.lanes))
                    builder.store(e.multiply_add(value, factor, e.get(sums[v])), sums[v])
            for v in range(vectors):
                e.store(e.get(sums[v]), places[v])

        _blocks(builder, e, n, body)
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 7), emit


@jit
def sum_block(one, x, step, rows, n, weight, weight_step, total):
    """total[j] = total[j] + sum over i of weight[i] x[i, j]; weight_step 0 for one weight."""
    _sum_block(one, x, step, rows, n, weight, weight_step, total)


@intrinsic
def _scale_block(context, one, x, step, rows, n, factor, column_factor, y, y_step):
    def emit(context, builder, signature, args):
        _, x, step, rows, n, factor, column_factor, y, y_step = args
        e = Emitter(builder, signature.args[0])
        block, factors, columns, result = (e.pointer(p) for p in (x, factor, column_factor, y))

        def body(j, vectors):
            scales = [e.load(e.at(columns, builder.add(j, ir.Constant(I64, v * e.lanes)))) for v in range(vectors)]
            with cgutils.for_range(builder, rows) as loop:
                line = e.at(block, builder.add(builder.mul(loop.index, step), j))
                target = e.at(result, builder.add(builder.mul(loop.index, y_step), j))
                term = e.broadcast(e.at(factors, loop.index))
                for v in range(vectors):
                    value = builder.fmul(builder.fmul(e.load(e.at(line, v * e.lanes)), scales[v]), term)
                    e.store(value, e.at(target, v * e.lanes))

        _blocks(builder, e, n, body)
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 8), emit


@jit
def scale_block(one, x, step, rows, n, factor, column_factor, y, y_step):
    """y[i, j] = x[i, j] factor[i] column_factor[j]."""
    _scale_block(one, x, step, rows, n, factor, column_factor, y, y_step)


@intrinsic
def _fill_before(context, one, x, step, rows, n, first, value):
    def emit(context, builder, signature, args):
        _, x, step, rows, n, first, value = args
        e = Emitter(builder, signature.args[0])
        block, wide, zero = e.pointer(x), e.filled(value), ir.Constant(I64, 0)
        with cgutils.for_range(builder, rows) as loop:
            line = e.at(block, builder.mul(loop.index, step))
            bound = builder.add(first, loop.index)
            bound = builder.select(builder.icmp_signed("<", bound, n), bound, n)
            with cgutils.for_range_slice(builder, zero, bound, ir.Constant(I64, e.lanes)) as (j, _):
                place = e.at(line, j)
                e.store(builder.select(e.first(builder.sub(bound, j)), wide, e.load(place)), place)
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 5, one), emit


@jit
def fill_before(one, x, step, rows, n, first, value):
    """x[i, j] = value for the columns j < first + i of n: a triangle."""
    _fill_before(one, x, step, rows, n, first, value)


@intrinsic
def _shift_block(context, one, x, step, rows, n, factor, shift, squares):
    def emit(context, builder, signature, args):
        _, x, step, rows, n, factor, shift, squares = args
        e = Emitter(builder, signature.args[0])
        block, shifts, totals = e.pointer(x), e.pointer(shift), e.pointer(squares)
        scale = e.broadcast(e.pointer(factor))

        def body(j, vectors):
            places = [e.at(totals, builder.add(j, ir.Constant(I64, v * e.lanes))) for v in range(vectors)]
            sums = [e.accumulator(e.constant(0.0)) for _ in places]
            with cgutils.for_range(builder, rows) as loop:
                line = e.at(block, builder.add(builder.mul(loop.index, step), j))
                term = e.broadcast(e.at(shifts, loop.index))
                for v in range(vectors):
                    place = e.at(line, v * e.lanes)
                    value = e.multiply_add(e.load(place), scale, term)
                    e.store(value, place)
                    builder.store(e.multiply_add(value, value, e.get(sums[v])), sums[v])
            for v in range(vectors):
                e.store(e.get(sums[v]), places[v])

        _blocks(builder, e, n, body)
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 7), emit


@jit
def shift_block(one, x, step, rows, n, factor, shift, squares):
    """x[i, j] = x[i, j] factor[0] + shift[i], and squares[j] = the sum of x[i, j]^2."""
    _shift_block(one, x, step, rows, n, factor, shift, squares)


@intrinsic
def _multiply_block(context, one, x, step, rows, n, y, total):
    def emit(context, builder, signature, args):
        _, x, step, rows, n, y, total = args
        e = Emitter(builder, signature.args[0])
        block, others, totals = e.pointer(x), e.pointer(y), e.pointer(total)

        def body(j, vectors):
            places = [e.at(totals, builder.add(j, ir.Constant(I64, v * e.lanes))) for v in range(vectors)]
            sums = [e.accumulator(e.load(place)) for place in places]
            with cgutils.for_range(builder, rows) as loop:
                offset = builder.add(builder.mul(loop.index, step), j)
                line, other = e.at(block, offset), e.at(others, offset)
                for v in range(vectors):
                    place = e.at(line, v * e.lanes)
                    value = builder.fmul(e.load(place), e.load(e.at(other, v * e.lanes)))
                    e.store(value, place)
                    builder.store(builder.fadd(value, e.get(sums[v])), sums[v])
            for v in range(vectors):
                e.store(e.get(sums[v]), places[v])

        _blocks(builder, e, n, body)
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 6), emit


@jit
def multiply_block(one, x, step, rows, n, y, total):
    """x[i, j] = x[i, j] y[i, j], and total[j] = total[j] + sum of x[i, j]; x and y have one step."""
    _multiply_block(one, x, step, rows, n, y, total)


# Single items --------------------------------------------------------------------------------------------------------


@intrinsic
def get(context, one, place):
    """The item at a place."""

    def emit(context, builder, signature, args):
        e = Emitter(builder, signature.args[0])
        value = builder.load(e.pointer(args[1]), typ=e.scalar)
        value.align = e.item
        return value

    return one(one, types.int64), emit


@intrinsic
def put(context, one, place, value):
    """Store an item at a place."""

    def emit(context, builder, signature, args):
        e = Emitter(builder, signature.args[0])
        builder.store(args[2], e.pointer(args[1])).align = e.item
        return context.get_dummy_value()

    return types.void(one, types.int64, one), emit


@intrinsic
def integer_at(context, address):
    """The 64-bit integer at an address."""

    def emit(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], ir.PointerType()), typ=I64)

    return types.int64(types.int64), emit


@intrinsic
def byte_at(context, address):
    """The byte at an address."""

    def emit(context, builder, signature, args):
        byte = builder.load(builder.inttoptr(args[0], ir.PointerType()), typ=ir.IntType(8))
        return builder.zext(byte, I64)

    return types.int64(types.int64), emit
