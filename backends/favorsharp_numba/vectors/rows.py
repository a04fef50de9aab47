"""Functions of rows, in vector instructions: loading and storing rows of any floating dtype, sums, and tops.

Places, strides and block lengths are as in `vectors/blocks.py`.
"""

import functools

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.emitter import HALVES, I32, I64, MASKS, Emitter

FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = 0, 1, 2, 3
"""The kinds of items that a row of a caller's array may have."""

_ITEMS = {FLOAT16: ir.HalfType(), BFLOAT16: ir.IntType(16), FLOAT32: ir.FloatType(), FLOAT64: ir.DoubleType()}
_SIZES = {FLOAT16: 2, BFLOAT16: 2, FLOAT32: 4, FLOAT64: 8}


def _widened(builder, e, value, kind, shape):
    """A loaded value in the dtype of the kernel. `shape` turns a scalar type into the type of the value: vector or
    scalar.
    """
    target = shape(e.scalar)
    if kind == FLOAT16:  # processors convert float16 only to float32
        value, kind = builder.fpext(value, shape(ir.FloatType())), FLOAT32
    if kind == BFLOAT16:
        integers = builder.zext(value, shape(I32))
        value = builder.bitcast(builder.shl(integers, _filled(shape(I32), 16)), shape(ir.FloatType()))
        kind = FLOAT32
    if _ITEMS[kind] == e.scalar:
        return value
    return builder.fptrunc(value, target) if _SIZES[kind] > e.item else builder.fpext(value, target)


def _narrowed(builder, e, value, kind, shape):
    """A value in the dtype of a row, rounded to nearest."""
    if _ITEMS[kind] == e.scalar:
        return value
    if kind == FLOAT16:
        single = value if e.single else builder.fptrunc(value, shape(ir.FloatType()))
        return builder.fptrunc(single, shape(ir.HalfType()))
    if kind != BFLOAT16:
        convert = builder.fpext if _SIZES[kind] > e.item else builder.fptrunc
        return convert(value, shape(_ITEMS[kind]))
    if not e.single:
        value = builder.fptrunc(value, shape(ir.FloatType()))
    bits = builder.bitcast(value, shape(I32))
    odd = builder.and_(builder.lshr(bits, _filled(shape(I32), 16)), _filled(shape(I32), 1))
    rounded = builder.add(bits, builder.add(odd, _filled(shape(I32), 0x7FFF)))
    nan = builder.or_(bits, _filled(shape(I32), 0x400000))
    kept = builder.select(builder.fcmp_unordered("uno", value, value), nan, rounded)
    return builder.trunc(builder.lshr(kept, _filled(shape(I32), 16)), shape(ir.IntType(16)))


def _filled(type_, value):
    return ir.Constant(type_, [value] * type_.count if isinstance(type_, ir.VectorType) else value)


def rows_loop(builder, e, n, body):
    """Emit body(column, shape) for whole vectors and then for single items."""
    _single_rows(builder, _whole_rows(builder, e, n, body), n, body)


def _whole_rows(builder, e, n, body):
    """Emit body(column, shape) for whole vectors. Return the column behind the last one."""
    width = ir.Constant(I64, e.lanes)
    middle = builder.mul(builder.udiv(n, width), width)
    with cgutils.for_range_slice(builder, ir.Constant(I64, 0), middle, width) as (j, _):
        body(j, lambda scalar: ir.VectorType(scalar, e.lanes))
    return middle


def _single_rows(builder, start, n, body):
    """Emit body(column, shape) for single items."""
    with cgutils.for_range_slice(builder, start, n, ir.Constant(I64, 1)) as (j, _):
        body(j, lambda scalar: scalar)


