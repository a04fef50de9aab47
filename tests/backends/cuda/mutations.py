"""Barriers of the kernels' source, each of which can be left out while kernels run.

As a script, it runs calls unchanged, and then once more without each barrier that they reach, each time in a child
process. It runs under ThreadSanitizer, whose builds are slow, so one build of a kernel serves all barriers.
"""

import hashlib
import json
import os
import re
import signal
import sys
import traceback
from bisect import bisect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import shape_classes
from host_module import HostModule, Schedule, scheduled
from on_host import installed

BARRIER = re.compile(
    r"\b(?:__syncthreads|__syncwarp|wait_copies<\w+>|commit_copies|named_barrier\w*)\s*\([^(){};]*\)\s*;"
)
LINE = re.compile(r'^#line (\d+) "([^"]+)"$', re.MULTILINE)
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
    """Every barrier in the joined source, in order, except in the definitions of the primitives."""
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
    """The source with a condition before each barrier, which can switch it off; lines keep their numbers."""
    parts, end = [], 0
    for number, site in enumerate(sites(code)):
        parts += [code[end : site.start], f"do {{ if (host::stands({number})) {site.text} }} while (0);"]
        end = site.stop
    return "".join([*parts, code[end:]])


def in_a_child(action: Callable[[], Any], quiet: bool) -> Any:
    """The result of an action that runs in a child process, or None if the child ends in any other way.

    Fork before any kernel has run: ThreadSanitizer takes fibers for threads, and does not watch the child of a process
    with several threads.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE)
        if quiet:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        try:
            os.write(writing, json.dumps(action()).encode())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with open(reading) as answer:
        said = answer.read()
    return None if os.waitpid(child, 0)[1] else json.loads(said)


def run(call: str, request: dict[str, Any], count: int, without: int = -1) -> dict[str, Any]:
    """Make a call with the shape and lengths of a request.

    Return its result, its launches, and the barriers that it reached.
    """
    from segments import short_segments

    shape, lengths = shape_classes.SHAPES[request["shapes"][0]], shape_classes.LENGTHS[request["lengths"]]
    HostModule.launched, HostModule.reached = set(), bytearray(count)
    lengths_cut = short_segments() if request.get("short_segments") else nullcontext()
    with lengths_cut, scheduled(Schedule("random", "random", 3, without)):
        result = shape_classes.run(call, shape, lengths)
    return {
        "result": digest(result),
        "launched": sorted(HostModule.launched),
        "reached": [number for number, come in enumerate(HostModule.reached) if come],
    }


def digest(result: Any) -> str:
    """A digest of all bits of the arrays of a result, which must be the same in every order of threads."""
    found = hashlib.sha256()
    for array in shape_classes.leaves(result):
        found.update(np.ascontiguousarray(array).view(np.uint8))
    return found.hexdigest()


def main(requests: str) -> None:
    """Print the barriers that the calls of the requests reached, those whose absence was noticed, and the kernels.

    A barrier whose absence one request has noticed is not left out again for the next.
    """
    from favorsharp_cuda.host.source import source

    code = source()
    count = len(sites(code))
    launched, reached, noticed = set(), set(), set()
    with installed(numbered(code)):
        for asked in json.loads(requests):
            shape_classes.feature_map(shape_classes.SHAPES[asked["shapes"][0]])  # once, for all the children
            for call in asked["calls"]:
                whole = in_a_child(partial(run, call, asked, count), quiet=False)
                if whole is None:
                    raise SystemExit(f"{call}: fails with every barrier in its place")
                launched.update(whole["launched"])
                reached.update(whole["reached"])
                for number in set(whole["reached"]) - noticed:
                    mutated = in_a_child(partial(run, call, asked, count, number), quiet=True)
                    if mutated is None or mutated["result"] != whole["result"]:
                        noticed.add(number)
    print(json.dumps({"launched": sorted(launched), "reached": sorted(reached), "noticed": sorted(noticed)}))


if __name__ == "__main__":
    main(sys.argv[1])
