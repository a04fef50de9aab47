"""
Kernel regression in one pass
=============================

The Nadaraya-Watson estimate from 20 000 noisy points, with features and exactly.
"""

import matplotlib.pyplot as plt
import numpy as np

import favorsharp as fs

rng = np.random.default_rng(0)
y = rng.uniform(-3, 3, (20_000, 1))
v = np.sin(2 * y) + 0.3 * rng.standard_normal(y.shape)
x = np.linspace(-3, 3, 200)[:, None]

weights = fs.kernel_matrix(x, y, kernel="gaussian", scale=10.0)
exact = weights @ v / weights.sum(axis=1, keepdims=True)

# %%
# This bandwidth is narrow for positive features, so the number of features matters.

plt.plot(y[:500], v[:500], ".", color="0.8", markersize=3)
plt.plot(x, exact, color="black", label="exact")
for m in (64, 1024):
    feature_map = fs.feature_map(fs.fit(x, y, kernel="gaussian", scale=10.0), m, rng=0)
    plt.plot(x, fs.nadaraya_watson(x, y, v, feature_map), label=f"{m} features")
plt.legend(frameon=False)
plt.show()
