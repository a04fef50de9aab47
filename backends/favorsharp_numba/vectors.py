"""The inner loops, in vector instructions: a register tile of a matrix product, and exponentials of a block.

Numba does not use a processor's vectors for such loops by itself; here they are spelled out as LLVM vectors, of the
width that `compiling.vector_bytes` names. `plain.py` has the same functions in plain Numba.

An array is a *place*: its address divided by the size of an item, so that places are counted in items. Strides are in
items too, and block lengths are multiples of `lanes`. The dtype is that of the argument `one`.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from favorsharp_numba.compiling import jit, num_vectors, processor_features, vector_bytes

BYTES = vector_bytes() or 16
VECTORS = num_vectors()

LOG2E = 1 / np.log(2)

HALVES = bool({"f16c", "neon", "fullfp16"} & processor_features())
"""Whether the processor converts float16; otherwise the backend declines it."""

_I32, _I64 = ir.IntType(32), ir.IntType(64)


class _Emitter:
    """LLVM code for vectors of one dtype."""

    def __init__(self, builder, one):
        self.b = builder
        self.single = one == types.float32
        self.scalar = ir.FloatType() if self.single else ir.DoubleType()
        self.item = 4 if self.single else 8
        self.lanes = BYTES // self.item
        self.vector = ir.VectorType(self.scalar, self.lanes)
        self.integer = ir.VectorType(_I32 if self.single else _I64, self.lanes)

    def constant(self, value):
        value = float(np.float32(value)) if self.single else float(value)
        return ir.Constant(self.vector, [value] * self.lanes)

    def pointer(self, place):
        return self.b.inttoptr(self.b.mul(place, ir.Constant(_I64, self.item)), ir.PointerType())

    def at(self, pointer, offset):
        if isinstance(offset, int):
            offset = ir.Constant(_I64, offset)
        return self.b.gep(pointer, [offset], source_etype=self.scalar)

    def load(self, pointer):
        value = self.b.load(pointer, typ=self.vector)
        value.align = self.item
        return value

    def store(self, value, pointer, *, stream=False):
        instruction = self.b.store(value, pointer)
        instruction.align = BYTES if stream else self.item
        if stream:
            instruction.set_metadata("nontemporal", self.b.module.add_metadata([ir.Constant(_I32, 1)]))

    def broadcast(self, pointer):
        value = self.b.load(pointer, typ=self.scalar)
        value.align = self.item
        return self.filled(value)

    def filled(self, value):
        undefined = ir.Constant(self.vector, ir.Undefined)
        first = self.b.insert_element(undefined, value, ir.Constant(_I32, 0))
        order = ir.Constant(ir.VectorType(_I32, self.lanes), [0] * self.lanes)
        return self.b.shuffle_vector(first, undefined, order)

    def multiply_add(self, x, y, z):
        """x y + z, in one instruction where there is one."""
        name = f"llvm.fmuladd.v{self.lanes}f{8 * self.item}"
        function = cgutils.get_or_insert_function(self.b.module, ir.FunctionType(self.vector, [self.vector] * 3), name)
        return self.b.call(function, [x, y, z])

    def larger(self, x, y):
        """The larger one; y where x is NaN, x where y is."""
        return self.b.select(self.b.fcmp_ordered(">", y, x), y, x)

    def exp2(self, y, *, above=False):
        """2**y; NaN where y is. Exactly 0 below the range of normal numbers.

        Rounding to the nearest integer by adding 1.5 * 2**23 leaves that integer in the low bits of the sum; with the
        exponent's bias added to it as well, a shift makes those bits the power of two itself, or 0.

        `above` says that y may be above 0, where a result near the top of the range needs half the power, doubled; the
        range then ends a factor of 2 higher at the bottom.
        """
        bits, bias, big = (23, 127, 1.5 * 2**23) if self.single else (52, 1023, 1.5 * 2**52)
        offset = bias - 1 if above else bias
        low = self.constant(-offset)
        y = self.b.select(self.b.fcmp_ordered("<", y, low), low, y)
        if above:
            top = self.constant(bias + 1)
            y = self.b.select(self.b.fcmp_ordered(">", y, top), top, y)
        magic = self.constant(big + offset)
        shifted = self.b.fadd(y, magic)
        rest = self.b.fsub(y, self.b.fsub(shifted, magic))
        coefficients = POWERS[4 if self.single else 8]
        value = self.constant(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            value = self.multiply_add(value, rest, self.constant(coefficient))
        shift = ir.Constant(self.integer, [bits] * self.lanes)
        power = self.b.bitcast(self.b.shl(self.b.bitcast(shifted, self.integer), shift), self.vector)
        value = self.b.fmul(value, power)
        return self.b.fadd(value, value) if above else value

    def accumulator(self, value):
        return cgutils.alloca_once_value(self.b, value)

    def get(self, accumulator):
        return self.b.load(accumulator, typ=self.vector)


def _power_series(degree, *, weighted):
    """Coefficients of a polynomial for 2**r, |r| <= 1/2, that is 1 at 0: by interpolation at Chebyshev nodes.

    The slope from 0 is fitted; its error counts by r where `weighted`, which rounding forbids at high degrees.
    """
    nodes = np.cos(np.pi * (np.arange(400) + 0.5) / 400) / 2
    slope, weights = np.expm1(nodes * np.log(2)) / nodes, np.abs(nodes) if weighted else None
    fitted = np.polynomial.chebyshev.Chebyshev.fit(nodes, slope, degree - 1, domain=[-0.5, 0.5], w=weights)
    return [1.0, *fitted.convert(kind=np.polynomial.Polynomial).coef]


POWERS = {4: _power_series(5, weighted=True), 8: _power_series(11, weighted=False)}
"""By item size; the polynomial's own error is one unit in the last place of float32, and two of float64."""


