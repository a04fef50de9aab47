"""Runs every public function under a default device, fake tensors and modes of torch, for test_tracers.py.

It runs in a process of its own, because a kernel that gets an invalid pointer ends the process.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import attention_problem, key_mask
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import favorsharp as fs
from favorsharp.torch import LinearAttention, MultiheadAttention, refine

NEEDS_NUMBERS = {"fit discrete", "save", "suggest", "refine"}
"""Verbs that read numbers, and so refuse tensors without."""


def problem(dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """Inputs, maps, states and modules, made without a mode."""
    torch.manual_seed(0)
    q, k, v = (torch.from_numpy(x).to(dtype) for x in attention_problem(0, (2, 2), n=24, d=8, e=5))
    mask = torch.from_numpy(key_mask(0, (2, 2, 24), "holes"))
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    state, near = fs.init_state(fm, 5, like=k), fs.init_state(fm, 5, like=k, window=4)
    head = LinearAttention(8, 2, num_features=16, rng=0, is_causal=True, dtype=dtype).calibrate(q, k)
    x = torch.from_numpy(attention_problem(1, (2,), n=9, d=16)[0]).to(dtype)
    layer = MultiheadAttention(16, 2, num_features=16, rng=0, batch_first=True, dtype=dtype).calibrate(x)
    folder = Path(tempfile.mkdtemp())
    fs.save(folder / "map", fm)
    return SimpleNamespace(
        q=q, k=k, v=v, mask=mask, fm=fm, token=[x[..., -1:, :].contiguous() for x in (q, k, v)],
        state=fs.update(state, k, v, fm), near=fs.update(near, k, v, fm), head=head, layer=layer, x=x, folder=folder,
        signed=fs.feature_map(fs.fit(q, k, method="trig"), 16, rng=0), out=torch.zeros(2, 2, 24, 5, dtype=dtype),
        poisson=fs.feature_map(fs.fit(q, k, method="poisson"), 16, rng=0),
    )  # fmt: skip


def with_gradients(call: Callable[..., Any], *arrays: torch.Tensor) -> tuple[Any, ...]:
    """A result, and the gradients of the sum of its squares."""
    own = [x.detach().clone().requires_grad_() for x in arrays]
    out = call(*own)
    (out * out).sum().backward()
    return out, *(x.grad for x in own)


def pulled_back(p: SimpleNamespace, name: str, *arrays: Any, **options: Any) -> tuple[Any, ...]:
    out, pullback = fs.vjp(name, *arrays, **options)
    return out, *pullback(torch.ones_like(out))


def verbs(p: SimpleNamespace) -> dict[str, Callable[[], Any]]:
    """Every public function, applied to the inputs of `problem`, by name."""
    q, k, v, fm, mask = p.q, p.k, p.v, p.fm, p.mask
    options: Any = {"num_features": 16, "rng": 0, "device": "cpu", "dtype": q.dtype}

    def attend(**options: Any) -> Callable[[], Any]:
        return lambda: fs.linear_attention(q, k, v, fm, **options)

    def saved() -> None:
        fs.save(p.folder / "again", fm)

    return {
        "linear_attention": attend(),
        "causal": attend(is_causal=True),
        "window": attend(window=4),
        "causal window": attend(is_causal=True, window=4),
        "masked": attend(key_mask=mask),
        "causal masked": attend(is_causal=True, key_mask=mask, window=4),
        "packed": attend(cu_seqlens=[0, 5, 24]),
        "packed causal": attend(cu_seqlens=[0, 5, 24], is_causal=True),
        "out": lambda: fs.linear_attention(q, k, v, fm, out=torch.zeros_like(p.out)),
        "return_state": attend(is_causal=True, return_state=True, window=4),
        "bidirectional state": attend(return_state=True),
        "state": lambda: fs.linear_attention(q, k, v, fm, is_causal=True, state=p.state, return_state=True),
        "grouped": lambda: fs.linear_attention(
            q, k[:, :1], v[:, :1], fs.feature_map(fs.fit(q[:, 0], k[:, 0], axis=(0, -2)), 8, rng=0), enable_gqa=True
        ),
        "init_state": lambda: fs.init_state(fm, 5, like=k, window=4),
        "update": lambda: fs.update(p.state, k, v, fm),
        "update window": lambda: fs.update(p.near, k, v, fm, key_mask=mask),
        "read": lambda: fs.read(p.state, q, fm),
        "read window": lambda: fs.read(p.near, q, fm),
        "decode_step": lambda: fs.decode_step(*p.token, p.state, fm),
        "decode_step window": lambda: fs.decode_step(*p.token, p.near, fm),
        "combine": lambda: fs.combine(p.state, p.state),
        "attention": lambda: fs.attention(q, k, v, num_features=8, rng=0),
        "attention causal": lambda: fs.attention(q, k, v, num_features=8, rng=0, is_causal=True, calibration=(q, k)),
        "attention masked": lambda: fs.attention(q, k, v, num_features=8, rng=0, key_mask=mask, window=4),
        "attention posrf": lambda: fs.attention(q, k, v, num_features=8, rng=0, method="posrf", is_causal=True),
        "attention relu": lambda: fs.attention(q, k, v, num_features=8, rng=0, method="relu"),
        "softmax_attention": lambda: fs.softmax_attention(q, k, v, is_causal=True, key_mask=mask),
        "kernel_matrix": lambda: fs.kernel_matrix(q, k, kernel="gaussian"),
        "kernel_matvec": lambda: fs.kernel_matvec(q, k, v, fm),
        "kernel_matvec signed": lambda: fs.kernel_matvec(q, k, v, p.signed),
        "nadaraya_watson": lambda: fs.nadaraya_watson(q, k, v, fm),
        "leave_one_out": lambda: fs.leave_one_out(q, v, fm),
        "query": lambda: fm.query(q),
        "key": lambda: fm.key(k),
        "log_query": lambda: fm.log_query(q),
        "log_key": lambda: fm.log_key(k),
        "features signed": lambda: p.signed.query(q),
        "features poisson": lambda: p.poisson.query(q),
        "moments": lambda: fs.moments(q, k, mask_x=mask),
        "attention_moments": lambda: fs.attention_moments(q, k, weighting=0.5, is_causal=True),
        "fit": lambda: fs.fit(q, k),
        "fit sderf": lambda: fs.fit(q, k, method="sderf", mask_y=mask),
        "fit aderf": lambda: fs.fit(q, k, method="aderf"),
        "feature_map": lambda: fs.feature_map(p.fm.parameters, 16, rng=0),
        "feature_map given": lambda: fs.feature_map(p.fm.parameters, 16, draw=p.fm.projection),
        "fit discrete": lambda: fs.feature_map(fs.fit(q, k, method="geometric"), 8, rng=0),
        "excess": lambda: fs.excess(fm.parameters, q, k),
        "log_second_moment": lambda: fs.log_second_moment(fm.parameters, q, k),
        "vjp": lambda: pulled_back(p, "linear_attention", q, k, v, fm, is_causal=True, of_map=True),
        "vjp packed": lambda: pulled_back(p, "linear_attention", q, k, v, fm, cu_seqlens=[0, 5, 24]),
        "vjp kernel_matvec": lambda: pulled_back(p, "kernel_matvec", q, k, v, fm),
        "backward": lambda: with_gradients(lambda *x: fs.linear_attention(*x, fm), q, k, v),
        "backward causal": lambda: with_gradients(
            lambda *x: fs.linear_attention(*x, fm, is_causal=True, window=4, key_mask=mask), q, k, v
        ),
        "backward matvec": lambda: with_gradients(lambda *x: fs.kernel_matvec(*x, fm), q, k, v),
        "backward features": lambda: with_gradients(fm.query, q),
        "save": saved,
        "load": lambda: fs.load(p.folder / "map", like=q),
        "suggest": lambda: fs.suggest(q, k, v, target_error=0.5).num_features,
        "refine": lambda: refine(fm.parameters, (q, k, v), num_features=8, steps=1, rng=0).parameters,
        "module": lambda: p.head(q, k, v),
        "module backward": lambda: with_gradients(lambda *x: p.head(*x), q, k, v),
        "calibrate": lambda: LinearAttention(8, 2, **options).calibrate(q, k).feature_map,
        "redraw": lambda: LinearAttention(8, 2, **options).redraw(1).projection,
        "multihead": lambda: p.layer(p.x, p.x, p.x)[0],
        "multihead causal": lambda: p.layer(p.x, p.x, p.x, is_causal=True, attn_mask=None)[0],
    }  # fmt: skip


def leaves(value: Any) -> Iterator[Any]:
    """The tensors and numbers in a result."""
    if isinstance(value, tuple | list):
        for x in value:
            yield from leaves(x)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            if field.name not in ("kv_low", "z_low"):  # kernels and references keep low parts after other calls
                yield from leaves(getattr(value, field.name))
    elif isinstance(value, torch.Tensor | int | float | bool):
        yield value


def detached(value: Any) -> list[Any]:
    return [x.detach() if isinstance(x, torch.Tensor) else x for x in leaves(value)]


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Logger(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class FunctionLogger(torch.overrides.TorchFunctionMode):
    """Counts functions."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


