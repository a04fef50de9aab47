"""The benchmarks run at tiny sizes, so that a broken benchmark is noticed. docs/benchmarks.md has their results."""

import pytest

pytestmark = [pytest.mark.own_backend, pytest.mark.slow]


@pytest.fixture
def report(monkeypatch):
    """The script that writes the page."""
    for needed in ("numba", "torch", "transformers", "sklearn", "jax", "matplotlib"):
        pytest.importorskip(needed)
    import importlib
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    return importlib.import_module("benchmarks.report")


@pytest.mark.parametrize("name", ["attention", "features", "models", "estimators"])
def test_every_script_runs_and_every_peer_is_right(report, name):
    found = list(report.rows_of([name], quick=True))
    assert len(found) >= 4
    assert not [table.left_out for _, table in found if table.left_out]
    assert all(seconds == seconds for _, table in found for seconds in table.seconds.values())
    assert len({table.work for _, table in found}) == len(found)


def rows(report, others):
    """Two rows with known numbers: 10 ms beside 20 ms of other software, and 0.5 times the bound of 8 GFLOP/s."""
    table = report.measure.Table
    fast = table(
        "fast", {"favorsharp": 0.01, "other": 0.02, "kernel": 0.001}, goal=1.0, beside=("kernel",), label="fast"
    )
    slow = table("fit, n=1", {"favorsharp": 0.01, "ours": 0.005}, part=0.9, flops=4e7, own=True)
    text = report.page(
        [("attention", fast), ("features", slow)], table("the first call", {"cold": 1.0}), {"x": 1.0},
        report.measure.Bounds(8e9, 1e9), report.about(others),
    )  # fmt: skip
    return fast, slow, text


def test_the_page_says_what_was_found_and_which_goals_are_missed(report, tmp_path):
    fast, slow, text = rows(report, 0.01)
    assert "| fast | 10 | other 20 | 2.00 |  | 1 |" in text  # calls that are listed beside are not compared
    assert "| fit, n=1 | 10 | ours 5 | 0.50 | 50 % | 90 % of the bound (missed) |" in text
    assert "Of 2 goals 1 are missed" in text
    assert text.index("benchmarks.png") < text.index("Of 2 goals") < text.index("## Terms") < text.index("| fast |")
    report.picture([("attention", fast), ("features", slow)], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5_000


def test_a_ratio_compares_times_of_one_round(report):
    """The second round was disturbed in one call, and the third in both."""
    table = report.measure.table_of(
        "x", {"favorsharp": [1.0, 1.0, 4.0], "slow": [9.0, 9.0, 36.0], "other": [2.0, 8.0, 8.0]}
    )
    assert table.best == ("other", 8.0)
    assert table.ratio == 2.0


@pytest.mark.parametrize(("others", "said"), [(0.01, "1.0 per cent"), (0.2, "Disturbed"), (None, "not known")])
def test_a_run_says_whether_other_work_ran(report, others, said):
    assert said in rows(report, others)[2]


def test_the_work_of_others_is_what_is_not_ours(report, monkeypatch):
    """In 10 seconds on two processors, all processes together used 4 seconds, and this process 2."""
    taken = iter([(10.0, 3.0, 100.0), (14.0, 5.0, 110.0)])
    monkeypatch.setattr(report.measure.OtherWork, "_now", staticmethod(lambda: next(taken)))
    assert report.measure.OtherWork().part == pytest.approx(0.2)


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


def test_features_are_compared_for_both_purposes(tmp_path, monkeypatch):
    """The sets are named, so that none is downloaded.

    The best number of a row is bold, and `auto` is one of the methods.
    """
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    import importlib
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    script = importlib.import_module("benchmarks.paper.kernel_features")
    monkeypatch.setattr(script, "NAMES", ())
    script.main(output=tmp_path, seeds=1, m=16, regression_seeds=0, names=["wine"])
    rows = [row for row in (tmp_path / "paper" / "_kernel-features.md").read_text().splitlines() if "wine" in row]
    assert len(rows) == 4
    for row in rows:
        cells = [cell.strip(" *") for cell in row.split("|")[3:9]]
        assert cells[2] in cells[3:]
        assert f"**{min(cells, key=float)}**" in row


def test_encoders_are_exact_where_every_key_is_kept(monkeypatch):
    """A window over the whole text gives the exact output, and so do as many landmarks as keys.

    Frozen prototypes do not.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    import importlib
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    encoders = importlib.import_module("benchmarks.paper.encoders")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(intermediate_size=16, **sizes)
    model = transformers.BertModel(config).eval()

    def run(name, ids):
        model.set_attn_implementation(name)
        return model(ids).last_hidden_state

    ids, others = torch.randint(50, (2, 2, 12))
    unit = lambda x: torch.nn.functional.normalize(x.mean(1), dim=-1)  # noqa: E731
    encoder = encoders.Encoder("small", run, ids, others, unit)
    rows = {(row.name, row.m, row.window): row for row in encoders.measured(encoder, (12,), (0, 4, 16))}
    assert rows["window alone", 0, 16].error < 1e-5
    assert rows["window alone", 0, 4].error > 1e-3
    assert rows["landmarks", 12, 0].error < 1e-5
    assert 1e-5 < rows["frozen prototypes", 12, 0].error < 1
    text = "\n".join(encoders.lines_of(encoder.title, list(rows.values())))
    assert "| landmarks | 12 | - | 1.000 |" in text
    assert "| `optimal` | 12 | 16 |" in text


def test_the_tables_of_the_neighbours_run(monkeypatch):
    for needed in ("scipy", "torch", "typer", "matplotlib"):
        pytest.importorskip(needed)
    import importlib
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    neighbours = importlib.import_module("benchmarks.paper.neighbours")
    monkeypatch.setattr(neighbours, "SIZES", (16,))
    found = {row.split("|")[1].strip(): row.split("|")[2] for row in neighbours.errors(1)[2:-1]}
    assert float(found["landmarks"].strip(" *")) < float(found["WildCat"]) < float(found["keys drawn uniformly"])
    assert {row.count("|") for row in neighbours.times((8,), 1)[:-1]} == {3}