# The matrix product --------------------------------------------------------------------------------------------------

SET, ADD, TERMS = 0, 1, 2
"""Where the sums of a product begin: at 0, at what the result holds, at row[i] + column[j]."""
STORE, EXP, STREAM = 0, 1, 2
"""What becomes of them: stored, exp stored, exp stored past the caches."""


@intrinsic(prefer_literal=True)
def _product(context, one, start, finish, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C (m, n) from A (m, k) and B (k, n), a register tile of 6, 2 or 1 rows by some vectors at a time.

    B lies in panels of VECTORS vectors, `b_panel` items apart; its rows are `b_step` apart inside a panel.
    """
    start_at, finish_by = start.literal_value, finish.literal_value

    def emit(context, builder, signature, args):
        m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column = args[3:]
        e = _Emitter(builder, signature.args[0])
        number = lambda value: ir.Constant(_I64, value)  # noqa: E731

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
            sums = []
            for r in range(rows):
                if start_at == TERMS:
                    term = e.broadcast(e.at(row_terms, r))
                    first = [builder.fadd(term, x) for x in columns]
                elif start_at == ADD:
                    first = [e.load(e.at(result_rows[r], v * e.lanes)) for v in range(vectors)]
                else:
                    first = [e.constant(0.0)] * vectors
                sums.append([e.accumulator(x) for x in first])
            with cgutils.for_range(builder, k) as loop:
                line = e.at(right, builder.mul(loop.index, b_step))
                entry = e.at(left, builder.mul(loop.index, a_step))
                factors = [e.load(e.at(line, v * e.lanes)) for v in range(vectors)]
                for r in range(rows):
                    factor = e.broadcast(e.at(entry, left_rows[r]))
                    for v in range(vectors):
                        builder.store(e.multiply_add(factor, factors[v], e.get(sums[r][v])), sums[r][v])
            for r in range(rows):
                for v in range(vectors):
                    value = e.get(sums[r][v])
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
                for rows in (6, 2, 1):
                    height = number(rows)
                    bottom = builder.add(top, builder.mul(builder.udiv(builder.sub(m, top), height), height))
                    with cgutils.for_range_slice(builder, top, bottom, height) as (i, _):
                        tile(rows, vectors, i, j)
                    top = bottom
            left_column = right_column
        return context.get_dummy_value()

    return types.void(one, start, finish, *[types.int64] * 13), emit


@jit
def product(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row):
    """C = A B."""
    _product(one, SET, STORE, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, c, c)


@jit
def product_add(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row):
    """C = C + A B."""
    _product(one, ADD, STORE, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, c, c)


@jit
def product_terms(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C = A B + row + column."""
    _product(one, TERMS, STORE, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column)


@jit
def product_exp(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C = exp(A B + row + column)."""
    _product(one, TERMS, EXP, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column)


@jit
def product_exp_stream(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C = exp(A B + row + column), past the caches: C and c_row are multiples of a vector."""
    _product(one, TERMS, STREAM, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column)


# Blocks: x has `rows` rows, `step` apart, of n columns ---------------------------------------------------------------


@intrinsic
def lanes(context, one):
    """How many items a vector holds: what block lengths are multiples of."""

    def emit(context, builder, signature, args):
        return ir.Constant(_I64, _Emitter(builder, signature.args[0]).lanes)

    return types.int64(one), emit


@intrinsic
def item_size(context, one):
    """Bytes of an item."""

    def emit(context, builder, signature, args):
        return ir.Constant(_I64, _Emitter(builder, signature.args[0]).item)

    return types.int64(one), emit


@intrinsic
def panel(context, one):
    """How many columns a panel of B has."""

    def emit(context, builder, signature, args):
        return ir.Constant(_I64, VECTORS * _Emitter(builder, signature.args[0]).lanes)

    return types.int64(one), emit


def _blocks(builder, e, n, body):
    """Emit body(first column, vectors) for columns 0 .. n, VECTORS vectors at a time and then one by one."""
    start = ir.Constant(_I64, 0)
    for vectors in dict.fromkeys((VECTORS, 1)):
        width = ir.Constant(_I64, vectors * e.lanes)
        stop = builder.add(start, builder.mul(builder.udiv(builder.sub(n, start), width), width))
        with cgutils.for_range_slice(builder, start, stop, width) as (j, _):
            body(j, vectors)
        start = stop


@intrinsic
def _max_block(context, one, x, step, rows, n, shift, shift_step, first, top):
    def emit(context, builder, signature, args):
        _, x, step, rows, n, shift, shift_step, first, top = args
        e = _Emitter(builder, signature.args[0])
        block, firsts, tops, shifts = (e.pointer(place) for place in (x, first, top, shift))

        def body(j, vectors):
            offsets = [builder.add(j, ir.Constant(_I64, v * e.lanes)) for v in range(vectors)]
            places = [e.at(tops, offset) for offset in offsets]
            best = [e.accumulator(e.load(e.at(firsts, offset))) for offset in offsets]
            with cgutils.for_range(builder, rows) as loop:
                line = e.at(block, builder.add(builder.mul(loop.index, step), j))
                term = e.broadcast(e.at(shifts, builder.mul(loop.index, shift_step)))
                for v in range(vectors):
                    value = builder.fadd(e.load(e.at(line, v * e.lanes)), term)
                    builder.store(e.larger(e.get(best[v]), value), best[v])
            for v in range(vectors):
                e.store(e.get(best[v]), places[v])

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
        e = _Emitter(builder, signature.args[0])
        block, tops, shifts, weights, totals = (e.pointer(p) for p in (x, top, shift, weight, total))

        def body(j, vectors):
            offsets = [builder.add(j, ir.Constant(_I64, v * e.lanes)) for v in range(vectors)]
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
        e = _Emitter(builder, signature.args[0])
        block, weights, totals = (e.pointer(p) for p in (x, weight, total))

        def body(j, vectors):
            places = [e.at(totals, builder.add(j, ir.Constant(_I64, v * e.lanes))) for v in range(vectors)]
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
        e = _Emitter(builder, signature.args[0])
        block, factors, columns, result = (e.pointer(p) for p in (x, factor, column_factor, y))

        def body(j, vectors):
            scales = [e.load(e.at(columns, builder.add(j, ir.Constant(_I64, v * e.lanes)))) for v in range(vectors)]
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
def _multiply_block(context, one, x, step, rows, n, y, total):
    def emit(context, builder, signature, args):
        _, x, step, rows, n, y, total = args
        e = _Emitter(builder, signature.args[0])
        block, others, totals = e.pointer(x), e.pointer(y), e.pointer(total)

        def body(j, vectors):
            places = [e.at(totals, builder.add(j, ir.Constant(_I64, v * e.lanes))) for v in range(vectors)]
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


# Rows of points: of any floating dtype, in and out -------------------------------------------------------------------

FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = 0, 1, 2, 3
"""What a row may hold."""

_ITEMS = {FLOAT16: ir.HalfType(), BFLOAT16: ir.IntType(16), FLOAT32: ir.FloatType(), FLOAT64: ir.DoubleType()}
_SIZES = {FLOAT16: 2, BFLOAT16: 2, FLOAT32: 4, FLOAT64: 8}


def _widened(builder, e, value, kind, shape):
    """A loaded value in the dtype to work in; `shape` makes a scalar type the type wanted, a vector or itself."""
    target = shape(e.scalar)
    if kind == FLOAT16:  # by way of float32: processors have no other conversion
        value, kind = builder.fpext(value, shape(ir.FloatType())), FLOAT32
    if kind == BFLOAT16:
        integers = builder.zext(value, shape(_I32))
        value = builder.bitcast(builder.shl(integers, _filled(shape(_I32), 16)), shape(ir.FloatType()))
        kind = FLOAT32
    if _ITEMS[kind] == e.scalar:
        return value
    return builder.fptrunc(value, target) if _SIZES[kind] > e.item else builder.fpext(value, target)


def _narrowed(builder, e, value, kind, shape):
    """A value in the dtype of a row, rounded to the nearest."""
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
    bits = builder.bitcast(value, shape(_I32))
    odd = builder.and_(builder.lshr(bits, _filled(shape(_I32), 16)), _filled(shape(_I32), 1))
    rounded = builder.add(bits, builder.add(odd, _filled(shape(_I32), 0x7FFF)))
    nan = builder.or_(bits, _filled(shape(_I32), 0x400000))
    kept = builder.select(builder.fcmp_unordered("uno", value, value), nan, rounded)
    return builder.trunc(builder.lshr(kept, _filled(shape(_I32), 16)), shape(ir.IntType(16)))


def _filled(type_, value):
    return ir.Constant(type_, [value] * type_.count if isinstance(type_, ir.VectorType) else value)


def _rows_loop(builder, e, n, body):
    """Emit body(column, shape) for whole vectors and then for single items."""
    width = ir.Constant(_I64, e.lanes)
    middle = builder.mul(builder.udiv(n, width), width)
    with cgutils.for_range_slice(builder, ir.Constant(_I64, 0), middle, width) as (j, _):
        body(j, lambda scalar: ir.VectorType(scalar, e.lanes))
    with cgutils.for_range_slice(builder, middle, n, ir.Constant(_I64, 1)) as (j, _):
        body(j, lambda scalar: scalar)


@intrinsic(prefer_literal=True)
def _load_rows(context, one, kind, address, step, count, n, pad, factor, offset, y):
    item = kind.literal_value

    def emit(context, builder, signature, args):
        _, _, address, step, count, n, pad, factor, offset, y = args
        e = _Emitter(builder, signature.args[0])
        offsets, factors = e.pointer(offset), e.pointer(factor)
        wide = e.broadcast(factors)
        single = builder.load(factors, typ=e.scalar)
        with cgutils.for_range(builder, count) as loop:
            source = builder.inttoptr(builder.add(address, builder.mul(loop.index, step)), ir.PointerType())
            target = e.pointer(builder.add(y, builder.mul(loop.index, pad)))

            def body(j, shape):
                value = builder.load(builder.gep(source, [j], source_etype=_ITEMS[item]), typ=shape(_ITEMS[item]))
                value.align = _SIZES[item]
                centre = builder.load(e.at(offsets, j), typ=shape(e.scalar))
                centre.align = e.item
                scale = wide if isinstance(shape(e.scalar), ir.VectorType) else single
                value = builder.fmul(_widened(builder, e, value, item, shape), scale)
                builder.store(builder.fsub(value, centre), e.at(target, j)).align = e.item

            _rows_loop(builder, e, n, body)
            with cgutils.for_range_slice(builder, n, pad, ir.Constant(_I64, 1)) as (j, _):
                builder.store(ir.Constant(e.scalar, 0.0), e.at(target, j)).align = e.item
        return context.get_dummy_value()

    return types.void(one, kind, *[types.int64] * 8), emit


@intrinsic(prefer_literal=True)
def _store_rows(context, one, kind, address, step, count, n, pad, factor, x):
    item = kind.literal_value

    def emit(context, builder, signature, args):
        _, _, address, step, count, n, pad, factor, x = args
        e = _Emitter(builder, signature.args[0])
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

            _rows_loop(builder, e, n, body)
        return context.get_dummy_value()

    return types.void(one, kind, *[types.int64] * 7), emit


@jit
def load_rows(one, kind, address, step, count, n, pad, factor, offset, y):
    """y[t, j] = x[t, j] factor[0] - offset[j], and 0 from n to pad.

    x has rows of the given kind, without gaps in them, `step` bytes apart.
    """
    if kind == 2:
        _load_rows(one, 2, address, step, count, n, pad, factor, offset, y)
    elif kind == 3:
        _load_rows(one, 3, address, step, count, n, pad, factor, offset, y)
    elif kind == 1:
        _load_rows(one, 1, address, step, count, n, pad, factor, offset, y)
    elif HALVES:
        _load_rows(one, 0, address, step, count, n, pad, factor, offset, y)


@jit
def store_rows(one, kind, address, step, count, n, pad, factor, x):
    """Store x[t, j] factor[t] to rows of the given kind, without gaps in them, `step` bytes apart."""
    if kind == 2:
        _store_rows(one, 2, address, step, count, n, pad, factor, x)
    elif kind == 3:
        _store_rows(one, 3, address, step, count, n, pad, factor, x)
    elif kind == 1:
        _store_rows(one, 1, address, step, count, n, pad, factor, x)
    elif HALVES:
        _store_rows(one, 0, address, step, count, n, pad, factor, x)


@intrinsic
def _transpose(context, one, x, x_step, rows, columns, y, y_step):
    def emit(context, builder, signature, args):
        _, x, x_step, rows, columns, y, y_step = args
        e = _Emitter(builder, signature.args[0])
        source, target = e.pointer(x), e.pointer(y)
        zero, one_item, width = (ir.Constant(_I64, value) for value in (0, 1, e.lanes))
        whole_rows, whole_columns = (builder.mul(builder.udiv(z, width), width) for z in (rows, columns))

        def shuffled(a, b, order):
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, e.lanes), order))

        def block(i, j):
            """lanes x lanes items: in each round, pairs of vectors exchange halves, quarters, ..."""
            line = e.at(source, builder.add(builder.mul(i, x_step), j))
            vectors = [e.load(e.at(line, builder.mul(ir.Constant(_I64, r), x_step))) for r in range(e.lanes)]
            half = e.lanes // 2
            while half:
                low = [r if not r & half else r - half + e.lanes for r in range(e.lanes)]
                high = [r + half if not r & half else r + e.lanes for r in range(e.lanes)]
                for r in range(e.lanes):
                    if not r & half:
                        a, b = vectors[r], vectors[r + half]
                        vectors[r], vectors[r + half] = shuffled(a, b, low), shuffled(a, b, high)
                half //= 2
            place = e.at(target, builder.add(builder.mul(j, y_step), i))
            for r, vector in enumerate(vectors):
                e.store(vector, e.at(place, builder.mul(ir.Constant(_I64, r), y_step)))

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


