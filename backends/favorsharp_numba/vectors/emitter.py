"""Emits LLVM code for vectors of one dtype. The inner loops in the other files of this folder are written with it."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from favorsharp_numba.vectors.compiling import num_vectors, processor_features, vector_bytes

BYTES = vector_bytes()
"""The width of a vector."""
VECTORS = num_vectors()
"""The number of vectors side by side in a register tile."""

LOG2E = 1 / np.log(2)

HALVES = bool({"f16c", "neon", "fullfp16"} & processor_features())
"""Whether the processor has instructions that convert float16; loading and storing of float16 is not compiled
otherwise."""

MASKS = BYTES == 64
"""Whether the processor loads parts of vectors under a mask; otherwise the compiler would load item by item."""

CACHE_LINE = 64
"""The number of bytes that one prefetch loads into the cache."""

I32, I64 = ir.IntType(32), ir.IntType(64)


_MANGLED = {"half": "f16", "i16": "i16", "float": "f32", "double": "f64"}


class Emitter:
    """Emits instructions into a builder, for vectors of the dtype of `one`, a Numba type."""

    def __init__(self, builder, one):
        self.b = builder
        self.single = one == types.float32
        self.scalar = ir.FloatType() if self.single else ir.DoubleType()
        self.item = 4 if self.single else 8
        self.lanes = BYTES // self.item
        self.vector = ir.VectorType(self.scalar, self.lanes)
        self.integer = ir.VectorType(I32 if self.single else I64, self.lanes)

    def constant(self, value):
        """A constant in every lane."""
        value = float(np.float32(value)) if self.single else float(value)
        return ir.Constant(self.vector, [value] * self.lanes)

    def pointer(self, place):
        """The pointer to a place (`vectors/blocks.py`)."""
        return self.b.inttoptr(self.b.mul(place, ir.Constant(I64, self.item)), ir.PointerType())

    def at(self, pointer, offset):
        """The pointer that many items after another one."""
        if isinstance(offset, int):
            offset = ir.Constant(I64, offset)
        return self.b.gep(pointer, [offset], source_etype=self.scalar)

    def load(self, pointer, kind=None):
        """Load a vector of items side by side, or an item of another kind."""
        value = self.b.load(pointer, typ=kind or self.vector)
        value.align = self.item
        return value

    def first(self, count):
        """The mask of the first `count` lanes."""
        order = ir.Constant(ir.VectorType(I64, self.lanes), list(range(self.lanes)))
        return self.b.icmp_signed("<", order, self.filled(count))

    def masked_load(self, pointer, mask, item, align):
        """Load the lanes of a mask as items of a type; the other lanes are 0."""
        kind = ir.VectorType(item, self.lanes)
        name = f"llvm.masked.load.v{self.lanes}{_MANGLED[str(item)]}.p0"
        signature = ir.FunctionType(kind, [ir.PointerType(), I32, mask.type, kind])
        function = cgutils.get_or_insert_function(self.b.module, signature, name)
        nothing = ir.Constant(kind, [0] * self.lanes)
        return self.b.call(function, [pointer, ir.Constant(I32, align), mask, nothing])

    def store(self, value, pointer, *, stream=False):
        """Store a vector or an item. With `stream` it goes past the caches; then the pointer is a multiple of BYTES."""
        instruction = self.b.store(value, pointer)
        instruction.align = BYTES if stream else self.item
        if stream:
            instruction.set_metadata("nontemporal", self.b.module.add_metadata([ir.Constant(I32, 1)]))

    def broadcast(self, pointer):
        """Load one item into every lane."""
        return self.filled(self.load(pointer, self.scalar))

    def filled(self, value):
        """A scalar in every lane."""
        undefined = ir.Constant(ir.VectorType(value.type, self.lanes), ir.Undefined)
        first = self.b.insert_element(undefined, value, ir.Constant(I32, 0))
        order = ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes)
        return self.b.shuffle_vector(first, undefined, order)

    def multiply_add(self, x, y, z):
        """x y + z, in one instruction if the processor has it."""
        name = f"llvm.fmuladd.v{self.lanes}f{8 * self.item}"
        function = cgutils.get_or_insert_function(self.b.module, ir.FunctionType(self.vector, [self.vector] * 3), name)
        return self.b.call(function, [x, y, z])

    def larger(self, x, y):
        """The larger of x and y in each lane; if one is NaN, the other."""
        return self.b.select(self.b.fcmp_ordered(">", y, x), y, x)

    def largest(self, x):
        """The largest lane of a vector without NaN."""
        name = f"llvm.vector.reduce.fmax.v{self.lanes}f{8 * self.item}"
        reduce = cgutils.get_or_insert_function(self.b.module, ir.FunctionType(self.scalar, [self.vector]), name)
        return self.b.call(reduce, [x], fastmath=("nnan",))

    def add_with_low(self, x, low, value):
        """x + low + value, as a rounded sum and the part that the rounding took off. NaN if the sum is not finite.

        The second part is exact if value is smaller than x; otherwise its error is the rounding error of value + low.
        """
        value = self.b.fadd(value, low)
        total = self.b.fadd(x, value)
        return total, self.b.fsub(value, self.b.fsub(total, x))

    def exp2(self, y, *, above=False):
        """2**y, or NaN if y is NaN. The result is exactly 0 below the range of normal numbers.

        Adding 1.5 * 2**23 rounds y to an integer, which is then in the low bits of the sum. With the bias of the
        exponent added as well, a shift moves these bits to where they are the power of two itself, or 0.

        `above` says that y may be larger than 0. Then half of the power is computed and doubled, because the power
        itself may leave the range near its top. Results become 0 a factor of 2 earlier at the bottom.
        """
        bits, bias, big = (23, 127, 1.5 * 2**23) if self.single else (52, 1023, 1.5 * 2**52)
        offset = bias - 1 if above else bias
        low = self.constant(-offset)
        y = self.b.select(self.b.fcmp_ordered("<", y, low), low, y)
        if above:
            top = self.constant(bias + 1)
            y = self.b.select(self.b.fcmp_ordered(">", y, top), top, y)
        magic = self.constant(big + offset)
        shifted = self.b.fadd(y, magic)
        rest = self.b.fsub(y, self.b.fsub(shifted, magic))
        coefficients = POWERS[4 if self.single else 8]
        value = self.constant(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            value = self.multiply_add(value, rest, self.constant(coefficient))
        shift = ir.Constant(self.integer, [bits] * self.lanes)
        power = self.b.bitcast(self.b.shl(self.b.bitcast(shifted, self.integer), shift), self.vector)
        value = self.b.fmul(value, power)
        return self.b.fadd(value, value) if above else value

    def accumulator(self, value):
        """A variable that holds a vector or an item."""
        return cgutils.alloca_once_value(self.b, value)

    def get(self, accumulator):
        """The vector in a variable of `accumulator`."""
        return self.b.load(accumulator, typ=self.vector)


def prefetch(builder, address):
    """Prefetch the cache line at an address into the second-level cache. An invalid address does no harm."""
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), *[I32] * 3])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    reading, second_cache, data = (ir.Constant(I32, value) for value in (0, 2, 1))
    builder.call(function, [builder.inttoptr(address, ir.PointerType()), reading, second_cache, data])


def function_in(module, name, kinds, body):
    """The function of that name in a module; body(builder, *arguments) emits its code the first time. It returns
    nothing.
    """
    function = cgutils.get_or_insert_function(module, ir.FunctionType(ir.VoidType(), kinds), name)
    if function.is_declaration:
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        builder = ir.IRBuilder(function.append_basic_block())
        body(builder, *function.args)
        builder.ret_void()
    return function


def _power_series(degree, *, weighted):
    """The coefficients of a polynomial that approximates 2**r for |r| <= 1/2 and is exactly 1 at r = 0.

    (2**r - 1) / r is fitted at Chebyshev nodes. If `weighted`, its errors count in proportion to r, as they do in the
    result; at high degrees rounding makes that fit worse.
    """
    nodes = np.cos(np.pi * (np.arange(400) + 0.5) / 400) / 2
    slope, weights = np.expm1(nodes * np.log(2)) / nodes, np.abs(nodes) if weighted else None
    fitted = np.polynomial.chebyshev.Chebyshev.fit(nodes, slope, degree - 1, domain=[-0.5, 0.5], w=weights)
    return [1.0, *fitted.convert(kind=np.polynomial.Polynomial).coef]


POWERS = {4: _power_series(5, weighted=True), 8: _power_series(11, weighted=False)}
"""The coefficients, by item size. The error is one unit in the last place for float32, and two for float64."""
