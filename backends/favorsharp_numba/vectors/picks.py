"""How seeds are picked: distances to the nearest seed, and the candidate with the largest score.

Places, strides and block lengths are as in `vectors/blocks.py`.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from favorsharp_numba.vectors.compiling import outlined
from favorsharp_numba.vectors.emitter import I64, Emitter


@intrinsic
def _take_nearer(context, one, n, distances, squares, size, grain, number, left, owner):
    def emit(context, builder, signature, args):
        _, n, distances, squares, size, grain, number, left, owner = args
        e = Emitter(builder, signature.args[0])
        sources, owns, lefts, owners = (e.pointer(x) for x in (distances, squares, left, owner))
        size, grain, number, nothing = e.filled(size), e.filled(grain), e.filled(number), e.constant(0.0)
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), n, ir.Constant(I64, e.lanes)) as (j, _):
            value, old = e.load(e.at(sources, j)), e.load(e.at(lefts, j))
            rounding = builder.fmul(grain, builder.fadd(size, e.load(e.at(owns, j))))
            value = builder.select(builder.fcmp_ordered("<=", value, rounding), nothing, value)
            nearer = builder.fcmp_ordered("<", value, old)
            e.store(builder.select(nearer, value, old), e.at(lefts, j))
            e.store(builder.select(nearer, number, e.load(e.at(owners, j))), e.at(owners, j))
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 3, one, one, one, types.int64, types.int64), emit


@outlined
def take_nearer(one, n, distances, squares, size, grain, number, left, owner):
    """left = the smaller of left and distances, and owner = number where that is the distance, for n items.

    A squared distance is 0 if it is not larger than grain times the sum of the squared norms `size` and `squares`. A
    distance of NaN is never the smaller. n is a number of whole vectors.
    """
    _take_nearer(one, n, distances, squares, one * size, one * grain, one * number, left, owner)


@intrinsic
def _first_largest(context, one, n, x):
    def emit(context, builder, signature, args):
        _, n, x = args
        e = Emitter(builder, signature.args[0])
        source, best, owner = e.pointer(x), e.accumulator(e.constant(-np.inf)), e.accumulator(e.constant(0.0))
        order = ir.Constant(e.vector, [float(i) for i in range(e.lanes)])
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), n, ir.Constant(I64, e.lanes)) as (j, _):
            value, old = e.load(e.at(source, j)), e.get(best)
            larger = builder.fcmp_ordered(">", value, old)
            place = builder.fadd(e.filled(builder.sitofp(j, e.scalar)), order)
            builder.store(builder.select(larger, value, old), best)
            builder.store(builder.select(larger, place, e.get(owner)), owner)
        equal = builder.fcmp_ordered("==", e.get(best), e.filled(e.largest(e.get(best))))
        before = builder.fsub(e.constant(0.0), e.get(owner))
        first = e.largest(builder.select(equal, before, e.constant(-np.inf)))
        return builder.fptosi(builder.fsub(ir.Constant(e.scalar, 0.0), first), I64)

    return types.int64(one, types.int64, types.int64), emit


@outlined
def first_largest(one, n, x):
    """The position of the largest of n items, in whole vectors; of equal ones the first. NaN is never the largest."""
    return _first_largest(one, n, x)