SAME_NUMBERS: dict[str, Callable[[], Any]] = {
    "default device": default_device,
    "device": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "dispatch": Logger,
    "function": FunctionLogger,
    "flops": lambda: FlopCounterMode(display=False),
}


def compare(name: str, got: list[Any], want: list[Any]) -> None:
    assert len(got) == len(want), name
    for x, y in zip(got, want, strict=True):
        x, y = torch.as_tensor(x, device="cpu"), torch.as_tensor(y, device="cpu")
        assert x.dtype == y.dtype, name
        finite = torch.isfinite(y)
        assert torch.equal(finite, torch.isfinite(x)), name
        x, y = (torch.where(finite, z, 0).double() for z in (x, y))
        assert (x - y).abs().max() <= 1e-4 * max(1.0, float(y.abs().max())) if y.numel() else True, name


def check_same_numbers(how: str) -> None:
    """Check that calls with and without the mode give the same numbers, and that a call with the mode leaves nothing
    behind."""
    calls, others = verbs(problem()), verbs(problem())
    for name, call in calls.items():
        print(how, name, flush=True)
        want = detached(others[name]())
        with SAME_NUMBERS[how]() as mode:  # the first call of this map, then a repeated call
            first = detached(call())
        compare(name, first, want)
        compare(name, detached(call()), want)
        with SAME_NUMBERS[how]() as mode:
            compare(name, detached(call()), want)
        if isinstance(mode, Logger | FunctionLogger):
            assert mode.count > 0, name


def check_fake() -> None:
    """Check that fake results have the right shape, dtype and device, or that the call is refused.

    Later calls give numbers.
    """
    for cold in (True, False):
        calls, others = verbs(problem()), verbs(problem())
        for name, call in calls.items():
            print("fake", name, "cold" if cold else "warm", flush=True)
            want = detached(others[name]())
            if not cold:
                call()
            with FakeTensorMode(allow_non_fake_inputs=True):
                if name in NEEDS_NUMBERS:
                    with pytest.raises((TypeError, ValueError), match="numbers|trace"):
                        call()
                else:
                    got = detached(call())
                    for x, y in zip(got, want, strict=True):
                        if isinstance(y, torch.Tensor):
                            assert isinstance(x, FakeTensor) or torch.equal(x, y), name
                            assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device), name
            compare(name, detached(call()), want)


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.manual_seed(0)
    for how in sys.argv[1:]:
        check_fake() if how == "fake" else check_same_numbers(how)
    print("done")
