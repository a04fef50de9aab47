"""The checks that each rank of a process group runs; tests/test_distributed.py spawns the ranks and reads the results.

The checks are in a module of their own, so that a spawned process can import them.
"""

import json
import re
import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from problems import attention_problem, key_mask
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

import favorsharp as fs
from favorsharp import distributed as fsd
from favorsharp._values import map_arrays
from favorsharp.diagnostics import load_sample

LENGTHS = {2: ([5, 12], [0, 9], [7, 0]), 3: ([5, 0, 12], [1, 7, 9], [0, 0, 6])}
BLOCKS = {2: ([8, 5], [4, 9], [0, 7]), 3: ([8, 4, 5], [4, 0, 12], [4, 8, 2])}
"""Lengths of shards for a window of 4: multiples of 4, except for the last shard that holds anything."""


def run(rank: int, world: int, folder: str) -> None:
    """Run every check in turn; a rank ends at its first failure."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.set_num_threads(1)
    found = {}
    for check in CHECKS:
        try:
            with nullcontext() if check is check_any_implementation else fs.use("reference"):
                check(rank, world)
            found[check.__name__] = ""
        except BaseException:
            found[check.__name__] = traceback.format_exc()
            break
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    if not any(found.values()):
        dist.barrier()
        dist.destroy_process_group()


def tensors(seed: int, batch: tuple[int, ...], n: int, dtype: torch.dtype, heads: int = 0) -> list[torch.Tensor]:
    """The same whole q, k and v on every rank; with `heads`, q has that many times the heads of k."""
    q, k, v = (torch.from_numpy(x).to(dtype) for x in attention_problem(seed, batch, n=n))
    if heads:
        q = torch.cat([q * (1 + 0.1 * i) for i in range(heads)], 1)
    return [q, k, v]


def close(name: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape, f"{name}: {ours.shape} and {theirs.shape}"
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype} and {theirs.dtype}"
    assert torch.isfinite(ours).all(), f"{name} is not finite"
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-3)).item() if ours.numel() else 0.0
    assert error <= tolerance, f"{name} is off by {error:.2e}"


def equal_to_one_process(rank, lengths, *, dtype=torch.float64, tolerance=1e-10, kind="none", heads=0, **options):
    """Check outputs and gradients against the whole sequence in one process."""
    whole = sum(lengths)
    q, k, v = tensors(whole, (2, 3), whole, dtype, heads)
    mask = key_mask(7, (2, 3, whole), kind)
    mask = None if mask is None else torch.from_numpy(mask)
    options["enable_gqa"] = bool(heads)
    feature_map = fs.feature_map(fs.fit(q, k, axis=(0, -2), enable_gqa=bool(heads)), 16, rng=0)
    weight = torch.from_numpy(attention_problem(3, q.shape[:2], n=whole)[2]).to(dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = fs.linear_attention(*leaves, feature_map, key_mask=mask, **options)
    (expected * weight).sum().backward()
    here = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    own = [x[..., here, :].clone().requires_grad_() for x in (q, k, v)]
    part = None if mask is None else mask[..., here]
    out = fsd.linear_attention(*own, feature_map, key_mask=part, **options)
    (out * weight[..., here, :]).sum().backward()
    label = f"rank {rank} of {lengths}, {kind}, {options}"
    close(f"{label}: out", out.detach(), expected[..., here, :].detach(), tolerance)
    for name, ours, theirs in zip("qkv", own, leaves, strict=True):
        close(f"{label}: d{name}", ours.grad, theirs.grad[..., here, :], tolerance)


def check_ragged_shards(rank, world):
    for causal in (False, True):
        for lengths in LENGTHS[world]:
            equal_to_one_process(rank, lengths, kind="holes", is_causal=causal)
        equal_to_one_process(rank, LENGTHS[world][0], is_causal=causal)


def check_windows(rank, world):
    for causal in (False, True):
        for lengths in BLOCKS[world]:
            equal_to_one_process(rank, lengths, kind="holes", is_causal=causal, window=4)
        equal_to_one_process(rank, BLOCKS[world][0], is_causal=causal, window=4)


def check_grouped_heads(rank, world):
    for causal in (False, True):
        for window in (0, 4):
            equal_to_one_process(rank, BLOCKS[world][0], kind="padding", heads=2, is_causal=causal, window=window)


def check_single_precision(rank, world):
    for causal in (False, True):
        for window in (0, 4):
            lengths = BLOCKS[world][1]
            options = {"dtype": torch.float32, "tolerance": 1e-4, "is_causal": causal, "window": window}
            equal_to_one_process(rank, lengths, kind="holes", **options)
    half = [x.bfloat16() for x in tensors(0, (2,), 4 * world, torch.float32)]
    feature_map = fs.feature_map(fs.fit(*half[:2]), 16, rng=0)
    own = [x[..., 4 * rank : 4 * rank + 4, :] for x in half]
    out = fsd.linear_attention(*own, feature_map, is_causal=True)
    close(
        "bfloat16", out, fs.linear_attention(*half, feature_map, is_causal=True)[..., 4 * rank : 4 * rank + 4, :], 0.02
    )


def check_any_implementation(rank, world):
    lengths = BLOCKS[world][0]
    q, k, v = tensors(1, (3,), sum(lengths), torch.float64)  # float64, for which other tests compile the kernels
    feature_map = fs.feature_map(fs.fit(q, k), 16, rng=0)
    here = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    own = [x[..., here, :] for x in (q, k, v)]
    for options in ({}, {"is_causal": True}, {"is_causal": True, "window": 4}, {"window": 4}):
        with fs.use("numba", "reference"):
            out = fsd.linear_attention(*own, feature_map, **options)
        close(f"{options}", out, fs.linear_attention(q, k, v, feature_map, **options)[..., here, :], 1e-10)


def check_gradients_of_a_map(rank, world):
    """Each rank has its own share of these gradients; the sum of the shares is the whole gradient."""
    q, k, v = tensors(2, (3,), 5 * world, torch.float64)
    drawn = fs.feature_map(fs.fit(q, k), 16, rng=0)
    here = slice(5 * rank, 5 * rank + 5)
    for causal in (False, True):
        whole, own = (replace(drawn, rows=drawn.rows.clone().requires_grad_()) for _ in range(2))
        fs.linear_attention(q, k, v, whole, is_causal=causal).square().sum().backward()
        points = (x[..., here, :] for x in (q, k, v))
        fsd.linear_attention(*points, own, is_causal=causal).square().sum().backward()
        total = own.rows.grad.clone()
        dist.all_reduce(total)
        close(f"rows, is_causal={causal}", total, whole.rows.grad, 1e-10)


def check_second_derivatives_are_refused(rank, world):
    q, k, v = (x.requires_grad_() for x in tensors(2, (), 3, torch.float64))
    feature_map = fs.feature_map(fs.fit(q.detach(), k.detach()), 8, rng=0)
    loss = fsd.linear_attention(q, k, v, feature_map).square().sum()
    (first,) = torch.autograd.grad(loss, k, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def check_not_finite_stays_where_it_is(rank, world):
    q, k, v = tensors(2, (3,), 4 * world, torch.float64)
    feature_map = fs.feature_map(fs.fit(q, k), 16, rng=0)
    k, v = k.clone(), v.clone()
    k[0, 4], v[1, 4] = torch.nan, torch.inf  # on rank 1
    here = slice(4 * rank, 4 * rank + 4)
    own = [x[:, here] for x in (q, k, v)]
    for options in ({}, {"is_causal": True}, {"is_causal": True, "window": 2}, {"window": 2}):
        expected = fs.linear_attention(q, k, v, feature_map, **options)[:, here].isfinite()
        assert torch.equal(fsd.linear_attention(*own, feature_map, **options).isfinite(), expected), options


def check_states_travel_and_keys_stay(rank, world):
    """The amount of data that a call sends does not grow with the length.

    A window adds a block of keys for each neighbour.
    """
    sent = []
    originals = dist.all_reduce, dist.all_to_all_single

    def all_reduce(x, *args, **kwargs):
        sent.append(x.numel())
        return originals[0](x, *args, **kwargs)

    def all_to_all_single(out, x, *args, **kwargs):
        sent.append(x.numel())
        return originals[1](out, x, *args, **kwargs)

    dist.all_reduce, dist.all_to_all_single = all_reduce, all_to_all_single
    try:
        for options in ({}, {"is_causal": True}, {"is_causal": True, "window": 8}, {"window": 8}):
            sizes = []
            for n in (64, 512):
                own = tensors(rank, (2,), n, torch.float32)
                feature_map = fs.feature_map(fs.fit(torch.ones(9, 8), torch.ones(9, 8)), 16, rng=0)
                fsd.linear_attention(*own, feature_map, **options)
                sizes.append(sum(sent))
                sent.clear()
            states, keys = 2 * 16 * (5 + 2), 2 * options.get("window", 0) * (8 + 5 + 1)
            assert sizes[0] == sizes[1] <= (world - 1 or 1) * states + 2 * keys, (options, sizes)
    finally:
        dist.all_reduce, dist.all_to_all_single = originals


def check_fit_over_shards(rank, world):
    q, k, v = tensors(5, (3,), 8 * world + 1, torch.float64)
    stop = None if rank == world - 1 else 8 * rank + 8
    own_q, own_k, own_v = (x[:, 8 * rank : stop] for x in (q, k, v))
    own_q = own_q[:, :0] if rank == 0 else own_q  # an empty shard changes nothing
    total = fsd.all_combine(fs.moments(own_q, own_k))
    whole = fs.moments(q[:, 8:], k)
    for name in ("count_x", "count_y", "mean_x", "mean_y", "covariance_x", "covariance_y"):
        close(name, getattr(total, name), getattr(whole, name), 1e-12)
    distributed, alone = fs.fit(total), fs.fit(whole)
    close("excess", fs.excess(distributed, q, k), fs.excess(alone, q, k), 1e-10)
    maps = [fs.feature_map(fs.fit(x, method="sderf"), 16, rng=0) for x in (total, whole)]
    close("attention", *(fs.linear_attention(q, k, v, fm) for fm in maps), 1e-8)
    host = map_arrays(fs.moments(own_q, own_k), lambda x: x.numpy())
    assert type(fsd.all_combine(host).mean_x).__module__ == "numpy"
    state = fs.update(fs.init_state(maps[0], 5, like=k), own_k, own_v, maps[0])
    close("state", fs.read(fsd.all_combine(state), q, maps[0]), fs.linear_attention(q, k, v, maps[0]), 1e-10)
    refused("all_combine takes Moments or a State", fsd.all_combine, 3)


def check_landmarks(rank, world):
    """With as many landmarks as keys, results and gradients are exact.

    With fewer, errors are about those of one process.
    """
    for lengths in LENGTHS[world]:
        whole, here = sum(lengths), slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
        q, k, v = tensors(whole, (2, 3), whole, torch.float64, 2)
        mask = torch.from_numpy(key_mask(7, k.shape[:-1], "holes"))
        leaves, own = ([x[..., part, :].clone().requires_grad_() for x in (q, k, v)] for part in (slice(None), here))
        options = {"enable_gqa": True}
        expected = fs.softmax_attention(*leaves, key_mask=mask, **options)
        out = fsd.linear_attention(*own, fs.landmarks(whole), key_mask=mask[..., here], **options)
        close(f"{lengths}", out.detach(), expected[..., here, :].detach(), 1e-10)
        for loss in (expected.square().sum(), out.square().sum()):
            loss.backward()
        for name, ours, theirs in zip("qkv", own, leaves, strict=True):
            close(f"{lengths}, d{name}", ours.grad, theirs.grad[..., here, :], 1e-9)
    q, k, v = (torch.from_numpy(x).float() for x in load_sample())
    here = slice(512 * rank // world, 512 * (rank + 1) // world)
    own, exact = [x[:, here] for x in (q, k, v)], fs.softmax_attention(q, k, v)[:, here]
    for m in (16, 64):
        lm = fs.landmarks(m)
        ours, alone = (
            (out - exact).norm() / exact.norm()
            for out in (fsd.linear_attention(*own, lm), fs.linear_attention(q, k, v, lm)[:, here])
        )
        assert ours < 1.3 * alone, (m, ours, alone)
    state = fs.update(fs.init_state(fs.landmarks(600), 32, like=k), *own[1:], fs.landmarks(600))
    joined = fsd.all_combine(state)
    close("states", fs.read(joined, q, fs.landmarks(600)), fs.softmax_attention(q, k, v), 1e-5)
    close("the order of the ranks", joined.keys, k, 0)
    refused("must agree in feature_map", fsd.linear_attention, *own, fs.landmarks(16 + rank))
    refused("take no is_causal and no window", fsd.linear_attention, *own, lm, is_causal=True)
    refused("take no is_causal and no window", fsd.linear_attention, *own, lm, window=4)
    mesh = init_device_mesh("cpu", (world,))
    cut = [distribute_tensor(x, mesh, [Shard(1)]) for x in (q, k, v)]
    close("DTensors", fsd.linear_attention(*cut, fs.landmarks(512)).full_tensor(), fs.softmax_attention(q, k, v), 1e-5)


def refused(words: str, call, *args, **kwargs) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        call(*args, **kwargs)


def check_errors_are_raised_on_every_rank(rank, world):
    q, k, v = (x[:, :8] for x in tensors(5, (3,), 8, torch.float64))
    parameters = fs.fit(q, k, axis=(0, -2))
    same = fs.feature_map(parameters, 16, rng=0)
    other = fs.feature_map(parameters, 16, rng=rank)
    attention = fsd.linear_attention
    refused("must agree in feature_map", attention, q, k, v, other)
    refused("must agree in is_causal", attention, q, k, v, same, is_causal=rank == 0)
    refused("must agree in window", attention, q, k, v, same, window=rank)
    refused("must agree in dtype", attention, *((x.float() if rank else x) for x in (q, k, v)), same)
    refused("must agree in e", attention, q, k, v[..., : 4 + (rank > 0)], same)
    refused(
        "must agree in leading axes", attention, q[: 2 + (rank > 0)], k[: 2 + (rank > 0)], v[: 2 + (rank > 0)], same
    )
    refused("whether gradients are recorded", attention, q.requires_grad_(rank == 0), k, v, same)
    q = q.detach()
    refused("rank 0 holds 8 positions; accepted: multiples of 3", attention, q, k, v, same, window=3)
    bad = k[..., :3] if rank == world - 1 else k
    refused("agree in d" if rank == world - 1 else f"rank {world - 1} of the group refuses", attention, q, bad, v, same)
    refused("signed", attention, q, k, v, fs.feature_map(fs.fit(q, k, method="trig"), 16, rng=0))
    refused("torch tensors", attention, *(x.numpy() for x in (q, k, v)), map_arrays(same, lambda x: x.numpy()))
    refused("ProcessGroup or None, got str", attention, q, k, v, same, group="default")
    close("after the errors", attention(q, k, v, same), fs.linear_attention(q, k, v, same), 1e-12)


def check_a_group_of_some(rank, world):
    members = list(range(1, world))
    group = dist.new_group(members)
    q, k, v = tensors(5, (3,), 4 * len(members), torch.float64)
    feature_map = fs.feature_map(fs.fit(q, k), 16, rng=0)
    if rank not in members:
        refused("does not contain this process", fsd.linear_attention, q, k, v, feature_map, group=group)
        return
    here = slice(4 * members.index(rank), 4 * members.index(rank) + 4)
    own = (x[:, here] for x in (q, k, v))
    out = fsd.linear_attention(*own, feature_map, is_causal=True, group=group)
    close("out", out, fs.linear_attention(q, k, v, feature_map, is_causal=True)[:, here], 1e-12)


def check_dtensors(rank, world):
    """Sharded along the sequence, the heads or the batch, outputs and gradients equal those of one process."""
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("heads", "sequence"))
    q, k, v = tensors(5, (2, 6), 5 * world - 1, torch.float64)
    feature_map = fs.feature_map(fs.fit(q, k, axis=(0, -2)), 16, rng=0)
    mask = torch.from_numpy(key_mask(7, k.shape[:-1], "holes"))
    for cut in (2, 1, 0, None):
        for causal in (False, True):
            places = [Shard(1), Replicate() if cut is None else Shard(cut)]
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            expected = fs.linear_attention(*leaves, feature_map, is_causal=causal, key_mask=mask)
            expected.square().sum().backward()
            own = [distribute_tensor(x, mesh, places).requires_grad_() for x in (q, k, v)]
            out = fsd.linear_attention(*own, feature_map, is_causal=causal, key_mask=mask)
            assert out.placements == own[0].placements, out.placements
            out.to_local().square().sum().backward()
            label = f"Shard({cut}), is_causal={causal}"
            close(label, out.full_tensor().detach(), expected.detach(), 1e-10)
            for name, ours, theirs in zip("qkv", own, leaves, strict=True):
                close(f"{label}, d{name}", ours.grad.full_tensor(), theirs.grad, 1e-10)
    cut = [distribute_tensor(x, mesh, [Replicate(), Shard(2)]) for x in (q, k, v)]
    even = [distribute_tensor(x[..., : 4 * world, :], mesh, [Replicate(), Shard(2)]) for x in (q, k, v)]
    out = fsd.linear_attention(
        *even, feature_map, window=2, key_mask=distribute_tensor(mask[..., : 4 * world], mesh, [Replicate(), Shard(2)])
    )
    whole = (x[..., : 4 * world, :] for x in (q, k, v))
    close(
        "window",
        out.full_tensor(),
        fs.linear_attention(*whole, feature_map, window=2, key_mask=mask[..., : 4 * world]),
        1e-10,
    )
    refused("must all be DTensors", fsd.linear_attention, cut[0], k, cut[2], feature_map)
    refused(
        "placed alike", fsd.linear_attention, cut[0], distribute_tensor(k, mesh, [Replicate()] * 2), cut[2], feature_map
    )
    last = [distribute_tensor(x, mesh, [Replicate(), Shard(3)]) for x in (q, k, v)]
    refused("accepted: Replicate, or Shard", fsd.linear_attention, *last, feature_map)
    refused("favorsharp.distributed.linear_attention", fs.linear_attention, *cut, feature_map)
    refused("their mesh says", fsd.linear_attention, *cut, feature_map, group=dist.group.WORLD)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
