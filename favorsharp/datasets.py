"""The eight UCI data sets that the papers classify, as NumPy arrays.

Tables are read from the folder that the environment variable FAVORSHARP_DATA names, or from a cache folder. A table
that is not there is downloaded from the UCI Machine Learning Repository and kept. Wherever a table comes from, its
values are compared with a SHA-256 digest before it is used. The data are under CC BY 4.0: cite the `source` of each set
that you use. The experiments in `benchmarks/paper` call these functions.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from favorsharp._tables import TABLES, rows_of

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
    return _dataset("abalone", rows_of("abalone", data_home))


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
    return _dataset("banknote", rows_of("banknote", data_home))


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
    return _dataset("car", rows_of("car", data_home))


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
    return _dataset("yeast", rows_of("yeast", data_home))


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
    return _dataset("cmc", rows_of("cmc", data_home))


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
    return _dataset("nursery", rows_of("nursery", data_home))


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
    return _dataset("wifi", rows_of("wifi", data_home))


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
    return _dataset("chess", rows_of("chess", data_home))


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
