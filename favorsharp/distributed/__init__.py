"""Attention over a sequence whose shards lie on several processes: states travel, keys stay (docs: design, sharding).

Each rank of a torch.distributed process group holds consecutive positions of the sequence, in the order of the ranks.
What it needs to know of the others is their state: m (e + 2) numbers a head, whatever the length.
"""

from favorsharp.distributed.attention import linear_attention
from favorsharp.distributed.gathering import all_combine

__all__ = ["all_combine", "linear_attention"]
