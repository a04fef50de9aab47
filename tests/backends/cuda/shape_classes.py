"""Calls of every op of favorsharp_cuda at every shape class that its kernels are instantiated for.

The functions that CuPy arrays are dispatched to are called with NumPy arrays, whose kernels `on_host` runs on the CPU.
As a script, it runs calls in a process that may be under a sanitizer.
"""

import importlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  np.dtype("bfloat16")
import numpy as np
from host_module import SHARED_LIMITS, HostModule, Schedule, sanitizer, scheduled
from on_host import guarded, installed

import favorsharp as fs
from favorsharp._values import map_arrays
from favorsharp.dispatch import OPS
from favorsharp.ops.landmark_metric import Metric
from favorsharp_cuda.host import launch

WIDER = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


@dataclass(frozen=True)
class Shape:
    """Sizes of points, values and features, the dtype, the kind of map, and the card whose memory limits apply."""

    dtype: str
    d: int
    e: int
    m: int
    method: str = "optimal"
    kernel: str = "softmax"
    card: str = "sm_90"

    def __str__(self) -> str:
        return f"{self.dtype}-d{self.d}-e{self.e}-m{self.m}-{self.method}-{self.kernel}-{self.card}"


SHAPES = (
    *(Shape(dtype, size, size, m) for dtype in ("float16", "bfloat16", "float32") for size, m in ((32, 16), (64, 144))),
    *(
        Shape(dtype, size, size, m)
        for dtype in ("float16", "bfloat16", "float32")
        for size, m in ((96, 64), (128, 130))
    ),
    Shape("float32", 5, 7, 13, "posrf"),
    Shape("float32", 128, 5, 256, "sderf"),
    Shape("float32", 64, 32, 512, "saderf"),
    Shape("float32", 40, 100, 33, "optimal", "gaussian"),
    Shape("bfloat16", 33, 64, 512, "posrf", "gaussian"),
    Shape("float32", 130, 140, 40),  # larger than tiles
    Shape("float32", 64, 64, 144, "optimal", "gaussian"),
    Shape("float64", 12, 9, 24),
    Shape("float64", 64, 64, 64, "optimal", "gaussian"),
    Shape("float64", 9, 5, 7, "optimal", "gaussian"),
    Shape("float16", 130, 3, 9),
    Shape("bfloat16", 140, 3, 9),
    Shape("float64", 80, 96, 20),
    Shape("float64", 128, 100, 33, "optimal", "gaussian"),
    Shape("float64", 101, 43, 20),
    *(
        Shape(dtype, size, e, m, card="sm_86")
        for dtype, half_wide in (("float16", 80), ("bfloat16", 96), ("float32", 80))
        for size, e, m in ((64, 64, 80), (half_wide, 90, 33), (128, 101, 70))
    ),
    Shape("float64", 64, 40, 20, card="sm_86"),
)


@dataclass(frozen=True)
class Lengths:
    """The number of queries, and that of keys if it may differ.

    Leading axes of the keys, and query heads for each key head.
    """

    n: int
    s: int
    batch: tuple[int, ...] = (2,)
    group: int = 1

    def __str__(self) -> str:
        return f"n{self.n}-s{self.s}-b{'x'.join(map(str, self.batch))}-g{self.group}"


RAGGED = Lengths(130, 201)
"""Three and four tiles of 64, the last ones not full: every loop over tiles goes around."""

LENGTHS = (
    RAGGED,
    Lengths(0, 3),
    Lengths(1, 1),
    Lengths(64, 128),
    Lengths(65, 0),
    Lengths(97, 63, (1, 2), group=3),
    Lengths(130, 201, (1,)),
    Lengths(70, 97, (1,)),
    Lengths(40, 40, (1,), group=2),
)