@jit
def transpose_block(one, x, x_step, rows, columns, y, y_step):
    """y[j, i] = x[i, j]."""
    _transpose(one, x, x_step, rows, columns, y, y_step)


@intrinsic
def _add_rows(context, one, target, size, x, step, count, factor):
    def emit(context, builder, signature, args):
        _, target, size, x, step, count, single = args
        e = _Emitter(builder, signature.args[0])
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

            _rows_loop(builder, e, size, body)
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 5, one), emit


@jit
def add_rows(one, target, size, x, step, count, factor):
    """Add rows x[t] times a factor to rows of `size` items without gaps."""
    _add_rows(one, target, size, x, step, count, factor)


@intrinsic
def _quadratic_rows(context, one, z, step, count, n, linear, first, second):
    def emit(context, builder, signature, args):
        _, z, step, count, n, linear, first, second = args
        e = _Emitter(builder, signature.args[0])
        lines, coefficients = e.pointer(z), e.pointer(linear)
        name = f"llvm.vector.reduce.fadd.v{e.lanes}f{8 * e.item}"
        reduce = cgutils.get_or_insert_function(builder.module, ir.FunctionType(e.scalar, [e.scalar, e.vector]), name)

        def body(t, rows):
            """Several rows at once: the sums of one wait for each other."""
            starts = [e.at(lines, builder.mul(builder.add(t, ir.Constant(_I64, r)), step)) for r in range(rows)]
            sums = [[e.accumulator(e.constant(0.0)) for _ in range(2)] for _ in range(rows)]
            with cgutils.for_range_slice(builder, ir.Constant(_I64, 0), n, ir.Constant(_I64, e.lanes)) as (j, _):
                coefficient = e.load(e.at(coefficients, j))
                for line, (dots, squares) in zip(starts, sums, strict=True):
                    value = e.load(e.at(line, j))
                    builder.store(e.multiply_add(value, coefficient, e.get(dots)), dots)
                    builder.store(e.multiply_add(value, value, e.get(squares)), squares)
            for r, pair in enumerate(sums):
                for total, target in zip(pair, (first, second), strict=True):
                    total = builder.call(reduce, [ir.Constant(e.scalar, 0.0), e.get(total)], fastmath=("reassoc",))
                    place = e.at(e.pointer(target), builder.add(t, ir.Constant(_I64, r)))
                    builder.store(total, place).align = e.item

        start = ir.Constant(_I64, 0)
        for rows in (4, 1):
            height = ir.Constant(_I64, rows)
            stop = builder.add(start, builder.mul(builder.udiv(builder.sub(count, start), height), height))
            with cgutils.for_range_slice(builder, start, stop, height) as (t, _):
                body(t, rows)
            start = stop
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 7), emit


