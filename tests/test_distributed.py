"""Attention of several processes: what each rank finds is in distributed_checks.py; here they are spawned."""

import json

import distributed_checks
import pytest
import torch
import torch.multiprocessing

import favorsharp as fs
from favorsharp import distributed as fsd


@pytest.mark.own_backend
@pytest.mark.parametrize("world", [2, 3])
def test_every_check_on_every_rank(world, tmp_path):
    torch.multiprocessing.spawn(distributed_checks.run, (world, str(tmp_path)), nprocs=world)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    faults = [f"rank {rank}, {name}:\n{text}" for rank, one in enumerate(found) for name, text in one.items() if text]
    assert not faults, "\n".join(faults)
    for one in found:
        assert len(one) == len(distributed_checks.CHECKS) > 10


def test_a_group_is_needed():
    q, k, v = torch.randn(3, 4, 2)
    feature_map = fs.feature_map(fs.fit(q, k), 8, rng=0)
    with pytest.raises(ValueError, match=r"torch\.distributed\.init_process_group first"):
        fsd.linear_attention(q, k, v, feature_map)
    with pytest.raises(ValueError, match=r"torch\.distributed\.init_process_group first"):
        fsd.all_combine(fs.moments(q, k))
