"""Loops over the columns of rows and blocks: as many at a time as fit, and then the rest in smaller steps."""

from llvmlite import ir
from numba.core import cgutils

from favorsharp_numba.vectors.emitter import I64


def steps_loop(builder, stop, sizes, body):
    """Emit body(position, size) for 0 .. stop: in steps of the first size as long as they fit, then of the next one."""
    start = ir.Constant(I64, 0)
    for size in sizes:
        width = ir.Constant(I64, size)
        end = builder.add(start, builder.mul(builder.udiv(builder.sub(stop, start), width), width))
        with cgutils.for_range_slice(builder, start, end, width) as (i, _):
            body(i, size)
        start = end


def rows_loop(builder, e, n, body):
    """Emit body(column, shape) for whole vectors and then for single items."""
    single_rows(builder, whole_rows(builder, e, n, body), n, body)


def whole_rows(builder, e, n, body):
    """Emit body(column, shape) for whole vectors. Return the column behind the last one."""
    width = ir.Constant(I64, e.lanes)
    middle = builder.mul(builder.udiv(n, width), width)
    with cgutils.for_range_slice(builder, ir.Constant(I64, 0), middle, width) as (j, _):
        body(j, lambda scalar: ir.VectorType(scalar, e.lanes))
    return middle


def single_rows(builder, start, n, body):
    """Emit body(column, shape) for single items."""
    with cgutils.for_range_slice(builder, start, n, ir.Constant(I64, 1)) as (j, _):
        body(j, lambda scalar: scalar)
