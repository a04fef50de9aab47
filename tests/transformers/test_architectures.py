"""Every architecture of transformers is served exactly, or refused by an error that says what is accepted."""

import pytest
import torch
from architectures import PAGE, architectures, outcome, prepare, served

pytestmark = pytest.mark.architectures


@pytest.mark.filterwarnings("ignore")
def test_every_architecture_is_served_or_refused():
    torch.set_num_threads(1)
    prepare()
    found = {model_type: outcome(model_type) for model_type in architectures()}
    assert [(name, why) for name, (kind, why) in found.items() if kind == "wrong"] == []
    lost = [name for name in served(PAGE.read_text()) if name in found and found[name].kind in ("refused", "outside")]
    assert lost == []
