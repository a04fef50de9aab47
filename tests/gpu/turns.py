"""Runs steps one after the other in a process. If it dies or loses its CUDA context, another process goes on.

So one fault is one line of the records, and not a hundred.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from processes import end_with_parent
from records import context_is_lost, record, short

LOST_CONTEXT = 88
"""The exit status of a process that has recorded that its context is lost."""


class Step(NamedTuple):
    """A function that does some work and records its findings; and the record that is made if it fails."""

    kind: str
    fields: dict[str, Any]
    do: Callable[[], None]


def parser() -> argparse.ArgumentParser:
    """The parser of options that tell a process at which step to begin; stages add options of their own."""
    options = argparse.ArgumentParser()
    options.add_argument("--first", type=int, default=0, help="number of the step to begin with")
    options.add_argument("--progress", type=Path, help="where to write which step is being done")
    return options


def main(make: Callable[[], Sequence[Step]]) -> int:
    """Do the steps that `make` returns, in a child process; return the number of processes that ended early."""
    given, _ = parser().parse_known_args()
    if given.progress is None:
        return shepherd([sys.executable, *sys.argv])
    steps = make()
    for number in range(given.first, len(steps)):
        given.progress.write_text(json.dumps([number, steps[number].kind, steps[number].fields]))
        _do(steps[number])
    return 0


def _do(step: Step) -> None:
    try:
        step.do()
    except Exception as error:
        record(step.kind, **step.fields, ok=False, said=short(error, 600))
        if context_is_lost(f"{error!r} {error} {error.__cause__!r}"):
            os._exit(LOST_CONTEXT)


def shepherd(command: Sequence[str]) -> int:
    """Start processes with `--first` and `--progress` until one reaches the last step; return how many did not."""
    first = early = 0
    with tempfile.TemporaryDirectory() as folder:
        while True:
            progress = Path(folder) / str(early)
            more = ["--first", str(first), "--progress", str(progress)]
            code = subprocess.run([*command, *more], preexec_fn=end_with_parent).returncode
            if code == 0:
                return early
            early += 1
            if not progress.exists():  # it did not reach any step, and another process would not either
                record("died", said=f"a process ended with {code} before its first step", command=command[1:])
                return early
            number, kind, fields = json.loads(progress.read_text())
            if code != LOST_CONTEXT:
                record(kind, **fields, ok=False, said=f"the process ended with {code}")
            first = number + 1