CALLS: dict[str, Callable[[Any], tuple[str, tuple[Any, ...], dict[str, Any]]]] = {
    "features": lambda p: ("exponential_features", p.plain, {}),
    "attention": lambda p: ("attention", (p.q, p.k, p.v, p.map), {}),
    "attention, masked": lambda p: ("attention", (p.q, p.k, p.v, p.map), {"key_mask": p.mask}),
    "attention, window 16": lambda p: ("attention", (p.q, *p.same, p.map), {"window": 16}),
    "attention, window 5, masked": lambda p: (
        "attention", (p.q, *p.same, p.map), {"window": 5, "key_mask": p.same_mask},
    ),
    "attention, window 64": lambda p: ("attention", (p.q, *p.same, p.map), {"window": 64}),
    "causal": lambda p: ("causal_attention", (p.q, *p.same, p.map), {}),
    "causal, masked": lambda p: ("causal_attention", (p.q, *p.same, p.map), {"key_mask": p.same_mask}),
    "causal, window 16": lambda p: ("causal_attention", (p.q, *p.same, p.map), {"window": 16}),
    "causal, window 64, masked": lambda p: (
        "causal_attention", (p.q, *p.same, p.map), {"window": 64, "key_mask": p.same_mask},
    ),
    "causal, window 5": lambda p: ("causal_attention", (p.q, *p.same, p.map), {"window": 5}),
    "causal, from a state": lambda p: ("causal_attention", (p.q, *p.same, p.map), {"state": p.state(0)}),
    "causal, from a state, window 16": lambda p: (
        "causal_attention", (p.q, *p.same, p.map), {"state": p.state(16), "window": 16},
    ),
    "update": lambda p: ("update", (p.state(0), p.k, p.v, p.map), {"key_mask": p.mask}),
    "update, window 16": lambda p: ("update", (p.state(16), p.k, p.v, p.map), {}),
    "read": lambda p: ("read", (p.state(0), p.q, p.map), {}),
    "read, window 16": lambda p: ("read", (p.state(16), p.q, p.map), {}),
    "decode": lambda p: ("decode_step", (*p.token, p.state(0), p.map), {}),
    "decode, masked": lambda p: ("decode_step", (*p.token, p.state(0), p.map), {"key_mask": p.token_mask}),
    "decode, window 16": lambda p: ("decode_step", (*p.token, p.state(16), p.map), {}),
    # as many recent keys as there may be, of which twenty leave
    "decode, window 20, masked": lambda p: (
        "decode_step", (*p.token, p.state(20), p.map), {"key_mask": p.token_mask},
    ),
    "matvec": lambda p: ("kernel_matvec", (p.q, p.k, p.v, p.map), {}),
    "landmarks": lambda p: ("choose_landmarks", p.landmarks, p.landmark_options),
}  # fmt: skip
"""Op, arguments and options of each call."""

SPOILED = {
    "causal, window 16, of a value that is not finite": lambda p: (
        "causal_attention", (p.q, p.same[0], spoiled(p.same[1]), p.map), {"window": 16},
    ),
}  # fmt: skip
"""Calls that take paths of their own through the kernels, which are looked at for races only."""

VJPS = {
    "vjp": {},
    "vjp, masked": {"key_mask": True},
    "vjp, window 16": {"window": 16},
    "vjp, causal": {"is_causal": True},
    "vjp, causal, masked": {"is_causal": True, "key_mask": True},
    "vjp, causal, window 16": {"is_causal": True, "window": 16},
    "vjp of the map": {"of_map": True},
    "vjp of the map, causal": {"of_map": True, "is_causal": True},
    "vjp of every array, window 16": {"window": 16},
    "features vjp": {},
    "matvec vjp": {},
    "update vjp, masked": {},
    "read vjp, window 16": {},
    "vjp, causal, from a state": {},
}
"""Options of `attention_vjp`; those from "vjp of every array" on are other functions, or what torch asks of them."""


