"""The docstring of each public function says what goes in and what comes out, and has an example.

`make lint` checks the form of all docstrings; `make docs` runs the examples on the pages of the site.
"""

import doctest
import importlib
import importlib.util
import inspect
import itertools

import pytest

pytest.importorskip("numpydoc")
from numpydoc.docscrape import NumpyDocString

MODULES = {
    "favorsharp": None,
    "favorsharp.diagnostics": None,
    "favorsharp.datasets": None,
    "favorsharp.testing": None,
    "favorsharp.distributed": "torch",
    "favorsharp.sklearn": "sklearn",
    "favorsharp.torch": "torch",
    "favorsharp.transformers": "transformers",
}
"""The modules that users import, and the library that each needs."""
OF_BACKENDS = ("Backend", "Explanation", "Kernel", "Op", "Request", "watch")
"""What the authors of backends use of `favorsharp.dispatch`."""


def public():
    for name, library in MODULES.items():
        if library is None or importlib.util.find_spec(library):
            module = importlib.import_module(name)
            for attribute in sorted(module.__all__):
                value = getattr(module, attribute)
                if inspect.isfunction(value) or inspect.isclass(value):
                    yield pytest.param(value, id=f"{name}.{attribute}")
    dispatch = importlib.import_module("favorsharp.dispatch")
    yield from (pytest.param(getattr(dispatch, name), id=f"favorsharp.dispatch.{name}") for name in OF_BACKENDS)


def documented(section):
    return [name.lstrip("*") for entry in section for name in entry.name.replace(" ", "").split(",")]


@pytest.mark.parametrize("value", list(public()))
def test_public_docstrings(value):
    parsed = NumpyDocString(inspect.getdoc(value))
    assert parsed["Summary"]
    assert any(line.startswith(">>>") for line in parsed["Examples"])
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert documented(parsed["Parameters"]) == list(signature.parameters)
        if signature.return_annotation not in (None, "None") and not hasattr(value, "__wrapped__"):
            assert parsed["Returns"] or parsed["Yields"]


@pytest.mark.parametrize("value", list(public()))
def test_examples(value):
    (found,) = doctest.DocTestFinder(recurse=False).find(value, value.__name__, globs={})
    result = doctest.DocTestRunner().run(found)
    assert result.attempted or "+SKIP" in value.__doc__
    assert result.failed == 0


@pytest.mark.parametrize("value", [value for value in public() if inspect.isfunction(value.values[0])])
def test_leading_arrays_are_positional_only(value):
    """As in NumPy, where names of array arguments are not a part of the interface."""
    parameters = list(inspect.signature(value).parameters.values())
    for parameter in itertools.takewhile(
        lambda p: p.name in {"q", "k", "v", "x", "y", "exact", "approximate"}, parameters
    ):
        if parameter.default is inspect.Parameter.empty:
            assert parameter.kind is inspect.Parameter.POSITIONAL_ONLY, parameter
