"""Benchmarks: one script an op, `python -m benchmarks.report` for all of them."""
