"""NVRTC compiles the kernels for three architectures, and they need no more registers than the table says."""

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
    """After a change of the kernels the table must be made again, which takes ten minutes; it covers all instances."""
    table = resources.read_table()
    assert table["fingerprint"] == resources.fingerprint(), "run python tests/backends/cuda/resources.py"
    for architecture in resources.ARCHITECTURES:
        assert set(table[architecture]) == set(INSTANTIATIONS)
        assert not resources.complaints(table[architecture], table[architecture])
        assert all(taken["registers"] <= 255 for taken in table[architecture].values())


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_representatives_take_what_the_table_says(architecture):
    """One instance of each kernel, a different one for each architecture, with the installed compiler."""
    turn = resources.ARCHITECTURES.index(architecture)
    names = resources.representatives(INSTANTIATIONS)[turn::3]
    said = resources.complaints(resources.compile_for(architecture, names), resources.read_table()[architecture])
    assert not said, "\n".join([*said, "if this is wanted: python tests/backends/cuda/resources.py"])


def test_loads_are_in_flight_together():
    """Points and values are loaded in pieces of 16 bytes, several of which are issued before the first is needed.

    In `absorb` the count may be that of the sums, which are also loaded in pieces of 16 bytes.
    """
    table = resources.read_table()
    for architecture in resources.ARCHITECTURES:
        for name, taken in table[architecture].items():
            if resources.kernel_of(name) in ("walk", "absorb", "read", "factors", "features"):
                assert taken["pieces in flight"] >= 4, (architecture, name)


LISTING = """
 .section .text.f
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0020*/              @P1 BRA `(.L_x_1) ;
        /*0030*/                   LDG.E.U16 R12, desc[UR4][R2.64+0x20] ;
        /*0040*/                   FADD R13, R7, R1 ;
        /*0050*/                   LDG.E R14, desc[UR4][R2.64+0x30] ;
        /*0060*/                   EXIT ;
        /*0070*/                   LDG.E R15, desc[UR4][R2.64+0x30] ;
"""


def test_loads_in_flight_are_counted_up_to_the_first_use():
    """R7 is the last word of the first load, so the addition waits for it."""
    instructions = resources.read_listing(LISTING)["f"]
    assert resources.in_flight(instructions) == 3
    assert resources.in_flight(instructions, ".128") == 2
    assert resources.in_flight(instructions[4:]) == 1
    now = {"registers": 1, "shared": 0, "spilled": 0, "LDL": 0, "STL": 0, "HMMA": 0, "LDSM": 0, "LDGSTS": 0}
    found = {"f": now | {"in flight": 1, "pieces in flight": 4}}
    assert resources.complaints(found, found) == []
    assert resources.complaints(found, {"f": found["f"] | {"in flight": 3}}) == ["f: 1 loads in flight, 3 in the table"]


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
