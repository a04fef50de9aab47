"""Backends import favorsharp through its public kit, and their folders import downwards."""

import ast
from pathlib import Path

import pytest

import favorsharp.backend

ROOT = Path(__file__).parents[2] / "backends"
FILES = sorted(ROOT.rglob("*.py"))
FLOORS = {
    "favorsharp_numba": [["vectors"], ["kernels"], ["host"], [], ["torch_ops", "vjp"]],
    "favorsharp_cuda": [["kernels"], ["host"], [], ["torch", "vjp"], ["torch_ops"]],
}
"""The folders and files of each floor, from the bottom up. The files of the ops are on the floor without names."""


def imported(path):
    """The names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def floor(package, parts):
    """The layer of a module of a backend."""
    floors = FLOORS[package]
    return next((i for i, names in enumerate(floors) if parts[0] in names), floors.index([]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_public_modules_and_what_lies_below_it(path):
    backend, *place = path.relative_to(ROOT).with_suffix("").parts
    own = floor(backend, place)
    for name in imported(path):
        package, *parts = name.split(".")
        assert package != "favorsharp" or not any(part.startswith("_") for part in parts), name
        assert package not in FLOORS or package == backend, name
        if package == backend and parts:
            assert floor(backend, parts) <= own, name


def test_every_name_of_the_kit_is_public_and_there():
    kit = favorsharp.backend
    assert kit.__all__ == sorted(kit.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert all(getattr(kit, name).__doc__ for name in kit.__all__)
    assert not [name for name in kit.__all__ if name.startswith("_")]
