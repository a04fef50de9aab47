"""Follows the three recipes of CONTRIBUTING step by step in a copy of the sources."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def copy(tmp_path):
    """A copy of the library and of the backends."""
    if not (ROOT / "backends").is_dir():
        pytest.skip("needs the sources")
    for name in ("favorsharp", "backends/favorsharp_numba", "backends/favorsharp_cuda"):
        shutil.copytree(ROOT / name, tmp_path / Path(name).name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def insert(path, before, text):
    """Put text before the first line that contains `before`."""
    lines = path.read_text().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if before in line)
    path.write_text("".join([*lines[:place], text, *lines[place:]]))


def run(copy, code, **variables):
    """Run code with the copy in place of the library, and with environment variables."""
    environment = {**os.environ, "PYTHONPATH": str(copy), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_adding_a_method(copy):
    with (copy / "favorsharp/formulas.py").open("a") as file:
        file.write(
            "\n\ndef mine(data: Statistics) -> Values:\n"
            '    """The values of oprf, with half of its a."""\n'
            "    values = oprf(data)\n"
            '    return {**values, "a": 0.5 * values["a"]}\n'
        )
    insert(copy / "favorsharp/methods.py", "    Method(", '    _dense("mine", "a method of a test", formulas.mine),\n')
    run(
        copy,
        """
import numpy as np, favorsharp as fs
from favorsharp.cli.compare import _options
from favorsharp.diagnostics import compare
from favorsharp.sklearn import NadarayaWatsonRegressor

assert "mine" in fs.METHODS
q, k, v = 0.5 * np.random.default_rng(0).standard_normal((3, 2, 40, 4))
fitted = fs.fit(q, k, method="mine")
assert np.all(fs.excess(fitted, q, k) <= fs.excess(fs.fit(q, k, method="posrf"), q, k))
exact = fs.kernel_matrix(q, k) @ v
estimate = np.mean([fs.kernel_matvec(q, k, v, fs.feature_map(fitted, 512, rng=i)) for i in range(40)], axis=0)
assert np.linalg.norm(estimate - exact) < 0.1 * np.linalg.norm(exact)
assert fs.attention(q, k, v, method="mine", rng=0).shape == v.shape
NadarayaWatsonRegressor(method="mine").fit(q[0], v[0, :, 0]).predict(q[0])
assert {row.method for row in compare(q, k, v, num_features=[8], windows=[0], seeds=1, repeats=1)} >= {"mine"}
assert _options("mine", "8", "0", "iid", False, 0.3)["methods"] == ["mine"]
""",
        FAVORSHARP_BACKEND="reference",  # a copy would compile all kernels anew
    )


def test_adding_a_kind_of_features(copy):
    """The last steps of the recipe for a method: features of its own, a subclass of PositiveFeatureMap."""
    (copy / "favorsharp/features/halved.py").write_text(
        '"""relu of half of the projections."""\n'
        "from dataclasses import dataclass\n\n"
        "from favorsharp._arrays import namespace_of\n"
        "from favorsharp.features.base import PositiveFeatureMap\n\n\n"
        "@dataclass(frozen=True, eq=False, repr=False)\n"
        "class HalvedMap(PositiveFeatureMap):\n"
        "    def _log_features(self, side, x):\n"
        "        xp = namespace_of(x)\n"
        "        projected = 0.5 * x @ xp.matrix_transpose(self.projection)\n"
        "        return xp.log(xp.where(projected > 1e-3, projected, xp.full_like(projected, 1e-3)))\n"
    )
    features = copy / "favorsharp/features/__init__.py"
    insert(features, "from favorsharp.features.nystrom", "from favorsharp.features.halved import HalvedMap\n")
    insert(features, "_MAPS: Mapping", "def _halved(p, m, rows):\n    return HalvedMap(p, m, _placed(rows, p))\n\n\n")
    insert(features, '"dense-exponential": ', '    "halved": _halved,\n')
    features.write_text(features.read_text().replace("MAPS = (", "MAPS = (HalvedMap, ", 1))
    insert(
        copy / "favorsharp/methods.py", "    Method(", '    Method("mine", "of a test", "halved", formulas.plain),\n'
    )
    run(
        copy,
        """
import importlib.util, numpy as np, favorsharp as fs

assert "mine" in fs.METHODS
q, k, v = np.random.default_rng(0).standard_normal((3, 2, 40, 4))
feature_map = fs.feature_map(fs.fit(q, k, method="mine"), 16, rng=0)
out = fs.linear_attention(q, k, v, feature_map, is_causal=True)
weights = feature_map.query(q) @ feature_map.key(k).swapaxes(-1, -2) * np.tri(40)
assert np.allclose(out, weights @ v / weights.sum(-1, keepdims=True))
fs.save("map.npz", feature_map)
assert np.array_equal(fs.load("map.npz").query(q), feature_map.query(q))
if importlib.util.find_spec("jax"):
    import jax, favorsharp.jax
    assert jax.tree_util.tree_leaves(feature_map)