@jit
def quadratic_rows(one, z, step, count, n, linear, first, second):
    """first[t] = linear.z[t], second[t] = z[t].z[t] over n columns, in whole vectors."""
    _quadratic_rows(one, z, step, count, n, linear, first, second)


@intrinsic
def _compare_tops(context, one, n, top, new_top, safe):
    def emit(context, builder, signature, args):
        _, n, top, new_top, safe = args
        e = _Emitter(builder, signature.args[0])
        tops, new_tops, safes = e.pointer(top), e.pointer(new_top), e.pointer(safe)
        best = e.accumulator(e.constant(0.0))
        lowest, nothing, little = e.constant(-np.inf), e.constant(0.0), e.constant(1e-30)
        with cgutils.for_range_slice(builder, ir.Constant(_I64, 0), n, ir.Constant(_I64, e.lanes)) as (j, _):
            old, new = e.load(e.at(tops, j)), e.load(e.at(new_tops, j))
            e.store(builder.select(builder.fcmp_ordered(">", new, lowest), new, nothing), e.at(safes, j))
            rise = builder.select(builder.fcmp_ordered(">", old, lowest), builder.fsub(new, old), little)
            rise = builder.select(builder.fcmp_ordered(">", new, old), rise, nothing)
            builder.store(e.larger(e.get(best), rise), best)
        name = f"llvm.vector.reduce.fmax.v{e.lanes}f{8 * e.item}"
        reduce = cgutils.get_or_insert_function(builder.module, ir.FunctionType(e.scalar, [e.vector]), name)
        return builder.call(reduce, [e.get(best)])

    return one(one, *[types.int64] * 4), emit


