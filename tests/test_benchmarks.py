"""The benchmarks run: tiny sizes, so that their code cannot rot. What they measure is in docs/benchmarks.md."""

import pytest

pytestmark = [pytest.mark.own_backend, pytest.mark.slow]


def test_every_script_runs_and_every_peer_is_right(tmp_path, monkeypatch):
    pytest.importorskip("numba")
    pytest.importorskip("torch")
    import importlib
    import sys
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    report = importlib.import_module("benchmarks.report")
    found = [table for script in report.SCRIPTS.values() for table in script.tables(quick=True)]
    assert len(found) >= 10
    assert not [table.left_out for table in found if table.left_out]
    assert all(seconds > 0 for table in found for seconds in table.seconds.values())
    text = report.page(found, {"x": 1.0}, 1.0)
    assert all(table.work in text for table in found)
    assert "benchmarks" in sys.modules
