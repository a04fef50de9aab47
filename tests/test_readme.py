"""Every snippet of the README runs as printed, and prints what its comments say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def promised(snippet):
    """The output that the comments promise: after a print, or on lines of their own after the last one."""
    behind = re.findall(r"^ *print\(.*\)  # (.*)$", snippet, flags=re.MULTILINE)
    below = re.findall(r"^# (.*)$", snippet, flags=re.MULTILINE)
    return behind or below


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[f"snippet-{i}" for i in range(len(SNIPPETS))])
def test_snippet(snippet):
    run = subprocess.run([sys.executable, "-W", "error", "-c", snippet], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == promised(snippet)


def test_there_are_snippets_and_both_commands():
    assert SNIPPETS
    text = README.read_text()
    assert len(text.splitlines()) < 150
    assert "`make demo`" in text
    assert "`make test`" in text