class Problem:
    """The arguments of calls, in the dtype of a shape or, with `wide`, the same numbers in float64."""

    def __init__(self, shape: Shape, lengths: Lengths, wide: bool = False) -> None:
        self.shape, self.lengths = shape, lengths
        rng = np.random.default_rng(7)
        key_batch = lengths.batch if lengths.group == 1 else (*lengths.batch, 1)
        batch = lengths.batch if lengths.group == 1 else (*lengths.batch, lengths.group)
        dtype = np.dtype("float64" if wide else shape.dtype)
        self.map_dtype = np.dtype("float64" if wide else WIDER[shape.dtype])

        def draw(*size: int) -> Any:
            return np.round(16 * rng.standard_normal(size)) / 16  # exact in every dtype

        points = [draw(*batch, lengths.n, shape.d), draw(*key_batch, lengths.s, shape.d) + 0.25]
        points += [draw(*key_batch, lengths.n, shape.d) + 0.25, draw(*batch, 1, shape.d)]
        self.q, self.k, k_same, q_token = (guarded(self.point(x).astype(dtype)) for x in points)
        values = [draw(*key_batch, size, shape.e) for size in (lengths.s, lengths.n, 1)]
        self.v, v_same, v_token = (guarded(x.astype(dtype)) for x in values)
        self.same = (k_same, v_same)
        self.token = (q_token, guarded(self.point(draw(*key_batch, 1, shape.d)).astype(dtype)), v_token)
        self.token_mask = guarded(np.arange(math.prod(key_batch)).reshape(*key_batch, 1) % 2 == 1)
        masks = [rng.random((*key_batch, size)) > 0.3 for size in (lengths.s, lengths.n)]
        if len(key_batch) > 1 or key_batch[0] > 1:
            for mask in masks:
                mask[0] = False  # a head that sees nothing
        self.mask, self.same_mask = map(guarded, masks)
        self.gradient = guarded(draw(*batch, lengths.n, shape.e).astype(dtype))
        self.map = map_arrays(feature_map(shape), lambda x: guarded(x.astype(self.map_dtype)))
        u, rows, row, column = (
            draw(*batch, lengths.n, shape.d) / 4,
            draw(shape.m, shape.d) / 4,
            draw(*batch, lengths.n, 1),
            draw(1, shape.m),
        )
        self.feature_gradient = guarded(draw(*batch, lengths.n, shape.m).astype(dtype))
        self.plain = tuple(guarded(x.astype(dtype)) for x in (u, rows, row, column))

    def point(self, x: Any) -> Any:
        """Points whose norm keeps the logarithms of features below ten, rounded to the dtype."""
        return (x / self.shape.d**0.5).astype(self.shape.dtype)

    @property
    def landmarks(self) -> tuple[Any, Any, Metric]:
        """Keys of which some are hidden, their log weights, and a metric."""
        rng = np.random.default_rng(13)
        k = np.round(16 * rng.standard_normal((*self.k.shape[:-2], 90, self.shape.d))) / 16
        weight = np.where(rng.random(k.shape[:-1]) < 0.8, 0.0, -np.inf).astype(self.map_dtype)
        lift = np.round(64 * rng.standard_normal((self.shape.d, self.shape.d))) / 64
        parts = np.full((1, self.shape.d), 0.25), lift / self.shape.d**0.5, np.zeros((1, self.shape.d))
        return guarded(k.astype(self.q.dtype)), weight, Metric(*(x.astype(self.map_dtype) for x in parts))

    @property
    def landmark_options(self) -> dict[str, Any]:
        """The options of a choice with one Lloyd step."""
        return {"num_landmarks": 9, "steps": 1, "kernel": "softmax", "scale": 0.5, "seed": 3, "event": 0}

    def of_sums(self, state: Any) -> list[np.ndarray]:
        """Gradients of the sums of a state."""
        rng = np.random.default_rng(11)
        return [np.round(16 * rng.standard_normal(tuple(x.shape))) / 16 for x in (state.kv, state.z, state.c)]

    def state(self, window: int) -> Any:
        """After 40 keys, which a window of 16 does not divide."""
        rng = np.random.default_rng(9)
        batch = self.k.shape[:-2]
        k, v = (np.round(16 * rng.standard_normal((*batch, 40, size))) / 16 for size in (self.shape.d, self.shape.e))
        dtype = self.q.dtype
        k, v = self.point(k).astype(dtype), v.astype(dtype)
        from favorsharp.ops.state import empty_state

        empty = empty_state(
            _cast(feature_map(self.shape), np.dtype("float64")), batch, k.shape[-1], v.shape[-1], window, k
        )
        wide = _cast(_cast(feature_map(self.shape), np.dtype(WIDER[self.shape.dtype])), np.dtype("float64"))
        full = OPS["update"].reference(empty, k.astype("float64"), v.astype("float64"), wide)
        narrow = map_arrays(full, lambda x: x if x.dtype == bool else x.astype(self.map_dtype))
        return replace(narrow, recent_k=full.recent_k.astype(dtype), recent_v=full.recent_v.astype(dtype))


