"""A model of the time of the tensor-core kernels, from instructions and bytes; it has not been compared with a GPU.

`python tests/backends/cuda/issue_slots.py` compiles the kernels of bfloat16 for sm_90 and prints the tables of
docs/design/cuda-issue-slots.md. Instructions are counted in the disassembly. Each belongs to lines of the source, and
the number of iterations of the loops around it follows from the sizes. Loads of 16 bytes are assumed to be possible.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import resources

ROOT = Path(__file__).parents[3]
TILE = 64
MULTIPROCESSORS, GIGAHERTZ, BYTES_A_NANOSECOND, CACHED_A_NANOSECOND = 132, 1.755, 3000.0, 5500.0
"""Of an H100: clock under load, and what it reads from its memory and from its second-level cache."""

PIPES = {
    "tensor": (6.5, ("HMMA",)),
    "shared memory": (4.0, ("LDSM", "LDS", "STS", "LDGSTS", "SHFL", "LDG", "STG", "RED", "ATOMG")),
    "exponentials": (8.0, ("MUFU",)),
    "integers": (
        2.0,
        ("LOP3", "IADD3", "VIADD", "SHF", "LEA", "PRMT", "SEL", "ISETP", "FSETP", "FMNMX", "FSEL", "F2FP"),
    ),
}
"""Cycles of a scheduler that an instruction of a warp takes of a pipe, and the names of the instructions. Every
instruction also takes one cycle to issue. 6.5 cycles of HMMA.16816 are 60 % of the peak of a Hopper card, as is
reported of mma.sync; four warps share the path to shared memory, which moves 128 bytes a cycle."""


class Line(NamedTuple):
    """A line of the source, by file and number, and its text."""

    file: str
    number: int
    text: str


class Counted(NamedTuple):
    """An instruction, and the lines that it was made from: of the innermost inlined function first."""

    name: str
    target: str
    lines: tuple[Line, ...]


@cache
def source_of(file: str) -> tuple[str, ...]:
    """The lines of a kernel's file."""
    path = ROOT / "backends" / "favorsharp_cuda" / "kernels" / file
    return tuple(path.read_text().splitlines()) if path.exists() else ()


def read_listing(text: str, symbol: str) -> tuple[list[Counted], dict[str, int]]:
    """The instructions of a kernel, and where its labels stand, from nvdisasm with lines of inlined functions."""
    found: list[Counted] = []
    labels: dict[str, int] = {}
    lines: list[Line] = []
    inside = begins = False
    for row in text.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.(\w+)", row):
            inside = section[1] == symbol
        elif not inside:
            continue
        elif place := re.match(r'\s*//## File "(?:[^"]*/)?([^/"]+)", line (\d+)', row):
            lines = [] if begins else lines
            begins, number = False, int(place[2])
            code = source_of(place[1])
            lines.append(Line(place[1], number, code[number - 1] if number <= len(code) else ""))
        elif label := re.match(r"(\.L_\w+):", row):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*([^;]*)", row):
            target = re.search(r"\.L_\w+", instruction[2]) if instruction[1].startswith("BRA") else None
            found.append(Counted(instruction[1], target[0] if target else "", tuple(lines)))
            begins = True
    return found, labels


Rule = tuple[str, float]
"""A piece of the source's text, and how often what stands on such a line runs where the code around it runs once."""


def counts(found: list[Counted], labels: dict[str, int], loops: Iterable[Rule], lines: Iterable[Rule]) -> Counter[str]:
    """How often each instruction is issued by one warp.

    `loops` gives the iterations of a loop, which is found by the lines of the branch that closes it; other loops run
    once. `lines` gives the number of times that lines of any function around an instruction run.
    """
    weights = [1.0] * len(found)
    for at, each in enumerate(found):
        if (begin := labels.get(each.target, at + 1)) <= at:
            factor = _factor(each.lines, loops, innermost=True)
            for i in range(begin, at + 1):
                weights[i] *= factor
    total: Counter[str] = Counter()
    for each, weight in zip(found, weights, strict=True):
        total[each.name.partition(".")[0]] += weight * _factor(each.lines, lines)  # type: ignore[assignment]
    return total


