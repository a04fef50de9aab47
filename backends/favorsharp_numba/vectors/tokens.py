"""The inner loops of `decode_step`, in vector instructions: how a token changes a state, and what its query reads.

Places, strides and block lengths are as in `vectors/blocks.py`.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from favorsharp_numba.vectors.compiling import outlined
from favorsharp_numba.vectors.emitter import I32, I64, LOG2E, VECTORS, Emitter
from favorsharp_numba.vectors.rows import rows_loop, sum_lanes


@intrinsic
def _turn_tops(context, one, n, c, keys, queries, new_c, scales):
    def emit(context, builder, signature, args):
        _, n, c, keys, queries, new_c, scales = args
        e = Emitter(builder, signature.args[0])
        held, features, weights, results, factors = (e.pointer(x) for x in (c, keys, queries, new_c, scales))
        lowest, nothing, log2e = e.constant(-np.inf), e.constant(0.0), e.constant(LOG2E)
        best = e.accumulator(lowest)
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), n, ir.Constant(I64, e.lanes)) as (j, _):
            natural, key = e.load(e.at(held, j)), e.load(e.at(features, j))
            old = builder.fmul(natural, log2e)
            rose = builder.fcmp_ordered(">", key, old)
            top = builder.select(rose, key, old)
            e.store(builder.select(rose, builder.fdiv(key, log2e), natural), e.at(results, j))
            safe = builder.select(builder.fcmp_ordered(">", top, lowest), top, nothing)
            e.store(e.exp2(builder.fsub(old, safe)), e.at(factors, j))
            e.store(e.exp2(builder.fsub(key, safe)), e.at(features, j))
            weight = builder.fadd(e.load(e.at(weights, j)), top)
            e.store(weight, e.at(weights, j))
            builder.store(e.larger(e.get(best), weight), best)
        return e.largest(e.get(best))

    return one(one, *[types.int64] * 6), emit


@outlined
def turn_tops(one, n, c, keys, queries, new_c, scales):
    """Raise the tops c of a state, natural logarithms, to the log features of a key, which are to base 2.

    new_c receives the larger of both, `scales` the factors for the sums, and `keys` the features relative to the new
    tops. The log features of a query, `queries`, become the logarithms of its weights. Return the largest of these.
    """
    return _turn_tops(one, n, c, keys, queries, new_c, scales)


@intrinsic
def _turn_sums(context, one, n, z, scales, keys, weights, new_z):
    def emit(context, builder, signature, args):
        _, n, z, scales, keys, weights, new_z = args
        e = Emitter(builder, signature.args[0])
        target, *sources = (e.pointer(x) for x in (new_z, z, scales, keys, weights))
        wide, single = e.accumulator(e.constant(0.0)), cgutils.alloca_once_value(builder, ir.Constant(e.scalar, 0.0))

        def body(j, shape):
            kind = shape(e.scalar)
            held, scale, key, weight = (builder.load(e.at(place, j), typ=kind) for place in sources)
            held.align = scale.align = key.align = weight.align = e.item
            value = builder.fadd(builder.fmul(held, scale), key, flags=("contract",))
            builder.store(value, e.at(target, j)).align = e.item
            total = wide if isinstance(kind, ir.VectorType) else single
            read = builder.fmul(value, weight)
            builder.store(builder.fadd(builder.load(total, typ=kind), read, flags=("contract",)), total)

        rows_loop(builder, e, n, body)
        whole = builder.extract_element(sum_lanes(builder, e, [e.get(wide)]), ir.Constant(I32, 0))
        return builder.fadd(whole, builder.load(single, typ=e.scalar))

    return one(one, *[types.int64] * 6), emit


@outlined
def turn_sums(one, n, z, scales, keys, weights, new_z):
    """new_z = scales z + keys. Return the sum of weights times new_z."""
    return _turn_sums(one, n, z, scales, keys, weights, new_z)


def _each_part(builder, e, n, body):
    """Emit body(first column, number of vectors) for n columns. The number is 0 for those that get single items."""
    start = ir.Constant(I64, 0)
    for vectors in dict.fromkeys((VECTORS, 1, 0)):
        width = ir.Constant(I64, max(1, vectors * e.lanes))
        stop = builder.add(start, builder.mul(builder.udiv(builder.sub(n, start), width), width))
        with cgutils.for_range_slice(builder, start, stop, width) as (j, _):
            body(j, vectors)
        start = stop


@intrinsic
def _turn_rows(context, one, kv, new_kv, m, n, old, new, weight, v, numerator):
    def emit(context, builder, signature, args):
        _, kv, new_kv, m, n, old, new, weight, v, numerator = args
        e = Emitter(builder, signature.args[0])
        source, target, values, result = (e.pointer(x) for x in (kv, new_kv, v, numerator))
        scales, features, weights = (e.pointer(x) for x in (old, new, weight))

        def body(j, vectors):
            """Emit code for the columns from j on: for some vectors of them, or a single item if `vectors` is 0."""
            kind = e.vector if vectors else e.scalar
            parts = [builder.add(j, ir.Constant(I64, v * e.lanes)) for v in range(max(vectors, 1))]

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

        _each_part(builder, e, n, body)
        return context.get_dummy_value()

    return types.void(one, *[types.int64] * 9), emit


@outlined
def turn_rows(one, kv, new_kv, m, n, old, new, weight, v, numerator):
    """new_kv[i] = old[i] kv[i] + new[i] v for m rows of n items, and numerator = the sum of weight[i] new_kv[i]."""
    _turn_rows(one, kv, new_kv, m, n, old, new, weight, v, numerator)
