"""The backend stands on the public kit alone, and its folders import downwards: vectors, kernels, host, ops."""

import ast
from pathlib import Path

import pytest

import favorsharp.backend

ROOT = Path(__file__).parents[3] / "backends" / "favorsharp_numba"
FILES = sorted(ROOT.rglob("*.py"))
FOLDERS = ["vectors", "kernels", "host"]
"""From the bottom up; the files of the ops stand above."""


def imported(path):
    """The names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def floor(parts):
    """The floor of a module below the backend's root."""
    return FOLDERS.index(parts[0]) if parts[0] in FOLDERS else len(FOLDERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_public_modules_and_what_lies_below_it(path):
    own = floor(path.relative_to(ROOT).parts)
    for name in imported(path):
        package, *parts = name.split(".")
        assert package != "favorsharp" or not any(part.startswith("_") for part in parts), name
        if package == "favorsharp_numba" and parts:
            assert floor(parts) <= own, name


def test_every_name_of_the_kit_is_public_and_there():
    kit = favorsharp.backend
    assert kit.__all__ == sorted(kit.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert all(getattr(kit, name).__doc__ for name in kit.__all__)
    assert not [name for name in kit.__all__ if name.startswith("_")]
