"""Compile every instance as a call would, with one process for each core, into CuPy's cache on disk.

Later stages load the kernels from there.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import cubins
from records import DRY, ROOT, record, short

SLOWEST = ("gradient_sweep<float,", "gradient_sweep<double", "gradient_sweep", "walk", "decode", "near_gradients")
"""Words in the names of what takes longest, longest first."""

FEW = ("plain_features<float>", "favorsharp::scan", "sum_members<float>")
"""What a dry run compiles."""


def weight(expression: str, seconds: dict[str, float]) -> float:
    """The seconds that an instance takes to compile: those that the bundle has recorded, or else a guess."""
    guess = next((9.0 - i for i, words in enumerate(SLOWEST) if words in expression), 1.0)
    return seconds.get(expression, guess)


def compile_one(expression: str, bundle: Path | None) -> dict[str, Any]:
    """Compile in this process; return the attributes of the kernel that the driver reports, or the error."""
    start = time.perf_counter()
    try:
        if DRY:
            found: dict[str, Any] = {"bytes": len(cubins.compile_for("90", expression)[1])}
        else:
            from favorsharp_cuda.host import launch

            bundled = bundle is not None and cubins.hand_to_cupy(bundle)
            kernel = launch._compile(expression, 0)
            names = {"registers": "num_regs", "local_bytes": "local_size_bytes", "binary": "binary_version"}
            found = {"bundled": bundled} | {name: getattr(kernel, of) for name, of in names.items()}
        return {"expression": expression, "seconds": round(time.perf_counter() - start, 2), **found}
    except Exception as error:
        return {"expression": expression, "said": short(error, 1500)}


def all_of_them(expressions: Sequence[str], jobs: int, bundle: Path | None) -> int:
    """Compile in several processes and record the results; return how many failed."""
    table = json.loads((ROOT / "tests/backends/cuda/resources.json").read_text())["sm_90"]
    start, seconds, failed, grown = time.perf_counter(), 0.0, 0, []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(compile_one, x, bundle) for x in expressions]):
            found = done.result()
            seconds += found.get("seconds", 0)
            failed += "said" in found
            record("compile", **found, quiet="said" not in found)
            registers = table[found["expression"]]["registers"]
            if found.get("registers", 0) > registers:
                grown.append(f"{found['expression']}: {found['registers']} registers, {registers} in the table")
    wall = round(time.perf_counter() - start, 1)
    fields = {"instances": len(expressions), "failed": failed, "processes": jobs, "wall": wall}
    record("compiled", **fields, summed=round(seconds, 1), more_registers=grown)
    return failed


def main() -> int:
    """Compile all, the slowest first."""
    from favorsharp_cuda.host.source import INSTANTIATIONS

    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--from-bundle", action="store_true")
    parser.add_argument("--only", default=",".join(FEW) if DRY else "")
    given = parser.parse_args()
    bundle = Path(os.environ["GPU_BUNDLE"])
    known = cubins.read_index(bundle)["seconds"]
    words = given.only.split(",")
    wanted = [x for x in INSTANTIATIONS if any(word in x for word in words)]
    wanted.sort(key=lambda x: -weight(x, known))
    return int(all_of_them(wanted, given.jobs, bundle if given.from_bundle else None) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
