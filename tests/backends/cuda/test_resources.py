"""NVRTC compiles the kernels for three architectures, and they take no more of a GPU than the table says."""

import pytest
import resources

pytestmark = pytest.mark.own_backend
pytest.importorskip("favorsharp_cuda")
pytest.importorskip("cupy_backends", exc_type=ImportError)
from favorsharp_cuda.host.source import INSTANTIATIONS  # noqa: E402

try:
    from cupy_backends.cuda.libs import nvrtc

    VERSION = nvrtc.getVersion()
    resources.disassembler()
except Exception as missing:
    pytest.skip(f"needs nvidia-cuda-nvrtc and nvidia-cuda-nvdisasm: {missing}", allow_module_level=True)


def test_the_table_is_of_this_source():
    """A change of the kernels needs the table anew, which takes ten minutes. It then speaks for all instances."""
    table = resources.read_table()
    assert table["fingerprint"] == resources.fingerprint(), "run python tests/backends/cuda/resources.py"
    for architecture in resources.ARCHITECTURES:
        assert set(table[architecture]) == set(INSTANTIATIONS)
        assert not resources.complaints(table[architecture], table[architecture])
        assert all(taken["registers"] <= 255 for taken in table[architecture].values())


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_representatives_take_what_the_table_says(architecture):
    """Of each kernel one instance, others for each architecture, with the compiler that is installed."""
    turn = resources.ARCHITECTURES.index(architecture)
    names = resources.representatives(INSTANTIATIONS)[turn::3]
    said = resources.complaints(resources.compile_for(architecture, names), resources.read_table()[architecture])
    assert not said, "\n".join([*said, "if this is wanted: python tests/backends/cuda/resources.py"])


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
