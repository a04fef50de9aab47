"""The eight UCI data sets that the papers classify, as NumPy arrays.

Tables are read from the folder that the environment variable FAVORSHARP_DATA names, or from a cache folder. A table
that is not there is downloaded from the UCI Machine Learning Repository and kept. Wherever a table comes from, its
values are compared with a SHA-256 digest before it is used. The data are under CC BY 4.0: cite the `source` of each set
that you use. The experiments in `benchmarks/paper` call these functions.
"""

import gzip
import hashlib
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "Dataset",
    "fetch_abalone",
    "fetch_banknote",
    "fetch_car",
    "fetch_chess",
    "fetch_cmc",
    "fetch_nursery",
    "fetch_wifi",
    "fetch_yeast",
]

ARCHIVE = "https://archive.ics.uci.edu/static/public"
"""The common beginning of the addresses of the data sets."""


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Points and their classes.

    Attributes
    ----------
    name : str
    data : numpy.ndarray, shape (n, d), float64
        Numbers as in the source, not scaled; a nominal column becomes one column of 0 and 1 for each of its values.
    target : numpy.ndarray, shape (n,)
        Integers if the source has numbers, else strings; in the order of the source.
    feature_names : tuple of str
        A name for each of the d columns; `column=value` for a value of a nominal column.
    target_names : tuple
        The classes, sorted.
    source : str
        What to cite: authors, year and DOI.

    Examples
    --------
    >>> from favorsharp.datasets import fetch_car
    >>> car = fetch_car()  # doctest: +SKIP
    >>> car  # doctest: +SKIP
    Dataset('car', n=1728, d=21, classes=4)
    >>> car.feature_names[0]  # doctest: +SKIP
    'buying=high'
    """

    name: str
    data: np.ndarray
    target: np.ndarray
    feature_names: tuple[str, ...]
    target_names: tuple[Any, ...]
    source: str

    def __repr__(self) -> str:
        n, d = self.data.shape
        return f"Dataset({self.name!r}, n={n}, d={d}, classes={len(self.target_names)})"


@dataclass(frozen=True)
class _Table:
    """Where a data set is and what its columns are."""

    file: str
    address: str
    member: str
    columns: tuple[str, ...]
    sha256: str
    source: str
    nominal: tuple[str, ...] = ()
    skipped: int = 0  # leading columns of the source that only name the row


TABLES = {
    "abalone": _Table(
        "abalone",
        "1/abalone.zip",
        "abalone.data",
        ("sex", "length", "diameter", "height", "whole_weight", "shucked_weight", "viscera_weight", "shell_weight",
         "rings"),
        "b36baf97dbcb1ae8d70ae95dd06794ce7878aef96cefc29cd0c8ca0fd9f8aee1",
        "Nash, Sellers, Talbot, Cawthorn, Ford (1994), https://doi.org/10.24432/C55C7W",
        nominal=("sex",),
    ),
    "banknote": _Table(
        "banknote",
        "267/banknote+authentication.zip",
        "data_banknote_authentication.txt",
        ("variance", "skewness", "curtosis", "entropy", "class"),
        "a4e6eb57f00dc0c5696badf6553001e8871644b5b98ab1b2869054af1d255125",
        "Lohweg (2012), https://doi.org/10.24432/C55P57",
    ),
    "car": _Table(
        "car",
        "19/car+evaluation.zip",
        "car.data",
        ("buying", "maint", "doors", "persons", "lug_boot", "safety", "class"),
        "0023b86e0dd3502aaa0e4a610ef4d8aebbba7ff40f53fa7c2f0543c68bee5114",
        "Bohanec (1988), https://doi.org/10.24432/C5JP48",
        nominal=("buying", "maint", "doors", "persons", "lug_boot", "safety"),
    ),
    "yeast": _Table(
        "yeast",
        "110/yeast.zip",
        "yeast.data",
        ("mcg", "gvh", "alm", "mit", "erl", "pox", "vac", "nuc", "class"),
        "39592b7a2c693d358df6f02073ec7d28894c22e4e3586e3a23bc306b9a4b72e5",
        "Nakai (1991), https://doi.org/10.24432/C5KG68",
        skipped=1,
    ),
    "cmc": _Table(
        "cmc",
        "30/contraceptive+method+choice.zip",
        "cmc.data",
        ("wife_age", "wife_education", "husband_education", "children", "wife_religion", "wife_working",
         "husband_occupation", "living_index", "media_exposure", "method"),
        "bc56f10bc5d1de7f714b94cecf5c4d8eef9645d2e4c42f2acbdcad5b7c5eb231",
        "Lim (1997), https://doi.org/10.24432/C59W2D",
    ),
    "nursery": _Table(
        "nursery",
        "76/nursery.zip",
        "nursery.data",
        ("parents", "has_nurs", "form", "children", "housing", "finance", "social", "health", "class"),
        "cfd50f92b8b65b8d398670ce13f1e78fbc0d452ff26906de8b4497f909716951",
        "Rajkovic (1989), https://doi.org/10.24432/C5P88W",
        nominal=("parents", "has_nurs", "form", "children", "housing", "finance", "social", "health"),
    ),
    "wifi": _Table(
        "wifi",
        "422/wireless+indoor+localization.zip",
        "wifi_localization.txt",
        ("wifi1", "wifi2", "wifi3", "wifi4", "wifi5", "wifi6", "wifi7", "room"),
        "da63f3482844cff62859e8ad26f1d56bbc81275c7e9a2998fe0f515f497c1639",
        "Bhatt (2017), https://doi.org/10.24432/C51880",
    ),
    "chess": _Table(
        "krkopt",
        "23/chess+king+rook+vs+king.zip",
        "krkopt.data",
        ("wk_file", "wk_rank", "wr_file", "wr_rank", "bk_file", "bk_rank", "depth"),
        "4c2572370c3b29dc0f6264983beaed0b4f380ade2901705b00b17ae56785b148",
        "Bain, van Hoff (1994), https://doi.org/10.24432/C57W2S",
        nominal=("wk_file", "wk_rank", "wr_file", "wr_rank", "bk_file", "bk_rank"),
    ),
}  # fmt: skip


def fetch_abalone(*, data_home: str | Path | None = None) -> Dataset:
    """Abalone: rings, as 28 ordered classes, from sex and seven measurements of a shellfish.

    Parameters
    ----------
    data_home : str or Path, optional
        The folder to read the table from, and to keep a download in. None means the folder that FAVORSHARP_DATA names,
        or else the user's cache folder. It may hold `abalone.csv` or `abalone.csv.gz` with a line of column names (for
        chess, `krkopt.csv`), or the source's own file, such as `abalone.data`.

    Returns
    -------
    Dataset
        n = 4177, d = 10.

    Raises
    ------
    ValueError
        If the values of the copy or the download do not have the expected digest; the message names the file.
    ImportError
        If a download is necessary and pooch is not installed.
    OSError
        If the download fails.

    Examples
    --------
    >>> from favorsharp.datasets import fetch_abalone
    >>> fetch_abalone()  # doctest: +SKIP
    Dataset('abalone', n=4177, d=10, classes=28)
    """
    return _fetch("abalone", data_home)


def fetch_banknote(*, data_home: str | Path | None = None) -> Dataset:
    """Banknote authentication: 2 classes; n = 1372, d = 4.

    Parameters
    ----------
    data_home : str or Path, optional
        As in `fetch_abalone`, which raises the same errors.

    Returns
    -------
    Dataset

    Examples
    --------
    >>> from favorsharp.datasets import fetch_banknote
    >>> fetch_banknote()  # doctest: +SKIP
    Dataset('banknote', n=1372, d=4, classes=2)
    """
    return _fetch("banknote", data_home)


def fetch_car(*, data_home: str | Path | None = None) -> Dataset:
    """Car evaluation: 4 classes, nominal columns; n = 1728, d = 21.

    Parameters
    ----------
    data_home : str or Path, optional
        As in `fetch_abalone`, which raises the same errors.

    Returns
    -------
    Dataset

    Examples
    --------
    >>> from favorsharp.datasets import fetch_car
    >>> fetch_car()  # doctest: +SKIP
    Dataset('car', n=1728, d=21, classes=4)
    """
    return _fetch("car", data_home)


def fetch_yeast(*, data_home: str | Path | None = None) -> Dataset:
    """Yeast: sites of proteins in 10 classes; n = 1484, d = 8.

    Parameters
    ----------
    data_home : str or Path, optional
        As in `fetch_abalone`, which raises the same errors.

    Returns
    -------
    Dataset

    Examples
    --------
    >>> from favorsharp.datasets import fetch_yeast
    >>> fetch_yeast()  # doctest: +SKIP
    Dataset('yeast', n=1484, d=8, classes=10)
    """
    return _fetch("yeast", data_home)


def fetch_cmc(*, data_home: str | Path | None = None) -> Dataset:
    """Contraceptive method choice: 3 classes; n = 1473, d = 9.

    Every column is used as a number.

    Parameters
    ----------
    data_home : str or Path, optional
        As in `fetch_abalone`, which raises the same errors.

    Returns
    -------
    Dataset

    Examples
    --------
    >>> from favorsharp.datasets import fetch_cmc
    >>> fetch_cmc()  # doctest: +SKIP
    Dataset('cmc', n=1473, d=9, classes=3)
    """
    return _fetch("cmc", data_home)


def fetch_nursery(*, data_home: str | Path | None = None) -> Dataset:
    """Nursery: 5 classes, one of which has only two points, nominal columns; n = 12960, d = 27.

    Parameters
    ----------
    data_home : str or Path, optional
        As in `fetch_abalone`, which raises the same errors.

    Returns
    -------
    Dataset

    Examples
    --------
    >>> from favorsharp.datasets import fetch_nursery
    >>> fetch_nursery()  # doctest: +SKIP
    Dataset('nursery', n=12960, d=27, classes=5)
    """
    return _fetch("nursery", data_home)


def fetch_wifi(*, data_home: str | Path | None = None) -> Dataset:
    """Wireless indoor localization: 4 rooms from the strengths of seven signals; n = 2000, d = 7.

    Rows are in the order of the rooms.

    Parameters
    ----------
    data_home : str or Path, optional
        As in `fetch_abalone`, which raises the same errors.

    Returns
    -------
    Dataset

    Examples
    --------
    >>> from favorsharp.datasets import fetch_wifi
    >>> fetch_wifi()  # doctest: +SKIP
    Dataset('wifi', n=2000, d=7, classes=4)
    """
    return _fetch("wifi", data_home)


def fetch_chess(*, data_home: str | Path | None = None) -> Dataset:
    """King and rook against king: depth of win in 18 classes, nominal columns; n = 28056, d = 40.

    In `data_home`, the file is called `krkopt.csv`.

    Parameters
    ----------
    data_home : str or Path, optional
        As in `fetch_abalone`, which raises the same errors.

    Returns
    -------
    Dataset

    Examples
    --------
    >>> from favorsharp.datasets import fetch_chess
    >>> fetch_chess()  # doctest: +SKIP
    Dataset('chess', n=28056, d=40, classes=18)
    """
    return _fetch("chess", data_home)


def _fetch(name: str, data_home: str | Path | None) -> Dataset:
    table = TABLES[name]
    named = data_home if data_home is not None else os.environ.get("FAVORSHARP_DATA")
    folder = Path(named) if named else Path(_pooch(name, "the cache folder").os_cache("favorsharp"))
    for file in (f"{table.file}.csv.gz", f"{table.file}.csv", table.member):
        if (folder / file).exists():
            text = _decoded(folder / file)
            rows = _rows(table, text)
            _check(table, rows, f"{folder / file}")
            return _dataset(name, rows)
    rows = _downloaded(name, table, folder)
    _keep(folder / f"{table.file}.csv.gz", _canonical(table, rows))
    return _dataset(name, rows)


def _pooch(name: str, what: str) -> Any:
    try:
        import pooch
    except ImportError:
        raise ImportError(
            f"{what} of fetch_{name} needs pooch: pip install 'favorsharp[datasets]'; or name a folder with a copy "
            "of the file by data_home or FAVORSHARP_DATA"
        ) from None
    return pooch


def _downloaded(name: str, table: _Table, folder: Path) -> list[list[str]]:
    import tempfile

    address = f"{ARCHIVE}/{table.address}"
    download = _pooch(name, f"{folder} has no {table.file}.csv.gz, and a download").HTTPDownloader(timeout=60)
    with tempfile.TemporaryDirectory() as held:
        path = Path(held) / "archive.zip"
        try:
            download(address, str(path), None)
        except OSError as error:  # the exceptions of requests are of this type
            raise OSError(
                f"{address} could not be downloaded: {error}. Put {table.member} or {table.file}.csv.gz into "
                f"{folder}, or name the folder of a copy by data_home or FAVORSHARP_DATA"
            ) from None
        try:
            with zipfile.ZipFile(path) as archive:
                content = archive.read(table.member)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ValueError(f"{address}: not an archive that holds {table.member}: {error}") from None
    rows = _rows(table, content.decode("utf-8", errors="replace"))
    _check(table, rows, address)
    return rows


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a gzip file, or a damaged one: {error}") from None
    return content.decode("utf-8", errors="replace")


def _rows(table: _Table, text: str) -> list[list[str]]:
    """The fields of each row, from the source's own file (commas, tabs or blanks; some name the rows) or a CSV."""
    lines = [re.split(r"[,\s]+", line.strip()) for line in text.splitlines() if line.strip()]
    if lines and tuple(lines[0]) == table.columns:
        return lines[1:]
    return [line[table.skipped :] if len(line) > len(table.columns) else line for line in lines]