@jit
def compare_tops(one, n, top, new_top, safe):
    """Return the largest rise from top to new_top, positive where any rose; safe = new_top with 0 for -inf."""
    return _compare_tops(one, n, top, new_top, safe)


@intrinsic
def _turn_rows(context, one, kv, new_kv, m, n, old, new, weight, v, numerator):
    def emit(context, builder, signature, args):
        _, kv, new_kv, m, n, old, new, weight, v, numerator = args
        e = _Emitter(builder, signature.args[0])
        source, target, values, result = (e.pointer(x) for x in (kv, new_kv, v, numerator))
        scales, features, weights = (e.pointer(x) for x in (old, new, weight))

        def body(j, vectors):
            """Columns of whole vectors; of single items where `vectors` is 0."""
            kind = e.vector if vectors else e.scalar
            parts = [builder.add(j, ir.Constant(_I64, v * e.lanes)) for v in range(max(vectors, 1))]

            def load(pointer):
                value = builder.load(pointer, typ=kind)
                value.align = e.item
                return value

            def item(pointer):
                return e.broadcast(pointer) if vectors else load(pointer)

            held = [load(e.at(values, part)) for part in parts]
            nothing = ir.Constant(kind, [0.0] * e.lanes if vectors else 0.0)
            totals = [cgutils.alloca_once_value(builder, nothing) for _ in parts]
            with cgutils.for_range(builder, m) as loop:
                line = builder.mul(loop.index, n)
                scale, feature, factor = (item(e.at(x, loop.index)) for x in (scales, features, weights))
                for part, value, total in zip(parts, held, totals, strict=True):
                    offset = builder.add(line, part)
                    kept = builder.fmul(load(e.at(source, offset)), scale)
                    turned = builder.fadd(kept, builder.fmul(value, feature), flags=("contract",))
                    builder.store(turned, e.at(target, offset)).align = e.item
                    read = builder.fmul(turned, factor)
                    builder.store(builder.fadd(builder.load(total, typ=kind), read, flags=("contract",)), total)
            for part, total in zip(parts, totals, strict=True):
                builder.store(builder.load(total, typ=kind), e.at(result, part)).align = e.item

        start = ir.Constant(_I64, 0)
        for vectors in dict.fromkeys((VECTORS, 1, 0)):
            width = ir.Constant(_I64, max(1, vectors * e.lanes))
            stop = builder.add(start, builder.mul(builder.udiv(builder.sub(n, start), width), width))
            with cgutils.for_range_slice(builder, start, stop, width) as (j, _):
                body(j, vectors)
            start = stop
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 9), emit


