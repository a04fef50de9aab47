"""Benchmarks: one script an op, `python -m benchmarks.report` for all of them."""

import os

# OpenBLAS workers spin after a call, and slow down whoever is next; read when NumPy is loaded
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")
