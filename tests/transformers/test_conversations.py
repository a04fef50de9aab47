"""Generation as in long conversations, with a StateCache: several turns, prompts in chunks, and rows that end early."""

import pytest
import torch
from tiny import VOCABULARY, inputs, llama, output

from favorsharp.transformers import StateCache, register

METHODS = {
    "features": {"method": "posrf", "num_features": 16},
    "features and a window": {"method": "posrf", "num_features": 16, "window": 3},
    "landmarks": {"method": "landmarks", "num_features": 4},
    "landmarks and a window": {"method": "landmarks", "num_features": 3, "window": 3},
}
GREEDY = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(params=METHODS)
def model(request):
    register("approximate", rng=0, **METHODS[request.param])
    made = llama()
    made.set_attn_implementation("approximate")
    return made


def assert_is_the_forward(model, found, prompt):
    whole = output(model, input_ids=found.sequences, use_cache=False)[:, prompt - 1 : -1]
    torch.testing.assert_close(torch.stack(found.logits, dim=1), whole.to(torch.float32), rtol=1e-4, atol=1e-5)


def test_a_conversation_goes_on_with_its_cache(model):
    ids, cache = inputs("llama")["input_ids"], StateCache()
    for turn in range(3):
        more = inputs("llama", n=5, seed=turn)["input_ids"]
        ids = torch.cat([ids, more], dim=1)
        found = model.generate(ids, cache=cache, max_new_tokens=4, eos_token_id=None, **GREEDY)
        assert_is_the_forward(model, found, ids.shape[1])
        ids = found.sequences
        assert cache.get_seq_length() == ids.shape[1] - 1


@pytest.mark.parametrize("size", [1, 5, 12, 100])
def test_a_prompt_may_be_read_in_chunks(model, size):
    ids = inputs("llama")["input_ids"]
    found = model.generate(
        ids, cache=StateCache(), max_new_tokens=4, prefill_chunk_size=size, eos_token_id=None, **GREEDY
    )
    assert_is_the_forward(model, found, 12)


def test_rows_that_end_early_leave_the_others_as_they_were(model):
    ids, options = inputs("llama")["input_ids"], {"max_new_tokens": 12, **GREEDY}
    free = model.generate(ids, cache=StateCache(), eos_token_id=None, **options).sequences[:, 12:]
    counts = [int((free == token).any(-1).sum()) for token in range(VOCABULARY)]
    end = next(token for token in range(3, VOCABULARY) if 0 < counts[token] < 3)  # in some rows, and not in others
    found = model.generate(ids, cache=StateCache(), eos_token_id=end, **options).sequences[:, 12:]
    ended = ((free == end).cumsum(-1) - (free == end).long()) > 0  # behind the first end
    assert torch.equal(found, torch.where(ended, 0, free)[:, : found.shape[1]])
