"""
Stream tokens from a Hugging Face model
=======================================

A cache of states takes the place of the cache of keys and values. Its size does not grow, and each step gives the same
logits as the causal forward pass.
"""

import matplotlib.pyplot as plt
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from favorsharp.transformers import StateCache, calibrate, register

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    eos_token_id=None,
    pad_token_id=0,
)
model = LlamaForCausalLM(config).eval()
register("favorsharp", num_features=32, window=16, rng=0)
model.set_attn_implementation("favorsharp")
calibrate(model, [torch.randint(100, (4, 128))])

# %%
# A causal model has to be calibrated, because a fit to the sequence itself would show it its own future. Now it can
# generate:

prompt = torch.randint(100, (1, 40))
out = model.generate(
    prompt,
    attention_mask=torch.ones_like(prompt),
    cache=StateCache(),
    max_new_tokens=60,
    do_sample=False,
    return_dict_in_generate=True,
    output_logits=True,
)
with torch.no_grad():
    whole = model(out.sequences, attention_mask=torch.ones_like(out.sequences), use_cache=False).logits[0]
print(max(float((step[0] - whole[39 + i]).abs().max()) for i, step in enumerate(out.logits)) < 1e-4)

# %%
# Sizes of the two caches, in KiB:

lengths = (64, 256, 1024)
sizes = {"keys and values": [], "states": []}
for n in lengths:
    text = torch.randint(100, (1, n))
    grown, state = DynamicCache(), StateCache()
    with torch.no_grad():
        model(text, cache=grown)
        model(text, cache=state)
    sizes["keys and values"].append(sum(x.keys.nbytes + x.values.nbytes for x in grown.layers) / 1024)
    sizes["states"].append(state.num_bytes / 1024)
print(sizes)

fig, ax = plt.subplots(layout="constrained")
for name, size in sizes.items():
    ax.loglog(lengths, size, marker="o", label=name)
ax.set(xlabel="tokens", ylabel="KiB")
ax.legend()
