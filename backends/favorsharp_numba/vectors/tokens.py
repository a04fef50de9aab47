"""The inner loops of `decode_step`, in vector instructions: features of a token, and how its query reads rows.

Places, strides and block lengths are as in `vectors/blocks.py`.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from favorsharp_numba.vectors.compiling import outlined
from favorsharp_numba.vectors.dots import products_of_rows
from favorsharp_numba.vectors.emitter import I64, LOG2E, VECTORS, Emitter
from favorsharp_numba.vectors.loops import steps_loop


@intrinsic
def _token_features(context, one, n, m, c, keys, row):
    def emit(context, builder, signature, args):
        _, n, m, c, keys, row = args
        e = Emitter(builder, signature.args[0])
        held, logarithms, result = (e.pointer(x) for x in (c, keys, row))
        lowest, nothing, log2e = e.constant(-np.inf), e.constant(0.0), e.constant(LOG2E)
        best = e.accumulator(lowest)
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), n, ir.Constant(I64, e.lanes)) as (j, _):
            top, key = builder.fmul(e.load(e.at(held, j)), log2e), e.load(e.at(logarithms, j))
            rise = builder.select(e.first(builder.sub(m, j)), builder.fsub(key, top), lowest)
            builder.store(e.larger(e.get(best), rise), best)
            safe = builder.select(builder.fcmp_ordered(">", top, lowest), top, nothing)
            e.store(e.exp2(builder.fsub(key, safe)), e.at(result, j))
        return e.largest(e.get(best))

    return one(one, *[types.int64] * 5), emit


@outlined
def token_features(one, n, m, c, keys, row):
    """row = the features of a key relative to the tops c of a state. Return how far the first m rise at most, in bits.

    c are natural logarithms, and the log features of the key, `keys`, are to base 2. A rise may be infinite, but must
    be smaller than 127 for the row to be used.
    """
    return _token_features(one, n, m, c, keys, row)


@intrinsic
def _token_weights(context, one, n, c, queries):
    def emit(context, builder, signature, args):
        _, n, c, queries = args
        e = Emitter(builder, signature.args[0])
        held, weights = e.pointer(c), e.pointer(queries)
        best, log2e = e.accumulator(e.constant(-np.inf)), e.constant(LOG2E)
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), n, ir.Constant(I64, e.lanes)) as (j, _):
            weight = e.multiply_add(e.load(e.at(held, j)), log2e, e.load(e.at(weights, j)))
            e.store(weight, e.at(weights, j))
            builder.store(e.larger(e.get(best), weight), best)
        return e.largest(e.get(best))

    return one(one, *[types.int64] * 3), emit


@outlined
def token_weights(one, n, c, queries):
    """The log features of a query become the logarithms of its weights for sums with the tops c (natural logarithms).

    Return the largest of these.
    """
    return _token_weights(one, n, c, queries)


@intrinsic
def _row_dots(context, one, x, step, count, n, weights, dots):
    def emit(context, builder, signature, args):
        _, x, step, count, n, weights, dots = args
        e = Emitter(builder, signature.args[0])
        lines, factors = e.pointer(x), e.pointer(weights)

        def pair(t, j):
            return e.load(e.at(lines, builder.add(builder.mul(t, step), j))), e.load(e.at(factors, j))

        products_of_rows(builder, e, count, n, [e.pointer(dots)], [pair])
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 6), emit


@outlined
def row_dots(one, x, step, count, n, weights, dots):
    """dots[t] = weights.x[t] for `count` rows, over n columns in whole vectors."""
    _row_dots(one, x, step, count, n, weights, dots)


@intrinsic
def _mix_rows(context, one, x, m, n, weights, mixture):
    def emit(context, builder, signature, args):
        _, x, m, n, weights, mixture = args
        e = Emitter(builder, signature.args[0])
        source, factors, result = (e.pointer(place) for place in (x, weights, mixture))

        def body(j, size):
            """Emit code for some columns from j on: whole vectors, or a single item."""
            vectors = size // e.lanes
            kind = e.vector if vectors else e.scalar
            parts = [builder.add(j, ir.Constant(I64, v * e.lanes)) for v in range(max(vectors, 1))]
            nothing = ir.Constant(kind, [0.0] * e.lanes if vectors else 0.0)
            totals = [cgutils.alloca_once_value(builder, nothing) for _ in parts]
            with cgutils.for_range(builder, m) as loop:
                line, place = builder.mul(loop.index, n), e.at(factors, loop.index)
                factor = e.broadcast(place) if vectors else e.load(place, kind)
                for part, total in zip(parts, totals, strict=True):
                    read = builder.fmul(e.load(e.at(source, builder.add(line, part)), kind), factor)
                    builder.store(builder.fadd(builder.load(total, typ=kind), read, flags=("contract",)), total)
            for part, total in zip(parts, totals, strict=True):
                e.store(builder.load(total, typ=kind), e.at(result, part))

        steps_loop(builder, n, dict.fromkeys((VECTORS * e.lanes, e.lanes, 1)), body)
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 5), emit


@outlined
def mix_rows(one, x, m, n, weights, mixture):
    """mixture = the sum of weights[i] x[i] over m rows of any number of items, n, without gaps."""
    _mix_rows(one, x, m, n, weights, mixture)
