"""
Error against features on real heads
====================================

How fast the error of attention falls with the number of features, by method: three heads of a sentence encoder, 512
tokens.
"""

import matplotlib.pyplot as plt

from favorsharp.diagnostics import compare, load_sample

q, k, v = (x[:3].astype("float32") for x in load_sample())
features = [16, 64, 256]
rows = list(compare(q, k, v, methods=["posrf", "oprf", "sderf", "optimal"], num_features=features, seeds=2, repeats=1))

# %%
# Dashed lines: near keys, in blocks of 16, are scored exactly.

for number, method in enumerate(("posrf", "oprf", "sderf", "optimal")):
    for window, style in ((0, "-"), (16, "--")):
        errors = [row.measured for row in rows if (row.method, row.window) == (method, window)]
        plt.plot(features, errors, style, color=f"C{number}", label=None if window else method)
plt.xscale("log", base=2)
plt.ylim(bottom=0)
plt.xlabel("features")
plt.ylabel("relative error of attention")
plt.legend(frameon=False)
plt.show()
