"""Reads the tables of `favorsharp.datasets` from a folder, or downloads them; each is compared with its digest."""

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

ARCHIVE = "https://archive.ics.uci.edu/static/public"
"""The common beginning of the addresses of the data sets."""


@dataclass(frozen=True)
class Table:
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
    "abalone": Table(
        "abalone",
        "1/abalone.zip",
        "abalone.data",
        ("sex", "length", "diameter", "height", "whole_weight", "shucked_weight", "viscera_weight", "shell_weight",
         "rings"),
        "b36baf97dbcb1ae8d70ae95dd06794ce7878aef96cefc29cd0c8ca0fd9f8aee1",
        "Nash, Sellers, Talbot, Cawthorn, Ford (1994), https://doi.org/10.24432/C55C7W",
        nominal=("sex",),
    ),
    "banknote": Table(
        "banknote",
        "267/banknote+authentication.zip",
        "data_banknote_authentication.txt",
        ("variance", "skewness", "curtosis", "entropy", "class"),
        "a4e6eb57f00dc0c5696badf6553001e8871644b5b98ab1b2869054af1d255125",
        "Lohweg (2012), https://doi.org/10.24432/C55P57",
    ),
    "car": Table(
        "car",
        "19/car+evaluation.zip",
        "car.data",
        ("buying", "maint", "doors", "persons", "lug_boot", "safety", "class"),
        "0023b86e0dd3502aaa0e4a610ef4d8aebbba7ff40f53fa7c2f0543c68bee5114",
        "Bohanec (1988), https://doi.org/10.24432/C5JP48",
        nominal=("buying", "maint", "doors", "persons", "lug_boot", "safety"),
    ),
    "yeast": Table(
        "yeast",
        "110/yeast.zip",
        "yeast.data",
        ("mcg", "gvh", "alm", "mit", "erl", "pox", "vac", "nuc", "class"),
        "39592b7a2c693d358df6f02073ec7d28894c22e4e3586e3a23bc306b9a4b72e5",
        "Nakai (1991), https://doi.org/10.24432/C5KG68",
        skipped=1,
    ),
    "cmc": Table(
        "cmc",
        "30/contraceptive+method+choice.zip",
        "cmc.data",
        ("wife_age", "wife_education", "husband_education", "children", "wife_religion", "wife_working",
         "husband_occupation", "living_index", "media_exposure", "method"),
        "bc56f10bc5d1de7f714b94cecf5c4d8eef9645d2e4c42f2acbdcad5b7c5eb231",
        "Lim (1997), https://doi.org/10.24432/C59W2D",
    ),
    "nursery": Table(
        "nursery",
        "76/nursery.zip",
        "nursery.data",
        ("parents", "has_nurs", "form", "children", "housing", "finance", "social", "health", "class"),
        "cfd50f92b8b65b8d398670ce13f1e78fbc0d452ff26906de8b4497f909716951",
        "Rajkovic (1989), https://doi.org/10.24432/C5P88W",
        nominal=("parents", "has_nurs", "form", "children", "housing", "finance", "social", "health"),
    ),
    "wifi": Table(
        "wifi",
        "422/wireless+indoor+localization.zip",
        "wifi_localization.txt",
        ("wifi1", "wifi2", "wifi3", "wifi4", "wifi5", "wifi6", "wifi7", "room"),
        "da63f3482844cff62859e8ad26f1d56bbc81275c7e9a2998fe0f515f497c1639",
        "Bhatt (2017), https://doi.org/10.24432/C51880",
    ),
    "chess": Table(
        "krkopt",
        "23/chess+king+rook+vs+king.zip",
        "krkopt.data",
        ("wk_file", "wk_rank", "wr_file", "wr_rank", "bk_file", "bk_rank", "depth"),
        "4c2572370c3b29dc0f6264983beaed0b4f380ade2901705b00b17ae56785b148",
        "Bain, van Hoff (1994), https://doi.org/10.24432/C57W2S",
        nominal=("wk_file", "wk_rank", "wr_file", "wr_rank", "bk_file", "bk_rank"),
    ),
}  # fmt: skip


def rows_of(name: str, data_home: str | Path | None) -> list[list[str]]:
    """The rows of a table, from the folder or from the archive, of which the folder then keeps a copy."""
    table = TABLES[name]
    named = data_home if data_home is not None else os.environ.get("FAVORSHARP_DATA")
    folder = Path(named) if named else Path(_pooch(name, "the cache folder").os_cache("favorsharp"))
    for file in (f"{table.file}.csv.gz", f"{table.file}.csv", table.member):
        if (folder / file).exists():
            rows = parsed(table, _decoded(folder / file))
            _check(table, rows, f"{folder / file}")
            return rows
    rows = _downloaded(name, table, folder)
    _keep(folder / f"{table.file}.csv.gz", _canonical(table, rows))
    return rows


def _pooch(name: str, what: str) -> Any:
    try:
        import pooch
    except ImportError:
        raise ImportError(
            f"{what} of fetch_{name} needs pooch: pip install 'favorsharp[datasets]'; or name a folder with a copy "
            "of the file by data_home or FAVORSHARP_DATA"
        ) from None
    return pooch


def _downloaded(name: str, table: Table, folder: Path) -> list[list[str]]:
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
    rows = parsed(table, content.decode("utf-8", errors="replace"))
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


def parsed(table: Table, text: str) -> list[list[str]]:
    """The fields of each row, from the source's own file (commas, tabs or blanks; some name the rows) or a CSV."""
    lines = [re.split(r"[,\s]+", line.strip()) for line in text.splitlines() if line.strip()]
    if lines and tuple(lines[0]) == table.columns:
        return lines[1:]
    return [line[table.skipped :] if len(line) > len(table.columns) else line for line in lines]


def _canonical(table: Table, rows: Sequence[Sequence[str]]) -> bytes:
    """The CSV whose digest is compared: a line of column names, then the rows, with commas and newlines."""
    return "".join(",".join(row) + "\n" for row in (table.columns, *rows)).encode()


def _check(table: Table, rows: Sequence[Sequence[str]], where: str) -> None:
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
