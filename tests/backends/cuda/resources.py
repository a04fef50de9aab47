"""The registers and instructions of the kernels, from NVRTC and the disassembler, on a machine without a GPU.

`python tests/backends/cuda/resources.py` compiles every instantiation and rewrites resources.json. With names of
kernels (`walk absorb`), it compiles the instances of these only, which is right if no other kernel has changed.
"""

import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
TABLE = Path(__file__).with_name("resources.json")
INSTRUCTIONS = {
    "HMMA": "products of the tensor cores",
    "LDSM": "matrices loaded from shared memory",
    "LDGSTS": "asynchronous copies to shared memory",
    "LDL": "loads from local memory: a spill, or an array that is indexed at run time",
    "STL": "stores to it",
}

SMALL_SPILL = 150
"""Bytes that an instance may spill, loads and stores together: addresses and counts, once a tile (cuda-kernels.md)."""

BATCH = 12  # names in one run of NVRTC

Resources = dict[str, int]


def compile_for(architecture: str, names: Iterable[str], code: str | None = None) -> dict[str, Resources]:
    """Registers, spills and instruction counts of kernels of `favorsharp_cuda.host.source` (or of other code)."""
    from favorsharp_cuda.host.launch import OPTIONS
    from favorsharp_cuda.host.source import source

    code = source() if code is None else code
    names = sorted(names)
    batches = [names[i : i + BATCH] for i in range(0, len(names), BATCH)]
    found: dict[str, Resources] = {}
    for batch in batches:
        found |= _compile(architecture, batch, code, OPTIONS)
    return found


