"""The hot operations: one file an op, each with its contract and its reference in array API functions.

The reference is the op: accelerated implementations stand beside it in `backends/` and are compared with it.
"""
