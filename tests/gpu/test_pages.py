"""Tests of the summary and the results page. As long as there is no results page, the docs say so."""

import page
import pytest
import tables
import tables_of_times
from records import append

pytestmark = pytest.mark.own_backend


@pytest.fixture
def folder(tmp_path):
    """A folder with the records of two runs."""
    file = tmp_path / "records.jsonl"
    card = {"name": "NVIDIA H200", "driver_version": "580.1"}
    append(file, "fact", "facts", name="card", value=card)
    append(file, "fact", "facts", name="torch sees", value={"name": "NVIDIA H200", "cuda": "13.0"})
    append(file, "fact", "facts", name="versions", value={"torch": "2.13", "numpy": "2.4"})
    append(file, "fact", "facts", name="NVRTC", value=None, said="ImportError: none")
    shape = {"shape": "float32-d64", "lengths": "n3", "library": "cupy"}
    append(file, "begin", "smoke")
    append(file, "call", "smoke", call="mended since", ok=False, said="nothing", **shape)
    append(file, "stage", "smoke", state="cut at its limit", seconds=9.0, tells="", kept=[], tail=["the last line"])
    append(file, "begin", "smoke")  # of the second call
    append(file, "call", "smoke", call="features", ok=True, error=1e-6, limit=2e-5, **shape)
    append(file, "call", "smoke", call="attention", ok=True, error=1e-5, limit=2e-5, **shape)
    append(file, "call", "smoke", call="causal", ok=False, error=0.5, limit=2e-5, **shape)
    append(file, "call", "smoke", call="decode", ok=False, said="the process ended with -11", **shape)
    append(file, "lost context", "forward", test="test_gpu.py::test_a", said="illegal | address")
    append(file, "test", "forward", test="test_gpu.py::test_a", outcome="failed", said="worker crashed")
    append(file, "test", "forward", test="test_gpu.py::test_b", outcome="failed", said="it differs")
    append(file, "test", "forward", test="test_gpu.py::test_c", outcome="passed", said="")
    append(file, "died", "times", said="a process ended with 1 before its first step", command=["times.py"])
    append(file, "ceilings", "times", bytes_a_second=1.5e12, flops_a_second=600e12, launch=2e-6)
    ends = {"seconds": 9.0, "tells": "calls", "kept": []}
    append(file, "stage", "forward", state="failed (1)", tail=[], **ends)
    append(file, "stage", "smoke", state="passed", tail=[], **ends)
    return tmp_path


def test_a_summary_says_what_was_found(folder):
    page.summarise(folder / "records.jsonl", folder / "summary.md")
    text = (folder / "summary.md").read_text()
    assert text.startswith("# A run on a GPU\n\nOn NVIDIA H200, driver 580.1, CUDA 13.0, torch 2.13.")
    assert "| smoke | passed | 9 | calls |  |" in text
    assert "| forward | failed (1) | 9 | calls | 2 failed, 1 passed |" in text
    assert "the last line" not in text  # of the first call, which the second replaces
    assert "mended since" not in text
    assert "2 are right and 2 wrong." in text
    assert "| decode | float32-d64 | n3 | cupy |  |  | the process ended with -11 |" in text
    nearest = text[text.index("Nearest") :]
    assert nearest.index("| attention |") < nearest.index("| features |")
    assert "| NVRTC | ImportError: none |" in text
    assert "| times | a process ended with 1 before its first step | ['times.py'] |" in text


def test_a_lost_context_is_one_line(folder):
    page.summarise(folder / "records.jsonl", folder / "summary.md")
    text = (folder / "summary.md").read_text()
    assert "| forward | test_gpu.py::test_a | lost the context | illegal / address |" in text
    assert text.count("test_gpu.py::test_a") == 1
    assert "| forward | test_gpu.py::test_b |  | it differs |" in text


def test_floors_are_those_of_the_card_and_the_host_is_not_in_them():
    """If a card copies half as fast, the lower bound of a call that is limited by bytes is twice as large."""
    found = {"ceilings": [{"bytes_a_second": 1.5e12, "flops_a_second": 6e14, "launch": 2e-6}], "time": []}
    times = {"call": 8e-9, "with_host": 1e-6, "host": 9e-7, "graph": 6e-9, "kernels": {"walk": [1.0, 5e-3]}}
    floors = {"bytes": 2e-9, "products": 1e-9}
    entry = {"case": "a case", "tokens": 1, "floor": 2e-9, "floors": floors, "not_finite": 0, **times}
    found["time"] = [entry, {"case": "another", "said": "RuntimeError: memory"}]
    text = "\n".join(tables_of_times.times(found))
    assert "The card copies 1.50 TB/s, multiplies 600 TFLOP/s (bfloat16), and needs 2.0 µs for an empty kernel." in text
    assert "| a case | 8 | 1e+03 | 6 | 900 | 5 | 4 | 80% | 0 |  |" in text
    assert "| another |  |  |  |  |  |  |  |  | RuntimeError: memory |" in text
    assert "- a case: walk 1 x, 0.005 µs" in text


def test_without_records_there_are_no_sections():
    found = tables.by_kind([])
    assert [section(found) for section in (*page.SECTIONS, tables.ends)] == [[]] * (len(page.SECTIONS) + 1)


def test_the_results_page_goes_into_the_docs_and_the_sentence_that_there_is_none_goes(folder, tmp_path):
    docs = tmp_path / "docs"
    (docs / "guide").mkdir(parents=True)
    (docs / "guide" / "gpu.md").write_text(f"**What has run.** {page.NOT_YET} They have been tested.\n")
    file = page.publish([folder], docs)
    day = file.name[:10]
    assert file == docs / "gpu-results" / f"{day}-nvidia-h200.md"
    text = file.read_text()
    assert text.startswith(
        f"---\norphan: true\n---\n\n# GPU results, NVIDIA H200, {day}\n\nOn NVIDIA H200, driver 580.1"
    )
    assert "2 are right and 2 wrong." in text
    said = f"*What ran on a GPU: [NVIDIA H200, {day}](../gpu-results/{file.name}).*"
    assert (docs / "guide" / "gpu.md").read_text() == f"**What has run.** {said} They have been tested.\n"
    (docs / "gpu-results" / "2026-01-02-another.md").write_text(text.replace("H200", "A100"))
    page.publish([folder], docs)
    guide = (docs / "guide" / "gpu.md").read_text()
    assert guide.count("[NVIDIA H200, ") == guide.count("[NVIDIA A100, ") == 1
    (docs / "guide" / "gpu.md").write_text("nothing")
    with pytest.raises(SystemExit, match="should say once what ran on a GPU"):
        page.publish([folder], docs)


def test_a_run_that_does_not_know_its_card_makes_no_page():
    with pytest.raises(SystemExit, match="the stage `facts` has to be among the runs"):
        page.results([{"kind": "fact", "stage": "facts", "at": 0, "name": "card", "value": None, "said": "none"}])


def test_the_docs_say_that_no_gpu_has_run_the_kernels_as_long_as_there_is_no_page():
    pages = list((page.DOCS / "gpu-results").glob("*.md"))
    text = " ".join((page.DOCS / "guide" / "gpu.md").read_text().split())
    assert (page.NOT_YET in text) is not bool(pages)


def test_no_other_page_says_so():
    """Such sentences elsewhere would become wrong once there is a results page."""
    for file in (page.ROOT / "README.md", *page.DOCS.rglob("*.md")):
        text = " ".join(file.read_text().lower().split())
        says = "no gpu has" in text
        assert says is (file == page.DOCS / "guide" / "gpu.md" and not (page.DOCS / "gpu-results").exists()), file
