"""Run with an installed wheel and its base requirements only, outside of the checkout (`make wheel-check`)."""

import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import favorsharp as fs
from favorsharp.diagnostics import load_sample

assert "site-packages" in fs.__file__, fs.__file__
assert (Path(fs.__file__).parent / "py.typed").exists()

assert find_spec("favorsharp_numba"), "the wheel lacks the kernels"
assert str(fs.explain("attention", like=np.ones(3))).splitlines()[0] == "reference: chosen"

q, k, v = (x.astype(np.float32) for x in load_sample())
out = fs.attention(q, k, v, num_features=128, rng=0)
exact = fs.softmax_attention(q, k, v)
error = float((np.linalg.norm(out - exact, axis=(-1, -2)) / np.linalg.norm(exact, axis=(-1, -2))).mean())
assert error < 0.54, error

reason = ""
try:
    fs.feature_map(fs.fit(q, k), 8, draw="sobol")
except ImportError as missing:
    reason = str(missing)
assert "pip install 'favorsharp[sobol]'" in reason, "SciPy is installed here: this environment is not the base one"

assert [point.value for point in entry_points(group="console_scripts", name="favorsharp")] == ["favorsharp.cli:main"]
command = shutil.which("favorsharp", path=str(Path(sys.executable).parent))
assert command is not None
run = subprocess.run([command, "info"], capture_output=True, text=True, check=False)
assert run.returncode == 2, run
assert run.stderr.strip().count("\n") == 0, run.stderr
assert "pip install 'favorsharp[cli]'" in run.stderr, run.stderr
python = sys.version.split()[0]
print(f"wheel: favorsharp {fs.__version__} on Python {python}, numpy {np.__version__}, attention error {error:.3f}")