def spoiled(v: np.ndarray) -> np.ndarray:
    """Values of which one is infinite."""
    copy = np.array(v)
    copy[..., 20, 1] = np.inf
    return guarded(copy)


@cache
def feature_map(shape: Shape) -> Any:
    """The map of a shape, whose arrays are in the dtype to compute in."""
    rng = np.random.default_rng(5)
    x, y = (rng.standard_normal((256, shape.d)) / shape.d**0.5 for _ in range(2))
    with fs.use("reference"):  # it is called while tests are collected, when nothing should be compiled
        fitted = fs.fit(x, y + 0.25, method=shape.method, kernel=shape.kernel, scale=1.0)
        exact = fs.feature_map(fitted, shape.m, rng=0)
    return _cast(exact, np.dtype(WIDER[shape.dtype]))


def _cast(value: Any, dtype: Any) -> Any:
    return map_arrays(value, lambda x: x.astype(dtype))


def run(name: str, shape: Shape, lengths: Lengths = RAGGED) -> Any:
    """The result of a call by the kernels; inside `installed()`."""
    kept = HostModule.shared_limit
    _set_card(SHARED_LIMITS[shape.card])
    try:
        return _run(name, shape, lengths)
    finally:
        _set_card(kept)


def _set_card(shared_limit: int) -> None:
    """Forget the kernels of another card, because kernels are loaded for the shared memory of a card."""
    if HostModule.shared_limit != shared_limit:
        launch.forget()
    HostModule.shared_limit = shared_limit


def _run(name: str, shape: Shape, lengths: Lengths) -> Any:
    problem = Problem(shape, lengths)
    if name == "features vjp":
        out, pullback = function("exponential_features_vjp")(*problem.plain)
        return (out, *pullback(problem.feature_gradient))
    if name == "matvec vjp":
        out, pullback = function("kernel_matvec_vjp")(problem.q, problem.k, problem.v, problem.map, of_map=True)
        return (out, *pullback(problem.gradient))
    if name in OF_STATES:
        return _through_a_state(name, problem)
    if name == "vjp of every array, window 16":
        return _of_every_array(problem, **VJPS[name])
    if name in VJPS:
        options = vjp_options(name, problem)
        out, pullback = function("attention_vjp")(problem.q, *problem.same, problem.map, **options)
        return (out, *pullback(problem.gradient))
    op, args, options = (SPOILED if name in SPOILED else CALLS)[name](problem)
    return function(op)(*args, **options)


def leaves(result: Any) -> list[Any]:
    """The arrays of a result."""
    if isinstance(result, tuple):
        return [leaf for part in result for leaf in leaves(part)]
    if hasattr(result, "kv"):
        return [result.kv, result.z, result.c, result.recent_k, result.recent_v, result.recent_mask]
    return [np.asarray(result)]


