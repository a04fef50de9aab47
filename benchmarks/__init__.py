"""Benchmarks: one script for each kind of call; `python -m benchmarks.report` runs them all and writes the page."""
