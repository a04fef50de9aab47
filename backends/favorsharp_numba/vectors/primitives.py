"""The products and blocks in use: vector code, or plain Numba where FAVORSHARP_NUMBA_VECTORS is 0."""

from favorsharp_numba.vectors import blocks, plain, products, tokens
from favorsharp_numba.vectors.compiling import vector_bytes

_products, _blocks, _token = (products, blocks, tokens) if vector_bytes() else (plain,) * 3

product = _products.product
product_ahead = _products.product_ahead
product_add = _products.product_add
product_add_ahead = _products.product_add_ahead
product_take = _products.product_take
product_terms = _products.product_terms
product_terms_ahead = _products.product_terms_ahead
product_exp = _products.product_exp
product_exp_stream = _products.product_exp_stream
product_sums = _products.product_sums
product_sum = _products.product_sum
max_block = _blocks.max_block
exp_block = _blocks.exp_block
sum_block = _blocks.sum_block
scale_block = _blocks.scale_block
fill_before = _blocks.fill_before
shift_block = _blocks.shift_block
multiply_block = _blocks.multiply_block
turn_rows = _token.turn_rows
