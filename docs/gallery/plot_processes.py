"""
Long sequences over several processes
=====================================

Each of three processes holds a third of a sequence. They exchange states and, with a window, one block of keys and
values. Their results and gradients are those that one process would get for the whole sequence.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist

import favorsharp as fs
import favorsharp.distributed as fsd

WORLD, LENGTH = 3, 3 * 512


def whole_sequence():
    """Two heads. Here every process can make the whole sequence, so that results can be compared."""
    torch.manual_seed(0)
    return torch.randn(3, 2, LENGTH, 32, dtype=torch.float64)


# %%
# This is what one rank runs; it uses only its own third. `torchrun` would start such programs on one machine or on
# many; here the ranks find each other through a file.


def one_rank(rank, folder):
    """Fit, draw and attend together with the other ranks; save the result and a gradient in a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    own = whole_sequence()[:, :, rank * LENGTH // WORLD : (rank + 1) * LENGTH // WORLD]
    q, k, v = (x.clone().requires_grad_() for x in own)
    moments = fsd.all_combine(fs.moments(q.detach(), k.detach()))
    feature_map = fs.feature_map(fs.fit(moments), 64, rng=0)
    out = fsd.linear_attention(q, k, v, feature_map, is_causal=True, window=16)
    out.square().sum().backward()
    torch.save((out.detach(), k.grad), Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


if sys.argv[1:2] == ["--rank"]:
    one_rank(int(sys.argv[2]), sys.argv[3])
    sys.exit()

# %%
# Start this file in three processes:

with tempfile.TemporaryDirectory() as folder:
    ranks = [subprocess.Popen([sys.executable, sys.argv[0], "--rank", str(rank), folder]) for rank in range(WORLD)]
    assert [process.wait(timeout=300) for process in ranks] == [0] * WORLD
    parts = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(WORLD)]
out, of_keys = (torch.cat(shards, dim=-2) for shards in zip(*parts, strict=True))

# %%
# Compare with one process that holds everything:

q, k, v = (x.requires_grad_() for x in whole_sequence())
feature_map = fs.feature_map(fs.fit(q.detach(), k.detach()), 64, rng=0)
expected = fs.linear_attention(q, k, v, feature_map, is_causal=True, window=16)
expected.square().sum().backward()
print("output: ", bool(torch.allclose(out, expected.detach(), rtol=0, atol=1e-9)))
print("gradient of the keys: ", bool(torch.allclose(of_keys, k.grad, rtol=0, atol=1e-9)))

# %%
# What one rank sends to another, compared with its keys and values:

sent = 64 * (32 + 2) + 16 * (32 + 32 + 1)  # a state, and a block of the window
tokens = [512, 2048, 8192, 32_768]
fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
ax.plot(tokens, [n * (32 + 32) for n in tokens], "o-", color="#999999", label="its keys and values")
ax.plot(tokens, [sent for _ in tokens], "o-", color="#0b4f9e", linewidth=2, label="a state and a block")
ax.set_xscale("log", base=2)
ax.set_yscale("log")
ax.set_xticks(tokens, [f"{n:,}" for n in tokens])
ax.set_xlabel("tokens of a rank")
ax.set_ylabel("numbers a head that it sends")
ax.legend()
plt.show()
