"""Measures our calls: with and without the host, as graphs, and kernel by kernel; and the peak rates of the card."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import turns
from clocks import DEVICE, ceilings, clock, graph_seconds, host_seconds, kernels
from records import DRY, context_is_lost, record, short
from turns import Step

import favorsharp as fs
from benchmarks import gpu
from benchmarks.gpu import Case, Token

CASES = (
    *(Case(4, 16, 16_384, 64, m, causal) for causal in (False, True) for m in (64, 256)),
    Token(64, 8, 64, 64),
    *(Case(4, 16, 16_384, 64, 64, causal, backward=True) for causal in (True, False)),
    Case(2, 16, 16_384, 64, 64, True),
    Case(4, 8, 16_384, 128, 128, True),
    Case(4, 16, 16_384, 64, 64, True, dtype="float32"),
    Case(4, 16, 1_024, 64, 64, True),
    Case(1, 8, 262_144, 64, 64, True),
    *(Token(batch, 8, 64, 64, window) for batch, window in ((1, 0), (1, 64), (64, 64))),
)


def runner(case: Case | Token) -> Callable[[], Any]:
    """The call of a case."""
    q, k, v, feature_map = gpu.problem(case, DEVICE)
    if isinstance(case, Token):
        step = gpu.token_peers(case, DEVICE, feature_map)[1][gpu.OURS]
        return lambda: step(q, k, v)

    def forward(q: Any, k: Any, v: Any) -> Any:
        return fs.linear_attention(q, k, v, feature_map, is_causal=case.is_causal)

    function = gpu.with_backward(forward) if case.backward else forward
    return lambda: function(q, k, v)


def measure(case: Case | Token) -> None:
    """Record the times of a case, or the reason why a time is missing."""
    run = runner(case)
    with_host = partial(gpu.seconds_on_cpu if DRY else gpu.seconds_on_gpu, rounds=5)
    ways = {"call": clock, "host": host_seconds, "with_host": with_host}
    if not DRY:
        ways |= {"kernels": kernels} | ({} if case.backward else {"graph": graph_seconds})
    with torch.set_grad_enabled(case.backward):
        found: dict[str, Any] = {"not_finite": int((~torch.isfinite(run())).sum())}
        run()
        for name, way in ways.items():
            try:
                found[name] = way(run)
            except RuntimeError as error:
                if context_is_lost(str(error)):
                    raise
                found[f"{name}_said"] = short(error)
    floors = None if case.backward else case.work.seconds
    record("time", case=str(case), tokens=case.tokens, floor=case.floor / case.tokens, floors=floors, **found)
    if not DRY:
        torch.cuda.empty_cache()


def steps() -> list[Step]:
    """The ceilings, then case after case."""
    found = [Step("time", {"case": str(case)}, partial(measure, case)) for case in (gpu.QUICK if DRY else CASES)]
    return found if DRY else [Step("ceilings", {}, ceilings), *found]


if __name__ == "__main__":
    sys.exit(turns.main(steps))
