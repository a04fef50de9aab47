"""
RBFSampler, Nystroem, ours: when which
======================================

Features whose products approximate the Gaussian kernel: their errors for a wide and a narrow kernel, and the results of
ridge regressions on them.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.kernel_approximation import Nystroem, RBFSampler
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from favorsharp.sklearn import FeatureRidge, RandomFeatures

x, y = load_digits(return_X_y=True)
x, test, y, wanted = train_test_split(StandardScaler().fit_transform(x), y.astype(float), random_state=0)

# %%
# The relative error of the kernel matrix of points that were not fitted. By default `RandomFeatures` compares Nystrom,
# Fourier and positive features on a sample, and says which it took, and why.

sizes, gammas = (32, 64, 128, 256), (0.1 / 64, 1 / 64)
makers = {"RBFSampler": RBFSampler, "Nystroem": Nystroem, "RandomFeatures": RandomFeatures}
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
for gamma, ax in zip(gammas, axes, strict=True):
    exact = rbf_kernel(test, gamma=gamma)
    for name, make in makers.items():
        errors = []
        for m in sizes:
            found = make(gamma=gamma, n_components=m, random_state=0).fit(x).transform(test)
            errors.append(np.linalg.norm(found @ found.T - exact) / np.linalg.norm(exact))
        ax.loglog(sizes, errors, marker="o", label=name)
    ax.set(title=f"gamma = {gamma:.3g}", xlabel="features")
axes[0].set_ylabel("relative error")
axes[0].legend(frameon=False)
plt.tight_layout()
plt.show()

features = RandomFeatures(gamma=1 / 64, random_state=0).fit(x)
print(features.method_, "|", features.reason_)

# %%
# If the kernel is so narrow that every point is far from all others, 256 features cannot describe it: all errors are
# near 1, and those of Fourier features are larger.

exact = rbf_kernel(test, gamma=1.0)
for name, make in makers.items():
    found = make(gamma=1.0, n_components=256, random_state=0).fit(x).transform(test)
    print(f"{name:15s} {np.linalg.norm(found @ found.T - exact) / np.linalg.norm(exact):.2f}")

# %%
# `FeatureRidge` is kernel ridge regression on such features. It chooses the penalty by leave-one-out errors, which are
# exact and cost one more pass over the points.

model = FeatureRidge(gamma=1 / 64, random_state=0).fit(x, y)
print(f"alpha {model.alpha_:.2g}, held-out R2 {model.score(test, wanted):.3f}")

# %%
# **Which one to take.**
#
# - `RandomFeatures` for the Gaussian kernel of dense points. By default it chooses the features that are nearest to the
#   kernel: mostly those of Nyström's method, and Fourier features for few points that are far apart. `method="trig"` or
#   `"optimal"` gives unbiased features; `purpose="smoothing"` chooses features for averages of values.
# - `Nystroem` for other kernels (polynomial, chi squared, a function), and if the fit should look at 256 points only.
# - `RBFSampler` for sparse tables, which `RandomFeatures` refuses.
# - `FeatureRidge` for ridge regression on such features, if the points do not fit into memory, or if the penalty has to
#   be chosen.
