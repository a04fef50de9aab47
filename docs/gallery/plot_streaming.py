"""
A stream in constant memory
===========================

A sequence is processed token by token. The size of the state is constant, and the result equals one causal call.
"""

import matplotlib.pyplot as plt
import numpy as np

import favorsharp as fs

rng = np.random.default_rng(0)
q, k, v = rng.standard_normal((3, 2, 300, 32))
feature_map = fs.feature_map(fs.fit(q[:, :100], k[:, :100]), 64, rng=0)

state = fs.init_state(feature_map, v.shape[-1], like=k, window=16)
outs, held = [], []
for i in range(q.shape[-2]):
    token = (x[:, i : i + 1] for x in (q, k, v))
    out, state = fs.decode_step(*token, state, feature_map)
    outs.append(out)
    held.append(sum(x.nbytes for x in vars(state).values() if hasattr(x, "nbytes")) / 1024)
print(state)

# %%
# One causal call gives the same numbers:

whole = fs.linear_attention(q, k, v, feature_map, is_causal=True, window=16)
print(np.abs(np.concatenate(outs, axis=1) - whole).max() < 1e-10)

# %%
# The size of the state, beside that of a cache of all keys and values:

seen = np.arange(1, len(held) + 1)
fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
ax.plot(seen, seen * (k[:, :1].nbytes + v[:, :1].nbytes) / 1024, color="#999999", label="all keys and values")
ax.plot(seen, held, color="#0b4f9e", linewidth=2, label="the state")
ax.set_xlabel("tokens seen")
ax.set_ylabel("KiB")
ax.set_ylim(bottom=0)
ax.legend()
plt.show()
