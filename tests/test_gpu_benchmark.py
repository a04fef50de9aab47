"""The GPU benchmark without a GPU: lower bounds, peers on the CPU, the page, and the message if it cannot run."""

import datetime
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("benchmarks.gpu")
    monkeypatch.setattr(module.peers, "compiled", lambda function: function)  # compiling takes a minute
    return module


# (causal, d, m): bytes, flops forward, nanoseconds; bytes and nanoseconds backward. Worked out by hand.
FLOORS = {
    (False, 64, 64): (512, 32_768, 0.17, 1024, 0.34),
    (False, 64, 256): (512, 131_072, 0.44, 1024, 0.87),
    (False, 128, 256): (1024, 262_144, 0.87, 2048, 1.75),
    (True, 64, 64): (768, 65_536, 0.26, 1792, 0.60),
    (True, 64, 256): (768, 237_568, 0.79, 1792, 1.83),
    (True, 128, 128): (1536, 229_376, 0.76, 3584, 1.75),
    (True, 128, 256): (1536, 442_368, 1.47, 3584, 3.33),
}


@pytest.mark.parametrize(("is_causal", "d", "m"), FLOORS)
def test_floors_are_those_counted_by_hand(gpu, is_causal, d, m):
    forward, backward = (gpu.Work(d, m, d, is_causal, passes) for passes in (False, True))
    got = (
        forward.planned_bytes,
        forward.planned_flops,
        round(1e9 * forward.floor, 2),
        backward.planned_bytes,
        round(1e9 * backward.floor, 2),
    )
    assert got == FLOORS[is_causal, d, m]
    assert gpu.Work(d, m, d, is_causal, itemsize=4).planned_bytes == 2 * forward.planned_bytes
    case = gpu.Case(2, 3, 100, d, m, is_causal, backward=True)
    assert case.floor == pytest.approx(600 * (forward.floor + backward.floor))


# window: bytes, multiplications and additions of a token with d = m = e = 64 and two bytes an item. Worked out by hand.
TOKENS = {0: (34_304, 36_864), 64: (66_816, 41_216)}


@pytest.mark.parametrize("window", TOKENS)
def test_floors_of_a_token_are_those_counted_by_hand(gpu, window):
    case = gpu.Token(2, 3, 64, 64, window)
    assert (case.work.bytes, case.work.flops) == TOKENS[window]
    assert case.floor == pytest.approx(6 * case.work.bytes / gpu.BYTES_A_SECOND)


@pytest.mark.slow
def test_every_case_is_measured_and_the_page_says_it(gpu):
    rows = list(gpu.results(gpu.QUICK, device="cpu"))
    text = gpu.page(rows, datetime.date(2026, 1, 2), "a test")
    assert text.startswith("---\norphan: true\n---\n\n# GPU benchmarks, 2026-01-02\n\nMeasured on a test.")
    for row in rows:
        if isinstance(row.case, gpu.Token):
            assert set(row.seconds) == {gpu.OURS, gpu.LANDMARKS, "torch", "torch.compile"}, row.left_out
        else:
            assert {gpu.OURS, gpu.LANDMARKS, "torch, features in memory", "exact, torch's choice"} <= set(row.seconds)
        assert f"| {row.case} | " in text
        assert f"**{row.case}**" in text
    wrong = gpu.measure(gpu.QUICK[0], device="cpu")
    assert any("fla" in why for why in wrong.left_out.values())  # not installed: named, not hidden


def test_a_wrong_peer_is_left_out(gpu, monkeypatch):
    monkeypatch.setattr(gpu.peers, "torch_attention", lambda q, k, v, rows, root: v)
    row = gpu.measure(gpu.QUICK[0], device="cpu")
    assert row.left_out["torch, features in memory"].startswith("ArithmeticError: relative error")
    assert "torch, features in memory" not in row.seconds


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["-m", "benchmarks.gpu"], ["tests/gpu/run.py"]])
def test_without_a_gpu_it_says_so_in_one_sentence(command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "needs an NVIDIA GPU" in done.stderr
