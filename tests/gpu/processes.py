"""A process with a time limit: its output goes to the log line by line, and at the limit its process group is
killed."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """The command of a process, what it finds out, its limit in seconds, and its environment variables."""

    name: str
    tells: str
    command: list[str]
    limit: float
    variables: dict[str, str] = field(default_factory=dict)
    keeps: Callable[[str], object] = lambda line: False
    """Which lines of the output belong on the results page."""


@dataclass
class Outcome:
    """How a stage ended ("passed", "failed (code)", "cut at its limit", "stopped", "cannot start"); its last lines."""

    state: str
    seconds: float = 0.0
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=25))
    kept: list[str] = field(default_factory=list)


def run(
    stage: Stage, limit: float, folder: Path, variables: dict[str, str], say: Callable[[str], None],
    stopped: threading.Event,
) -> Outcome:  # fmt: skip
    """Run a stage until it ends, reaches its limit or `stopped` is set.

    `say` is called with every line of its output.
    """
    begun, outcome = time.monotonic(), Outcome("running")
    try:
        process = subprocess.Popen(
            stage.command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", process_group=0, preexec_fn=end_with_parent,
        )  # fmt: skip
    except OSError as error:
        say(str(error))
        return Outcome("cannot start", tail=deque([str(error)]))
    reader = threading.Thread(target=_read, args=(process, stage, outcome, say), daemon=True)
    reader.start()
    try:
        while process.poll() is None and time.monotonic() - begun < limit:
            if stopped.wait(0.05):
                break
        cut = process.poll() is None
    finally:
        end_group(process)
        reader.join(3)
    code = process.poll()
    early = "stopped" if stopped.is_set() else "cut at its limit"
    outcome.state = early if cut else "passed" if code == 0 else f"failed ({code})"
    outcome.seconds = round(time.monotonic() - begun, 1)
    return outcome


def _read(process: subprocess.Popen[str], stage: Stage, outcome: Outcome, say: Callable[[str], None]) -> None:
    assert process.stdout is not None  # a pipe
    with process.stdout as lines:
        for line in lines:
            line = line.rstrip("\n")
            outcome.tail.append(line)
            if len(outcome.kept) < 200 and stage.keeps(line):
                outcome.kept.append(line)
            say(line)


def end_group(process: subprocess.Popen[str]) -> None:
    """End every process in the group of a stage: terminate them, and kill them two seconds later."""
    for number, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 1.0)):
        until = time.monotonic() + patience
        try:
            os.killpg(process.pid, number)
            while time.monotonic() < until:
                process.poll()
                os.killpg(process.pid, 0)  # raises if no process is left
                time.sleep(0.02)
        except (ProcessLookupError, PermissionError):
            return


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Called in a child before its program starts: let the system end the child when the run is killed (Linux only)."""
    if _libc is not None:
        _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