def _factor(lines: Iterable[Line], rules: Iterable[Rule], innermost: bool = False) -> float:
    """The product of all rules that match; with `innermost`, the first rule that matches the innermost line."""
    lines = tuple(lines)[:1] if innermost else tuple(lines)
    factor = 1.0
    for text, times in rules:
        if any(text in line.text for line in lines):
            if innermost:
                return times
            factor *= times
    return factor


def cycles(issued: Counter[str]) -> dict[str, float]:
    """The cycles for which a warp occupies each pipe of its scheduler, and those that it needs to issue everything."""
    taken = {"issue": float(sum(issued.values()))}
    for pipe, (each, names) in PIPES.items():
        taken[pipe] = each * sum(issued[name] for name in names)
    return taken


class Sizes(NamedTuple):
    """Sizes of points, features and values."""

    d: int
    m: int
    e: int


SKIPPED = (
    *("append(", "next[n] =", "if (first + column_of(n, i) < end)"),  # of arrays that do not allow pieces
    *("mark(odd_keys", "s.read_near(", "if (p.flags & WALK", "if (enters) s.load_keys(entering"),  # of windows
    *("if (reads && !single()) copy_rows_of", "copy_rows_of(key(), tile + 1", "stages + (tile + 1) % 2"),  # one stage
    *("load_points(q, whole, first, 0, count, (int)p.d, side.root(), side.center(), points, D, unscale, sums",),  # g
    *("keep_of_blocks(pairs", "put_sums(r, n, own.x, own.y)", "// of keys that are hidden"),  # of windows and masks
)
"""Lines that do not run, or whose work is counted on another line."""