def _canonical(table: _Table, rows: Sequence[Sequence[str]]) -> bytes:
    """The CSV whose digest is compared: a line of column names, then the rows, with commas and newlines."""
    return "".join(",".join(row) + "\n" for row in (table.columns, *rows)).encode()


def _check(table: _Table, rows: Sequence[Sequence[str]], where: str) -> None:
    found = hashlib.sha256(_canonical(table, rows)).hexdigest()
    if found != table.sha256:
        raise ValueError(
            f"{where}: {len(rows)} rows with SHA-256 {found}; accepted: the table {','.join(table.columns)} with "
            f"{table.sha256}. Remove the file to have it downloaded again"
        )


def _keep(path: Path, content: bytes) -> None:
    """Write a file atomically, so that it never exists in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(gzip.compress(content, mtime=0))
    partial.replace(path)


def _dataset(name: str, rows: Sequence[Sequence[str]]) -> Dataset:
    table = TABLES[name]
    columns = dict(zip(table.columns, np.array(rows).T, strict=True))
    target = columns.pop(table.columns[-1])
    if all(re.fullmatch(r"-?\d+", value) for value in np.unique(target)):
        target = target.astype(np.int64)
    blocks, names = [], []
    for column, values in columns.items():
        if column in table.nominal:
            found = np.unique(values)
            blocks.append((values[:, None] == found).astype(np.float64))
            names += [f"{column}={value}" for value in found]
        else:
            blocks.append(values.astype(np.float64)[:, None])
            names.append(column)
    classes = tuple(np.unique(target).tolist())
    return Dataset(name, np.concatenate(blocks, axis=1), target, tuple(names), classes, table.source)
