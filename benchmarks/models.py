"""Attention inside models: a block in torch, an encoder and a decoder of transformers."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from typing import Any

import torch
from transformers import AttentionInterface, BertConfig, BertModel, DynamicCache, LlamaConfig, LlamaForCausalLM

import favorsharp as fs
from benchmarks import peers
from benchmarks.measure import Table, compare, table_of
from favorsharp.transformers import StateCache, calibrate, register

EXACT = "exact attention (sdpa)"
WITHOUT = "the model without attention"


def tables(*, quick: bool = False) -> Iterator[Table]:
    """All rows of this script."""
    AttentionInterface.register("bench-none", lambda module, q, k, v, *_, **__: (q.transpose(1, 2), None))
    yield from block(quick)
    yield from encoders(quick)
    yield from decoders(quick)


def block(quick: bool) -> Iterator[Table]:
    """Three linear layers, attention of 8 heads of 64 and a linear layer; beside FAVOR+ there, and attention alone."""
    n, h, d, m = (128 if quick else 4096), 8, 64, 64
    torch.manual_seed(0)
    inputs, last = [torch.nn.Linear(h * d, h * d) for _ in range(3)], torch.nn.Linear(h * d, h * d)
    x, rows = torch.randn(n, h * d), torch.randn(m, d)
    q, k, v = (f(x).unflatten(-1, (h, d)).transpose(0, 1).contiguous() for f in inputs)
    fm = fs.feature_map(fs.fit(q, k), m, rng=0)
    plain = peers.compiled(peers.torch_attention_plain)

    def whole(attend: Callable[..., Any]) -> Any:
        heads = (f(x).unflatten(-1, (h, d)).transpose(0, 1) for f in inputs)
        return last(attend(*heads).transpose(0, 1).flatten(-2))

    ours = lambda *x: fs.linear_attention(*x, fm)  # noqa: E731
    found = compare(
        "a block of torch",
        {
            "favorsharp": partial(whole, ours),
            "torch.compile, FAVOR+": partial(whole, lambda *x: plain(*x, rows, d**-0.25)),
            EXACT: partial(whole, peers.exact),
            WITHOUT: partial(whole, lambda q, k, v: v),
            "attention alone": partial(ours, q, k, v),
        },
        budget=6.0,
    ).rounds  # fmt: skip
    sides = [name for name in ("favorsharp", "torch.compile, FAVOR+", EXACT) if name in found]
    added = {name: [x - y for x, y in zip(found[name], found[WITHOUT], strict=True)] for name in sides}
    label = f"features in a torch block, {n:,} tokens"
    yield table_of(f"what attention adds to a block of torch, n={n}, m={m}", added, goal=1.0, label=label)
    alone = {"favorsharp": added["favorsharp"], "alone": found["attention alone"]}
    work = f"what attention adds to a block of torch, n={n}, m={m}, beside itself alone"
    yield table_of(work, alone, goal=0.87, own=True)


def served(model: Any, name: str) -> Any:
    """A copy of the model with an attention."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(name)
    return model


def encoders(quick: bool) -> Iterator[Table]:
    """A BERT of three layers with six heads of 64: frozen features, and landmarks."""
    config = BertConfig(
        vocab_size=1000, hidden_size=384, num_attention_heads=6, num_hidden_layers=3, intermediate_size=1536,
        max_position_embeddings=4096, attn_implementation="sdpa",
    )  # fmt: skip
    exact = BertModel(config).eval()
    register("bench-features", num_features=64 if quick else 128, rng=0)
    register("bench-landmarks", method="landmarks", num_features=64, rng=0)
    features, marks = served(exact, "bench-features"), served(exact, "bench-landmarks")
    calibrate(features, [torch.randint(1000, (1, 256))])
    for n in (64,) if quick else (512, 2048):
        x = torch.randint(1000, (1, n))
        for model, kind in ((features, "calibrated features"), (marks, "64 landmarks")):
            sides = {"favorsharp": partial(model, x), EXACT: partial(exact, x)}
            label = f"BERT, {kind}, {n:,} tokens"
            yield compare(f"BERT-like, 3 layers, {kind}, n={n}", sides, goal=1.0, label=label if n > 512 else "")


CACHE = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""The keyword of a cache; transformers renamed it."""


def generation(model: Any, cache: Any, prompt: Any, count: int) -> Callable[[], Any]:
    """A run that feeds tokens one by one to a cache that has seen a prompt."""
    model(prompt, **{CACHE: cache}, use_cache=True)

    def run() -> Any:
        for i in range(count):
            out = model(prompt[:, i : i + 1], **{CACHE: cache}, use_cache=True).logits
        return out

    return run


def decoders(quick: bool) -> Iterator[Table]:
    """A Llama of four layers, by a state of fixed size and by a cache of all keys."""
    config = LlamaConfig(
        vocab_size=1000, hidden_size=512, num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=4,
        intermediate_size=1376, max_position_embeddings=2**15, attn_implementation="sdpa",
    )  # fmt: skip
    exact, count = LlamaForCausalLM(config).eval(), 4 if quick else 16
    register("bench-features", num_features=128, rng=0)
    register("bench-landmarks", method="landmarks", num_features=128, rng=0)
    features, marks, none = (served(exact, f"bench-{name}") for name in ("features", "landmarks", "none"))
    calibrate(features, [torch.randint(1000, (1, 256))])
    for n in (64,) if quick else (512, 8192):
        prompt = torch.randint(1000, (1, n))
        sides = {
            "favorsharp": generation(features, StateCache(), prompt, count),
            EXACT: generation(exact, DynamicCache(config=config), prompt, count),
            "landmarks": generation(marks, StateCache(), prompt, count),
            WITHOUT: generation(none, DynamicCache(config=config), prompt, count),
        }
        yield compare(
            f"a token of a Llama-like model, 4 layers, after {n}", sides, beside=("landmarks", WITHOUT), times=count,
            goal=1.0 if n > 512 else None, label=f"a token of a Llama after {n:,} others",
        )  # fmt: skip
