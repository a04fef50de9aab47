"""Rows in a workspace, in vector instructions: filled, copied, scaled, and added up.

Places, strides and block lengths are as in `vectors/blocks.py`.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.emitter import I64, Emitter
from favorsharp_numba.vectors.loops import rows_loop


@intrinsic
def _fill(context, one, place, count, value):
    def emit(context, builder, signature, args):
        _, place, count, value = args
        e = Emitter(builder, signature.args[0])
        start, wide = e.pointer(place), e.filled(value)

        def body(j, shape):
            filled = wide if isinstance(shape(e.scalar), ir.VectorType) else value
            e.store(filled, e.at(start, j))

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
            e.store(e.load(e.at(source, j), shape(e.scalar)), e.at(target, j))

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
                old, value = e.load(e.at(result, j), kind), e.load(e.at(line, j), kind)
                scaled = builder.fmul(value, wide if isinstance(kind, ir.VectorType) else single)
                e.store(builder.fadd(old, scaled), e.at(result, j))

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
            value, held, lost = (e.load(e.at(place, j), kind) for place in (source, result, lows))
            value = builder.fmul(value, wide if isinstance(kind, ir.VectorType) else factor)
            total, lost = e.add_with_low(held, lost, value)
            e.store(total, e.at(result, j))
            e.store(lost, e.at(lows, j))

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
            values = [e.load(e.at(place, j), kind) for place in (left, right)]
            total, *factors = vectors if isinstance(kind, ir.VectorType) else scalars
            for value, factor in zip(values, factors, strict=True):
                total = builder.fadd(total, builder.fmul(value, factor), flags=("contract",))
            e.store(total, e.at(result, j))

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
            value = e.load(e.at(line, j), kind)
            nothing, unit = (ir.Constant(kind, [z] * e.lanes if kind == e.vector else z) for z in (0.0, 1.0))
            seen = builder.fcmp_unordered("!=", value, nothing)
            e.store(builder.select(seen, builder.fdiv(unit, value), value), e.at(line, j))

        rows_loop(builder, e, n, body)
        return context.get_dummy_value()

    return types.void(one, types.int64, types.int64), emit


@outlined
def invert(one, x, n):
    """x = 1 / x for n items, or 0 for a 0."""
    _invert(one, x, n)
