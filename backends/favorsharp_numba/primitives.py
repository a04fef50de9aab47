"""The products and blocks in use: vector code, or plain Numba where FAVORSHARP_NUMBA_VECTORS is 0."""

from favorsharp_numba import plain, rows, vectors
from favorsharp_numba.compiling import vector_bytes

_source = vectors if vector_bytes() else plain

product = _source.product
product_ahead = _source.product_ahead
product_add = _source.product_add
product_add_ahead = _source.product_add_ahead
product_terms = _source.product_terms
product_terms_ahead = _source.product_terms_ahead
product_exp = _source.product_exp
product_exp_stream = _source.product_exp_stream
product_sums = _source.product_sums
product_sum = _source.product_sum
max_block = _source.max_block
exp_block = _source.exp_block
sum_block = _source.sum_block
scale_block = _source.scale_block
fill_before = _source.fill_before
shift_block = _source.shift_block
multiply_block = _source.multiply_block
turn_rows = (rows if vector_bytes() else plain).turn_rows
