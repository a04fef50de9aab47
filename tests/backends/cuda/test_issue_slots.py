"""The model of issue slots counts each loop once per iteration, and kernels stay within the design page's table."""

import issue_slots
import pytest

pytestmark = pytest.mark.own_backend

LISTING = """
	.section	.text.f,"ax",@progbits
	//## File "/x/a.cu", line 1
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
	//## File "/x/a.cu", line 2 inlined at "/x/b.cu", line 7
	//## File "/x/b.cu", line 7
        /*0010*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0020*/                   MUFU.EX2 R4, R4 ;
	//## File "/x/a.cu", line 3
        /*0030*/              @P0 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
	.section	.text.g,"ax",@progbits
        /*0000*/                   EXIT ;
"""


def test_loops_and_lines_are_counted_as_the_rules_say(monkeypatch):
    sources = {"a.cu": ("begin", "inner();", "for (;;)"), "b.cu": ("",) * 6 + ("caller();",)}
    monkeypatch.setattr(issue_slots, "source_of", sources.__getitem__)
    found, labels = issue_slots.read_listing(LISTING, "f")
    assert [x.name for x in found] == ["MOV", "HMMA.16816.F32", "MUFU.EX2", "BRA", "EXIT"]
    issued = issue_slots.counts(found, labels, [("for (;;)", 5)], [("caller();", 0.5)])
    assert issued == {"MOV": 1, "HMMA": 2.5, "MUFU": 2.5, "BRA": 5, "EXIT": 5 / 5}
    taken = issue_slots.cycles(issued)
    assert taken["issue"] == 12
    assert taken["tensor"] == 2.5 * 6.5
    assert taken["exponentials"] == 20


@pytest.mark.slow
def test_kernels_issue_no_more_than_the_design_page_says():
    """The test notices a kernel that has grown, and a rule that no longer matches any line."""
    pytest.importorskip("favorsharp_cuda")
    pytest.importorskip("cupy_backends", exc_type=ImportError)
    try:
        issue_slots.resources.disassembler()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    sizes = issue_slots.Sizes(64, 64, 64)
    page = (issue_slots.ROOT / "docs" / "design" / "cuda-issue-slots.md").read_text()
    for kernel, share in issue_slots.shares(sizes).items():
        row = next(line for line in page.splitlines() if line.startswith(f"| 64, 64, 64 | `{kernel}` |"))
        assert share.instructions == pytest.approx(float(row.split("|")[3]), rel=0.05), kernel
