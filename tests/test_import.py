"""Importing the package is fast and imports no array library."""

import subprocess
import sys

import pytest


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_nothing_else_is_loaded_but_array_api_compat_and_the_standard_library():
    """Other modules would make the import slow; the time itself depends on the machine."""
    code = (
        "import sys; before = set(sys.modules); import favorsharp; "
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names), "
        "*sorted(m for m in ('asyncio', 'concurrent.futures', 'json', 'multiprocessing', 'subprocess', 'unittest')"
        " if m in sys.modules))"
    )
    assert run(code) == "array_api_compat favorsharp"


def test_modules_of_torch_do_not_load_its_compiler():
    pytest.importorskip("torch")
    assert run("import sys, favorsharp.torch; print('torch._dynamo' in sys.modules)") == "False"


def test_every_public_name_is_there():
    import favorsharp

    assert all(hasattr(favorsharp, name) for name in favorsharp.__all__)
    assert callable(favorsharp.moments)
    assert callable(favorsharp.linear_attention)
