"""Matrix products, in vector instructions: the inner loops in which kernels spend most of their time.

A product is computed by register tiles: some rows by some vectors of the result, whose sums stay in registers. The
right factor B is stored in *panels* of VECTORS vectors of columns. Places and strides are as in `vectors/blocks.py`.
"""

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from favorsharp_numba.vectors.compiling import inlined, outlined
from favorsharp_numba.vectors.emitter import CACHE_LINE, I64, LOG2E, VECTORS, Emitter, function_in, prefetch
from favorsharp_numba.vectors.loops import steps_loop

SET, ADD, TERMS, TAKE = 0, 1, 2, 3
"""How a product begins: SET at 0; ADD at the result so far; TERMS at row[i] + column[j]; TAKE at 0, and then the result
takes the product with its low parts, which are at the place `row`, in rows like those of the result."""
STORE, EXP, STREAM, SUMS, SUM, NEAREST, POWER, POWER_STREAM, NATURAL_STREAM = range(9)
"""What is done with a product: STORE it; EXP, store its exponential; STREAM, store that past the caches; SUMS, add up
the powers of two with two weights and store nothing (`ColumnSums`); SUM, the same with the second weight alone;
NEAREST, find the largest entry of each column and its row, and store nothing else; POWER, store the powers of two;
POWER_STREAM, store these past the caches; NATURAL_STREAM, store log(2) times the product past the caches."""
PAST_CACHES = (STREAM, POWER_STREAM, NATURAL_STREAM)


class Ahead(NamedTuple):
    """What is prefetched while a product runs: rows of `size` bytes, `step` bytes apart, from an address on.

    Each register tile prefetches a few cache lines: a processor drops requests that come faster than its memory answers
    (docs/design/memory-ahead.md).
    """

    address: int
    step: int
    rows: int
    size: int


NOTHING = Ahead(0, 0, 0, 0)


class ColumnSums(NamedTuple):
    """Where `product_sums` finds the weights of the rows of its result C, and where it puts sums down the columns.

    `weight` and `other` are the places of two weights for each row, with their strides. `total` and `other_total`
    receive the sums of weight * 2**C, and `largest` the largest C of each column.
    """

    weight: int
    weight_step: int
    other: int
    other_step: int
    total: int
    other_total: int
    largest: int


NO_SUMS = ColumnSums(0, 0, 0, 0, 0, 0, 0)


class _Operands(NamedTuple):
    """The arguments of `_product` in the code that it emits."""

    m: ir.Value
    n: ir.Value
    k: ir.Value
    a: ir.Value
    a_row: ir.Value
    a_step: ir.Value
    b: ir.Value
    b_panel: ir.Value
    b_step: ir.Value
    c: ir.Value
    c_row: ir.Value
    row: ir.Value
    column: ir.Value
    ahead: Ahead
    sums: ColumnSums


class _Tile(NamedTuple):
    """A register tile of the result: `rows` rows by `vectors` vectors, from row i and column j on."""

    rows: int
    vectors: int
    i: ir.Value
    j: ir.Value


@intrinsic(prefer_literal=True)
def _product(
    context, one, start, finish, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead, sums
):
    """C (m, n) from A (m, k) and B (k, n), by register tiles of 6, 4, 2 or 1 rows and several vectors, or 8 rows and
    one.

    The panels of B are `b_panel` items apart, and the rows of a panel `b_step` items. The other strides are those of
    A's and C's rows and of A's columns.
    """

    def emit(context, builder, signature, args):
        *places, ahead, sums = args[3:]
        ahead, sums = Ahead(*cgutils.unpack_tuple(builder, ahead)), ColumnSums(*cgutils.unpack_tuple(builder, sums))
        x, e = _Operands._make([*places, ahead, sums]), Emitter(builder, signature.args[0])
        # otherwise the compiler would copy the function for calls that share a constant
        builder.function.attributes.add("noduplicate")
        _each_tile(e, x, lambda tile: _compute(e, x, tile, start.literal_value, finish.literal_value))
        return context.get_dummy_value()

    return types.void(one, start, finish, *[types.int64] * 13, ahead, sums), emit


