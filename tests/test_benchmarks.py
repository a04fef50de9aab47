"""The benchmarks run: tiny sizes, so that their code cannot rot. What they measure is in docs/benchmarks.md."""

import pytest

pytestmark = [pytest.mark.own_backend, pytest.mark.slow]


def test_every_script_runs_and_every_peer_is_right(tmp_path, monkeypatch):
    pytest.importorskip("numba")
    pytest.importorskip("torch")
    import importlib
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    report = importlib.import_module("benchmarks.report")
    found = [table for script in report.SCRIPTS.values() for table in script.tables(quick=True)]
    assert len(found) >= 10
    assert not [table.left_out for table in found if table.left_out]
    assert all(seconds > 0 for table in found for seconds in table.seconds.values())
    text = report.page(found, {"x": 1.0}, 1.0, 1.0)
    assert all(table.work in text for table in found)


def test_public_calls_run(tmp_path, monkeypatch):
    pytest.importorskip("numba")
    pytest.importorskip("torch")
    import importlib
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    script = importlib.import_module("benchmarks.public_calls")
    script.main(quick=True, output=tmp_path / "calls.md")
    rows = [line for line in (tmp_path / "calls.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) >= 12
    assert not [row for row in rows if "nan" in row]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("variance", {"quick": True}),
        ("classification", {"draws": 2, "tuning_draws": 1, "m": 8, "names": ["banknote"]}),
        ("regression", {"rows": 150, "largest": 16, "seeds": 2}),
        ("draws", {"seeds": 2, "largest": 16}),
        ("long_sequences", {"quick": True}),
        ("language_model", {"quick": True}),
    ],
)
def test_every_experiment_of_the_papers_leaves_a_table_and_a_picture(name, options, tmp_path, monkeypatch):
    for needed in ("sklearn", "scipy", "matplotlib"):
        pytest.importorskip(needed)
    import importlib
    from pathlib import Path

    import numpy as np

    from favorsharp import datasets

    points = np.random.default_rng(0).standard_normal((200, 4))
    made_up = datasets.Dataset("banknote", points, (points[:, 0] > 0).astype(int), (), (0, 1), "nobody")
    monkeypatch.setattr(datasets, "fetch_banknote", lambda: made_up)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    monkeypatch.chdir(tmp_path)  # where the language model leaves its checkpoint
    importlib.import_module(f"benchmarks.paper.{name}").main(output=tmp_path, **options)
    page = name.replace("_", "-")
    text = (tmp_path / "paper" / f"_{page}.md").read_text()
    assert "nan" not in text
    assert text.count("`optimal`") >= 2
    assert (tmp_path / "_static" / f"paper-{page}.png").stat().st_size > 10_000
