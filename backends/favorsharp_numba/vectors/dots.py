"""Inner products and sums along rows, in vector instructions.

Places, strides and block lengths are as in `vectors/blocks.py`.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from favorsharp_numba.vectors.compiling import outlined
from favorsharp_numba.vectors.emitter import I32, I64, Emitter
from favorsharp_numba.vectors.loops import rows_loop, steps_loop


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
            e.store(sum_lanes(builder, e, [e.get(x) for x in sums]), e.at(target, t))

    steps_loop(builder, count, sorted({e.lanes, min(4, e.lanes), 1}, reverse=True), body)


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
            value = e.load(e.at(line, j), kind)
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
