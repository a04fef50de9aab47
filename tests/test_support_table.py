"""The support table in the documentation equals the output of `favorsharp matrix`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "support.md"


@pytest.mark.slow
@pytest.mark.own_backend
def test_the_page_is_current(tmp_path):
    pytest.importorskip("jax")
    pytest.importorskip("torch")
    environment = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "PYTHONWARNINGS": "ignore",
    }
    environment.pop("FAVORSHARP_BACKEND", None)
    made = tmp_path / "support.md"
    subprocess.run(
        [sys.executable, "-m", "favorsharp.cli", "matrix", "--markdown", str(made)],
        env=environment,
        check=True,
        capture_output=True,
    )
    assert made.read_text() == PAGE.read_text()
    assert "**" not in made.read_text()  # an error above its bound
