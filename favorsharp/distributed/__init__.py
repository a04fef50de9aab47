"""Attention over a sequence whose shards are on several processes (docs: design, sharding).

Each rank of a torch.distributed process group holds consecutive positions of the sequence, in the order of the ranks.
Instead of their keys and values, the ranks send each other states: m (e + 2) numbers a head, whatever the length. Users
import this package; no other part of the library does.
"""

from favorsharp.distributed.attention import linear_attention
from favorsharp.distributed.gathering import all_combine

__all__ = ["all_combine", "linear_attention"]
