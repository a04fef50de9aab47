"""A pytest plugin (`-p report_lines`) that records each result at once, and ends a process that lost its CUDA context.

With pytest-xdist, another process goes on with the remaining tests.
"""

import os
from collections.abc import Generator
from typing import Any

import pytest
from records import context_is_lost, record
from turns import LOST_CONTEXT


def _said(report: Any) -> str:
    crash = getattr(getattr(report, "longrepr", None), "reprcrash", None)
    return " ".join(str(crash.message if crash is not None else report.longrepr or "").split())[:400]


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: Any) -> None:
    """Record a result in the process that collects them, not in the workers of pytest-xdist."""
    if os.environ.get("PYTEST_XDIST_WORKER") or (report.when != "call" and report.outcome == "passed"):
        return
    said = "" if report.outcome == "passed" else _said(report)
    seconds = round(report.duration, 2)
    quiet = report.outcome != "failed"
    record("test", test=report.nodeid, outcome=report.outcome, seconds=seconds, said=said, quiet=quiet)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, None]:
    """End the process if its context is lost, because all later tests in it would fail too."""
    report = (yield).get_result()
    if report.failed and context_is_lost(str(report.longrepr)):
        record("lost context", test=report.nodeid, said=_said(report), quiet=True)
        os._exit(LOST_CONTEXT)
