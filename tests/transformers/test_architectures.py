"""Every architecture of transformers is served exactly, or refused by an error that says what is accepted."""

import pytest
import torch
import transformers
from architectures import PAGE, architectures, entries, outcome, page, prepare

pytestmark = pytest.mark.architectures

SHARDS = 8
KNOWN = entries(PAGE.read_text())
"""What the page says of each architecture. Those that were not reached take as long as the others, and are left out."""
NAMES = [name for name in architectures() if KNOWN.get(name, ("",))[0] != "Not reached"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_architecture_is_what_the_page_says(shard):
    torch.set_num_threads(1)
    prepare()
    found = {name: outcome(name) for name in NAMES[shard::SHARDS]}
    assert [(name, why) for name, (kind, why) in found.items() if kind == "wrong"] == []
    now = entries(page(found))
    if f"transformers {transformers.__version__} " in PAGE.read_text():
        assert now == {name: KNOWN.get(name) for name in found}
    else:  # architectures come and go with versions, but what is served stays so
        lost = [name for name, (section, _) in now.items() if section in ("Refused", "Outside the attention interface")]
        assert [name for name in lost if KNOWN.get(name, ("",))[0].startswith("Served")] == []


def test_the_page_has_every_architecture():
    if f"transformers {transformers.__version__} " in PAGE.read_text():
        assert sorted(KNOWN) == architectures()
