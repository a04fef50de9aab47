"""Makes Markdown tables from the recorded times, ours and those of peers."""

from collections.abc import Mapping
from typing import Any

from tables import Found, named, table


def times(found: Found) -> list[str]:
    """Nanoseconds for each token and head, beside lower bounds from the copy rate that was measured on this card."""
    if not found["time"]:
        return []
    ceilings = next((x for x in found["ceilings"] if "launch" in x), None)
    lines = [_said_of(ceilings), ""] if ceilings else []
    columns = ["case", "call", "with host", "graph", "host", "kernels", "floor", "of it", "not finite", "said"]
    lines += table(columns, [_times_row(x, ceilings) for x in found["time"]])
    for x in found["time"]:
        spent = [f"{name} {launches:g} x, {us:g} µs" for name, (launches, us) in (x.get("kernels") or {}).items()]
        lines += [f"- {x['case']}: {'; '.join(spent)}"] if spent else []
    return ["## Times, ns a token and head", "", *lines, ""]


def _said_of(ceilings: Mapping[str, Any]) -> str:
    copied, products = ceilings["bytes_a_second"] / 1e12, ceilings["flops_a_second"] / 1e12
    return f"The card copies {copied:.2f} TB/s, multiplies {products:.0f} TFLOP/s (bfloat16), and " + (
        f"needs {1e6 * ceilings['launch']:.1f} µs for an empty kernel."
    )


def _times_row(x: Mapping[str, Any], ceilings: Mapping[str, Any] | None) -> list[Any]:
    if "call" not in x:
        return [x["case"], *[None] * 8, x.get("said")]
    from benchmarks.gpu_floors import BYTES_A_SECOND

    per, floor = 1e9 / x["tokens"], x["floor"]
    if ceilings and x["floors"]:
        bytes_here = x["floors"]["bytes"] * BYTES_A_SECOND / ceilings["bytes_a_second"]
        floor = max((x["floors"] | {"bytes": bytes_here}).values())
    spent = sum(us for _, us in (x.get("kernels") or {}).values()) * 1e-6 or None
    best = min(y for y in (x["call"], x.get("graph"), spent) if y)
    taken = [y * per if y else None for y in (x["call"], x.get("with_host"), x.get("graph"), x.get("host"), spent)]
    said = "; ".join(text for name, text in x.items() if name.endswith("_said"))
    return [x["case"], *taken, 1e9 * floor, f"{floor * x['tokens'] / best:.0%}", x["not_finite"], said]


def peers(found: Found) -> list[str]:
    """Our times beside those of peers."""
    entries = []
    for x in found["peer"]:
        ns = 1e9 * x["seconds"] / x["tokens"] if "seconds" in x else None
        entries.append(x | {"peer": x["name"], "ns a token and head": ns, "apart from ours": x.get("apart")})
    return named(entries, "Peers", "case", "peer", "ns a token and head", "apart from ours", "said")
