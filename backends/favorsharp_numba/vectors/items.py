"""Single items in memory, and the sizes of items, vectors and panels, for compiled functions."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from favorsharp_numba.vectors.emitter import I64, VECTORS, Emitter


@intrinsic
def lanes(context, one):
    """The number of items in a vector; the lengths of blocks are multiples of it."""

    def emit(context, builder, signature, args):
        return ir.Constant(I64, Emitter(builder, signature.args[0]).lanes)

    return types.int64(one), emit


@intrinsic
def item_size(context, one):
    """The size of an item in bytes."""

    def emit(context, builder, signature, args):
        return ir.Constant(I64, Emitter(builder, signature.args[0]).item)

    return types.int64(one), emit


@intrinsic
def panel(context, one):
    """The number of columns of a panel (`vectors/products.py`)."""

    def emit(context, builder, signature, args):
        return ir.Constant(I64, VECTORS * Emitter(builder, signature.args[0]).lanes)

    return types.int64(one), emit


@intrinsic
def get(context, one, place):
    """The item at a place."""

    def emit(context, builder, signature, args):
        e = Emitter(builder, signature.args[0])
        value = builder.load(e.pointer(args[1]), typ=e.scalar)
        value.align = e.item
        return value

    return one(one, types.int64), emit


@intrinsic
def put(context, one, place, value):
    """Store an item at a place."""

    def emit(context, builder, signature, args):
        e = Emitter(builder, signature.args[0])
        builder.store(args[2], e.pointer(args[1])).align = e.item
        return context.get_dummy_value()

    return types.void(one, types.int64, one), emit


@intrinsic
def integer_at(context, address):
    """The 64-bit integer at an address."""

    def emit(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], ir.PointerType()), typ=I64)

    return types.int64(types.int64), emit


@intrinsic
def byte_at(context, address):
    """The byte at an address."""

    def emit(context, builder, signature, args):
        byte = builder.load(builder.inttoptr(args[0], ir.PointerType()), typ=ir.IntType(8))
        return builder.zext(byte, I64)

    return types.int64(types.int64), emit