def _compile(architecture: str, names: list[str], code: str, options: tuple[str, ...]) -> dict[str, Resources]:
    from cupy_backends.cuda.libs import nvrtc  # needs libnvrtc, and neither a driver nor a GPU

    program = nvrtc.createProgram(code, "favorsharp.cu", (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, (f"-arch={architecture}", "--ptxas-options=-v", *options))
        except Exception as error:
            raise RuntimeError(f"NVRTC, {architecture}:\n{nvrtc.getProgramLog(program)[:8000]}") from error
        symbols = {nvrtc.getLoweredName(program, name): name for name in names}
        log = nvrtc.getProgramLog(program)
        cubin = nvrtc.getCUBIN(program) + b"\0"  # CuPy drops the last byte, as the end of a string
    finally:
        nvrtc.destroyProgram(program)
    counts = count_instructions(cubin)
    found = {symbols[symbol]: counts[symbol] | taken for symbol, taken in read_log(log).items() if symbol in symbols}
    missing = set(names) - set(found)
    if missing:
        raise RuntimeError(f"NVRTC's log says nothing of {sorted(missing)}")
    return found


def read_log(log: str) -> dict[str, Resources]:
    """Registers, spilled bytes and static shared memory of each kernel, by symbol, from what ptxas prints."""
    found: dict[str, Resources] = {}
    symbol = ""
    for line in log.splitlines():
        if entry := re.search(r"(?:entry function|Function properties for) '?(\w+)'?", line):
            symbol = entry[1]
            found.setdefault(symbol, {"registers": 0, "spilled": 0, "shared": 0})
        elif spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[symbol]["spilled"] = int(spills[1]) + int(spills[2])
        elif used := re.search(r"Used (\d+) registers", line):
            found[symbol]["registers"] = int(used[1])
            static = re.search(r"(\d+) bytes smem", line)
            found[symbol]["shared"] = int(static[1]) if static else 0
    return found


def count_instructions(cubin: bytes) -> dict[str, Resources]:
    """The number of each of `INSTRUCTIONS` in each kernel, and the number of its loads in flight, by symbol."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(disassembler()), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {symbol: _counts(lines) for symbol, lines in read_listing(text).items()}


class Instruction(NamedTuple):
    """Whether an instruction depends on a predicate, its name with modifiers, and its operands."""

    conditional: bool
    name: str
    operands: str


def read_listing(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, by symbol, from what nvdisasm prints."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            current = found.setdefault(section[1], [])
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*([^;]*)", line):
            current.append(Instruction(bool(instruction[1]), instruction[2], instruction[3]))
    return found


def _counts(instructions: list[Instruction]) -> Resources:
    counts = Counter(each.name.partition(".")[0] for each in instructions)
    return {name: counts[name] for name in INSTRUCTIONS} | {
        "in flight": in_flight(instructions),
        "pieces in flight": in_flight(instructions, ".128"),
    }


def in_flight(instructions: Iterable[Instruction], width: str = "") -> int:
    """The most loads from global memory that are issued before an instruction needs one of them.

    The listing is read from top to bottom, as if no conditional branch were taken; loads of `width` are counted.
    """
    pending: list[range] = []
    most = 0
    for conditional, name, operands in instructions:
        registers = [int(number) for number in re.findall(r"\bR(\d+)", operands)]
        leaves = not conditional and name in ("EXIT", "RET", "BRA")
        if leaves or any(x in load for x in registers for load in pending):
            pending = []
        if name.startswith("LDG") and width in name and registers:
            size = 4 if ".128" in name else 2 if ".64" in name else 1
            pending.append(range(registers[0], registers[0] + size))
            most = max(most, len(pending))
    return most


def disassembler() -> Path:
    """nvdisasm of the wheel nvidia-cuda-nvdisasm."""
    for file in importlib.metadata.files("nvidia-cuda-nvdisasm") or ():
        if file.name in ("nvdisasm", "nvdisasm.exe"):
            return Path(str(file.locate()))
    raise FileNotFoundError("nvdisasm: pip install nvidia-cuda-nvdisasm")


def fingerprint() -> str:
    """A hash of what the table depends on except the compiler's version: code without comments, options and names."""
    from favorsharp_cuda.host.launch import OPTIONS
    from favorsharp_cuda.host.source import INSTANTIATIONS, source

    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", source(), flags=re.DOTALL).split()
    return hashlib.sha256(json.dumps([code, OPTIONS, sorted(INSTANTIATIONS)]).encode()).hexdigest()


def read_table() -> dict[str, Any]:
    """The table in the repository, by architecture and name.

    The entry "fingerprint" says which code it was made from.
    """
    return json.loads(TABLE.read_text())  # type: ignore[no-any-return]


def write_table(table: Mapping[str, Mapping[str, Resources]]) -> None:
    """Write the table, with one line for each kernel."""
    blocks = [f' "fingerprint": {json.dumps(fingerprint())}']
    for architecture, kernels in table.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(kernels[name])}" for name in sorted(kernels)]
        blocks.append(f" {json.dumps(architecture)}: {{\n" + ",\n".join(lines) + "\n }")
    TABLE.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def complaints(found: Mapping[str, Resources], table: Mapping[str, Resources]) -> list[str]:
    """The kernels that need more registers or memory than the table says, or use other instructions."""
    said = []
    for name, now in found.items():
        if now["spilled"] > SMALL_SPILL:
            said.append(f"{name}: {now['spilled']} bytes spilled, {SMALL_SPILL} are allowed")
        then = table.get(name)
        if then is None:
            said.append(f"{name} is not in the table")
            continue
        said += [
            f"{name}: {now[what]} {what}, {then[what]} in the table"
            for what in ("registers", "shared", "spilled", "LDL", "STL")
            if now[what] > then[what]
        ]
        said += [
            f"{name}: {now[what]} {what}, {then[what]} in the table"
            for what in ("HMMA", "LDSM", "LDGSTS")
            if now[what] != then[what]
        ]
        said += [
            f"{name}: {now[what]} loads {what}, {then[what]} in the table"
            for what in ("in flight", "pieces in flight")
            if what in now and now[what] < then.get(what, 0)
        ]
    return said


def representatives(names: Iterable[str]) -> list[str]:
    """For each kernel, the instance whose name sorts last: one dtype, with the largest first size."""
    by_kernel = groupby(sorted(names), key=lambda name: name.partition("<")[0])
    return [list(group)[-1] for _, group in by_kernel]


def kernel_of(name: str) -> str:
    """The kernel of an instance: "walk" for "favorsharp::walk<float, 64>"."""
    return name.removeprefix("favorsharp::").partition("<")[0]


def main(*kernels: str) -> None:
    """Compile all kernels, or those of the given names, for every architecture and write the table."""
    from favorsharp_cuda.host.source import INSTANTIATIONS

    chosen = [
        name for name in INSTANTIATIONS if not kernels or name.removeprefix("favorsharp::").partition("<")[0] in kernels
    ]
    with ThreadPoolExecutor() as pool:
        results: list[Any] = list(pool.map(lambda a: compile_for(a, chosen), ARCHITECTURES))
    kept: dict[str, Any] = read_table() if kernels else {}
    table = {a: kept.get(a, {}) | found for a, found in zip(ARCHITECTURES, results, strict=True)}
    write_table(table)
    for architecture, kernels in table.items():
        for line in complaints(kernels, kernels):
            print(f"{architecture}: {line}", file=sys.stderr)
    print(f"{TABLE.name}: {len(chosen)} kernels for {', '.join(ARCHITECTURES)}, by {sysconfig.get_platform()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
