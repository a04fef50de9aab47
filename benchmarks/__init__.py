"""Benchmarks: one script for each op; `python -m benchmarks.report` runs them all."""

import os

# OpenBLAS workers spin after a call and slow down the next peer; the variable is read when NumPy is loaded
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")
