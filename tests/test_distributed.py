"""Attention over several processes: this file starts the processes, and distributed_checks.py has their checks."""

import json

import distributed_checks
import pytest
import torch
import torch.multiprocessing

import favorsharp as fs
from favorsharp import distributed as fsd


@pytest.mark.own_backend
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch warns where a graph breaks
def test_a_compiled_caller_leaves_it_out_of_its_graph(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        q, k, v = torch.randn(3, 2, 15, 8, dtype=torch.float64)
        feature_map = fs.feature_map(fs.fit(q, k), 16, rng=0)
        for causal in (False, True):

            def double(q, causal=causal):
                return 2 * fsd.linear_attention(1.5 * q, k, v, feature_map, is_causal=causal)

            leaves = [q.clone().requires_grad_() for _ in range(2)]
            outs = [double(leaves[0]), torch.compile(double, backend="aot_eager")(leaves[1])]
            for out in outs:
                out.square().sum().backward()
            torch.testing.assert_close(outs[1], outs[0])
            torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    finally:
        torch.distributed.destroy_process_group()
