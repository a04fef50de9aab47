"""
A stream in constant memory
===========================

A sequence is processed token by token. The size of the state is constant, and the result equals one causal call.
"""

import numpy as np

import favorsharp as fs

rng = np.random.default_rng(0)
q, k, v = rng.standard_normal((3, 2, 300, 32))
feature_map = fs.feature_map(fs.fit(q[:, :100], k[:, :100]), 64, rng=0)

state = fs.init_state(feature_map, v.shape[-1], like=k, window=16)
outs = []
for i in range(q.shape[-2]):
    token = (x[:, i : i + 1] for x in (q, k, v))
    out, state = fs.decode_step(*token, state, feature_map)
    outs.append(out)
print(state)

# %%
# One causal call gives the same numbers:

whole = fs.linear_attention(q, k, v, feature_map, is_causal=True, window=16)
print(np.abs(np.concatenate(outs, axis=1) - whole).max() < 1e-10)