class _Loading:
    """Emits the parts of `_load_rows`, for rows of items of one kind."""

    def __init__(self, e, item, address, step, n, pad, factor, offset, y):
        self.e, self.b, self.item = e, e.b, item
        self.address, self.step, self.n, self.pad, self.y = address, step, n, pad, y
        self.offsets, factors = e.pointer(offset), e.pointer(factor)
        self.wide = e.broadcast(factors)
        self.single = e.b.load(factors, typ=e.scalar)
        self.width = ir.Constant(I64, e.lanes)

    def line(self, row):
        """The pointers from which a row is read and to which it is written."""
        source = self.b.inttoptr(self.b.add(self.address, self.b.mul(row, self.step)), ir.PointerType())
        return source, self.e.pointer(self.b.add(self.y, self.b.mul(row, self.pad)))

    def item_at(self, source, j):
        """The pointer to an item of a row that is read."""
        return self.b.gep(source, [j], source_etype=_ITEMS[self.item])

    def put(self, value, centre, place, shape):
        """Scale and centre loaded items, and store them."""
        scale = self.wide if isinstance(shape(self.e.scalar), ir.VectorType) else self.single
        value = self.b.fmul(_widened(self.b, self.e, value, self.item, shape), scale)
        self.b.store(self.b.fsub(value, centre), place).align = self.e.item

    def put_items(self, source, target, j, shape):
        """Load, scale, centre and store a whole vector or a single item in column j."""
        value = self.b.load(self.item_at(source, j), typ=shape(_ITEMS[self.item]))
        value.align = _SIZES[self.item]
        centre = self.b.load(self.e.at(self.offsets, j), typ=shape(self.e.scalar))
        centre.align = self.e.item
        self.put(value, centre, self.e.at(target, j), shape)

    def put_part(self, start, mask, centre, place):
        """As `put_items`, for the first items of a vector, those of a mask. The others become 0."""
        value = self.e.masked_load(start, mask, _ITEMS[self.item], _SIZES[self.item])
        self.put(value, centre, place, lambda scalar: ir.VectorType(scalar, self.e.lanes))


def _load_single_vectors(rows, count):
    """Load `count` rows that are a part of one vector each, under the same mask."""
    mask = rows.e.first(rows.n)
    centre = rows.e.masked_load(rows.offsets, mask, rows.e.scalar, rows.e.item)
    with cgutils.for_range(rows.b, count) as loop:
        source, target = rows.line(loop.index)
        rows.put_part(source, mask, centre, target)


def _load_any_rows(rows, count):
    """Load `count` rows of any length, and clear what is behind them."""
    with cgutils.for_range(rows.b, count) as loop:
        source, target = rows.line(loop.index)
        body = functools.partial(rows.put_items, source, target)
        if MASKS:
            cleared = _load_end_masked(rows, source, target, _whole_rows(rows.b, rows.e, rows.n, body), body)
        else:
            rows_loop(rows.b, rows.e, rows.n, body)
            cleared = rows.n
        with cgutils.for_range_slice(rows.b, cleared, rows.pad, ir.Constant(I64, 1)) as (j, _):
            rows.b.store(ir.Constant(rows.e.scalar, 0.0), rows.e.at(target, j)).align = rows.e.item


def _load_end_masked(rows, source, target, done, body):
    """Load the items of a row behind its whole vectors: as a part of a vector if there is room for a vector in the
    result, or else one by one. Return the column behind what was stored.
    """
    b, e = rows.b, rows.e
    with b.if_else(b.icmp_signed("<=", b.add(done, rows.width), rows.pad)) as (room, none):
        with room:
            mask = e.first(b.sub(rows.n, done))
            centre = e.masked_load(e.at(rows.offsets, done), mask, e.scalar, e.item)
            rows.put_part(rows.item_at(source, done), mask, centre, e.at(target, done))
        with none:
            _single_rows(b, done, rows.n, body)
    cleared = b.add(done, rows.width)
    return b.select(b.icmp_signed("<=", cleared, rows.pad), cleared, rows.n)


@intrinsic(prefer_literal=True)
def _load_rows(context, one, kind, address, step, count, n, pad, factor, offset, y):
    def emit(context, builder, signature, args):
        _, _, address, step, count, n, pad, factor, offset, y = args
        e = Emitter(builder, signature.args[0])
        rows = _Loading(e, kind.literal_value, address, step, n, pad, factor, offset, y)
        if not MASKS:
            _load_any_rows(rows, count)
            return context.get_dummy_value()
        short = builder.and_(builder.icmp_signed("<", n, rows.width), builder.icmp_signed("==", pad, rows.width))
        with builder.if_else(short) as (one_vector, several):
            with one_vector:
                _load_single_vectors(rows, count)
            with several:
                _load_any_rows(rows, count)
        return context.get_dummy_value()

    return types.void(one, kind, *[types.int64] * 8), emit


