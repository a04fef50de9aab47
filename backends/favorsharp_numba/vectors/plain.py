"""The products and blocks in plain Numba, for processors whose vectors nobody has tried.

The environment variable FAVORSHARP_NUMBA_VECTORS=0 selects them.
"""

import numpy as np

from favorsharp_numba.vectors.blocks import get, lanes, put
from favorsharp_numba.vectors.compiling import num_vectors, outlined

_VECTORS = num_vectors()


@outlined
def _sum(one, i, j, k, a, a_row, a_step, b, b_panel, b_step):
    width = _VECTORS * lanes(one)
    right = b + j // width * b_panel + j % width
    total = one - one
    for step in range(k):
        total += get(one, a + i * a_row + step * a_step) * get(one, right + step * b_step)
    return total


@outlined
def product(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row):
    for i in range(m):
        for j in range(n):
            put(one, c + i * c_row + j, _sum(one, i, j, k, a, a_row, a_step, b, b_panel, b_step))


@outlined
def product_add(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row):
    for i in range(m):
        for j in range(n):
            place = c + i * c_row + j
            put(one, place, get(one, place) + _sum(one, i, j, k, a, a_row, a_step, b, b_panel, b_step))


@outlined
def product_take(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, low, ahead):
    for i in range(m):
        for j in range(n):
            place, low_place = c + i * c_row + j, low + i * c_row + j
            value = get(one, low_place) + _sum(one, i, j, k, a, a_row, a_step, b, b_panel, b_step)
            held = get(one, place)
            total = held + value
            put(one, place, total)
            put(one, low_place, value - (total - held))


@outlined
def product_terms(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    for i in range(m):
        for j in range(n):
            terms = get(one, row + i) + get(one, column + j)
            put(one, c + i * c_row + j, terms + _sum(one, i, j, k, a, a_row, a_step, b, b_panel, b_step))


@outlined
def product_exp(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column):
    for i in range(m):
        for j in range(n):
            terms = get(one, row + i) + get(one, column + j)
            put(one, c + i * c_row + j, np.exp(terms + _sum(one, i, j, k, a, a_row, a_step, b, b_panel, b_step)))


product_exp_stream = product_exp


# plain code leaves it to the processor to bring memory nearer


@outlined
def product_ahead(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, ahead):
    product(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row)


@outlined
def product_add_ahead(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, ahead):
    product_add(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row)


@outlined
def product_terms_ahead(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column, ahead):
    product_terms(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, c, c_row, row, column)


@outlined
def product_sums(one, m, n, k, a, a_row, a_step, b, b_panel, b_step, row, column, sums, ahead):
    for i in range(m):
        weight, other = get(one, sums.weight + i * sums.weight_step), get(one, sums.other + i * sums.other_step)
        for j in range(n):
            value = get(one, row + i) + get(one, column + j) + _sum(one, i, j, k, a, a_row, a_step, b, b_panel, b_step)
            if value > get(one, sums.largest + j):
                put(one, sums.largest + j, value)
            power = np.exp2(value)
            put(one, sums.total + j, get(one, sums.total + j) + power * weight)
            put(one, sums.other_total + j, get(one, sums.other_total + j) + power * other)


product_sum = product_sums


@outlined
def max_block(one, x, step, rows, n, shift, shift_step, first, top):
    for j in range(n):
        best = get(one, first + j)
        for i in range(rows):
            value = get(one, x + i * step + j) + get(one, shift + i * shift_step)
            if value > best:
                best = value
        put(one, top + j, best)  # at the end: x may lie there


@outlined
def exp_block(one, x, step, rows, n, shift, shift_step, top, weight, weight_step, total):
    for i in range(rows):
        for j in range(n):
            place = x + i * step + j
            value = np.exp2(get(one, place) + get(one, shift + i * shift_step) - get(one, top + j))
            put(one, place, value)
            put(one, total + j, get(one, total + j) + value * get(one, weight + i * weight_step))


@outlined
def sum_block(one, x, step, rows, n, weight, weight_step, total):
    for i in range(rows):
        for j in range(n):
            value = get(one, x + i * step + j) * get(one, weight + i * weight_step)
            put(one, total + j, get(one, total + j) + value)


@outlined
def scale_block(one, x, step, rows, n, factor, column_factor, y, y_step):
    for i in range(rows):
        for j in range(n):
            value = get(one, x + i * step + j) * get(one, column_factor + j) * get(one, factor + i)
            put(one, y + i * y_step + j, value)


@outlined
def fill_before(one, x, step, rows, n, first, value):
    for i in range(rows):
        for j in range(min(n, first + i)):
            put(one, x + i * step + j, value)


@outlined
def shift_block(one, x, step, rows, n, factor, shift, squares):
    for j in range(n):
        put(one, squares + j, one - one)
    for i in range(rows):
        for j in range(n):
            value = get(one, x + i * step + j) * get(one, factor) + get(one, shift + i)
            put(one, x + i * step + j, value)
            put(one, squares + j, get(one, squares + j) + value * value)


@outlined
def multiply_block(one, x, step, rows, n, y, total):
    for i in range(rows):
        for j in range(n):
            value = get(one, x + i * step + j) * get(one, y + i * step + j)
            put(one, x + i * step + j, value)
            put(one, total + j, get(one, total + j) + value)


@outlined
def turn_rows(one, kv, new_kv, m, n, old, new, weight, v, numerator):
    for j in range(n):
        total = one - one
        for i in range(m):
            value = get(one, kv + i * n + j) * get(one, old + i) + get(one, v + j) * get(one, new + i)
            put(one, new_kv + i * n + j, value)
            total += get(one, weight + i) * value
        put(one, numerator + j, total)
