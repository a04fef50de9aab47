"""Writes and reads records: each finding is a line of JSON, written at once.

Tables and pages are made from these lines.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DRY = os.environ.get("GPU_DRY") == "1"
"""Whether stages run on the CPU, through the shim: to see that they start, record and end."""

LOST = (
    *("illegal memory access", "IllegalAddress", "ILLEGAL_ADDRESS", "misaligned address", "MisalignedAddress"),
    *("MISALIGNED_ADDRESS", "unspecified launch failure", "LaunchFailure", "LAUNCH_FAILED", "device-side assert"),
    *("illegal instruction", "IllegalInstruction", "ILLEGAL_INSTRUCTION", "hardware stack error", "HardwareStackError"),
)
"""Words of errors after which every later call of the process fails too: its CUDA context is lost."""


def context_is_lost(text: str) -> bool:
    """Whether an error has destroyed the CUDA context of its process."""
    return any(words in text for words in LOST)


def append(file: Path, kind: str, stage: str, **fields: Any) -> str:
    """Append a line to a file, and return the line. Several processes may do so at once."""
    line = json.dumps({"kind": kind, "stage": stage, "at": round(time.time(), 2), **fields}, default=str)
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (line + "\n").encode())
    finally:
        os.close(handle)
    return line


def record(kind: str, *, quiet: bool = False, **fields: Any) -> None:
    """Record a finding of a stage in the file of the run, and print it."""
    line = append(Path(os.environ.get("GPU_RECORDS", os.devnull)), kind, os.environ.get("GPU_STAGE", ""), **fields)
    if not quiet:
        print(line[:600], flush=True)


def read(file: Path) -> list[dict[str, Any]]:
    """All complete lines of a file; a run that was stopped may leave an incomplete one."""
    found = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def short(error: BaseException, length: int = 300) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:length]


def with_tests() -> None:
    """Make the modules that the tests of the kernels share importable."""
    folder = ROOT / "tests" / "backends" / "cuda"
    for each in (ROOT / "tests", folder / "host", folder):
        if str(each) not in sys.path:
            sys.path.insert(0, str(each))
