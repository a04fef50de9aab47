"""Time attention on a GPU, its floors and its peers; `python -m benchmarks.gpu` writes a dated page."""

import contextlib
import datetime
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import favorsharp as fs
from benchmarks import peers
from benchmarks.gpu_floors import BYTES_A_SECOND, FLOPS_A_SECOND, PLAIN_FLOPS_A_SECOND, TokenWork, Work
from favorsharp._values import astype, map_arrays

ROOT = Path(__file__).parents[1]
OURS = "favorsharp"
LANDMARKS = f"{OURS}, landmarks"
"""It approximates exact attention, by as many landmarks as there are features, so it is not compared with others."""
ROOM = 1024
"""Keys that a causal call compresses at once: each compression is some hundred launches, whatever it compresses."""

GOAL = 0.6
"""The part of the floor's speed that is the goal on an H100."""

TOLERANCES = {"bfloat16": 4e-2, "float16": 1e-2, "float32": 1e-3}
CHECKED = 4096
"""Number of tokens up to which a result is compared with float64."""


@dataclass(frozen=True)
class Case:
    """A batch of heads of equal length."""

    batch: int
    heads: int
    n: int
    d: int
    m: int
    is_causal: bool
    backward: bool = False
    dtype: str = "bfloat16"

    @property
    def tokens(self) -> int:
        """The number of tokens of all heads together."""
        return self.batch * self.heads * self.n

    @property
    def work(self) -> Work:
        """The work of the forward pass for one token of a head."""
        return Work(self.d, self.m, self.d, self.is_causal, itemsize=4 if self.dtype == "float32" else 2)

    @property
    def floor(self) -> float:
        """The least time in seconds, that of the backward pass included if there is one."""
        seconds = self.work.floor
        if self.backward:
            seconds += Work(self.d, self.m, self.d, self.is_causal, True, self.work.itemsize).floor
        return seconds * self.tokens

    def __str__(self) -> str:
        mode = "causal" if self.is_causal else "bidirectional"
        passes = ", forward and backward" if self.backward else ""
        return f"{mode}, {self.batch} x {self.heads} x {self.n}, d={self.d}, m={self.m}, {self.dtype}{passes}"


@dataclass(frozen=True)
class Token:
    """One token of a batch of streams."""

    batch: int
    heads: int
    d: int
    m: int
    window: int = 0
    dtype: str = "bfloat16"

    n = 1
    backward = False

    @property
    def tokens(self) -> int:
        """The number of tokens of all heads together."""
        return self.batch * self.heads

    @property
    def recent(self) -> int:
        """The keys that a window keeps before the token: halfway from a step in which keys leave to the next."""
        return self.window + self.window // 2

    @property
    def work(self) -> TokenWork:
        """The work of one token of a head."""
        itemsize = 4 if self.dtype == "float32" else 2
        return TokenWork(self.d, self.m, self.d, self.recent if self.window else None, itemsize)

    @property
    def floor(self) -> float:
        """The least time in seconds."""
        return self.work.floor * self.tokens

    def __str__(self) -> str:
        window = f", window {self.window}" if self.window else ""
        return f"a token, {self.batch} x {self.heads}, d={self.d}, m={self.m}{window}, {self.dtype}"


CASES = (
    *(Case(4, 16, 16_384, 64, m, causal) for causal in (False, True) for m in (64, 128, 256)),
    *(Case(4, 8, 16_384, 128, m, causal) for causal in (False, True) for m in (128, 256)),
    *(Case(4, 16, n, 64, 256, True) for n in (1024, 4096, 65_536)),
    Case(1, 8, 1_000_000, 64, 256, True),
    Case(4, 16, 16_384, 64, 128, True, dtype="float32"),
    *(Case(4, 16, 16_384, 64, m, causal, backward=True) for causal in (False, True) for m in (64, 256)),
    Case(4, 8, 16_384, 128, 128, True, backward=True),
    *(Token(batch, 8, 64, 64, window) for batch in (1, 64) for window in (0, 64)),
)
QUICK = (
    *(Case(1, 2, 128, 32, 16, causal, dtype="float32") for causal in (False, True)),
    Case(1, 2, 128, 32, 16, True, backward=True, dtype="float32"),
    *(Token(1, 2, 32, 16, window, dtype="float32") for window in (0, 4)),
)


@dataclass
class Row:
    """The measurements of a case: seconds of each peer, and why others are left out."""

    case: Case | Token
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


# Peers ---------------------------------------------------------------------------------------------------------------


