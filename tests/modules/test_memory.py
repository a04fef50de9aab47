"""Modules whose memory other code fills: deferred, converted, loaded and averaged modules, and several processes."""

import copy
import gc
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch_samples import sample  # noqa: E402

import favorsharp as fs  # noqa: E402
from favorsharp.torch import LinearAttention, MultiheadAttention  # noqa: E402

KINDS_OF_MODULE = {
    "attention": lambda **options: LinearAttention(8, 4, num_features=16, **options),
    "posrf": lambda **options: LinearAttention(8, num_features=16, method="posrf", **options),
    "multihead": lambda **options: MultiheadAttention(32, 4, batch_first=True, num_features=16, **options),
}


def result(module):
    """The result of a module for fixed inputs; it is calibrated to them first if its method is fitted."""
    x = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0))
    if isinstance(module, MultiheadAttention):
        return module.calibrate(x)(x, x, x)[0]
    q, k, v = sample(2, 4, 50, 8)
    return module.calibrate(q, k)(q, k, v)


@pytest.mark.parametrize("rng", [0, None, np.random.SeedSequence(3), np.random.default_rng(4)], ids=str)
@pytest.mark.parametrize("kind", KINDS_OF_MODULE)
def test_deferred_memory_is_filled_by_reset_parameters(kind, rng):
    """The numbers equal those of a module that was not deferred, also if every part of the module is reset by
    itself."""
    make = KINDS_OF_MODULE[kind]
    torch.manual_seed(1)
    want = make(rng=copy.deepcopy(rng))
    deferred = make(rng=copy.deepcopy(rng), device="meta").to_empty(device="cpu")
    torch.manual_seed(1)
    deferred.reset_parameters()
    assert torch.equal(result(deferred), result(want))
    with torch.device("meta"):
        parts = make(rng=rng)
    parts.to_empty(device="cpu")
    for part in parts.modules():
        part.reset_parameters()
    rows, wanted = (next(x for name, x in m.named_buffers() if "projection" in name) for m in (parts, want))
    if rng is not None:
        assert torch.equal(rows, wanted)
    assert bool(result(parts).isfinite().all())


def test_reset_parameters_goes_back(attention):
    """It restores the rows of the seed, and the module is not calibrated any more."""
    rows = attention.projection.clone()
    attention.redraw(5).reset_parameters()
    assert torch.equal(attention.projection, rows)
    assert not attention.is_calibrated
    given = torch.randn(16, 8)
    for device in ("cpu", "meta"):
        module = LinearAttention(8, num_features=16, draw=given.numpy(), device=device).to_empty(device="cpu")
        module.reset_parameters()
        assert torch.equal(module.projection, given)
    module = LinearAttention(8, num_features=16, draw=given.to("meta")).to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="draw was an array on the 'meta' device"):
        module.reset_parameters()


@pytest.mark.parametrize("kind", KINDS_OF_MODULE)
def test_memory_that_nobody_filled_is_refused(kind):
    """Such memory comes from to_empty, from skip_init, and from loaders that do not find a key."""
    with torch.device("meta"):
        module = KINDS_OF_MODULE[kind](rng=0)
    with pytest.raises(RuntimeError, match="has no random rows: its memory was not filled"):
        result(module.to_empty(device="cpu"))
    with pytest.raises(RuntimeError, match="has no random rows"):
        result(torch.nn.utils.skip_init(type(module), *((8, 4) if kind != "multihead" else (32, 4))))
    module = KINDS_OF_MODULE[kind](rng=0)
    attention = getattr(module, "attention", module)
    for garbage in (torch.zeros(16, 8), torch.full((16, 8), 1e-30), torch.rand(16, 8)):
        attention.projection = garbage
        with pytest.raises(RuntimeError, match="not those of any draw 'orthogonal'"):
            result(module)
    module.reset_parameters()
    for name in ("a", "g1", "g2", "center_x", "center_y"):
        setattr(attention, name, torch.zeros_like(getattr(attention, name)))
    with pytest.raises(RuntimeError, match=r"not those of one fit \(g1\^T g2 differs from I by 1\)"):
        _ = attention.feature_map
    assert not attention.is_calibrated


