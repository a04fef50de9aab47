"""The environment of stages: the checkout, unpacked wheels, metadata by which backends are found, and caches.

favorsharp is not installed for a run. Backends are entry points, so the few lines of metadata that an installation
would have written are written into a folder on the path.
"""

import importlib.util
import os
import re
import tomllib
import zipfile
from pathlib import Path

from records import ROOT

HERE = Path(__file__).resolve().parent
FEW_THREADS = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""For stages of many processes."""

DRY = {"GPU_DRY": "1", "FAVORSHARP_BACKEND": "reference"}
"""Without a GPU: where a stage does not name the shim's backend, the references run, which nothing has to compile."""


def lay_out(folder: Path, bundle: Path) -> None:
    """Unpack the wheels of packages that are not installed here, and write favorsharp's metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in sorted((bundle / "wheels").glob("*.whl")):
        if importlib.util.find_spec(wheel.name.split("-")[0]) is None:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
    text = (ROOT / "favorsharp" / "__init__.py").read_text()
    version = re.search(r'__version__ = "([^"]+)"', text)
    number = version[1] if version else "0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["favorsharp.backends"]
    info = folder / f"favorsharp-{number}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: favorsharp\nVersion: {number}\n")
    lines = "".join(f"{name} = {target}\n" for name, target in points.items())
    (info / "entry_points.txt").write_text(f"[favorsharp.backends]\n{lines}")


def variables(work: Path, bundle: Path, records: Path, stage: str, dry: bool) -> dict[str, str]:
    """The environment variables of a stage.

    The folder `work` has caches, and in `site` the files that `lay_out` wrote.
    """
    paths = [str(HERE), str(ROOT), str(ROOT / "backends"), str(work / "site")]
    outer = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    found = {
        **outer,  # without the variables that make a process a worker of another pytest-xdist run
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUPY_CACHE_DIR": str(work / "cupy"),
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "NUMBA_CACHE_DIR": str(work / "numba"),
        "JAX_PLATFORMS": "cpu",
        "GPU_BUNDLE": str(bundle),
        "GPU_RECORDS": str(records),
        "GPU_STAGE": stage,
    }
    found.pop("GPU_DRY", None)
    found.pop("FAVORSHARP_GPU", None)
    return found | (DRY if dry else {"FAVORSHARP_GPU": "1"})