@jit
def turn_rows(one, kv, new_kv, m, n, old, new, weight, v, numerator):
    """new_kv[i] = old[i] kv[i] + new[i] v for rows of n items, and numerator = sum of weight[i] new_kv[i]."""
    _turn_rows(one, kv, new_kv, m, n, old, new, weight, v, numerator)


# Single items --------------------------------------------------------------------------------------------------------


@intrinsic
def get(context, one, place):
    """The item at a place."""

    def emit(context, builder, signature, args):
        e = _Emitter(builder, signature.args[0])
        value = builder.load(e.pointer(args[1]), typ=e.scalar)
        value.align = e.item
        return value

    return one(one, types.int64), emit


@intrinsic
def put(context, one, place, value):
    """Store an item at a place."""

    def emit(context, builder, signature, args):
        e = _Emitter(builder, signature.args[0])
        builder.store(args[2], e.pointer(args[1])).align = e.item
        return context.get_dummy_value()

    return types.void(one, types.int64, one), emit


@intrinsic
def integer_at(context, address):
    """The 64-bit integer at an address."""

    def emit(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], ir.PointerType()), typ=_I64)

    return types.int64(types.int64), emit


@intrinsic
def byte_at(context, address):
    """The byte at an address."""

    def emit(context, builder, signature, args):
        byte = builder.load(builder.inttoptr(args[0], ir.PointerType()), typ=ir.IntType(8))
        return builder.zext(byte, _I64)

    return types.int64(types.int64), emit