def wanted(name: str, shape: Shape, lengths: Lengths = RAGGED) -> Any:
    """The reference's result in float64; gradients by torch."""
    problem = Problem(shape, lengths, wide=True)
    if name in VJPS:
        if name == "features vjp":
            plain = (_tensors(x) for x in problem.plain)
            out, pullback = OPS["exponential_features_vjp"].reference(*plain)
            return (out, *pullback(_tensors(problem.feature_gradient)))
        if name in OF_STATES:
            return by_autograd(name, problem, _tensors, lambda op: OPS[op].reference)
        if name == "matvec vjp":
            points = (_tensors(x) for x in (problem.q, problem.k, problem.v))
            out, pullback = OPS["kernel_matvec_vjp"].reference(*points, _tensors(problem.map), of_map=True)
            return (out, *pullback(_tensors(problem.gradient)))
        options = vjp_options(name, problem)
        if "key_mask" in options:
            options["key_mask"] = _tensors(options["key_mask"])
        feature_map = _tensors(problem.map)
        arrays = [_tensors(x) for x in (problem.q, *problem.same)]
        if name == "vjp of every array, window 16":
            return _wanted_of_every_array(arrays, feature_map, _tensors(problem.gradient), **options)
        out, pullback = OPS["attention_vjp"].reference(*arrays, feature_map, **options)
        return (out, *pullback(_tensors(problem.gradient)))
    op, args, options = CALLS[name](problem)
    return OPS[op].reference(*args, **options)


def _tensors(value: Any) -> Any:
    """An array as a tensor; in a value that holds arrays, these as tensors."""
    import torch

    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value))
    return map_arrays(value, lambda x: torch.from_numpy(np.array(x)))


OF_STATES = ("update vjp, masked", "read vjp, window 16", "vjp, causal, from a state")


def _through_a_state(name: str, problem: Problem) -> tuple[Any, ...]:
    """A result, and the gradients of points and of a state that torch's autograd has computed."""
    from favorsharp_cuda.causal_attention import causal_attention_with_stats
    from favorsharp_cuda.host.attention_gradients import attention_backward
    from favorsharp_cuda.host.state_gradients import read_backward, update_backward
    from favorsharp_cuda.state import read_with_stats, update

    state = problem.state(16 if name.startswith("read") else 0)
    before = (state.kv, state.z, state.c)
    if name.startswith("update"):
        k, v, own = problem.k, problem.v, problem.map
        after = update(state, k, v, own, key_mask=problem.mask)
        sums = (after.kv, after.z, after.c)
        gradients = tuple(guarded(x.astype(problem.map_dtype)) for x in problem.of_sums(after))
        return (after.kv, *update_backward(gradients, k, v, before, sums, own, key_mask=problem.mask)[:-1])
    if name.startswith("read"):
        out, stats = read_with_stats(state, problem.q, problem.map)
        return (out, *read_backward(problem.gradient, problem.q, state, problem.map, out, stats)[:-1])
    given = (problem.q, *problem.same, problem.map)
    out, stats, _ = causal_attention_with_stats(*given, state=state)
    return (out, *attention_backward(problem.gradient, *given, out, stats, causal=True, state=before)[:-1])


def by_autograd(name: str, problem: Problem, place: Callable[[Any], Any], op: Callable[[str], Any]) -> tuple[Any, ...]:
    """The result of a call of `OF_STATES`, and its gradients by torch's autograd.

    `place` turns arrays, and those that a value holds, into tensors; `op` gives the function of a name.
    """
    import torch

    own = place(problem.map)
    given = place(problem.state(16 if name.startswith("read") else 0))
    sums = [given.kv.requires_grad_(), given.z.requires_grad_(), given.c.requires_grad_()]
    if name.startswith("update"):
        points = [place(x).requires_grad_() for x in (problem.k, problem.v)]
        after = op("update")(given, *points, own, key_mask=place(problem.mask))
        results = [after.kv, after.z, after.c]
        gradients = [place(x).to(after.kv.dtype) for x in problem.of_sums(after)]
        return (after.kv.detach(), *torch.autograd.grad(results, [*points, *sums], gradients, materialize_grads=True))
    if name.startswith("read"):
        leaves = [place(problem.q).requires_grad_(), *sums, given.recent_k, given.recent_v]
        leaves = [x.requires_grad_() for x in leaves]
        out = op("read")(given, leaves[0], own)
    else:
        points = [place(x).requires_grad_() for x in (problem.q, *problem.same)]
        leaves = [*points, *sums]
        out, _ = op("causal_attention")(*points, own, state=given)
    return (out.detach(), *torch.autograd.grad(out, leaves, place(problem.gradient), materialize_grads=True))


