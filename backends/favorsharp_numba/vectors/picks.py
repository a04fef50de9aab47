"""How seeds are picked: candidates that a new seed is near to, and the candidate with the largest score.

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
def any_smaller(context, one, x, y):
    """Whether any item of the vector at x is smaller than that of the vector at y."""

    def emit(context, builder, signature, args):
        e = Emitter(builder, signature.args[0])
        smaller = builder.fcmp_ordered("<", e.load(e.pointer(args[1])), e.load(e.pointer(args[2])))
        bits = ir.IntType(e.lanes)
        return builder.icmp_unsigned("!=", builder.bitcast(smaller, bits), ir.Constant(bits, 0))

    return types.boolean(one, types.int64, types.int64), emit


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
