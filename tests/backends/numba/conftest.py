"""A guard region around every workspace: a test fails if a kernel writes outside of its workspace.

Workspaces are also filled with NaN before every kernel, so that a result does not depend on what they held before.
"""

import weakref

import numpy as np
import pytest

GUARD = 1024
"""Items behind each workspace: more than a kernel with a wrong layout would skip."""
PATTERN = 7.25


class Guarded(np.ndarray):
    """The memory of workspaces. Its guard regions are checked when it is released, and at the end of the test."""

    guards = ()
    faults = None

    def check(self):
        for guard in self.guards:
            if not (guard == PATTERN).all():
                self.faults.append(f"{np.count_nonzero(guard != PATTERN)} items outside of a workspace were written")

    def __del__(self):
        self.check()


@pytest.fixture(autouse=True)
def faults(monkeypatch):
    """The list of writes outside of workspaces, which must be empty at the end of a test."""
    workspace = pytest.importorskip("favorsharp_numba.host.workspace")
    found, kept = [], []

    def guarded(threads, items, dtype):
        memory = np.full((threads, items + workspace.CACHE_LINE + GUARD), np.nan, dtype).view(Guarded)
        guards = []
        for row in memory.view(np.ndarray):
            start = workspace.place_in(row) - row.__array_interface__["data"][0] // row.itemsize
            guards += [row[:start], row[start + items :]]
            row[:start] = row[start + items :] = PATTERN
        memory.guards, memory.faults = guards, found
        kept.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(workspace, "workspaces", guarded)
    yield found
    for memory in (reference() for reference in kept):
        if memory is not None:  # a plan keeps its workspace
            memory.check()
    assert not found, found[0]
