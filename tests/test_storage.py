"""`load` returns all numbers of a saved value, and refuses other files."""

import io
import json
from dataclasses import fields

import numpy as np
import pytest
from problems import attention_problem

import favorsharp as fs
from favorsharp._arrays import FLOATS, dtype_name, library_of, to_host
from favorsharp.testing import make_array

METHODS = ["optimal", "hyperbolic", "trig", "poisson", "relu"]


@pytest.mark.parametrize("method", METHODS)
def test_a_map_comes_back(few_xp, tmp_path, method):
    x, y, _ = (few_xp(a, "float32") for a in attention_problem(0, (2,)))
    fm = fs.feature_map(fs.fit(x, y, method=method), 8, rng=0)
    fs.save(tmp_path / "map", fm)
    again = fs.load(tmp_path / "map", like=x)
    assert type(again) is type(fm)
    assert again.fingerprint == fm.fingerprint
    assert few_xp.is_like(again.query(x), fm.query(x))
    np.testing.assert_array_equal(few_xp.back(again.query(x)), few_xp.back(fm.query(x)))


@pytest.mark.parametrize("window", [0, 4])
def test_a_stream_goes_on_with_its_saved_state(tmp_path, window):
    q, k, v = attention_problem(1, n=20)
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    state = fs.update(fs.init_state(fm, 5, like=k, window=window), k[:15], v[:15], fm)
    for name, value in (("map", fm), ("state", state), ("moments", fs.moments(q, k)), ("fit", fm.parameters)):
        fs.save(tmp_path / name, value)
    fm2, state2 = fs.load(tmp_path / "map"), fs.load(tmp_path / "state")
    want = fs.decode_step(q[:1], k[15:16], v[15:16], state, fm)[0]
    np.testing.assert_array_equal(fs.decode_step(q[:1], k[15:16], v[15:16], state2, fm2)[0], want)
    np.testing.assert_array_equal(fs.fit(fs.load(tmp_path / "moments")).g1, fs.load(tmp_path / "fit").g1)
    other = fs.feature_map(fs.fit(q, k), 8, rng=1)
    with pytest.raises(ValueError, match="another feature map"):
        fs.read(state2, q, other)


MARKED = ("numpy", "torch", pytest.param("jax", marks=pytest.mark.jax), "array_api_strict")


def arrays_of(value):
    """The arrays of a saved value by name, those of its parameters included."""
    found = {}
    for field in fields(value):
        entry = getattr(value, field.name)
        if isinstance(entry, fs.Parameters):
            found |= arrays_of(entry)
        elif hasattr(entry, "shape"):
            found[field.name] = entry
    return found


@pytest.mark.parametrize("like", [None, *MARKED])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("library", MARKED)
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
def test_every_value_comes_back_into_every_library(tmp_path, library, dtype, like):
    """The numbers and the dtype are the same; the dtype is float32 if the library lacks the saved one."""
    make, into = make_array(library, dtype), make_array(like or "numpy", "float32")
    if make is None or into is None:
        pytest.skip("no such arrays here")
    q, k, v = (make(x) for x in attention_problem(1, n=12))
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    values = [fs.moments(q, k), fm.parameters, fm]
    values += [fs.update(fs.init_state(fm, 5, like=k, window=window), k, v, fm) for window in (0, 4)]
    for value in values:
        fs.save(tmp_path / "value", value)
        again = fs.load(tmp_path / "value", like=None if like is None else into([0.0]))
        assert type(again) is type(value)
        for name, x in arrays_of(value).items():
            y = arrays_of(again)[name]
            kept = dtype_name(x).rstrip("_")
            if kept in FLOATS and make_array(like or "numpy", kept) is None:
                kept = "float32"
            assert (library_of(y), dtype_name(y).rstrip("_")) == (like or "numpy", kept)
            np.testing.assert_array_equal(to_host(y), to_host(x).astype(to_host(y).dtype))


def test_foreign_and_damaged_files_are_refused(tmp_path):
    q, k, _ = attention_problem(2)
    path = tmp_path / "map"
    fs.save(path, fs.feature_map(fs.fit(q, k), 8, rng=0))
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        bad = bytearray(good)
        where = int(rng.integers(len(bad)))
        bad[where] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(bad))
        try:
            again = fs.load(path)
        except ValueError:
            continue
        assert again.fingerprint is not None  # a bit that nothing reads: a date, a flag
        np.testing.assert_array_equal(again.projection, fs.feature_map(fs.fit(q, k), 8, rng=0).projection)
    entry = good.index(b"PK\x01\x02")
    for offset in (8, 10, 42, 45):  # flags, among them encryption; the kind of compression; where the entry begins
        for bit in range(8):
            bad = bytearray(good)
            bad[entry + offset] ^= 1 << bit
            path.write_bytes(bytes(bad))
            try:
                fs.load(path)
            except ValueError:
                continue
    path.write_bytes(good)
    with np.load(path) as archive:
        arrays = dict(archive)
    rows = arrays["rows"]
    for altered in (rows.reshape(1, *rows.shape), rows.view(np.int64), -rows):  # the first two have the same bytes
        with path.open("wb") as file:
            np.savez(file, **arrays | {"rows": altered})
        with pytest.raises(ValueError, match="damaged or altered"):
            fs.load(path)
    for size in range(0, len(good), 97):
        path.write_bytes(good[:size])
        with pytest.raises(ValueError, match="not a file that favorsharp"):
            fs.load(path)
    np.savez(path.with_suffix(".npz"), a=np.arange(3))
    with pytest.raises(ValueError, match="not a file that favorsharp"):
        fs.load(path.with_suffix(".npz"))


def test_pickles_other_versions_and_callables_are_refused(tmp_path):
    q, k, _ = attention_problem(3)
    path = tmp_path / "map"
    with path.open("wb") as file:
        np.savez(file, header=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="not a file"):
        fs.load(path)
    header = np.frombuffer(json.dumps({"favorsharp": 99}).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, header=header)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="format 99"):
        fs.load(path)
    with pytest.raises(TypeError, match="is code"):
        fs.save(path, fs.fit(q, k, method=np.square))
    with pytest.raises(TypeError, match="value must be"):
        fs.save(path, q)