def _of_every_array(problem: Problem, **options: Any) -> tuple[Any, ...]:
    """The result, and the gradients of points and of all arrays of a map by torch's autograd."""
    from favorsharp.features.map_gradients import map_gradients
    from favorsharp_cuda.attention import attention_with_stats
    from favorsharp_cuda.host.attention_gradients import attention_backward

    given = (problem.q, *problem.same, problem.map)
    out, stats = attention_with_stats(*given, **options)
    *points, sums = attention_backward(problem.gradient, *given, out, stats, of_map=True, **options)
    return (out, *points, *map_gradients(problem.map, sums.finished()))


def _wanted_of_every_array(arrays: Any, feature_map: Any, gradient: Any, **options: Any) -> tuple[Any, ...]:
    import torch

    p = feature_map.parameters
    of_map = [feature_map.rows, feature_map.log_weight, p.g1, p.g2, p.center_x, p.center_y]
    q, k, v, rows, log_weight, g1, g2, center_x, center_y = leaves = [x.requires_grad_() for x in (*arrays, *of_map)]
    parameters = replace(p, g1=g1, g2=g2, center_x=center_x, center_y=center_y)
    own = replace(feature_map, parameters=parameters, rows=rows, log_weight=log_weight)
    out = OPS["attention"].reference(q, k, v, own, **options)
    return (out.detach(), *torch.autograd.grad(out, leaves, gradient, materialize_grads=True))


def vjp_options(name: str, problem: Problem) -> dict[str, Any]:
    """Options of a call of `VJPS`."""
    options: dict[str, Any] = dict(VJPS[name])
    if "key_mask" in options:
        options["key_mask"] = problem.same_mask
    return options


@cache
def function(op: str) -> Callable[..., Any]:
    """The function that calls with CuPy arrays are dispatched to."""
    import favorsharp_cuda

    target = next(k.target for k in favorsharp_cuda.BACKEND.kernels if k.op == op and "cupy" in k.libraries)
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def has_gradients(shape: Shape, room: int | None = None) -> bool:
    """Whether gradients of points of this size run on a device with so much shared memory, or on the shape's card."""
    from favorsharp_cuda.host.gradient_sizes import sweeps_for

    return bool(sweeps_for(shape.dtype, shape.d, SHARED_LIMITS[shape.card] if room is None else room))


def names(shape: Shape | None = None) -> list[str]:
    """All calls that the backend serves at that shape."""
    import favorsharp_cuda

    ops = {kernel.op for kernel in favorsharp_cuda.BACKEND.kernels}
    return [*CALLS, *(VJPS if "attention_vjp" in ops and (shape is None or has_gradients(shape)) else ())]


def main(request: str) -> None:
    """Run the calls of a request (JSON): source, calls, shapes, lengths, schedules."""
    asked = json.loads(request)
    code = Path(asked["source"]).read_text() if asked.get("source") else None
    HostModule.launched = set()
    with installed(code):
        for schedule in asked.get("schedules", [["forward", "forward", 0]]):
            with scheduled(Schedule(*schedule)):
                for number in asked.get("shapes", range(len(SHAPES))):
                    for name in asked.get("calls") or names(SHAPES[number]):
                        run(name, SHAPES[number], LENGTHS[asked.get("lengths", 0)])
    print(json.dumps({"sanitizer": sanitizer(), "launched": sorted(HostModule.launched)}))


if __name__ == "__main__":
    main(sys.argv[1])
