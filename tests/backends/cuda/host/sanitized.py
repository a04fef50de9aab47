"""Run a script of this folder in a fresh interpreter whose kernels are built with a sanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from host_module import compiler

RUNTIMES = {"thread": "libtsan.so", "address": "libasan.so"}
OPTIONS = {
    # `exitcode` distinguishes a report from other failures; the first report ends the process
    "thread": ("TSAN_OPTIONS", "exitcode=66:halt_on_error=1:report_signal_unsafe=0:history_size=2:atexit_sleep_ms=0"),
    "address": ("ASAN_OPTIONS", "exitcode=66:detect_leaks=0:halt_on_error=1:detect_stack_use_after_return=0"),
}
REPORTED = 66


def run(sanitizer: str, script: Path, *arguments: str, timeout: float = 1800) -> "subprocess.CompletedProcess[str]":
    """Run `python script arguments` under the sanitizer "thread" or "address"; a report exits with `REPORTED`.

    The interpreter is not built with the sanitizer, so the library of the sanitizer has to be loaded first.
    """
    runtime = subprocess.run(
        [compiler() or "g++", f"-print-file-name={RUNTIMES[sanitizer]}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(runtime):
        raise FileNotFoundError(f"g++ comes without {RUNTIMES[sanitizer]}")
    name, options = OPTIONS[sanitizer]
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        name: options,
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=66",
        "FAVORSHARP_HOST_SANITIZER": sanitizer,
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONMALLOC": "malloc",  # each array gets a block of its own, so that an access beyond its end is noticed
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, str(script), *arguments]
    if shutil.which("setarch"):  # ThreadSanitizer needs a memory layout without randomisation
        fixed = ["setarch", "-R", *command]
        if subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode == 0:
            command = fixed
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
