"""Makes Markdown tables from records.

Each section is a function of the records by kind; without records it is empty.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Found = Mapping[str, list[dict[str, Any]]]
"""Records by their kind."""

MOST = 100
"""Rows of a table of faults."""


def by_kind(records: Iterable[dict[str, Any]]) -> Found:
    """Records by kind; if a stage ran several times, those of its last run."""
    records = list(records)
    begun = {entry["stage"]: number for number, entry in enumerate(records) if entry["kind"] == "begin"}
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number, entry in enumerate(records):
        if number >= begun.get(entry["stage"], 0):
            found[entry["kind"]].append(entry)
    found["stage"] = list({entry["stage"]: entry for entry in found["stage"]}.values())
    return found


def number(x: Any, digits: int = 3) -> str:
    """A number as text for a table; empty for None."""
    return "" if x is None else f"{x:.{digits}g}" if isinstance(x, float) else str(x)


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """The lines of a table."""
    columns = list(columns)
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    cells = [[number(x).replace("|", "/").replace("\n", " ") for x in row] for row in rows]
    return [*lines, *("| " + " | ".join(row) + " |" for row in cells), ""]


def named(entries: Iterable[Mapping[str, Any]], title: str, *names: str) -> list[str]:
    """A section with a table of these fields; empty without entries."""
    entries = list(entries)[:MOST]
    return [f"## {title}", "", *table(names, ([x.get(name) for name in names] for x in entries))] if entries else []


def stages(found: Found) -> list[str]:
    """How each stage ended, and how many of its tests passed and failed."""
    counts = defaultdict(Counter)
    for entry in found["test"]:
        counts[entry["stage"]][entry["outcome"]] += 1
    rows = []
    for x in found["stage"]:
        counted = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts[x["stage"]].items()))
        rows.append([x["stage"], x["state"], round(x["seconds"]), x["tells"], counted])
    return ["## Stages", "", *table(["stage", "state", "s", "what it tells", "tests"], rows)] if rows else []


def facts(found: Found) -> list[str]:
    """The machine."""
    rows = [[x["name"], x["said"] if x["value"] is None else json.dumps(x["value"])] for x in found["fact"]]
    return ["## Machine", "", *table(["", ""], rows)] if rows else []


def compiling(found: Found) -> list[str]:
    """The number of instances that compile, and the instances that do not."""
    lines = []
    for x in found["compiled"]:
        grown = "; ".join(x["more_registers"]) or "none"
        lines += [f"{x['instances']} instances, of which {x['failed']} failed, in {x['wall']} s."]
        lines += [f"More registers than in resources.json: {grown}.", ""]
    broken = named((x for x in found["compile"] if "said" in x), "Instances that do not compile", "expression", "said")
    return ["## Compilation", "", *lines, *broken] if lines or broken else []


def calls(found: Found) -> list[str]:
    """Calls compared with float64: the wrong ones, and the right ones whose errors are nearest to their limits."""
    right = [x for x in found["call"] if x["ok"]]
    wrong = [x for x in found["call"] if not x["ok"]]
    if not found["call"]:
        return []
    columns = ("call", "shape", "lengths", "library", "error", "limit")
    near = sorted(right, key=lambda x: -x["error"] / x["limit"])[:12]
    lines = ["## Calls against float64", "", f"{len(right)} are right and {len(wrong)} wrong.", ""]
    return [*lines, *named(wrong, "Wrong calls", *columns, "said"), *named(near, "Nearest to the limit", *columns)]


def failures(found: Found) -> list[str]:
    """Tests that failed; a test that destroyed the context of its process is one line."""
    lost = {x["test"] for x in found["lost context"]}
    failed = [x for x in found["test"] if x["outcome"] == "failed" and x["test"] not in lost]
    entries = [x | {"what": "lost the context"} for x in found["lost context"]] + [x | {"what": ""} for x in failed]
    return named(entries, "Tests that failed", "stage", "test", "what", "said")


def ended_early(found: Found) -> list[str]:
    """Processes that did not reach their first step, and calls of the sanitizers and the profiler that ended early."""
    died = named(found["died"], "Processes that did not begin", "stage", "said", "command")
    return [*died, *named(found["calls"], "Calls that nothing is compared with", "stage", "which", "calls", "failed")]


def streams(found: Found) -> list[str]:
    """Checks of streams, threads and graphs."""
    return named(found["streams"], "Streams, threads and graphs", "name", "ok", "value", "said")


def rounding(found: Found) -> list[str]:
    """How the tensor cores add, and the errors of long sums."""
    lines = []
    for x in found["probe"]:
        lines += [f"Additions of the tensor cores are {x['additions are']}." if "sums" in x else x["said"], ""]
        lines += table(["one mma", "changes the sum by, ulp"], x.get("sums", {}).items())
    columns = ("n", "dtype", "causal", "mean", "heads", "error", "error_of_norms", "slope_less_one", "said")
    return ["## Rounding", "", *lines, *named(found["long sum"], "Long sums", *columns)] if lines else []


def kept(found: Found) -> list[str]:
    """The output of sanitizers and of the profiler."""
    lines = []
    for x in found["stage"]:
        lines += [f"## Said by {x['stage']}", "", "```", *x["kept"], "```", ""] if x["kept"] else []
    return lines


def ends(found: Found) -> list[str]:
    """The last lines of stages that did not pass."""
    lines = []
    for x in found["stage"]:
        said = ["```", *x["tail"], "```", ""]
        lines += [f"## The end of {x['stage']}: {x['state']}", "", *said] if x["tail"] else []
    return lines


SECTIONS: tuple[Callable[[Found], list[str]], ...] = (
    *(stages, facts, compiling, calls, failures, ended_early, streams, rounding),
)
"""In the order of a page."""
