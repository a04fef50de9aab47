"""Functions of blocks, in vector instructions: maxima, exponentials and sums down the columns.

Numba does not turn such loops into vector instructions by itself, so the functions of this folder emit LLVM vectors.

These conventions hold for all files of this folder and for the kernels. An array is given by its *place*: its address
divided by the size of an item, so that places count items. Strides count items too. The dtype is that of the argument
`one`. A block x has `rows` rows of n columns, `step` items apart; n is a multiple of `lanes`, the number of items in a
vector.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from favorsharp_numba.vectors.compiling import outlined
from favorsharp_numba.vectors.emitter import I64, VECTORS, Emitter
from favorsharp_numba.vectors.loops import steps_loop

WAYS = 4
"""The number of rows that are worked on side by side where a row is a single vector."""


def _blocks(builder, e, n, body, most=VECTORS):
    """Emit body(first column, number of vectors) for the columns 0 .. n: `most` vectors at a time, then one by one."""
    steps_loop(builder, n, dict.fromkeys((most * e.lanes, e.lanes)), lambda j, size: body(j, size // e.lanes))


def _by_rows(builder, e, rows, vectors, found, take, join):
    """Emit take(row, accumulators) for all rows.

    Each row waits for the accumulator of the row before. If a row is a single vector, WAYS rows at a time therefore
    have accumulators of their own, which begin as copies of `found` and are joined into it at the end.
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


@outlined
def max_block(one, x, step, rows, n, shift, shift_step, first, top):
    """top[j] = the maximum of first[j] and of x[i, j] + shift[i] over i, without NaN. shift_step 0: one shift."""
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


@outlined
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


@outlined
def sum_block(one, x, step, rows, n, weight, weight_step, total):
    """total[j] = total[j] + sum over i of weight[i] x[i, j]. weight_step 0: one weight for all."""
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


@outlined
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


@outlined
def fill_before(one, x, step, rows, n, first, value):
    """x[i, j] = value for the columns j < first + i, a triangle."""
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


@outlined
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


@outlined
def multiply_block(one, x, step, rows, n, y, total):
    """x[i, j] = x[i, j] y[i, j], and total[j] = total[j] + sum of x[i, j]. x and y have the same step."""
    _multiply_block(one, x, step, rows, n, y, total)


@intrinsic
def _square_distances(context, one, x, step, rows, n, point, point_step, squares):
    def emit(context, builder, signature, args):
        _, x, step, rows, n, point, point_step, squares = args
        e = Emitter(builder, signature.args[0])
        block, items, results = e.pointer(x), e.pointer(point), e.pointer(squares)

        def body(j, vectors):
            sums = [e.accumulator(e.constant(0.0)) for _ in range(vectors)]
            with cgutils.for_range(builder, rows) as loop:
                line = e.at(block, builder.add(builder.mul(loop.index, step), j))
                item = e.broadcast(e.at(items, builder.mul(loop.index, point_step)))
                for v in range(vectors):
                    away = builder.fsub(e.load(e.at(line, v * e.lanes)), item)
                    builder.store(e.multiply_add(away, away, e.get(sums[v])), sums[v])
            for v in range(vectors):
                e.store(e.get(sums[v]), e.at(results, builder.add(j, ir.Constant(I64, v * e.lanes))))

        _blocks(builder, e, n, body, most=2 * WAYS)  # additions to one sum wait for each other
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 7), emit


@outlined
def square_distances(one, x, step, rows, n, point, point_step, squares):
    """squares[j] = the sum over i of (x[i, j] - point[i])^2, for a point whose items are `point_step` apart."""
    _square_distances(one, x, step, rows, n, point, point_step, squares)