""",
        FAVORSHARP_BACKEND="reference",
    )


@pytest.mark.own_backend
def test_adding_an_op(copy):
    (copy / "favorsharp/ops/doubled.py").write_text(
        '"""Twice a value."""\n'
        "from favorsharp.dispatch import Op\n\n\n"
        "@Op\n"
        "def doubled(x):\n"
        '    """2 x, an array of the shape of x."""\n'
        "    return 2 * x\n"
    )
    kit = copy / "favorsharp/backend.py"
    insert(kit, '"attention": "attention"', '    "doubled": "doubled",\n')
    kit.write_text(kit.read_text().replace("DIFFERENTIABLE = (", 'DIFFERENTIABLE = ("doubled", ', 1))
    for backend in ("favorsharp_numba", "favorsharp_cuda"):
        (copy / backend / "doubled.py").write_text("def doubled(x):\n    return x + x\n")
        with (copy / backend / "torch_ops.py").open("a") as file:
            file.write("\n\ndef doubled(x):\n    return x + x\n")
    shutil.copytree(ROOT / "tests/loopback", copy, dirs_exist_ok=True)
    insert(copy / "favorsharp_loopback.py", '_OPS += ("choose', '_OPS += ("doubled",)\n')
    cases = copy / "favorsharp/_cases.py"
    imported = "from favorsharp.ops import (  # noqa: F401  fill OPS\n"
    assert imported in cases.read_text()
    cases.write_text(cases.read_text().replace(imported, f"{imported}    doubled,\n"))
    made = '    "doubled": lambda: [Case("five", lambda to: ((to(np.arange(5.0)),), {}))],\n'
    insert(cases, '    "exponential_features": _exponential_features,', made)
    run(
        copy,
        """
import importlib.util, numpy as np, favorsharp as fs
import favorsharp_loopback
from favorsharp.cli import matrix
from favorsharp.dispatch import OPS
from favorsharp.testing import check_backend

rows = check_backend("numba", ops=["doubled"], libraries=["numpy"])
assert {row.dtype for row in rows} == {"float16", "float32", "float64"}
assert fs.explain("doubled", like=np.ones(3)).chosen == "numba"
assert check_backend("loopback", ops=["doubled"], libraries=["numpy"])
assert favorsharp_loopback.calls["doubled"]
if importlib.util.find_spec("torch"):
    import torch
    x = torch.ones(3, requires_grad=True)
    assert fs.explain("doubled", like=x).chosen == "numba"
    OPS["doubled"](x).sum().backward()
    assert x.grad.tolist() == [2.0] * 3
for op in [op for op in OPS if op != "doubled"]:
    del OPS[op]
assert "| doubled | numpy | cpu | float64 | numba | 1e-10 |" in matrix.page(matrix.support())
""",
    )


def test_adding_a_backend(copy):
    package = copy / "mine"
    package.mkdir()
    (package / "__init__.py").write_text(
        '"""A backend of a test."""\n'
        "from favorsharp.backend import Backend, Kernel\n\n"
        "BACKEND = Backend(\n"
        '    "mine",\n'
        "    kernels=(\n"
        '        Kernel("exponential_features", "mine.exponential_features:exponential_features",\n'
        '               libraries={"numpy"}, devices={"cpu"}, dtypes={"float64"}),\n'
        "    ),\n"
        ")\n"
    )
    (package / "exponential_features.py").write_text(
        "import numpy as np\n\n\n"
        "def exponential_features(u, rows, row, column, *, out=None):\n"
        "    result = np.exp(u @ np.swapaxes(rows, -1, -2) + row + column)\n"
        "    if out is None:\n"
        "        return result\n"
        "    out[...] = result\n"
        "    return out\n"
    )
    metadata = copy / "mine-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[favorsharp.backends]\nmine = mine:BACKEND\n")
    run(
        copy,
        """
import numpy as np, favorsharp as fs
from favorsharp.testing import check_backend

assert check_backend("mine")
q, k = np.random.default_rng(0).standard_normal((2, 20, 4))
feature_map = fs.feature_map(fs.fit(q, k), 16, rng=0)
with fs.use("mine"), fs.dispatch.watch() as calls:
    features = feature_map.query(q)
assert calls == [("exponential_features", "mine")]
assert np.allclose(features, feature_map.query(q))  # by the reference, which the environment names
assert fs.explain("exponential_features", like=q).chosen != "mine"
""",
        FAVORSHARP_BACKEND="reference",
    )


def test_the_recipes_name_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`?((?:favorsharp|backends|tests|docs)/[\w/.]+\.(?:py|md))", text))
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []
