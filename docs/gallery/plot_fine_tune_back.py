"""
Fine-tune back
==============

Features only estimate attention, so a model that was trained with exact attention gets worse. This example shows two
ways to get the quality back: refining the map, which does not change the model, and training the model to reproduce its
own former outputs.
"""

import copy

import matplotlib.pyplot as plt
import torch

import favorsharp as fs
from favorsharp.diagnostics import load_sample
from favorsharp.torch import MultiheadAttention, refine

torch.manual_seed(0)

# %%
# Refine the map
# --------------
#
# Three heads of a sentence encoder. The closed form is the best if all pairs of a query and a key count equally, but
# the attention output depends on few of them. `refine` follows the gradient of the output's error, with fresh random
# rows at each step, and chooses the best step on tokens that it does not train on.

q, k, v = (torch.from_numpy(x[:3].astype("float32")) for x in load_sample())
parameters = fs.fit(q[:, :256], k[:, :256])
found = refine(parameters, (q, k, v), num_features=32, steps=100, rng=0)
print("held-out error before", found.before.numpy().round(3))
print("                after", found.after.numpy().round(3))

# %%
# Only the parameters have changed. The map is still unbiased, and any number of features may be drawn:

q2, k2, v2 = (x[:, 256:] for x in (q, k, v))
exact = fs.softmax_attention(q2, k2, v2)
for m in (32, 128):
    for name, p in (("closed form", parameters), ("refined", found.parameters)):
        out = fs.linear_attention(q2, k2, v2, fs.feature_map(p, m, rng=1))
        print(f"{name}, {m} features: {float((out - exact).norm() / exact.norm()):.3f}")

# %%
# Train the model
# ---------------
#
# A small encoder, and a copy of it with linear attention and the same weights. The copy is trained to reproduce the
# hidden states of the original.


def data(count):
    """Sequences with some structure: mixtures of a few directions."""
    return torch.randn(count, 64, 3) @ directions + 0.3 * torch.randn(count, 64, 32)


directions = 3 * torch.randn(3, 32)
teacher = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True).eval()
student = copy.deepcopy(teacher)
student.self_attn = MultiheadAttention.from_torch(teacher.self_attn, num_features=16, rng=0).calibrate(data(8))

held_out = data(16)
optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 161)
errors = []
for step in range(161):
    if step % 16 == 0:
        with torch.no_grad():
            want = teacher(held_out)
            errors.append((step, float((student(held_out) - want).norm() / want.norm())))
    x = data(8)
    with torch.no_grad():
        want = teacher(x)
    loss = (student(x) - want).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()

# %%
# Training has changed the queries and keys, so the map is fitted to them again:

student.self_attn.calibrate(held_out)
with torch.no_grad():
    want = teacher(held_out)
    print(f"error {errors[0][1]:.3f} before, {float((student(held_out) - want).norm() / want.norm()):.3f} after")

plt.plot(*zip(*errors, strict=True), marker=".")
plt.ylim(0)
plt.xlabel("steps")
plt.ylabel("relative error of held-out hidden states")
plt.show()
