"""
Swap attention in a Hugging Face model
======================================

A BERT with random weights stands for yours: load that with `from_pretrained(..., attn_implementation="favorsharp")`.
"""

import matplotlib.pyplot as plt
import torch
from transformers import BertConfig, BertModel

from favorsharp.transformers import calibrate, register

torch.manual_seed(0)
config = BertConfig(vocab_size=200, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128)
model = BertModel(config).eval()
with torch.no_grad():  # the scores of fresh weights are nearly all alike; a trained model's are not
    for layer in model.encoder.layer:
        layer.attention.self.query.weight *= 12
        layer.attention.self.key.weight *= 12

text = torch.randint(200, (4, 96))
mask = torch.arange(96)[None] < torch.tensor([96, 80, 64, 48])[:, None]


@torch.no_grad()
def hidden(implementation):
    model.set_attn_implementation(implementation)
    return model(input_ids=text, attention_mask=mask.long()).last_hidden_state[mask]


# %%
# The exact attention through the same door is the model's own:

register("exact", method="exact")
exact = hidden("eager")
print(torch.allclose(hidden("exact"), exact, atol=1e-5))

# %%
# Without calibration a bidirectional model is fitted to each input. The error falls with the number of features, and
# faster for the better fit:

sizes = (16, 64, 256)
fig, ax = plt.subplots(layout="constrained")
for method in ("posrf", "sderf", "optimal"):
    errors = []
    for m in sizes:
        register("favorsharp", method=method, num_features=m, rng=0)
        errors.append(float((hidden("favorsharp") - exact).norm() / exact.norm()))
    ax.loglog(sizes, errors, marker="o", label=method)
ax.set(xlabel="features", ylabel="relative error of the last hidden state")
ax.legend()

# %%
# Frozen maps cost no fit per input, and are what a causal model needs:

register("frozen", num_features=256, window=16, rng=0, calibration="frozen")
model.set_attn_implementation("frozen")
maps = calibrate(model, [torch.randint(200, (4, 96)) for _ in range(3)])
print(maps["encoder.layer.0.attention.self"])
print(float((hidden("frozen") - exact).norm() / exact.norm()))
