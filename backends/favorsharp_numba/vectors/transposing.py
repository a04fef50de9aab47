"""Transposed blocks, in vector instructions.

Places, strides and block lengths are as in `vectors/blocks.py`.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from favorsharp_numba.vectors.compiling import outlined
from favorsharp_numba.vectors.emitter import I32, I64, Emitter


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
            value = e.load(e.at(source, builder.add(builder.mul(i, x_step), j)), e.scalar)
            e.store(value, e.at(target, builder.add(builder.mul(j, y_step), i)))

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
