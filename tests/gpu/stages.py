"""The stages of a run, the most informative first.

Stages of a group run at the same time; stages that measure times run alone.
"""

import importlib.util
import re
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from environment import FEW_THREADS
from processes import Stage

HERE = Path(__file__).resolve().parent
CUDA_TESTS = "tests/backends/cuda"
MATRIX = ("tests/ops", "tests/test_linear_attention.py", "tests/test_streaming.py", "tests/test_regression.py")
KERNELS = r"regex:^(favorsharp::)?(walk|absorb|read|factors|scan|decode|gradient_sweep|features)"
"""The kernels whose counters are read."""

SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "SchedulerStats", "MemoryWorkloadAnalysis")
FOUND = re.compile(r"ERROR SUMMARY|^=========\s+(Invalid|Error|Race|Hazard|Barrier|Uninit|Program hit|RACECHECK)")
COUNTED = re.compile(
    r"Context \d|Duration\s|DRAM Throughput|Memory Throughput|\(SM\) Throughput|Achieved Occupancy|Hit Rate"
    r"|Registers Per Thread|Dynamic Shared Memory|Block Limit|Warp Cycles Per Issued|Eligible|==(ERROR|WARNING)=="
)


@dataclass(frozen=True)
class Settings:
    """Settings of a run: number of processes, seconds for peers, whether there is a GPU, and the bundle's kernels."""

    jobs: int = 1
    peers: float = 120
    dry: bool = False
    cubins: bool = False
    only: str = ""


def groups(settings: Settings) -> list[list[Stage]]:
    """All stages, in groups."""
    return [
        [Stage("facts", "the machine, versions, whether the backend is found", _script("facts"), 45)],
        [_compile(settings)],
        _first_answers(settings),
        [Stage("times", "time of each call, graph, host and kernel, beside floors", _script("times"), 80)],
        [_counters(settings)],
        _suite(settings),
        [_peers(settings)],
        _rest(settings),
    ]


def _script(name: str, *options: str) -> list[str]:
    return [sys.executable, str(HERE / f"{name}.py"), *options]


def _compile(settings: Settings) -> Stage:
    options = ["--jobs", str(settings.jobs), *(["--only", settings.only] if settings.only else [])]
    command = _script("compiling", *options, *(["--from-bundle"] if settings.cubins else []))
    return Stage("compile", "every instance compiles, with the registers that the table says", command, 150)


def _first_answers(settings: Settings) -> list[Stage]:
    primitives = _pytest(1, f"{CUDA_TESTS}/test_primitives.py", *_marked(settings))
    calls = _script("smoke", "--jobs", str(min(8, settings.jobs)))
    return [
        Stage("primitives", "lane layouts, conversions, copies: our reading of the PTX manual", primitives, 60),
        Stage("smoke", "each call once against float64, at seven shapes", calls, 110, FEW_THREADS),
        Stage("rounding", "whether tensor cores cut bits, and what long sums lose", _script("rounding"), 60),
        Stage("streams", "streams, threads, graphs, memory that is given back early", _script("streams"), 45),
    ]


def _counters(settings: Settings) -> Stage:
    tool = [shutil.which("ncu") or "ncu", "--clock-control", "none", "--kernel-name", KERNELS, "--launch-count", "14"]
    tool += [word for name in SECTIONS for word in ("--section", name)]
    command = [*([] if settings.dry else tool), *_script("calls", "large")]
    return Stage("counters", "what the hardware counted in the main kernels", command, 50, keeps=COUNTED.search)


def _suite(settings: Settings) -> list[Stage]:
    test = partial(_pytest, max(1, settings.jobs // 2 - 1), f"{CUDA_TESTS}/test_gpu.py", *_marked(settings), "-k")
    forward, gradients = "test_shape_classes", "gradients or captured or long or every_case"
    if settings.dry:
        forward = gradients = "memory_of_its_own"
    return [
        Stage("forward", "every call at every shape class and length", test(forward), 120, FEW_THREADS),
        Stage("gradients", "every gradient, graphs, long sequences", test(gradients), 120, FEW_THREADS),
        _sanitized(settings, "memcheck", "first", "bounds and alignment"),
        _sanitized(settings, "racecheck", "first", "races in shared memory"),
    ]


def _peers(settings: Settings) -> Stage:
    tells = "the benchmark beside torch, torch.compile and FlashAttention"
    return Stage("peers", tells, _script("peers", "--seconds", str(settings.peers)), settings.peers + 10)


def _rest(settings: Settings) -> list[Stage]:
    workers = max(1, settings.jobs // 2 - 1)
    which = "intermediate_factors" if settings.dry else "cupy or torch-cuda"
    matrix = _pytest(workers, *(MATRIX[:1] if settings.dry else MATRIX), "-k", which)
    return [
        Stage("matrix", "the laws of the library on CuPy arrays and CUDA tensors", matrix, 90, FEW_THREADS),
        _sanitized(settings, "synccheck", "first", "barriers"),
        _sanitized(settings, "initcheck", "first", "reads of memory that nothing wrote"),
        _sanitized(settings, "memcheck", "narrow", "bounds, two bytes a number"),
        _sanitized(settings, "racecheck", "wide", "races, wide points"),
    ]


def _sanitized(settings: Settings, tool: str, which: str, tells: str) -> Stage:
    path = shutil.which("compute-sanitizer") or "compute-sanitizer"
    command = [path, "--tool", tool, "--error-exitcode", "9", "--print-limit", "30"]
    if tool != "initcheck":  # it must also see the kernels that wrote the inputs
        command += ["--kernel-name", "kns=favorsharp"]
    command = [*([] if settings.dry else command), *_script("calls", which)]
    name = tool if which == "first" else f"{tool}-{which}"
    return Stage(name, tells, command, 110, FEW_THREADS, FOUND.search)


def _marked(settings: Settings) -> list[str]:
    return ["-m", "not slow and not sweep" if settings.dry else "gpu"]


def _pytest(workers: int, *options: str) -> list[str]:
    """The command of the test suite, which records each result; another process takes over if one loses its context."""
    found = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "report_lines", "--tb=short"]
    if importlib.util.find_spec("pytest_benchmark"):  # it warns if pytest-xdist is used, and warnings are errors here
        found += ["-p", "no:benchmark"]
    if importlib.util.find_spec("pytest_timeout"):
        found += ["--timeout", "90", "--timeout-method", "thread"]
    if importlib.util.find_spec("xdist"):
        found += ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "40"]
    return [*found, *options]
