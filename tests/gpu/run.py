"""Run the kernels on a GPU in stages with time limits, the most informative first; a failure does not end the run.

    python3 tests/gpu/run.py [--out FOLDER] [--seconds 540] [--stages facts,compile,...] [--dry]

It is meant for a machine with a GPU and without a network; see README.md in this folder. Findings are written to disk
at once, so a run may be stopped at any time.
"""

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import environment
import page
import processes
import stages
from processes import Outcome, Stage
from records import ROOT, append

RESERVE = 6
"""Seconds that are kept for the end."""

SHORTEST = 5
"""A stage is not begun with fewer seconds left."""


class Run:
    """A run: groups of stages, the folder of its findings, and its time limit.

    Parameters
    ----------
    out, work, bundle : Path
        Folders: of findings, of caches and unpacked wheels, and of what `bundle.py` made.
    seconds : float
        The limit of the whole run. `dry` says that there is no GPU.
    """

    def __init__(self, out: Path, work: Path, bundle: Path, seconds: float, dry: bool = False) -> None:
        self.out, self.work, self.bundle, self.dry = out, work, bundle, dry
        out.mkdir(parents=True, exist_ok=True)
        self.records = out / "records.jsonl"
        self.start = time.monotonic()
        self.ends = self.start + seconds - RESERVE
        self.stopped = threading.Event()
        self._one_line = threading.Lock()
        environment.lay_out(work / "site", bundle)

    def all(self, groups: Sequence[Sequence[Stage]]) -> int:
        """Run every group; return the number of stages that did not pass."""
        outcomes: list[Outcome] = []
        with open(self.out / "log.txt", "a", buffering=1, errors="replace") as log:
            for group in groups:
                threads = [threading.Thread(target=self._one, args=(stage, log, outcomes)) for stage in group]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                page.summarise(self.records, self.out / "summary.md")
        return sum(outcome.state != "passed" for outcome in outcomes)

    def _one(self, stage: Stage, log: TextIO, outcomes: list[Outcome]) -> None:
        """Run a stage, and print how it ended."""
        left = self.ends - time.monotonic()
        if left < SHORTEST or self.stopped.is_set():
            outcome = Outcome("no time was left")
        else:
            say = self._sayer(stage.name, log)
            say("$ " + " ".join(stage.command))
            append(self.records, "begin", stage.name)
            own = environment.variables(self.work, self.bundle, self.records, stage.name, self.dry) | stage.variables
            outcome = processes.run(stage, min(stage.limit, left), ROOT, own, say, self.stopped)
            say(f"-- {outcome.state} after {outcome.seconds:.1f} s")
        outcomes.append(outcome)
        tail = [] if outcome.state == "passed" else list(outcome.tail)
        ended = {"state": outcome.state, "seconds": outcome.seconds, "kept": outcome.kept, "tail": tail}
        append(self.records, "stage", stage.name, tells=stage.tells, **ended)
        print(f"{stage.name}: {outcome.state}, {outcome.seconds:.0f} s", flush=True)

    def _sayer(self, name: str, log: TextIO) -> Callable[[str], None]:
        def say(line: str) -> None:
            with self._one_line:
                log.write(f"{time.monotonic() - self.start:7.1f} [{name}] {line}\n")

        return say


def why_not() -> str | None:
    """The reason why stages cannot run here, or None."""
    try:
        import cupy

        if not cupy.cuda.is_available():
            return "gpu-check needs an NVIDIA GPU with its driver, and CuPy finds none here."
    except ImportError:
        return "gpu-check needs an NVIDIA GPU and CuPy: pip install 'favorsharp[cuda13]'."
    return None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu" / "results", help="where findings go")
    parser.add_argument("--bundle", type=Path, default=ROOT / ".gpu", help="what bundle.py has made, if anything")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "favorsharp-gpu", help="caches")
    parser.add_argument("--seconds", type=float, default=540, help="of the whole run")
    parser.add_argument("--peers", type=float, default=120, help="seconds of the comparison with others")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--stages", default="", help="only these, separated by commas; the order stays")
    parser.add_argument("--cubins", action="store_true", help="use compiled kernels of the bundle in place of NVRTC")
    parser.add_argument("--only", default="", help="compile only instances with one of these words in their names")
    parser.add_argument("--dry", action="store_true", help="without a GPU: whether the stages start and end")
    return parser.parse_args(arguments)


def chosen(groups: list[list[Stage]], names: str) -> list[list[Stage]]:
    """The stages with these names, or all stages if there are no names."""
    known, wanted = [stage.name for group in groups for stage in group], [x for x in names.split(",") if x]
    for name in wanted:
        if name not in known:
            raise SystemExit(f"--stages has {name!r}; accepted: {', '.join(known)}")
    return [[stage for stage in group if not wanted or stage.name in wanted] for group in groups]


def main() -> int:
    """Run the stages of the command line; return the number of those that did not pass."""
    given = parse()
    reason = None if given.dry else why_not()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    out, work, bundle = (folder.resolve() for folder in (given.out, given.work, given.bundle))
    run = Run(out, work, bundle, given.seconds, given.dry)
    sys.path.append(str(work / "site"))
    signal.signal(signal.SIGTERM, lambda *_: run.stopped.set())
    signal.signal(signal.SIGINT, lambda *_: run.stopped.set())
    plan = stages.groups(stages.Settings(given.jobs, given.peers, given.dry, given.cubins, given.only))
    failed = run.all(chosen(plan, given.stages))
    print((out / "summary.md").read_text()[:9000])
    return min(failed, 100)


if __name__ == "__main__":
    sys.exit(main())