def rules_of(s: Sizes) -> tuple[list[Rule], list[Rule]]:
    """The iterations of the loops of all kernels for bfloat16, and the lines that do not run, for whole tiles."""
    lanes = max(2, 1 << (-(-s.d // 8) - 1).bit_length())
    steps = lanes.bit_length() - 1
    loops = [
        ("for (int k = 0; k < D; k += 16)", s.d / 16),
        ("for (int i = 0; i < D; i += 16)", s.d / 16),
        ("while (N << shift < D)", steps - 1),
        ("while (ITEMS<T> * lanes < D)", steps - 1),
        ("for (int i = 0; i < ITEMS<T>; i++)", 0),
        ("begin < 16; begin += IN_FLIGHT * rows", max(1, 16 // (4 * (32 // lanes)))),
        ("tile < tiles; tile++", s.m / TILE),
        ("t < high * (E / N)", TILE * s.e / 8 / 128),
        ("t < high * E", 0),
        ("j < p.m; j += TILE", s.m / TILE),
        ("(p.plane_rows - p.m_pad) / TILE", 0),
    ]
    lines = [
        *((text, 0) for text in SKIPPED),
        ("tile + 1 < tiles) copy_stage", 1 - TILE / s.m),
        ("add_part<E>(sums_of(p, again(number))", TILE / 2048),
        ("index[a] = rest % size", 2 / 8),
    ]
    return loops, lines


def listing_of(kernel: str, architecture: str = "sm_90") -> tuple[list[Counted], dict[str, int]]:
    """The disassembly of one instance."""
    from cupy_backends.cuda.libs import nvrtc

    from favorsharp_cuda.host.launch import OPTIONS
    from favorsharp_cuda.host.source import source

    program = nvrtc.createProgram(source(), "favorsharp.cu", (), ())
    nvrtc.addNameExpression(program, kernel)
    nvrtc.compileProgram(program, (f"-arch={architecture}", "-lineinfo", *OPTIONS))
    symbol = nvrtc.getLoweredName(program, kernel)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(nvrtc.getCUBIN(program) + b"\0")
        file.flush()
        command = [str(resources.disassembler()), "-c", "-gi", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return read_listing(text, symbol)


def of_tile(kernel: str, s: Sizes, body: str = "", without: str = "") -> Counter[str]:
    """What a warp issues for a tile of 64 points: the instructions of the loop that a line with the text closes, or
    all.

    Lines with the text `without` do not run.
    """
    found, labels = _listing(kernel)
    if body:
        closing = [
            (labels[x.target], i)
            for i, x in enumerate(found)
            if labels.get(x.target, i + 1) <= i and body in x.lines[0].text
        ]
        start, stop = max(closing, key=lambda pair: pair[1] - pair[0])
        labels = {name: place - start for name, place in labels.items() if start <= place <= stop}
        found = found[start : stop + 1]
    loops, lines = rules_of(s)
    return counts(found, labels, loops, [*lines, *([(without, 0)] if without else [])])


_listing = cache(listing_of)


class Share(NamedTuple):
    """The share of a kernel in a call: instructions of a warp for a tile, and nanoseconds for a token of a head."""

    kernel: str
    instructions: float
    issue: float
    busiest: str
    pipe: float
    memory: float
    cache: float

    @property
    def time(self) -> float:
        """If everything overlaps: the slowest of them."""
        return max(self.issue, self.pipe, self.memory, self.cache)


def share_of(
    kernel: str, s: Sizes, body: str, times: float, memory: float, cached: float, label: str = "", without: str = ""
) -> Share:
    """A kernel that runs `times` times for a token, and moves bytes of memory and of the second-level cache."""
    issued = of_tile(f"favorsharp::{kernel}", s, body, without)
    taken = {pipe: times * each / TILE / MULTIPROCESSORS / GIGAHERTZ for pipe, each in cycles(issued).items()}
    issue = taken.pop("issue")
    busiest = max(taken, key=taken.__getitem__)
    name = label or kernel.partition("<")[0]
    rates = memory / BYTES_A_NANOSECOND, (memory + cached) / CACHED_A_NANOSECOND
    return Share(name, sum(issued.values()), issue, busiest, taken[busiest], *rates)


def shares(s: Sizes) -> dict[str, Share]:
    """The kernels of attention with maps that have no quadratic form."""
    key, value, tiles = 2 * s.d, 2 * s.e, s.m / TILE
    sums = 8 * s.m * s.e / TILE  # of a tile, with low parts; `walk` reads and writes them
    absorb, tile = "first < count; first += TILE", "copy_points(k, whole_k, first, 0, here, (int)p.d, points, D"
    kind = "favorsharp::bfloat16"
    found = (
        share_of(f"factors<{kind}>", s, "", 1, key + 4, 0),
        share_of(f"absorb<{kind}, {s.e}>", s, absorb, tiles, key + value + 4, 0, without=f"{tile});"),
        share_of(
            f"absorb<{kind}, {s.e}>", s, absorb, tiles, key + value + 4, 0, "absorb, causal", f"{tile}, FactorOfRow"
        ),
        share_of(f"read<{kind}, {s.e}>", s, "", 1, key + value, s.m * (4 * s.d + 2 * s.e) / TILE),
        share_of(f"walk<{kind}, {s.e}>", s, "while (done < all)", 1, 2 * (key + value) + 4, 2 * sums),
    )
    return {each.kernel: each for each in found}


CALLS = {
    "bidirectional": ("absorb", "read"),
    "causal, heads that fill the card": ("factors", "walk"),
    "causal, in segments": ("factors", "absorb, causal", "walk"),
}
"""The kernels of each call, apart from `scan`."""


def table(sizes: Iterable[Sizes]) -> str:
    """The tables of the design page."""
    from benchmarks.gpu_floors import Work

    kernels = ["| d, m, e | kernel | instructions | issue | busiest pipe | memory | L2 |", "|" + " --- |" * 7]
    calls = ["| d, m, e | call | model | floor | share |", "|" + " --- |" * 5]
    for s in sizes:
        found, label = shares(s), ", ".join(map(str, s))
        for x in found.values():
            times = f"{x.issue:.2f} | {x.busiest} {x.pipe:.2f} | {x.memory:.2f} | {x.cache:.2f}"
            kernels.append(f"| {label} | `{x.kernel}` | {x.instructions:.0f} | {times} |")
        for call, names in CALLS.items():
            work = Work(s.d, s.m, s.e, is_causal=call.startswith("causal"))
            once = max(work.bytes / BYTES_A_NANOSECOND, *(1e9 * x for n, x in work.seconds.items() if n != "bytes"))
            time = sum(found[name].time for name in names)
            calls.append(f"| {label} | {call} | {time:.2f} | {once:.2f} | {once / time:.0%} |")
    return "\n".join([*kernels, "", *calls])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(table((Sizes(64, 64, 64), Sizes(128, 64, 64))))
