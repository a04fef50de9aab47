"""
Swap attention in a Hugging Face model
======================================

A BERT with random weights stands in for your model, which you would load with
`from_pretrained(..., attn_implementation="favorsharp")`.
"""

import matplotlib.pyplot as plt
import torch
from transformers import BertConfig, BertModel

from favorsharp.transformers import calibrate, register

torch.manual_seed(0)
config = BertConfig(vocab_size=200, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128)
model = BertModel(config).eval()
with torch.no_grad():  # scores from random weights are nearly equal; those of a trained model are not
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
# `method="exact"` runs exact attention through the same interface, and equals the model's own attention:

register("exact", method="exact")
exact = hidden("eager")
print(torch.allclose(hidden("exact"), exact, atol=1e-5))

# %%
# Without calibration the maps of a bidirectional model are fitted to each input. The error falls with the number of
# features, and faster with a better method:

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
# Frozen maps need no fit for each input. A causal model needs them:

register("frozen", num_features=256, window=16, rng=0, calibration="frozen")
model.set_attn_implementation("frozen")
maps = calibrate(model, [torch.randint(200, (4, 96)) for _ in range(3)])
print(maps["encoder.layer.0.attention.self"])
print(float((hidden("frozen") - exact).norm() / exact.norm()))