def problem(case: Case | Token, device: str) -> tuple[Any, Any, Any, Any]:
    """Tensors (batch, heads, n, d), and a FAVOR+ map in float32, small enough for the peers that take no maxima."""
    rng = np.random.default_rng(0)
    dtype = getattr(torch, case.dtype)
    shape = (case.batch, case.heads, case.n, case.d)
    sample = rng.standard_normal((2, 256, case.d))
    feature_map = astype(fs.feature_map(fs.fit(*sample, method="posrf"), case.m, rng=0), np.float32)
    on_device = map_arrays(feature_map, lambda x: torch.from_numpy(np.array(x)).to(device))
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
    return q, k, v, on_device


def forward_peers(case: Case, device: str, feature_map: Any) -> dict[str, Callable[..., Any]]:
    """Functions of (q, k, v), one for each peer; ours first."""
    root = case.d**-0.25
    rows = feature_map.rows.to(getattr(torch, case.dtype))
    formula = peers.torch_causal_chunked if case.is_causal else peers.torch_attention
    found: dict[str, Callable[..., Any]] = {
        OURS: lambda q, k, v: fs.linear_attention(q, k, v, feature_map, is_causal=case.is_causal),
        "torch, features in memory": lambda q, k, v: formula(q, k, v, rows, root),
        "torch.compile, the same": lambda q, k, v: peers.compiled(formula)(q, k, v, rows, root),
        "exact, torch's choice": lambda q, k, v: peers.exact(q, k, v, is_causal=case.is_causal),
        "exact, flash": lambda q, k, v: exact_flash(q, k, v, case.is_causal),
        "flash-linear-attention with features": lambda q, k, v: fla(q, k, v, rows, root, case.is_causal),
    }
    found[LANDMARKS] = partial(with_landmarks, fs.landmarks(case.m, room=ROOM), case.is_causal)
    if not case.backward:
        found["cupy, features in memory, float32"] = lambda q, k, v: cupy_attention(q, k, v, rows, root, case)
        found["flash-linear-attention, features given"] = FlaOnFeatures(rows, root, case.is_causal)
    return found


def with_landmarks(settings: Any, is_causal: bool, q: Any, k: Any, v: Any) -> Any:
    """Attention through landmarks that the call chooses."""
    return fs.linear_attention(q, k, v, settings, is_causal=is_causal)


def token_peers(case: Token, device: str, feature_map: Any) -> tuple[Any, dict[str, Callable[..., Any]]]:
    """A state after some keys, and functions of (q, k, v), one for each peer; ours first."""
    root, dtype = case.d**-0.25, getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(1)
    shape = (case.batch, case.heads, 32 + case.recent, case.d)  # with a window, `recent` of these are kept
    k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
    far, near = (k[..., :32, :], v[..., :32, :]), (k[..., 32:, :], v[..., 32:, :])
    state = fs.update(fs.init_state(feature_map, case.d, like=k), *far, feature_map)
    mask = torch.ones(near[0].shape[:-1], dtype=torch.bool, device=device)
    state = replace(state, window=case.window, recent_k=near[0], recent_v=near[1], recent_mask=mask)
    rows = feature_map.rows
    features = _features(far[0].float(), rows, root)
    sums = features.mT @ far[1].float(), features.sum(-2, keepdim=True)
    lm = fs.landmarks(case.m, room=ROOM)
    held = fs.update(fs.init_state(lm, case.d, like=k, window=case.window), k, v, lm)
    step, given = (torch_window_step, (*sums, *near)) if case.window else (peers.torch_step, sums)
    return state, {
        OURS: lambda q, k, v: fs.decode_step(q, k, v, state, feature_map)[0],
        LANDMARKS: lambda q, k, v: fs.decode_step(q, k, v, held, lm)[0],
        "torch": lambda q, k, v: step(q.float(), k.float(), v.float(), rows, *given, root)[0],
        "torch.compile": lambda q, k, v: peers.compiled(step)(q.float(), k.float(), v.float(), rows, *given, root)[0],
    }


def torch_window_step(
    q: Any, k: Any, v: Any, rows: Any, kv: Any, z: Any, recent_k: Any, recent_v: Any, root: float
) -> tuple[Any, Any, Any]:
    """A step without maxima: the token joins the recent keys, none of which leaves, and the sums are read unchanged."""
    recent_k, recent_v = (torch.cat([x, y.to(x.dtype)], -2) for x, y in ((recent_k, k), (recent_v, v)))
    pq = _features(q, rows, root) / rows.shape[-2]
    near = torch.exp(q @ recent_k.to(q.dtype).mT * root**2)
    total = (pq * z).sum(-1, keepdim=True) + near.sum(-1, keepdim=True)
    return (pq @ kv + near @ recent_v.to(q.dtype)) / total, recent_k, recent_v


