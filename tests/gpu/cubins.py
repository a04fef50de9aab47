"""Kernels that are compiled on a machine without a GPU for the bundle.

On the GPU, CuPy loads them instead of compiling.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

OF_CUPY = ("-ftz=true", "--device-as-default-execution-space")
"""What CuPy 14 adds to the options of a module."""

NOTHING: dict[str, Any] = {"source": "", "architecture": "", "kernels": {}, "seconds": {}}


def digest() -> str:
    """The digest of the kernels' source."""
    from favorsharp_cuda.host.source import source

    return hashlib.sha256(source().encode()).hexdigest()


def compile_for(architecture: str, expression: str) -> tuple[str, bytes]:
    """The symbol and the code of an instance, compiled by NVRTC, which needs neither a driver nor a GPU."""
    from cupy_backends.cuda.libs import nvrtc

    from favorsharp_cuda.host.launch import OPTIONS
    from favorsharp_cuda.host.source import source

    program = nvrtc.createProgram(source(), "favorsharp.cu", (), ())
    try:
        nvrtc.addNameExpression(program, expression)
        nvrtc.compileProgram(program, (f"-arch=sm_{architecture}", *OF_CUPY, *OPTIONS))
        symbol = nvrtc.getLoweredName(program, expression)
        code = nvrtc.getCUBIN(program) + b"\0"  # CuPy takes the last byte for the end of a string
    finally:
        nvrtc.destroyProgram(program)
    return symbol if isinstance(symbol, str) else symbol.decode(), code


def make(bundle: Path, architecture: str, expressions: tuple[str, ...]) -> dict[str, Any]:
    """Compile instances into the bundle, one after the other; return the index that is written there."""
    folder = bundle / "cubins"
    folder.mkdir(parents=True, exist_ok=True)
    index = {"source": digest(), "architecture": architecture, "kernels": {}, "seconds": {}}
    for number, expression in enumerate(expressions):
        start = time.process_time()
        symbol, code = compile_for(architecture, expression)
        (folder / f"{number}.cubin").write_bytes(code)
        index["kernels"][expression] = {"symbol": symbol, "file": f"{number}.cubin"}
        index["seconds"][expression] = round(time.process_time() - start, 3)
    (folder / "index.json").write_text(json.dumps(index, indent=1))
    return index


def read_index(bundle: Path) -> dict[str, Any]:
    """The index of the compiled kernels in the bundle."""
    file = bundle / "cubins" / "index.json"
    return json.loads(file.read_text()) if file.exists() else NOTHING


def hand_to_cupy(bundle: Path) -> bool:
    """Make CuPy use the bundle's code instead of calling NVRTC; return whether the bundle was made from this source."""
    index = read_index(bundle)
    if index["source"] != digest():
        return False
    from cupy.cuda import compiler

    from favorsharp_cuda.host.source import source

    inner = "_compile_using_nvrtc_no_warning"
    name = inner if hasattr(compiler, inner) else "compile_using_nvrtc"
    ask = getattr(compiler, name)

    def answer(
        code: str, options: Any = (), arch: Any = None, filename: str = "kern.cu", name_expressions: Any = None,
        *rest: Any, **more: Any,
    ) -> Any:  # fmt: skip
        names = tuple(name_expressions or ())
        known = index["kernels"].get(names[0]) if len(names) == 1 and code == source() else None
        if known is None or str(arch or compiler._get_arch()) != index["architecture"]:
            return ask(code, options, arch, filename, name_expressions, *rest, **more)
        return (bundle / "cubins" / known["file"]).read_bytes(), {names[0]: known["symbol"]}

    setattr(compiler, name, answer)
    return True
