"""Barriers of the kernels' source, each of which can be left out while kernels run.

As a script: run calls as they are, and then once more without each barrier that they come to, in a process of its own.
Under ThreadSanitizer, whose builds take long, so that all of it is done with one build of a kernel.
"""

import json
import os
import re
import signal
import sys
from bisect import bisect
from dataclasses import dataclass, replace

import shape_classes
from host_module import HostModule, Schedule, scheduled
from on_host import installed

BARRIER = re.compile(
    r"\b(?:__syncthreads|__syncwarp|wait_copies<\w+>|commit_copies|named_barrier\w*)\s*\([^(){};]*\)\s*;"
)
LINE = re.compile(r'^#line (\d+) "([^"]+)"$', re.MULTILINE)
NONE = -1
"""The number of no barrier."""

PATIENCE = 120
"""Seconds after which a call without a barrier is taken to run for ever."""


@dataclass(frozen=True)
class Site:
    """A barrier, and where it stands."""

    file: str
    line: int
    text: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.text}"


def sites(code: str) -> list[Site]:
    """Every barrier in the joined source, in order; the primitives' own definitions are none."""
    marks = list(LINE.finditer(code))
    starts = [mark.start() for mark in marks]
    found = []
    for match in BARRIER.finditer(code):
        mark = marks[bisect(starts, match.start()) - 1]
        if mark[2] != "primitives.cuh":
            line = int(mark[1]) + code.count("\n", mark.end() + 1, match.start())
            found.append(Site(mark[2], line, match[0], match.start(), match.end()))
    return found


def numbered(code: str) -> str:
    """The source with a question before each barrier, whether it stands; lines keep their numbers."""
    parts, end = [], 0
    for number, site in enumerate(sites(code)):
        parts += [code[end : site.start], f"do {{ if (host::stands({number})) {site.text} }} while (0);"]
        end = site.stop
    return "".join([*parts, code[end:]])


def noticed(number: int, schedule: Schedule, call: str, request: dict) -> bool:
    """Whether a call without a barrier fails, in whatever way; in a child, as the first report of a race ends it."""
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            with scheduled(replace(schedule, without=number)):
                run(call, request)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def run(call: str, request: dict) -> None:
    """Make a call at the shape and lengths of a request."""
    shape, lengths = (
        shape_classes.SHAPES[request["shapes"][0]],
        shape_classes.LENGTHS[request["lengths"]],
    )
    shape_classes.run(call, shape, lengths)


def main(request: str) -> None:
    """Print the barriers that the calls of a request came to, and those whose absence they noticed."""
    from favorsharp_cuda.source import source

    asked = json.loads(request)
    code = source()
    count = len(sites(code))
    schedule = Schedule("random", "random", 3)
    reached, seen = set(), set()
    HostModule.launched = set()
    with installed(numbered(code)):
        for call in asked["calls"]:
            HostModule.reached = bytearray(count)
            with scheduled(schedule):
                run(call, asked)
            here = {number for number, come in enumerate(HostModule.reached) if come}
            HostModule.reached = None
            if call == asked["calls"][0] and noticed(NONE, schedule, call, asked):
                raise SystemExit(f"{call}: fails in a child that leaves out no barrier")
            reached |= here
            seen |= {number for number in sorted(here - seen) if noticed(number, schedule, call, asked)}
    print(json.dumps({"reached": sorted(reached), "noticed": sorted(seen), "launched": sorted(HostModule.launched)}))


if __name__ == "__main__":
    main(sys.argv[1])