def exact_flash(q: Any, k: Any, v: Any, is_causal: bool) -> Any:
    """Exact attention of torch, with its FlashAttention kernel only."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return peers.exact(q, k, v, is_causal=is_causal)


def _features(x: Any, rows: Any, root: float) -> Any:
    x = x * root
    return torch.exp(x @ rows.mT - (x * x).sum(-1, keepdim=True) / 2)


def fla(q: Any, k: Any, v: Any, rows: Any, root: float, is_causal: bool) -> Any:
    """flash-linear-attention's chunked kernel on FAVOR+ features that torch.compile makes."""
    from fla.ops.linear_attn import chunk_linear_attn

    if not is_causal:
        raise NotImplementedError("it is causal")
    make = peers.compiled(_features)
    pq, pk = (make(x, rows, root).transpose(1, 2).contiguous() for x in (q, k))
    return chunk_linear_attn(pq, pk, v.transpose(1, 2).contiguous(), scale=1.0, normalize=True)[0].transpose(1, 2)


class FlaOnFeatures:
    """The kernel of `fla` without the time for the features, which are made in the first call."""

    def __init__(self, rows: Any, root: float, is_causal: bool) -> None:
        self.rows, self.root, self.is_causal = rows, root, is_causal
        self.given: tuple[Any, ...] | None = None

    def __call__(self, q: Any, k: Any, v: Any) -> Any:
        from fla.ops.linear_attn import chunk_linear_attn

        if not self.is_causal:
            raise NotImplementedError("it is causal")
        if self.given is None:
            features = [_features(x, self.rows, self.root) for x in (q, k)]
            self.given = tuple(x.transpose(1, 2).contiguous() for x in (*features, v))
        return chunk_linear_attn(*self.given, scale=1.0, normalize=True)[0].transpose(1, 2)


def cupy_attention(q: Any, k: Any, v: Any, rows: Any, root: float, case: Case) -> Any:
    """The formula in CuPy, which has no bfloat16."""
    import cupy

    if case.is_causal:
        raise NotImplementedError("bidirectional only")
    with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
        x, y, z, w = (cupy.from_dlpack(t.float().contiguous()) for t in (q, k, v, rows))

        def logs(points: Any) -> Any:
            points = points * np.float32(root)
            return points @ w.T - (points * points).sum(-1, keepdims=True) / 2

        lq, lk = logs(x), logs(y)
        top = lk.max(-2, keepdims=True)
        features = cupy.exp(lk - top)
        weights = lq + top
        weights = cupy.exp(weights - weights.max(-1, keepdims=True))
        sums, total = features.swapaxes(-1, -2) @ z, features.sum(-2)[..., None]
        return torch.from_dlpack((weights @ sums) / (weights @ total))


