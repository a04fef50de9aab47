"""Every list of methods is derived from the records, and the entries of the records are right."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

import favorsharp as fs
from favorsharp.methods import TABLE, method_of

ROOT = Path(__file__).parent.parent
DATA = np.random.default_rng(0).standard_normal((2, 200, 3))


@pytest.mark.parametrize("method", fs.METHODS)
def test_a_record_says_what_the_method_does(method):
    record = TABLE[method]
    other = fs.fit(*DATA[:, :50], method=method)
    fitted = fs.fit(*DATA, method=method)
    changed = any(
        not np.array_equal(getattr(fitted, name), getattr(other, name)) for name in ("a", "g1", "g2", "center_x")
    ) or (fitted.rate is not None and not np.array_equal(fitted.rate, other.rate))
    assert changed == record.is_fitted
    drawn = fs.feature_map(fitted, 16, rng=0)
    assert drawn.positive == (not record.signed)
    assert (drawn.family == "exponential") == (record.kind == "dense-exponential")
    smallest = min(drawn.query(DATA[0]).min(), drawn.key(DATA[1]).min())
    assert (smallest < 0) == record.signed


@pytest.mark.parametrize("method", fs.METHODS)
def test_second_moments_are_known_for_the_methods_whose_records_have_them(method):
    record, fitted = TABLE[method], fs.fit(*DATA, method=method)
    for function, formula in ((fs.log_second_moment, record.log_second_moment), (fs.excess, record.excess)):
        if formula is None:
            with pytest.raises(ValueError, match=method):
                function(fitted, *DATA)
        else:
            assert np.all(np.isfinite(function(fitted, *DATA)))


def test_callables_share_a_record_of_positive_features():
    record = method_of(np.exp)
    assert not record.is_fitted
    assert not record.signed
    assert not record.estimates_kernel


def test_the_readme_has_a_row_for_every_method():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    named = {name for line in rows for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert set(fs.METHODS) <= named


def test_no_other_file_lists_methods():
    """A second list would have to be updated by hand whenever the records change."""
    found = set()
    for path in (ROOT / "favorsharp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            entries = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
            if sum(isinstance(x, ast.Constant) and x.value in fs.METHODS for x in entries) > 1:
                found.add(path.name)
    assert found == {"draws.py"}  # the distributions of counts, which have the names of their methods
