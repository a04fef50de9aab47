"""NVRTC compiles the kernels for three architectures, and they take no more of a GPU than the table says."""

import pytest
import resources

pytestmark = pytest.mark.own_backend
pytest.importorskip("favorsharp_cuda")
pytest.importorskip("cupy_backends", exc_type=ImportError)
from favorsharp_cuda.source import INSTANTIATIONS  # noqa: E402

try:
    from cupy_backends.cuda.libs import nvrtc

    VERSION = nvrtc.getVersion()
    resources.disassembler()
except Exception as missing:
    pytest.skip(f"needs nvidia-cuda-nvrtc and nvidia-cuda-nvdisasm: {missing}", allow_module_level=True)


def test_the_table_has_every_instantiation():
    table = resources.read_table()
    for architecture in resources.ARCHITECTURES:
        assert set(table[architecture]) == set(INSTANTIATIONS)


def test_products_are_made_by_tensor_cores_and_nothing_is_spilled():
    """What the table says of itself; what it says of the kernels is compiled anew below."""
    for kernels in resources.read_table().values():
        for name, taken in kernels.items():
            assert taken["registers"] <= 255, name
            assert taken["spilled"] == 0 or name in SPILLS, name


SPILLS: frozenset[str] = frozenset()
"""Instances that are known to spill."""


def compare(architecture, names):
    found = resources.compile_for(architecture, names)
    said = resources.complaints(found, resources.read_table()[architecture])
    assert not said, "\n".join([*said, "if this is wanted: python tests/backends/cuda/resources.py"])


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_representatives_take_what_the_table_says(architecture):
    """Of each kernel one instance, another one for each architecture."""
    turn = resources.ARCHITECTURES.index(architecture)
    chosen = resources.representatives(INSTANTIATIONS)[turn::3]
    compare(architecture, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_every_instantiation_takes_what_the_table_says(architecture):
    compare(architecture, INSTANTIATIONS)


WASTEFUL = """
template <int N> __global__ void __launch_bounds__(1024) f(float *x) {
  float kept[N];
  for (int i = 0; i < N; i++) kept[i] = x[i * 1024 + threadIdx.x];
  for (int j = 0; j < 9; j++)
    for (int i = 0; i < N; i++) kept[i] = kept[i] * kept[(i * 7 + 3) % N] + x[j];
  for (int i = 0; i < N; i++) x[i * 1024 + threadIdx.x] = kept[i];
}
"""


def test_a_spill_is_seen():
    found = resources.compile_for("sm_90", ["f<100>", "f<4>"], WASTEFUL)
    assert found["f<4>"]["spilled"] == found["f<4>"]["LDL"] == 0
    assert found["f<100>"]["spilled"] > 0
    assert found["f<100>"]["LDL"] > 0
    said = resources.complaints(found, found | {"f<4>": found["f<4>"] | {"registers": 1}})
    assert any(line.startswith("f<4>") and line.endswith("registers, 1 in the table") for line in said)


def test_what_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match="nothing_of_the_kind"):
        resources.compile_for("sm_80", ["f"], "__global__ void f() { nothing_of_the_kind(); }")
