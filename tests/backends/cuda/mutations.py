"""Barriers of the kernels' source, and the source without one of them."""

import re
from bisect import bisect
from dataclasses import dataclass

BARRIER = re.compile(
    r"\b(?:__syncthreads|__syncwarp|wait_copies<\w+>|commit_copies|named_barrier\w*)\s*\([^(){};]*\)\s*;"
)
KERNEL = re.compile(r"\bKERNEL\(\w+\)\s*(\w+)\s*\(")
LINE = re.compile(r'^#line (\d+) "([^"]+)"$', re.MULTILINE)


@dataclass(frozen=True)
class Site:
    """A barrier: where it stands, in which kernel (None: in a function that several may call)."""

    file: str
    line: int
    text: str
    start: int
    stop: int
    kernel: str | None

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.text}"


def sites(code: str) -> list[Site]:
    """Every barrier in the joined source, in order; the primitives' own definitions are none."""
    marks = list(LINE.finditer(code))
    starts = [mark.start() for mark in marks]
    found = []
    for match in BARRIER.finditer(code):
        mark = marks[bisect(starts, match.start()) - 1]
        file = mark[2]
        if file == "primitives.cuh":
            continue
        line = int(mark[1]) + code.count("\n", mark.end() + 1, match.start())
        found.append(
            Site(file, line, match[0], match.start(), match.end(), _kernel_at(code, mark.end(), match.start()))
        )
    return found


def _kernel_at(code: str, begin: int, at: int) -> str | None:
    """The kernel whose body encloses a position of the file that begins at `begin`."""
    top = code.rfind("\n}", begin, at)  # the end of whatever was defined before
    headers = [match for match in KERNEL.finditer(code, begin, at) if match.start() > top]
    return headers[-1][1] if headers else None


def kernels_of(code: str, file: str) -> list[str]:
    """The kernels that a file defines."""
    parts = LINE.split(code)  # text, line, file, text, line, file, text ...
    texts = {parts[i + 1]: parts[i + 2] for i in range(1, len(parts) - 1, 3)}
    return KERNEL.findall(texts[file])


def without(code: str, site: Site) -> str:
    """The source with nothing in the place of a barrier; lines keep their numbers."""
    return code[: site.start] + "(void)0;" + code[site.stop :]