@intrinsic(prefer_literal=True)
def _store_rows(context, one, kind, address, step, count, n, pad, factor, x):
    item = kind.literal_value

    def emit(context, builder, signature, args):
        _, _, address, step, count, n, pad, factor, x = args
        e = Emitter(builder, signature.args[0])
        factors = e.pointer(factor)
        with cgutils.for_range(builder, count) as loop:
            target = builder.inttoptr(builder.add(address, builder.mul(loop.index, step)), ir.PointerType())
            source = e.pointer(builder.add(x, builder.mul(loop.index, pad)))
            wide = e.broadcast(e.at(factors, loop.index))
            single = builder.load(e.at(factors, loop.index), typ=e.scalar)

            def body(j, shape):
                value = builder.load(e.at(source, j), typ=shape(e.scalar))
                value.align = e.item
                scale = wide if isinstance(shape(e.scalar), ir.VectorType) else single
                value = _narrowed(builder, e, builder.fmul(value, scale), item, shape)
                place = builder.gep(target, [j], source_etype=_ITEMS[item])
                builder.store(value, place).align = _SIZES[item]

            rows_loop(builder, e, n, body)
        return context.get_dummy_value()

    return types.void(one, kind, *[types.int64] * 7), emit


@outlined
def load_rows(one, kind, address, step, count, n, pad, factor, offset, y):
    """y[t, j] = x[t, j] factor[0] - offset[j] for `count` rows of n items, and 0 for j = n .. pad.

    The rows of x have items of the given kind side by side, and are `step` bytes apart.
    """
    if kind == 2:
        _load_rows(one, 2, address, step, count, n, pad, factor, offset, y)
    elif kind == 3:
        _load_rows(one, 3, address, step, count, n, pad, factor, offset, y)
    elif kind == 1:
        _load_rows(one, 1, address, step, count, n, pad, factor, offset, y)
    elif HALVES:
        _load_rows(one, 0, address, step, count, n, pad, factor, offset, y)


@outlined
def store_rows(one, kind, address, step, count, n, pad, factor, x):
    """Store x[t, j] factor[t] in rows of items of the given kind, side by side; the rows are `step` bytes apart."""
    if kind == 2:
        _store_rows(one, 2, address, step, count, n, pad, factor, x)
    elif kind == 3:
        _store_rows(one, 3, address, step, count, n, pad, factor, x)
    elif kind == 1:
        _store_rows(one, 1, address, step, count, n, pad, factor, x)
    elif HALVES:
        _store_rows(one, 0, address, step, count, n, pad, factor, x)


def _transposed(e, vectors):
    """As many vectors as they have lanes, transposed: pairs of them exchange halves, then quarters, and so on."""
    vectors, order, half = list(vectors), ir.VectorType(I32, e.lanes), e.lanes // 2
    while half:
        low = ir.Constant(order, [r if not r & half else r - half + e.lanes for r in range(e.lanes)])
        high = ir.Constant(order, [r + half if not r & half else r + e.lanes for r in range(e.lanes)])
        for r in range(e.lanes):
            if not r & half:
                pair = vectors[r], vectors[r + half]
                vectors[r], vectors[r + half] = e.b.shuffle_vector(*pair, low), e.b.shuffle_vector(*pair, high)
        half //= 2
    return vectors


