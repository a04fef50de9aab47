"""Tiny models with random weights, one of each architecture that is served."""

import sys
from pathlib import Path

import pytest

import favorsharp as fs

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))  # tiny.py and passages.py


@pytest.fixture(autouse=True)
def _reference():
    """Run the references, because kernels would be compiled for every dtype, and have tests of their own."""
    with fs.use("reference"):
        yield
