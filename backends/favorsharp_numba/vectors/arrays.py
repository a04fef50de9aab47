"""Rows of callers' arrays: how a kernel loads and stores items of any floating dtype, in vector instructions.

Places, strides and block lengths are as in `vectors/blocks.py`.
"""

import functools

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from favorsharp_numba.vectors.compiling import outlined
from favorsharp_numba.vectors.emitter import HALVES, I32, I64, MASKS, Emitter
from favorsharp_numba.vectors.loops import rows_loop, single_rows, whole_rows

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
            cleared = _load_end_masked(rows, source, target, whole_rows(rows.b, rows.e, rows.n, body), body)
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
            single_rows(b, done, rows.n, body)
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