@intrinsic
def _transpose(context, one, x, x_step, rows, columns, y, y_step):
    def emit(context, builder, signature, args):
        _, x, x_step, rows, columns, y, y_step = args
        e = Emitter(builder, signature.args[0])
        source, target = e.pointer(x), e.pointer(y)
        zero, one_item, width = (ir.Constant(I64, value) for value in (0, 1, e.lanes))
        whole_rows, whole_columns = (builder.mul(builder.udiv(z, width), width) for z in (rows, columns))

        def block(i, j):
            """Transpose lanes x lanes items."""
            line = e.at(source, builder.add(builder.mul(i, x_step), j))
            vectors = [e.load(e.at(line, builder.mul(ir.Constant(I64, r), x_step))) for r in range(e.lanes)]
            vectors = _transposed(e, vectors)
            place = e.at(target, builder.add(builder.mul(j, y_step), i))
            for r, vector in enumerate(vectors):
                e.store(vector, e.at(place, builder.mul(ir.Constant(I64, r), y_step)))

        def single(i, j):
            value = builder.load(e.at(source, builder.add(builder.mul(i, x_step), j)), typ=e.scalar)
            value.align = e.item
            builder.store(value, e.at(target, builder.add(builder.mul(j, y_step), i))).align = e.item

        def loop(low, high, step):
            return cgutils.for_range_slice(builder, low, high, step)

        with loop(zero, whole_rows, width) as (i, _), loop(zero, whole_columns, width) as (j, _):
            block(i, j)
        with loop(zero, whole_columns, one_item) as (j, _), loop(whole_rows, rows, one_item) as (i, _):
            single(i, j)
        with loop(whole_columns, columns, one_item) as (j, _), loop(zero, rows, one_item) as (i, _):
            single(i, j)
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 6), emit


@outlined
def transpose_block(one, x, x_step, rows, columns, y, y_step):
    """y[j, i] = x[i, j]."""
    _transpose(one, x, x_step, rows, columns, y, y_step)


@intrinsic
def _fill(context, one, place, count, value):
    def emit(context, builder, signature, args):
        _, place, count, value = args
        e = Emitter(builder, signature.args[0])
        start, wide = e.pointer(place), e.filled(value)

        def body(j, shape):
            filled = wide if isinstance(shape(e.scalar), ir.VectorType) else value
            builder.store(filled, e.at(start, j)).align = e.item

        rows_loop(builder, e, count, body)
        return context.get_dummy_value()

    return types.void(one, types.int64, types.int64, one), emit


@outlined
def fill(one, place, count, value):
    """x = value for `count` items; for none if `count` is smaller than 1."""
    _fill(one, place, max(0, count), value)


@intrinsic
def _copy(context, one, x, n, y):
    def emit(context, builder, signature, args):
        _, x, n, y = args
        e = Emitter(builder, signature.args[0])
        source, target = e.pointer(x), e.pointer(y)

        def body(j, shape):
            value = builder.load(e.at(source, j), typ=shape(e.scalar))
            value.align = e.item
            builder.store(value, e.at(target, j)).align = e.item

        rows_loop(builder, e, n, body)
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 3), emit


@outlined
def copy(one, x, n, y):
    """y = x, of n items that do not overlap."""
    _copy(one, x, n, y)


@intrinsic
def _add_rows(context, one, target, size, x, step, count, factor):
    def emit(context, builder, signature, args):
        _, target, size, x, step, count, single = args
        e = Emitter(builder, signature.args[0])
        target, source, wide = e.pointer(target), e.pointer(x), e.filled(single)
        with cgutils.for_range(builder, count) as loop:
            result = e.at(target, builder.mul(loop.index, size))
            line = e.at(source, builder.mul(loop.index, step))

            def body(j, shape):
                kind = shape(e.scalar)
                old, value = builder.load(e.at(result, j), typ=kind), builder.load(e.at(line, j), typ=kind)
                old.align = value.align = e.item
                scaled = builder.fmul(value, wide if isinstance(kind, ir.VectorType) else single)
                builder.store(builder.fadd(old, scaled), e.at(result, j)).align = e.item

            rows_loop(builder, e, size, body)
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 5, one), emit


@outlined
def add_rows(one, target, size, x, step, count, factor):
    """Add rows x[t], `step` items apart, times a factor to `count` rows of `size` items without gaps between them."""
    _add_rows(one, target, size, x, step, count, factor)