def _number(value):
    return ir.Constant(I64, value)


def _each_tile(e, x, body):
    """Emit body(tile) for tiles that cover the result: the largest that fit, then smaller ones for what is left."""

    def columns(j, width):
        vectors = width // e.lanes
        rows = (6 if vectors > 1 else 8, 4, 2, 1)
        steps_loop(e.b, x.m, rows, lambda i, height: body(_Tile(height, vectors, i, j)))

    steps_loop(e.b, x.n, dict.fromkeys(y * e.lanes for y in (VECTORS, VECTORS // 2, 1)), columns)


def _compute(e, x, tile, start, finish):
    """Compute a register tile, from its beginning (SET ...) to its end (STORE ...)."""
    _bring_share(e, x, tile)  # first: a call stores vectors from registers
    right, left, result = _corners(e, x, tile)
    left_rows = [e.b.mul(_number(r), x.a_row) for r in range(tile.rows)]
    result_rows = _lines(e, x, tile, result)
    found = _begin(e, x, tile, start, result_rows)
    _multiply_in(e, x, found, right, left, left_rows)
    if finish in (SUMS, SUM):
        _add_up(e, x.sums, tile, found, finish)
    elif finish == NEAREST:
        _keep_nearest(e, x.sums, tile, found)
    else:
        _put(e, x, tile, found, result_rows, start, finish)


def _bring_share(e, x, tile):
    """Prefetch a tile's share of the rows `ahead`. They are divided among the tiles in the first columns."""
    bottom = e.b.add(tile.i, _number(tile.rows))
    some = e.b.icmp_signed(">", x.ahead.rows, _number(0))
    with e.b.if_then(e.b.and_(some, e.b.icmp_signed("==", tile.j, _number(0)))):
        low, high = (e.b.udiv(e.b.mul(row, x.ahead.rows), x.m) for row in (tile.i, bottom))
        e.b.call(_bring(e.b.module), [x.ahead.address, x.ahead.step, low, high, x.ahead.size])


def _corners(e, x, tile):
    """The pointers to the first items of B, of A and of the result that belong to a tile."""
    panel = e.b.mul(e.b.udiv(tile.j, _number(VECTORS * e.lanes)), x.b_panel)
    inside = e.b.urem(tile.j, _number(VECTORS * e.lanes))
    right = e.pointer(e.b.add(x.b, e.b.add(panel, inside)))
    left = e.pointer(e.b.add(x.a, e.b.mul(tile.i, x.a_row)))
    return right, left, _in_result(e, x, tile, x.c)


def _in_result(e, x, tile, place):
    """The pointer to the first item of a tile, in rows like those of the result that begin at a place."""
    return e.pointer(e.b.add(place, e.b.add(e.b.mul(tile.i, x.c_row), tile.j)))


def _lines(e, x, tile, first):
    """The pointers to the rows of a tile, in rows like those of the result."""
    return [e.at(first, e.b.mul(_number(r), x.c_row)) for r in range(tile.rows)]


def _begin(e, x, tile, start, result_rows):
    """The sums of a register tile, in rows of variables that hold a vector each, before anything is added."""
    offsets = [v * e.lanes for v in range(tile.vectors)]
    if start == TERMS:
        row_terms, column_terms = e.pointer(e.b.add(x.row, tile.i)), e.pointer(e.b.add(x.column, tile.j))
        columns = [e.load(e.at(column_terms, offset)) for offset in offsets]
    found = []
    for r, line in enumerate(result_rows):
        if start == TERMS:
            term = e.broadcast(e.at(row_terms, r))
            first = [e.b.fadd(term, column) for column in columns]
        elif start == ADD:
            first = [e.load(e.at(line, offset)) for offset in offsets]
        else:
            first = [e.constant(0.0) for _ in offsets]
        found.append([e.accumulator(value) for value in first])
    return found


def _multiply_in(e, x, found, right, left, left_rows):
    """Add the products of rows of A and columns of B to the sums of a register tile."""
    with cgutils.for_range(e.b, x.k) as loop:
        line = e.at(right, e.b.mul(loop.index, x.b_step))
        entry = e.at(left, e.b.mul(loop.index, x.a_step))
        factors = [e.load(e.at(line, v * e.lanes)) for v in range(len(found[0]))]
        for totals, left_row in zip(found, left_rows, strict=True):
            factor = e.broadcast(e.at(entry, left_row))
            for total, other in zip(totals, factors, strict=True):
                e.b.store(e.multiply_add(factor, other, e.get(total)), total)


def _add_up(e, sums, tile, found, finish):
    """Add a register tile of logarithms to the sums, and to the maxima, of its columns."""
    sides = [(sums.weight, sums.weight_step), (sums.other, sums.other_step)]
    places = [e.pointer(e.b.add(place, tile.j)) for place in (sums.total, sums.other_total)]
    if finish == SUM:
        sides, places = sides[1:], places[1:]
    tops = e.pointer(e.b.add(sums.largest, tile.j))
    factors = [[_weight(e, tile, r, *side) for side in sides] for r in range(tile.rows)]
    for v in range(tile.vectors):
        top, *added = (e.load(e.at(place, v * e.lanes)) for place in (tops, *places))
        for line, own in zip(found, factors, strict=True):
            value = e.get(line[v])
            top = e.larger(top, value)
            power = e.exp2(value)
            added = [e.multiply_add(power, x, y) for x, y in zip(own, added, strict=True)]
        for value, place in zip((top, *added), (tops, *places), strict=True):
            e.store(value, e.at(place, v * e.lanes))


def _weight(e, tile, r, place, step):
    """The weight of row r of a tile, in every lane."""
    return e.broadcast(e.pointer(e.b.add(place, e.b.mul(e.b.add(tile.i, _number(r)), step))))


def _keep_nearest(e, sums, tile, found):
    """Compare a register tile with the largest entries of its columns so far, `largest`, in rows `total`."""
    bests, owners = (e.pointer(e.b.add(place, tile.j)) for place in (sums.largest, sums.total))
    first = e.b.sitofp(tile.i, e.scalar)
    owner_of = [e.filled(e.b.fadd(first, ir.Constant(e.scalar, float(r)))) for r in range(tile.rows)]
    for v in range(tile.vectors):
        best, owner = (e.load(e.at(place, v * e.lanes)) for place in (bests, owners))
        for line, own in zip(found, owner_of, strict=True):
            value = e.get(line[v])
            closer = e.b.fcmp_ordered(">", value, best)
            best, owner = e.b.select(closer, value, best), e.b.select(closer, own, owner)
        e.store(best, e.at(bests, v * e.lanes))
        e.store(owner, e.at(owners, v * e.lanes))


def _put(e, x, tile, found, result_rows, start, finish):
    """Store a register tile, or a function of it, in the result."""
    low_rows = _lines(e, x, tile, _in_result(e, x, tile, x.row)) if start == TAKE else [None] * tile.rows
    for totals, line, low_line in zip(found, result_rows, low_rows, strict=True):
        for v, total in enumerate(totals):
            value = e.get(total)
            if start == TAKE:
                place, low_place = (e.at(row, v * e.lanes) for row in (line, low_line))
                value, low = e.add_with_low(e.load(place), e.load(low_place), value)
                e.store(low, low_place)
            e.store(_finished(e, value, finish), e.at(line, v * e.lanes), stream=finish in PAST_CACHES)


def _finished(e, value, finish):
    """What is stored for a vector of the product: itself, log(2) times it, or its exponential or power of two."""
    if finish in (EXP, STREAM):
        value = e.b.fmul(value, e.constant(LOG2E))
    elif finish == NATURAL_STREAM:
        value = e.b.fmul(value, e.constant(1 / LOG2E))
    return value if finish in (STORE, NATURAL_STREAM) else e.exp2(value, above=True)


def _bring(module):
    """The function that prefetches rows low .. high, which all kinds of register tiles share."""

    def body(builder, address, step, low, high, size):
        with cgutils.for_range_slice(builder, low, high, ir.Constant(I64, 1)) as (r, _):
            line = builder.add(address, builder.mul(r, step))
            with cgutils.for_range_slice(builder, line, builder.add(line, size), ir.Constant(I64, CACHE_LINE)) as (
                place,
                _,
            ):
                prefetch(builder, place)

    return function_in(module, "favorsharp_bring", [I64] * 5, body)


@outlined
def _multiply(one, start, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead):
    _product(one, start, STORE, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead, NO_SUMS)


@inlined
def _multiplied(one, start, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead):
    """As `_multiply`. It is compiled for each start and each constant stride of A, but for no other constants."""
    m, n, k, b_step, c_row = np.int64(m), np.int64(n), np.int64(k), np.int64(b_step), np.int64(c_row)
    _multiply(one, start, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead)


@inlined
def product(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row):
    """C = A B."""
    product_ahead(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, NOTHING)


@inlined
def product_ahead(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, ahead):
    """C = A B."""
    _multiplied(one, SET, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, c, c, ahead)


@inlined
def product_add(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row):
    """C = C + A B."""
    product_add_ahead(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, NOTHING)


@inlined
def product_add_ahead(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, ahead):
    """C = C + A B."""
    _multiplied(one, ADD, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, c, c, ahead)


@inlined
def product_take(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, low, ahead):
    """C = C + A B with low parts: what rounding took off C so far is added, and what it takes off now is kept."""
    _multiplied(one, TAKE, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, low, low, ahead)


@inlined
def product_terms(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C = A B + row + column."""
    product_terms_ahead(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, NOTHING)


@inlined
def product_terms_ahead(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead):
    """C = A B + row + column."""
    _multiplied(one, TERMS, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead)


@outlined
def product_exp(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C = exp(A B + row + column)."""
    _product(one, TERMS, EXP, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, NOTHING, NO_SUMS)


@outlined
def product_exp_stream(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C = exp(A B + row + column), stored past the caches. C and c_row are multiples of a vector."""
    _product(one, TERMS, STREAM, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, NOTHING, NO_SUMS)


@outlined
def product_power(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C = 2**(A B + row + column)."""
    _product(one, TERMS, POWER, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, NOTHING, NO_SUMS)


@outlined
def product_power_stream(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C = 2**(A B + row + column), stored past the caches. C and c_row are multiples of a vector."""
    _product(
        one, TERMS, POWER_STREAM, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, NOTHING, NO_SUMS
    )  # fmt: skip


@outlined
def product_natural_stream(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    """C = log(2) (A B + row + column), stored past the caches. C and c_row are multiples of a vector."""
    _product(
        one, TERMS, NATURAL_STREAM, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, NOTHING,
        NO_SUMS,
    )  # fmt: skip


@outlined
def product_sums(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, row, column, sums, ahead):
    """Add the powers of two of A B + row + column to sums, and take maxima; no logarithm may be larger than 127."""
    _product(one, TERMS, SUMS, m, n, k, a, a_row, a_step, b, b_panel, b_step, b, b_step, row, column, ahead, sums)


@outlined
def product_sum(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, row, column, sums, ahead):
    """As `product_sums`, for the second weight alone."""
    _product(one, TERMS, SUM, m, n, k, a, a_row, a_step, b, b_panel, b_step, b, b_step, row, column, ahead, sums)


@outlined
def product_nearest(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, row, column, best, owner, ahead):
    """Compare the entries of A B + row + column with best[j], the largest of column j so far, whose row is owner[j].

    Of equal entries the first one stays. NaN is never the largest.
    """
    sums = ColumnSums(0, 0, 0, 0, owner, 0, best)
    _product(one, TERMS, NEAREST, m, n, k, a, a_row, a_step, b, b_panel, b_step, b, b_step, row, column, ahead, sums)
