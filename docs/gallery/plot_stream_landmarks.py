"""
A stream of landmarks
=====================

A causal stream with landmarks holds a fixed number of keys, which it chooses again as it goes. Nothing is calibrated.
Here the heads of a sentence encoder read 2,048 tokens: 512 real ones, and more that were drawn from them.
"""

import matplotlib.pyplot as plt
import numpy as np

import favorsharp as fs
from favorsharp.diagnostics import load_sample

q, k, v = (x[:3].astype(np.float32) for x in load_sample(2048))
exact = fs.softmax_attention(q, k, v, is_causal=True)

# %%
# The stream comes in chunks of 128 tokens. After each chunk we note how many numbers the state holds.


def streamed(settings, window):
    """The causal output of all chunks, and the size of the state after each."""
    state, outs, sizes = None, [], []
    for start in range(0, q.shape[1], 128):
        chunk = (x[:, start : start + 128] for x in (q, k, v))
        out, state = fs.linear_attention(
            *chunk, settings, is_causal=True, window=window, state=state, return_state=True
        )
        outs.append(out)
        sizes.append(sum(x.size for x in vars(state).values() if hasattr(x, "size") and hasattr(x, "ndim")))
    return np.concatenate(outs, axis=1), sizes


landmarks = fs.landmarks(64)
features = fs.feature_map(fs.fit(q[:, :512], k[:, :512]), 256, rng=0)  # a map needs data to be fitted to
outs, sizes = {}, {}
for name, settings in {"64 landmarks, window 16": landmarks, "256 features, window 16": features}.items():
    outs[name], sizes[name] = streamed(settings, 16)
    print(name, "hold", sizes[name][3], "numbers after 512 tokens and", sizes[name][-1], "after 2048")

# %%
# For comparison: the most recent keys alone, as many as the stream of landmarks holds at most. Each query attends to
# them exactly, and to nothing else.

keys = 2 * 64 + 2 * 16
recent = np.zeros_like(exact)
for i in range(q.shape[1]):
    near = slice(max(0, i + 1 - keys), i + 1)
    recent[:, i : i + 1] = fs.softmax_attention(q[:, i : i + 1], k[:, near], v[:, near])
outs[f"{keys} recent keys alone"] = recent

# %%
# The error of each chunk, relative to exact attention:

fig, ax = plt.subplots(layout="constrained")
ends = np.arange(128, q.shape[1] + 1, 128)
for name, out in outs.items():
    squares = ((out - exact) ** 2).sum(axis=(0, 2)).reshape(-1, 128).sum(axis=1)
    errors = np.sqrt(squares / (exact**2).sum(axis=(0, 2)).reshape(-1, 128).sum(axis=1))
    ax.plot(ends, errors, label=name)
    print(f"{name}: error {errors[-8:].mean():.3f} in the second half")
ax.set(xlabel="tokens seen", ylabel="relative error of attention", ylim=(0, None))
ax.legend()