@intrinsic
def _take_row(context, one, n, x, factor, target, low):
    def emit(context, builder, signature, args):
        _, n, x, factor, target, low = args
        e = Emitter(builder, signature.args[0])
        source, result, lows = (e.pointer(place) for place in (x, target, low))
        wide = e.filled(factor)

        def body(j, shape):
            kind = shape(e.scalar)
            value, held, lost = (builder.load(e.at(place, j), typ=kind) for place in (source, result, lows))
            value.align = held.align = lost.align = e.item
            value = builder.fmul(value, wide if isinstance(kind, ir.VectorType) else factor)
            total, lost = e.add_with_low(held, lost, value)
            builder.store(total, e.at(result, j)).align = e.item
            builder.store(lost, e.at(lows, j)).align = e.item

        rows_loop(builder, e, n, body)
        return context.get_dummy_value()

    return types.void(one, types.int64, types.int64, one, types.int64, types.int64), emit


@outlined
def take_scaled_row(one, n, x, factor, target, low):
    """target = target + factor x for n items, with the low parts of target as in `product_take`."""
    _take_row(one, n, x, factor, target, low)


@inlined
def take_row(one, n, x, target, low):
    """target = target + x for n items, with the low parts of target as in `product_take`."""
    take_scaled_row(one, n, x, one, target, low)


@intrinsic
def _scale_rows(context, one, x, step, rows, n, factors):
    def emit(context, builder, signature, args):
        _, x, step, rows, n, factors = args
        e = Emitter(builder, signature.args[0])
        lines, scales, bits = e.pointer(x), e.pointer(factors), cgutils.alloca_once(builder, I64)
        zero, width = ir.Constant(I64, 0), ir.Constant(I64, e.lanes)
        with cgutils.for_range_slice(builder, zero, rows, width) as (i, _):
            changed = builder.fcmp_unordered("!=", e.load(e.at(scales, i)), e.constant(1.0))
            changed = builder.and_(changed, e.first(builder.sub(rows, i)))
            builder.store(builder.zext(builder.bitcast(changed, ir.IntType(e.lanes)), I64), bits)
            with cgutils.for_range(builder, builder.ctpop(builder.load(bits, typ=I64))):
                left = builder.load(bits, typ=I64)
                builder.store(builder.and_(left, builder.sub(left, ir.Constant(I64, 1))), bits)
                row = builder.add(i, builder.cttz(left, ir.Constant(ir.IntType(1), 1)))
                line, scale = e.at(lines, builder.mul(row, step)), e.broadcast(e.at(scales, row))
                with cgutils.for_range_slice(builder, zero, n, width) as (j, _):
                    place = e.at(line, j)
                    e.store(builder.fmul(e.load(place), scale), place)
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 5), emit


@outlined
def scale_rows(one, x, step, rows, n, factors):
    """x[i, j] = x[i, j] factors[i] for n columns, in whole vectors. Rows with the factor 1 are skipped."""
    _scale_rows(one, x, step, rows, n, factors)


@intrinsic
def _combine(context, one, n, constant, first, x, second, y, target):
    def emit(context, builder, signature, args):
        _, n, constant, first, x, second, y, target = args
        e = Emitter(builder, signature.args[0])
        left, right, result = (e.pointer(place) for place in (x, y, target))
        scalars = (constant, first, second)
        vectors = [e.filled(value) for value in scalars]

        def body(j, shape):
            kind = shape(e.scalar)
            values = [builder.load(e.at(place, j), typ=kind) for place in (left, right)]
            total, *factors = vectors if isinstance(kind, ir.VectorType) else scalars
            for value, factor in zip(values, factors, strict=True):
                value.align = e.item
                total = builder.fadd(total, builder.fmul(value, factor), flags=("contract",))
            builder.store(total, e.at(result, j)).align = e.item

        rows_loop(builder, e, n, body)
        return context.get_dummy_value()

    return types.void(one, types.int64, one, one, types.int64, one, types.int64, types.int64), emit


@outlined
def combine(one, n, constant, first, x, second, y, target):
    """target = constant + first x + second y for n items."""
    _combine(one, n, constant, first, x, second, y, target)


