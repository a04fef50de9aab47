"""Tops, the logarithms that sums are relative to: how they rise, in vector instructions.

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
