"""A backend that runs the references and counts its calls, so that tests go through the whole dispatcher."""

from collections import Counter
from typing import Any

from favorsharp.dispatch import OPS, Backend, Kernel

calls: Counter[str] = Counter()
"""How often each op ran here."""

_OPS = ("exponential_features", "attention", "causal_attention", "update", "read", "decode_step", "kernel_matvec")
_OPS += ("choose_landmarks", "condense", "point_moments", "weighted_attention", "landmark_stream", "landmark_window")
_OPS += ("landmark_keys",)
_EVERYTHING = {
    "libraries": frozenset({"numpy", "torch", "jax", "cupy", "array_api_strict"}),
    "devices": frozenset({"cpu", "cuda", "meta", "device1", "traced"}),
    "dtypes": frozenset(
        {"float16", "bfloat16", "float32", "float64", "float32+float64", "float16+float32", "float16+float64"}
    ),
    "families": frozenset({"exponential", "elementwise"}),
    "differentiable": True,
    "traceable": True,
}


def __getattr__(name: str) -> Any:
    if name not in _OPS:
        raise AttributeError(name)

    def run(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return OPS[name].reference(*args, **kwargs)

    return run


BACKEND = Backend(
    name="loopback",
    kernels=tuple(Kernel(op=op, target=f"favorsharp_loopback:{op}", **_EVERYTHING) for op in _OPS),
)
