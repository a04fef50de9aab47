"""Download, on a machine with a network, what a GPU machine without one needs: `make gpu-bundle` writes to .gpu.

The bundle has wheels of what the library and its tests import besides NumPy, torch, CuPy and pytest. With `--cubins` it
also has every kernel, compiled for one architecture; this needs CuPy and NVRTC, but no GPU.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from records import ROOT

WHEELS = (
    *("array-api-compat", "array-api-strict", "ml-dtypes", "pytest-xdist", "execnet", "pytest-timeout"),
    *("typer", "click", "shellingham", "annotated-doc"),
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def wheels(folder: Path, names: Sequence[str], python: str) -> list[str]:
    """Download wheels without their dependencies; return the names of those that are not available."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, "-d", str(folder)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    missing = []
    for name in names:
        done = subprocess.run([*command, name], capture_output=True, text=True)
        if done.returncode:
            missing.append(name)
            print(f"{name}: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}", file=sys.stderr)
    return missing


def compiled(folder: Path, architecture: str) -> None:
    """Compile every instance into the bundle."""
    sys.path[:0] = [str(ROOT), str(ROOT / "backends")]
    import cubins

    from favorsharp_cuda.host.source import INSTANTIATIONS

    seconds = cubins.make(folder, architecture, INSTANTIATIONS)["seconds"]
    print(f"{len(seconds)} instances, {sum(seconds.values()):.0f} s, the slowest {max(seconds.values()):.1f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the bundle; return the number of wheels that are not available."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu")
    parser.add_argument("--python", default="3.12", help="version of Python of the GPU machine")
    parser.add_argument("--wheel", action="append", default=[], help="a further package")
    parser.add_argument("--without", action="append", default=[], help="a package that is there already")
    parser.add_argument("--cubins", action="store_true", help="compile the kernels, too")
    parser.add_argument("--architecture", default="90", help="compute capability to compile for, times 10")
    given = parser.parse_args(arguments)
    names = [name for name in (*WHEELS, *given.wheel) if name not in given.without]
    missing = wheels(given.out / "wheels", names, given.python)
    if given.cubins:
        compiled(given.out, given.architecture)
    files = [file for file in sorted(given.out.rglob("*")) if file.is_file()]
    for file in files:
        if file.suffix == ".whl":
            print(f"{file.name}: {file.stat().st_size / 1024:.0f} KB")
    print(f"{given.out}: {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB")
    return len(missing)


if __name__ == "__main__":
    sys.exit(main())