@intrinsic
def _invert(context, one, x, n):
    def emit(context, builder, signature, args):
        _, x, n = args
        e = Emitter(builder, signature.args[0])
        line = e.pointer(x)

        def body(j, shape):
            kind = shape(e.scalar)
            value = builder.load(e.at(line, j), typ=kind)
            value.align = e.item
            nothing, unit = (ir.Constant(kind, [z] * e.lanes if kind == e.vector else z) for z in (0.0, 1.0))
            seen = builder.fcmp_unordered("!=", value, nothing)
            builder.store(builder.select(seen, builder.fdiv(unit, value), value), e.at(line, j)).align = e.item

        rows_loop(builder, e, n, body)
        return context.get_dummy_value()

    return types.void(one, types.int64, types.int64), emit


@outlined
def invert(one, x, n):
    """x = 1 / x for n items, or 0 for a 0."""
    _invert(one, x, n)


def sum_lanes(builder, e, vectors):
    """A vector of the sums of the lanes of each of the given vectors.

    Their number is a power of two and at most the number of lanes. In each round, every vector is replaced by the sum
    of its halves, and the results of two vectors are joined into one.
    """
    kinds = len(vectors)
    while len(vectors) > 1 or vectors[0].type.count > kinds:
        size = vectors[0].type.count
        half = size * len(vectors) // kinds // 2
        starts = [x + y for x in range(0, size * min(2, len(vectors)), 2 * half) for y in range(half)]
        low, high = (
            ir.Constant(ir.VectorType(I32, len(starts)), [x + shift for x in starts]) for shift in (0, half)
        )  # fmt: skip
        pairs = zip(vectors[::2], vectors[1::2] or vectors, strict=True)
        vectors = [builder.fadd(builder.shuffle_vector(*p, low), builder.shuffle_vector(*p, high)) for p in pairs]
    return vectors[0]


def products_of_rows(builder, e, count, n, targets, factors):
    """Store, for each row and each target, the sum over n columns of the product of a pair of values.

    The pairs are vectors that a function of `factors` loads for a row and a column. Several rows are worked on at once,
    because the additions to one sum wait for each other.
    """

    def body(t, rows):
        places = [builder.add(t, ir.Constant(I64, r)) for r in range(rows)]
        for target, pair in zip(targets, factors, strict=True):
            sums = [e.accumulator(e.constant(0.0)) for _ in places]
            with cgutils.for_range_slice(builder, ir.Constant(I64, 0), n, ir.Constant(I64, e.lanes)) as (j, _):
                for place, total in zip(places, sums, strict=True):
                    builder.store(e.multiply_add(*pair(place, j), e.get(total)), total)
            builder.store(sum_lanes(builder, e, [e.get(x) for x in sums]), e.at(target, t)).align = e.item

    start = ir.Constant(I64, 0)
    for rows in sorted({e.lanes, min(4, e.lanes), 1}, reverse=True):
        height = ir.Constant(I64, rows)
        stop = builder.add(start, builder.mul(builder.udiv(builder.sub(count, start), height), height))
        with cgutils.for_range_slice(builder, start, stop, height) as (t, _):
            body(t, rows)
        start = stop


@intrinsic
def _quadratic_rows(context, one, z, step, count, n, linear, first, second):
    def emit(context, builder, signature, args):
        _, z, step, count, n, linear, first, second = args
        e = Emitter(builder, signature.args[0])
        lines, coefficients = e.pointer(z), e.pointer(linear)
        value = lambda t, j: e.load(e.at(lines, builder.add(builder.mul(t, step), j)))  # noqa: E731
        dot = lambda t, j: (value(t, j), e.load(e.at(coefficients, j)))  # noqa: E731
        square = lambda t, j: (value(t, j),) * 2  # noqa: E731
        products_of_rows(builder, e, count, n, (e.pointer(first), e.pointer(second)), (dot, square))
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 7), emit


@outlined
def quadratic_rows(one, z, step, count, n, linear, first, second):
    """first[t] = linear.z[t] and second[t] = z[t].z[t], over n columns in whole vectors."""
    _quadratic_rows(one, z, step, count, n, linear, first, second)


