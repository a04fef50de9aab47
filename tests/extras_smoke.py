"""Run with an installed wheel; the arguments name its extras. The script makes one call for each extra."""

import subprocess
import sys
from pathlib import Path

import numpy as np

import favorsharp as fs

assert "site-packages" in fs.__file__, fs.__file__
x = np.random.default_rng(0).standard_normal((40, 8))


def cpu():
    assert "numba: chosen" in str(fs.explain("attention", like=x))
    with fs.use("reference"):
        want = fs.attention(x, x, x, num_features=16, rng=0)
    np.testing.assert_allclose(fs.attention(x, x, x, num_features=16, rng=0), want, rtol=1e-9)


def sobol():
    fs.feature_map(fs.fit(x, x), 8, draw="sobol", rng=0)


def torch():
    import torch

    from favorsharp.torch import MultiheadAttention

    assert MultiheadAttention(8, 2, method="posrf")(*[torch.asarray(x, dtype=torch.float32)[None]] * 3)[0].shape == (
        1,
        40,
        8,
    )


def jax():
    import jax.numpy as jnp

    assert fs.attention(*[jnp.asarray(x)] * 3, num_features=16, rng=0).shape == x.shape


def sklearn():
    from favorsharp.sklearn import RandomFeatures

    assert len(RandomFeatures().fit_transform(x)) == 40


def dask():
    import dask.array as da

    assert fs.moments(*[da.from_array(x, chunks=(20, 8))] * 2) is not None


def datasets():
    import favorsharp.datasets  # noqa: F401


def transformers():
    from favorsharp.transformers import register

    register("favorsharp")


def cli():
    command = Path(sys.executable).parent / "favorsharp"
    assert subprocess.run([command, "info"], capture_output=True, check=False).returncode == 0


for extra in sys.argv[1:]:
    globals()[extra]()
    print(f"extra {extra}: runs on Python {sys.version.split()[0]}, numpy {np.__version__}")
