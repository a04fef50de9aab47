"""Data sets: every form of a file gives the same values, and a file that is not the table is refused."""

import gzip
import hashlib
import io
import os
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest

from favorsharp import _tables, datasets

SMALL = {
    "abalone": ["M,0.455,0.365,0.095,0.514,0.2245,0.101,0.15,15", "F,0.35,0.265,0.0,0.2,0.09,0.04,0.07,7"],
    "banknote": ["3.6216,8.6661,-2.8073,-0.44699,0", "-1.5,2.0,1.0,-1.4621,1"],
    "car": ["vhigh,vhigh,2,2,small,low,unacc", "low,vhigh,5more,4,big,high,vgood"],
    "yeast": ["0.58,0.61,0.47,0.13,0.50,0.00,0.48,0.22,MIT", "0.43,0.67,0.48,0.27,0.50,0.00,0.53,0.22,CYT"],
    "cmc": ["24,2,3,3,1,1,2,3,0,1", "45,1,3,10,1,1,3,4,0,3"],
    "nursery": ["usual,proper,complete,1,convenient,convenient,nonprob,recommended,recommend"] * 2,
    "wifi": ["-64,-56,-61,-66,-71,-82,-81,1", "-59,-50,-45,-60,-45,-88,-87,4"],
    "chess": ["a,1,b,3,c,2,draw", "b,1,g,7,g,5,sixteen"],
}
"""Made up in the form of the sources' rows; the third party's files are not shipped."""

WIDTHS = {"abalone": 9, "banknote": 4, "car": 11, "yeast": 8, "cmc": 9, "nursery": 8, "wifi": 7, "chess": 11}


def as_csv(name):
    return "\n".join([",".join(_tables.TABLES[name].columns), *SMALL[name], ""])


def as_source(name):
    rows = SMALL[name]
    if name == "yeast":
        rows = [f"ADT{i}_YEAST  " + row.replace(",", "  ") for i, row in enumerate(rows)]
    if name == "wifi":
        rows = [row.replace(",", "\t") for row in rows]
    return "\r\n".join([*rows, "", ""])  # some of the source files have such line ends, and some end with an empty line


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    monkeypatch.delenv("FAVORSHARP_DATA", raising=False)
    for name, table in _tables.TABLES.items():
        monkeypatch.setitem(
            _tables.TABLES, name, replace(table, sha256=hashlib.sha256(as_csv(name).encode()).hexdigest())
        )


@pytest.fixture
def archive(monkeypatch):
    """A server on this machine with the archives under UCI's paths; returns the list of requested paths."""
    pytest.importorskip("pooch")
    asked, content = [], {}
    for name, table in _tables.TABLES.items():
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("Index", "of no use")
            file.writestr(table.member, as_source(name))
        content[f"/{table.address}"] = buffer.getvalue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = content.get(self.path)
            self.send_response(200 if body else 404)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *values):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(_tables, "ARCHIVE", f"http://127.0.0.1:{server.server_port}")
    yield asked, content
    server.shutdown()
    server.server_close()


def fetch(name, **options):
    return getattr(datasets, f"fetch_{name}")(**options)


@pytest.mark.parametrize("name", SMALL)
def test_a_download_and_every_copy_give_the_same_values(name, archive, tmp_path):
    asked, _ = archive
    first = fetch(name, data_home=tmp_path / "cache")
    assert first.data.shape == (2, WIDTHS[name])
    assert first.data.dtype == np.float64
    assert len(first.feature_names) == WIDTHS[name]
    table = _tables.TABLES[name]
    for number, (file, content) in enumerate(
        {
            f"{table.file}.csv": as_csv(name).encode(),
            f"{table.file}.csv.gz": gzip.compress(as_csv(name).encode()),
            table.member: as_source(name).encode(),
        }.items()
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / file).write_bytes(content)
        again = fetch(name, data_home=folder)
        np.testing.assert_array_equal(again.data, first.data)
        np.testing.assert_array_equal(again.target, first.target)
    again = fetch(name, data_home=tmp_path / "cache")
    np.testing.assert_array_equal(again.data, first.data)
    assert len(asked) == 1, "the second call reads what the first one kept"


def test_values():
    rows = _tables.parsed(_tables.TABLES["chess"], as_source("chess"))
    found = datasets._dataset("chess", rows)
    assert found.feature_names[:4] == ("wk_file=a", "wk_file=b", "wk_rank=1", "wr_file=b")
    np.testing.assert_array_equal(found.data[:, :5], [[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]])
    assert found.target.tolist() == ["draw", "sixteen"]
    assert found.target_names == ("draw", "sixteen")
    wifi = datasets._dataset("wifi", _tables.parsed(_tables.TABLES["wifi"], as_source("wifi")))
    np.testing.assert_array_equal(wifi.data[1], [-59, -50, -45, -60, -45, -88, -87])
    assert wifi.target.dtype == np.int64
    assert repr(wifi) == "Dataset('wifi', n=2, d=7, classes=2)"


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FAVORSHARP_DATA", str(tmp_path))
    (tmp_path / "krkopt.csv").write_text(as_csv("chess"))
    assert fetch("chess").data.shape == (2, 11)


def test_what_is_not_the_table_is_refused(archive, tmp_path):
    _, content = archive
    for bad in (as_csv("car").replace("low", "med").encode(), b"", b"<html>not found</html>", b"\xff\x00\xfe"):
        (tmp_path / "car.csv").write_bytes(bad)
        with pytest.raises(ValueError, match=r"car\.csv: \d+ rows with SHA-256 .*; accepted: the table buying,"):
            fetch("car", data_home=tmp_path)
    good = gzip.compress(as_csv("car").encode())
    for bad in (good[:-9], good[:20] + b"\xff" + good[21:], b"plain"):
        (tmp_path / "car.csv.gz").write_bytes(bad)
        with pytest.raises(ValueError, match=r"car\.csv\.gz: not a gzip file"):
            fetch("car", data_home=tmp_path)
    address = f"/{_tables.TABLES['wifi'].address}"
    for bad in (b"not a zip file", content[f"/{_tables.TABLES['car'].address}"]):
        content[address] = bad
        with pytest.raises(ValueError, match=r"wireless\+indoor\+localization\.zip: not an archive that holds wifi"):
            fetch("wifi", data_home=tmp_path / "new")
    del content[address]
    with pytest.raises(OSError, match="could not be downloaded: 404.*FAVORSHARP_DATA"):
        fetch("wifi", data_home=tmp_path / "new")
    assert not (tmp_path / "new").exists() or not os.listdir(tmp_path / "new"), "a failed download leaves nothing"


def test_without_pooch_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pooch", None)
    with pytest.raises(ImportError, match=r"favorsharp\[datasets\].*FAVORSHARP_DATA"):
        fetch("car", data_home=tmp_path)


@pytest.mark.skipif(not os.environ.get("FAVORSHARP_DATA"), reason="FAVORSHARP_DATA names no folder with copies")
def test_local_copies_are_the_published_tables(monkeypatch):
    monkeypatch.undo()
    sizes = {
        "abalone": (4177, 10, 28), "banknote": (1372, 4, 2), "car": (1728, 21, 4), "yeast": (1484, 8, 10),
        "cmc": (1473, 9, 3), "nursery": (12960, 27, 5), "wifi": (2000, 7, 4), "chess": (28056, 40, 18),
    }  # fmt: skip
    for name, size in sizes.items():
        found = fetch(name)
        assert (*found.data.shape, len(found.target_names)) == size
        assert np.isfinite(found.data).all()