def test_conversions_keep_the_numbers(attention):
    q, k, v = sample(2, 4, 50, 8)
    want = attention(q, k, v)
    attention.to_empty(device="cpu")
    assert torch.equal(attention(q, k, v), want)
    doubled = copy.deepcopy(attention).double().half()
    assert {x.dtype for x in doubled.buffers()} == {torch.float64}
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        swapped = copy.deepcopy(attention).bfloat16().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(swapped(q, k, v), want)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_strict_loads_both_ways(attention, assign, device):
    """State dicts of calibrated and other modules load into both kinds, and by assignment into a module on meta."""
    if device == "meta" and not assign:
        return
    q, k, v = sample(2, 4, 50, 8)
    blank = LinearAttention(8, 4, num_features=16, rng=1)
    earlier = {"projection": blank.projection}
    for start in (copy.deepcopy(blank), copy.deepcopy(attention)):
        module = start.to(device)
        module.load_state_dict(attention.state_dict(), assign=assign)
        assert torch.equal(module(q, k, v), attention(q, k, v))
        module.load_state_dict(blank.state_dict(), assign=assign)
        assert not module.is_calibrated
        module.load_state_dict(earlier, assign=assign)
        with pytest.raises(RuntimeError, match="not calibrated"):
            module(q, k, v)


def test_modules_pickled_before_parameters_were_always_there():
    module = LinearAttention(8, 4, num_features=16, rng=0)
    state = module.__getstate__()
    for name in ("_source", "_orthogonal", "_last_fault"):
        del state[name]
    state["_buffers"] = {**state["_buffers"], **dict.fromkeys(("a", "g1", "g2", "center_x", "center_y"))}
    again = LinearAttention.__new__(LinearAttention)
    again.__setstate__(state)
    assert not again.is_calibrated
    assert torch.equal(result(again), result(module))