def with_backward(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs forward and backward."""

    def run(q: Any, k: Any, v: Any) -> Any:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        return out.detach()

    return run


# Measuring -----------------------------------------------------------------------------------------------------------


def seconds_on_gpu(run: Callable[[], Any], rounds: int = 15) -> float:
    """Median time between two events on the stream; the L2 cache is overwritten before each round."""
    scratch = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    pairs = []
    for _ in range(rounds):
        scratch.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def seconds_on_cpu(run: Callable[[], Any], rounds: int = 3) -> float:
    """Median wall-clock time, for trying this script without a GPU."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(case: Case | Token, device: str = "cuda") -> Row:
    """Time every peer whose result is right; for exact attention and landmarks it is only checked that they run."""
    q, k, v, feature_map = problem(case, device)
    clock = seconds_on_gpu if device == "cuda" else seconds_on_cpu
    row = Row(case)
    want = None
    wide, exact_map = (x.double() for x in (q, k, v)), astype(feature_map, torch.float64)
    if isinstance(case, Token):
        state, runs = token_peers(case, device, feature_map)
        exact = map_arrays(state, lambda x: x.double() if x.dtype.is_floating_point else x)
        with fs.use("reference"):
            want, _ = fs.decode_step(*wide, replace(exact, fingerprint=None), exact_map)
    else:
        runs = forward_peers(case, device, feature_map)
        if case.n <= CHECKED:
            with fs.use("reference"):
                want = fs.linear_attention(*wide, exact_map, is_causal=case.is_causal)
    if case.backward:
        runs = {name: with_backward(function) for name, function in runs.items()}
    elif device == "cuda":
        runs |= {f"{name}, CUDA graph": _Graph(runs[name]) for name in (OURS, LANDMARKS)}
    for name, function in runs.items():
        try:
            with contextlib.nullcontext() if case.backward else torch.no_grad():
                got = function(q, k, v)
                if want is not None and not name.startswith(("exact", LANDMARKS)):
                    error = float((got.double() - want).abs().max() / want.abs().max())
                    if not error <= TOLERANCES[case.dtype]:
                        raise ArithmeticError(f"relative error {error:.1g}")
                del got
                function(q, k, v)
                row.seconds[name] = clock(lambda function=function: function(q, k, v))
        except Exception as fault:
            row.left_out[name] = f"{type(fault).__name__}: {fault}".splitlines()[0][:120]
        if device == "cuda":
            torch.cuda.empty_cache()
    return row


class _Graph:
    """A function that is captured in a CUDA graph at the first call and replayed later."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.graph: Any = None

    def __call__(self, q: Any, k: Any, v: Any) -> Any:
        if self.graph is None:
            self.function(q, k, v)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = self.function(q, k, v)
        self.graph.replay()
        return self.out


# The page ------------------------------------------------------------------------------------------------------------


def machine() -> str:
    """The card and the versions of the libraries."""
    parts = []
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = properties.total_memory / 2**30
        parts.append(f"{properties.name}, {properties.multi_processor_count} multiprocessors, {memory:.0f} GiB")
        parts.append(f"CUDA {torch.version.cuda}")
    else:
        parts.append("no GPU")
    for package in ("favorsharp", "torch", "cupy-cuda13x", "cupy-cuda12x", "flash-linear-attention", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            parts.append(f"{package} {version(package)}")
    return ", ".join(parts)


def page(rows: list[Row], day: datetime.date, where: str) -> str:
    """The Markdown page."""
    lines = [
        "---",
        "orphan: true",
        "---",
        "",
        f"# GPU benchmarks, {day.isoformat()}",
        "",
        f"Measured on {where}.",
        "",
        "Medians between events on the stream, the second-level cache overwritten before each call, after a check",
        f"against float64 up to {CHECKED} tokens. All times in nanoseconds a token and head.",
        "",
        f"The floor is the slowest of bytes at {BYTES_A_SECOND / 1e12:.1f} TB/s, products at",
        f"{FLOPS_A_SECOND / 1e12:.0f} TFLOP/s (three of bfloat16 for one of float32) and exponentials, all of an H100,",
        f"with nothing lost in between (benchmarks/gpu_floors.py). The goal is {GOAL:.0%} of its speed.",
        "Landmarks are as many as features. Each call chooses its own; a causal call compresses",
        f"{ROOM} keys at a time. They approximate exact attention, so they are not compared, and have no floor here.",
        f"Products of a token are of float32, at {PLAIN_FLOPS_A_SECOND / 1e12:.0f} TFLOP/s. No floor has the time of a",
        "launch: few heads of a token do not come near theirs.",
        "",
        "| work | ours | floor | of the floor | bytes | products | best other | times |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        nanoseconds = {name: 1e9 * seconds / row.case.tokens for name, seconds in row.seconds.items()}
        resources = {name: 1e9 * seconds for name, seconds in row.case.work.seconds.items()}
        floor = 1e9 * row.case.floor / row.case.tokens
        ours = nanoseconds.get(OURS)
        others = {name: value for name, value in nanoseconds.items() if not name.startswith(OURS)}
        best = min(others, key=others.__getitem__, default="")
        share = "" if ours is None else f"{floor / ours:.0%}{'' if floor / ours >= GOAL else ' (missed)'}"
        lines.append(
            f"| {row.case} | {'failed' if ours is None else f'{ours:.2f}'} | {floor:.2f} | {share} "
            f"| {resources['bytes']:.2f} | {resources['products']:.2f} | {best} "
            f"{f'{others[best]:.2f}' if best else ''} | {f'{others[best] / ours:.2f}' if best and ours else ''} |"
        )
    lines += ["", "## Every peer", ""]
    for row in rows:
        lines += [f"**{row.case}**", "", "| | ns |", "| --- | --- |"]
        lines += [f"| {name} | {1e9 * seconds / row.case.tokens:.3f} |" for name, seconds in row.seconds.items()]
        lines += [f"| {name} | left out: {why} |" for name, why in row.left_out.items()]
        lines.append("")
    return "\n".join(lines)


def results(cases: tuple[Case | Token, ...], device: str = "cuda") -> Iterator[Row]:
    """One row for each case, printed as it is measured."""
    for case in cases:
        row = measure(case, device)
        said = ", ".join(f"{name} {1e9 * seconds / case.tokens:.2f}" for name, seconds in row.seconds.items())
        typer.echo(f"{case}: floor {1e9 * case.floor / case.tokens:.2f} ns; {said}")
        yield row


def main(
    quick: Annotated[bool, typer.Option(help="Tiny sizes: whether it runs, not how fast.")] = False,
    output: Annotated[Path, typer.Option(help="The folder of the page.")] = ROOT / "docs",
) -> None:
    """Measure on the first GPU and write the page."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs an NVIDIA GPU and torch built for CUDA, and finds none here.")
    today = datetime.date.today()
    file = output / f"gpu-benchmarks-{today.isoformat()}.md"
    file.write_text(page(list(results(QUICK if quick else CASES)), today, machine()))
    typer.echo(f"Page: {file}")


if __name__ == "__main__":
    typer.run(main)
