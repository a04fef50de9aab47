"""Writes pages from records: `summary.md` of a run, and the results page of the docs.

    python3 tests/gpu/page.py FOLDER...

writes the page of one or several runs on one card into docs/gpu-results, where docs/guide/gpu.md then refers to it.
"""

import argparse
import datetime
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tables
import tables_of_times
from records import ROOT, read

DOCS = ROOT / "docs"
NOT_YET = "*No GPU has run these kernels yet, and nothing is known of their speed.*"
"""The sentence of docs/guide/gpu.md until there is a results page."""

SAID = re.compile(r"\*(No GPU has run|What ran on a GPU)[^*]*\*")
"""That sentence, or the one in its place that refers to the pages."""

SECTIONS = (*tables.SECTIONS, tables_of_times.times, tables_of_times.peers, tables.kept)
"""Of a results page, in order."""


def summarise(records: Path, to: Path) -> None:
    """Write the summary of a run; the file is never incomplete."""
    found = tables.by_kind(read(records))
    lines = [*_head("A run on a GPU", found), *_sections((*SECTIONS, tables.ends), found)]
    fresh = to.with_suffix(".new")
    fresh.write_text("\n".join(lines))
    os.replace(fresh, to)


def results(records: Iterable[dict[str, Any]]) -> tuple[str, str]:
    """The name of a results page, by date and card, and its text."""
    records = list(records)
    found = tables.by_kind(records)
    card = card_of(found)
    if card is None:
        raise SystemExit("no card is recorded: the stage `facts` has to be among the runs")
    day = datetime.datetime.fromtimestamp(min(x["at"] for x in records), datetime.UTC).date().isoformat()
    name = f"{day}-{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}.md"
    lines = ["---", "orphan: true", "---", "", *_head(f"GPU results, {card}, {day}", found)]
    return name, "\n".join([*lines, *_sections(SECTIONS, found)])


def card_of(found: tables.Found) -> str | None:
    """The card's name, if it was recorded."""
    named = [x["value"]["name"] for x in found["fact"] if x["name"] in ("card", "torch sees") and x["value"]]
    return named[0] if named else None


def _head(title: str, found: tables.Found) -> list[str]:
    facts = {x["name"]: x["value"] for x in found["fact"] if x["value"]}
    card, versions = facts.get("card", {}), facts.get("versions", {})
    said = [card_of(found) or "no card", *([f"driver {card['driver_version']}"] if card else [])]
    said += [f"CUDA {facts['torch sees']['cuda']}"] if "torch sees" in facts else []
    said += [
        f"{name} {of}" for name, of in versions.items() if name.startswith(("favorsharp", "torch", "cupy", "triton"))
    ]
    return [f"# {title}", "", f"On {', '.join(said)}. By `tests/gpu/run.py`.", ""]


def _sections(sections: Iterable[Any], found: tables.Found) -> list[str]:
    return [line for section in sections for line in section(found)]


def publish(folders: Sequence[Path], docs: Path = DOCS) -> Path:
    """Write the page into the docs, and link all such pages from the place in the guide that says what has run on a
    GPU."""
    name, text = results(entry for folder in folders for entry in read(folder / "records.jsonl"))
    file = docs / "gpu-results" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    pages = [(each.name, each.read_text().splitlines()[4]) for each in sorted(file.parent.glob("*.md"))]
    said = ", ".join(f"[{title.removeprefix('# GPU results, ')}](../gpu-results/{name})" for name, title in pages)
    guide = docs / "guide" / "gpu.md"
    before = guide.read_text()
    after, found = SAID.subn(f"*What ran on a GPU: {said}.*", before)
    if found != 1:
        raise SystemExit(f"{guide} should say once what ran on a GPU, as {NOT_YET!r}; it does {found} times")
    guide.write_text(after)
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="what run.py was given as --out")
    print(publish(parser.parse_args().folders))