def test_a_distributed_checkpoint_loads(tmp_path):
    import torch.distributed.checkpoint as checkpoint

    saved, module = (KINDS_OF_MODULE["multihead"](rng=rng) for rng in (0, 1))
    want = result(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        checkpoint.save(saved.state_dict(), checkpoint_id=tmp_path, no_dist=True)
        checkpoint.load(module.state_dict(), checkpoint_id=tmp_path, no_dist=True)  # in place
    assert module.attention.is_calibrated
    x = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(x, x, x)[0], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pretrained_model_loads(tmp_path, dtype):
    transformers = pytest.importorskip("transformers")

    class Net(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.part = KINDS_OF_MODULE["multihead"]()
            self.post_init()

        def _init_weights(self, module):
            pass

    saved = Net(transformers.PretrainedConfig()).to(dtype)
    x = torch.randn(2, 30, 32, dtype=dtype)
    want = saved.part.calibrate(x)(x, x, x)[0]
    saved.save_pretrained(tmp_path)
    loaded, info = Net.from_pretrained(tmp_path, output_loading_info=True, dtype=dtype)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert torch.equal(loaded.part(x, x, x)[0], want)


AVERAGES = {
    "mean": {},
    "exponential": {"multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)},
    "one by one": {"avg_fn": torch.optim.swa_utils.get_ema_avg_fn(0.999)},
}


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("average", AVERAGES)
def test_averages_of_one_map_are_that_map(average, use_buffers):
    """This holds whether the copy was made before calibration or after it."""
    for early in (True, False):
        module = KINDS_OF_MODULE["multihead"](rng=0)
        want = None if early else result(module)
        averaged = torch.optim.swa_utils.AveragedModel(module, use_buffers=use_buffers, **AVERAGES[average])
        want = result(module) if early else want
        for _ in range(50):
            averaged.update_parameters(module)
        x = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(averaged(x, x, x)[0], want)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize(
    ("change", "message"),
    [("calibrate", "averages of different calibrations"), ("redraw", "averages of different rows")],
)
def test_averages_of_different_maps_are_refused(change, message, average):
    """An average of different maps is biased: g1^T g2 is not I, or the rows are not normal."""
    module = KINDS_OF_MODULE["multihead"](rng=0)
    x = torch.randn(2, 30, 32)
    module.calibrate(x)
    averaged = torch.optim.swa_utils.AveragedModel(module, use_buffers=True, **AVERAGES[average])
    averaged.update_parameters(module)
    averaged(x, x, x)
    module.calibrate(x @ torch.diag(torch.linspace(0, 5, 32))) if change == "calibrate" else module.redraw(1)
    for _ in range(300 if average == "one by one" else 1):
        averaged.update_parameters(module)
    with pytest.raises(RuntimeError, match=message):
        averaged(x, x, x)


def test_numbers_are_looked_at_only_where_they_changed(attention, monkeypatch):
    """The reason is that the host waits for the device when it looks."""
    looks = []
    look = LinearAttention._fault_of_rows
    monkeypatch.setattr(LinearAttention, "_fault_of_rows", lambda self: looks.append(1) or look(self))
    q, k, v = sample(2, 4, 50, 8)
    for _ in range(3):
        attention(q, k, v)
        assert attention.is_calibrated
    assert len(looks) == 1
    with torch.no_grad():
        attention.center_x.add_(0.1)
    attention(q, k, v), attention(q, k, v)
    assert len(looks) == 2


def test_graphs_are_not_made_of_nothing():
    """Export and transforms refuse a module that is not calibrated, and accept stacked modules."""
    q, k, v = sample(2, 4, 20, 8)
    blank = LinearAttention(8, 4, num_features=16)
    for call in (
        lambda: torch.export.export(blank, (q, k, v)),
        lambda: torch.func.grad(lambda x: blank(x, k, v).sum())(q),
        lambda: torch.vmap(lambda x: blank(x, k, v))(q[None]),
    ):
        with pytest.raises(RuntimeError, match="not calibrated"):
            call()
    modules = [LinearAttention(8, 4, num_features=16, rng=i).calibrate(q + i, k) for i in range(2)]
    parameters, buffers = torch.func.stack_module_state(modules)

    def call(parameters, buffers):
        return torch.func.functional_call(blank.to("meta"), (parameters, buffers), (q, k, v))

    want = torch.stack([module(q, k, v) for module in modules])
    torch.testing.assert_close(torch.vmap(call)(parameters, buffers), want)


# Several processes ---------------------------------------------------------------------------------------------------


def _train_in_parallel(rank, folder, calibrated):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save(_trained_in_parallel(rank, calibrated), f"{folder}/{rank}.pt")
    # A DistributedDataParallel that dies after its process group was destroyed waits, with the interpreter's lock, for
    # a thread of gloo that may wait for the lock.
    gc.collect()
    torch.distributed.destroy_process_group()


def _trained_in_parallel(rank, calibrated):
    x = torch.randn(4, 20, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    module = MultiheadAttention(16, 2, batch_first=True, num_features=8, rng=rank)  # rows differ by rank
    if rank in calibrated:
        module.calibrate(x)
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    with fs.use("reference"):
        own = x[2 * rank : 2 * rank + 2]
        parallel(own, own, own)[0].square().mean().backward()
    return {"projection": module.attention.projection, "gradient": module.in_proj_weight.grad.clone()}


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [(0, 1), (0,)], ids=str)
def test_data_parallel_training(tmp_path, calibrated):
    """Every process uses the map of the first process, and gradients equal those of a single process."""
    torch.multiprocessing.spawn(_train_in_parallel, args=(str(tmp_path), calibrated), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first["projection"], second["projection"])
    x = torch.randn(4, 20, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    module = MultiheadAttention(16, 2, batch_first=True, num_features=8, rng=0).calibrate(x)
    module(x, x, x)[0].square().mean().backward()
    torch.testing.assert_close(first["gradient"], module.in_proj_weight.grad)
    torch.testing.assert_close(second["gradient"], module.in_proj_weight.grad)