@intrinsic
def _dot_rows(context, one, x, y, step, count, n, dots):
    def emit(context, builder, signature, args):
        _, x, y, step, count, n, dots = args
        e = Emitter(builder, signature.args[0])
        lines = e.pointer(x), e.pointer(y)

        def pair(t, j):
            return [e.load(e.at(line, builder.add(builder.mul(t, step), j))) for line in lines]

        products_of_rows(builder, e, count, n, [e.pointer(dots)], [pair])
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 6), emit


@outlined
def dot_rows(one, x, y, step, count, n, dots):
    """dots[t] = x[t].y[t], over n columns in whole vectors. They may overwrite the beginning of x or y."""
    _dot_rows(one, x, y, step, count, n, dots)


@intrinsic
def _total_of(context, one, x, n):
    def emit(context, builder, signature, args):
        _, x, n = args
        e = Emitter(builder, signature.args[0])
        line = e.pointer(x)
        wide, single = e.accumulator(e.constant(0.0)), cgutils.alloca_once_value(builder, ir.Constant(e.scalar, 0.0))

        def body(j, shape):
            kind = shape(e.scalar)
            value = builder.load(e.at(line, j), typ=kind)
            value.align = e.item
            total = wide if isinstance(kind, ir.VectorType) else single
            builder.store(builder.fadd(builder.load(total, typ=kind), value), total)

        rows_loop(builder, e, n, body)
        whole = builder.extract_element(sum_lanes(builder, e, [e.get(wide)]), ir.Constant(I32, 0))
        return builder.fadd(whole, builder.load(single, typ=e.scalar))

    return one(one, types.int64, types.int64), emit


@outlined
def total_of(one, x, n):
    """The sum of n items."""
    return _total_of(one, x, n)


@intrinsic
def _compare_tops(context, one, n, top, new_top, safe):
    def emit(context, builder, signature, args):
        _, n, top, new_top, safe = args
        e = Emitter(builder, signature.args[0])
        tops, new_tops, safes = e.pointer(top), e.pointer(new_top), e.pointer(safe)
        best = e.accumulator(e.constant(0.0))
        lowest, nothing, little = e.constant(-np.inf), e.constant(0.0), e.constant(1e-30)
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), n, ir.Constant(I64, e.lanes)) as (j, _):
            old, new = e.load(e.at(tops, j)), e.load(e.at(new_tops, j))
            e.store(builder.select(builder.fcmp_ordered(">", new, lowest), new, nothing), e.at(safes, j))
            rise = builder.select(builder.fcmp_ordered(">", old, lowest), builder.fsub(new, old), little)
            rise = builder.select(builder.fcmp_ordered(">", new, old), rise, nothing)
            builder.store(e.larger(e.get(best), rise), best)
        return e.largest(e.get(best))

    return one(one, *[types.int64] * 4), emit


@outlined
def compare_tops(one, n, top, new_top, safe):
    """Return the largest rise from top to new_top, positive if any top rose. safe = new_top with 0 for -inf."""
    return _compare_tops(one, n, top, new_top, safe)


@intrinsic
def _take_tops(context, one, n, top, new_top, factors):
    def emit(context, builder, signature, args):
        _, n, top, new_top, factors = args
        e = Emitter(builder, signature.args[0])
        tops, new_tops, results = e.pointer(top), e.pointer(new_top), e.pointer(factors)
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), n, ir.Constant(I64, e.lanes)) as (j, _):
            old, new = e.load(e.at(tops, j)), e.load(e.at(new_tops, j))
            rose = builder.fcmp_ordered(">", new, old)
            factor = builder.select(rose, e.exp2(builder.fsub(old, new)), e.constant(1.0))
            e.store(factor, e.at(results, j))
            e.store(builder.select(rose, new, old), e.at(tops, j))
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 4), emit


@outlined
def take_tops(one, n, top, new_top, factors):
    """factors = 2**(top - new_top) for tops that rise, or else 1; top = the larger of both."""
    _take_tops(one, n, top, new_top, factors)
