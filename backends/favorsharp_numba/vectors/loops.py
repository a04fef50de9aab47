"""Loops over the items of a row: whole vectors first, and then single items."""

from llvmlite import ir
from numba.core import cgutils

from favorsharp_numba.vectors.emitter import I64


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
