"""What lies in a MIMIC folder: which release it is, and where its tables are."""

from __future__ import annotations

import csv
import difflib
import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

from data.errors import InputError
from data.files import sha256_json
from data.sources import mimic3, mimic4
from data.sources.blocks import read_header
from data.sources.marker import named

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from data.sources.layout import TableSpec

_SUFFIXES: Final = (".parquet", ".csv", ".csv.gz")
_TAIL_BYTES: Final = 4096
_TEXTS: Final = ("changelog", "readme", "license", "sha256sums")
_NAMED_VERSION: Final = {
    "mimic-iv": re.compile(r"mimic-?iv[^\n]{0,60}?\bv?(?:ersion )?([123]\.\d)\b", re.IGNORECASE),
    "mimic-iii": re.compile(r"mimic-?iii[^\n]{0,60}?\bv?(?:ersion )?(1\.\d)\b", re.IGNORECASE),
}
_FOLDER_VERSION: Final = re.compile(r"([123]\.\d)")
_YEARS_OF_3: Final = "2020 - 2022"


@dataclass(frozen=True)
class TableFile:
    """One table's file.

    Attributes:
        name: The table, lower case.
        path: Where it lies.
        columns: Column as written, in the order of the file.
    """

    name: str
    path: Path
    columns: tuple[str, ...]

    @property
    def is_parquet(self) -> bool:
        """Whether it is Parquet and no CSV."""
        return self.path.suffix.lower() == ".parquet"

    def written(self, names: tuple[str, ...]) -> str | None:
        """The column as written that has one of these lower-case names, the first preferred."""
        lower = {column.strip().lower(): column for column in self.columns}
        return next((lower[name] for name in names if name in lower), None)

    def fingerprint(self) -> str:
        """A hash of columns, size and last bytes: a gzip ends in its checksum."""
        with self.path.open("rb") as handle:
            size = handle.seek(0, 2)
            handle.seek(max(0, size - _TAIL_BYTES))
            tail = hashlib.sha256(handle.read()).hexdigest()
        return sha256_json([self.name, self.columns, size, tail])


@dataclass(frozen=True)
class Release:
    """A MIMIC folder with raw tables.

    Attributes:
        name: E.g. mimic-iv-2.2; mimic-iv-3.x where only the tables tell the version; it ends in
            `-synthetic` where no patient is real.
        folder: The folder that was opened.
        tables: The files of its tables by lower-case name, also those that nothing reads.
    """

    name: str
    folder: Path
    tables: dict[str, TableFile]

    @property
    def specs(self) -> tuple[TableSpec, ...]:
        """The tables that are read, each with its columns."""
        return mimic3.TABLES if self.name.startswith("mimic-iii") else mimic4.TABLES

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the tables that are read: names, columns, sizes, last bytes; no paths."""
        return sha256_json([self.tables[spec.table].fingerprint() for spec in self.specs])


def open_release(folder: Path) -> Release:
    """Find the tables of a MIMIC folder and tell its release.

    Files may be .csv, .csv.gz or .parquet; names of files and columns may be in either case.

    Raises:
        InputError: The folder, a table or a column is missing; the message names the release, the
            file, the column and what was found instead.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder that holds MIMIC's tables")
    paths = _index(folder)
    family = _family(folder, paths)
    specs = mimic3.TABLES if family == "mimic-iii" else mimic4.TABLES
    wanted = {spec.table for spec in specs}
    missing = sorted(wanted - paths.keys())
    if missing:
        raise InputError(_missing_table(folder, family, missing, sorted(paths)))
    tables = {name: open_table(name, paths[name]) for name in sorted(wanted)}
    name = named(f"{family}-{_version(folder, family, tables)}", folder)
    for spec in specs:
        require_columns(name, tables[spec.table], spec)
    return Release(name, folder, tables)


def _index(folder: Path) -> dict[str, Path]:
    """Lower-case table name -> its file, Parquet before CSV before gzip."""
    found: dict[str, tuple[int, Path]] = {}
    for place in [folder, *_subfolders(folder)]:
        for path in sorted(place.iterdir()):
            lower = path.name.lower()
            for rank, suffix in enumerate(_SUFFIXES):
                if path.is_file() and lower.endswith(suffix):
                    name = lower.removesuffix(suffix)
                    if name not in found or rank < found[name][0]:
                        found[name] = (rank, path)
    return {name: path for name, (_, path) in found.items()}


def _subfolders(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name.lower() in mimic4.FOLDERS:
            yield path


def _family(folder: Path, paths: dict[str, Path]) -> str:
    if "icustays" not in paths:
        raise InputError(_missing_table(folder, "MIMIC", ["icustays"], sorted(paths)))
    stays = open_table("icustays", paths["icustays"])
    if stays.written(("stay_id",)):
        return "mimic-iv"
    if stays.written(("icustay_id",)):
        return "mimic-iii"
    raise InputError(
        f"{stays.path}: neither stay_id (MIMIC-IV) nor icustay_id (MIMIC-III) among its columns "
        f"{', '.join(stays.columns)}; restore the name of that column"
    )


def find_table(folder: Path, name: str) -> TableFile:
    """A table of a MIMIC folder by its lower-case name.

    Raises:
        InputError: It is missing.
    """
    paths = _index(folder)
    if name not in paths:
        raise InputError(_missing_table(folder, "MIMIC", [name], sorted(paths)))
    return open_table(name, paths[name])


def open_table(name: str, path: Path) -> TableFile:
    """The columns of one table's file.

    Raises:
        InputError: It is empty, not readable, not comma separated, or repeats a column.
    """
    if path.suffix.lower() == ".parquet":
        return TableFile(name, path, _parquet_columns(path))
    header = read_header(path)
    columns = tuple(next(csv.reader([header])))
    others = [mark for mark in (";", "\t", "|") if len(columns) == 1 and mark in header]
    if others:
        raise InputError(
            f"{path}: columns are separated by {others[0]!r} in its header; "
            "convert it to a comma separated file"
        )
    lower = [column.strip().lower() for column in columns]
    twice = sorted({column for column in lower if lower.count(column) > 1})
    if twice:
        raise InputError(f"{path}: column {twice[0]} appears twice; remove one of them")
    return TableFile(name, path, columns)


def _parquet_columns(path: Path) -> tuple[str, ...]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return tuple(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not readable as Parquet ({error}); write it again") from None


def _missing_table(folder: Path, release: str, missing: list[str], found: list[str]) -> str:
    close = difflib.get_close_matches(missing[0], found, n=2)
    instead = ", ".join(close or found[:12]) or "no .csv, .csv.gz or .parquet file"
    places = "" if release == "mimic-iii" else " or in its core, hosp and icu folders"
    return (
        f"{folder}: {release} table {missing[0]} is missing in it{places} "
        f"(found: {instead}); put {missing[0]}.csv.gz there"
        + (f", and {', '.join(missing[1:])}" if missing[1:] else "")
    )


def require_columns(release: str, file: TableFile, spec: TableSpec) -> None:
    """Refuse a table without a column that its spec names.

    Raises:
        InputError: Naming the file, the column and what was found.
    """
    for names in spec.columns.values():
        if file.written(names) is None:
            lower = [column.strip().lower() for column in file.columns]
            close = difflib.get_close_matches(names[0], lower, n=2, cutoff=0.5)
            hint = f" (close: {', '.join(close)})" if close else ""
            raise InputError(
                f"{file.path}: {release}: column {' or '.join(names)} is missing; found "
                f"{', '.join(file.columns)}{hint}; restore its name or download the file again"
            )


def _version(folder: Path, family: str, tables: dict[str, TableFile]) -> str:
    """From what the folder says of itself, else its own or its parent's name, else its tables."""
    for text in sorted(folder.iterdir()):
        if text.is_file() and text.name.lower().startswith(_TEXTS):
            start = text.read_bytes()[:65536].decode("utf-8", errors="replace")
            if found := _NAMED_VERSION[family].search(start):
                return found[1]
    resolved = folder.resolve()
    if found := _NAMED_VERSION[family].search(resolved.name):
        return found[1]
    if _FOLDER_VERSION.fullmatch(resolved.name) and "mimic" in resolved.parent.name.lower():
        return resolved.name
    if family == "mimic-iii":
        return "1.4"
    if tables["patients"].path.parent.name.lower() == "core":
        return "1.0"
    return _version_of_tables(tables)


def _version_of_tables(tables: dict[str, TableFile]) -> str:
    """1.0 still says ethnicity; 3.0 added the patients of 2020 to 2022."""
    if tables["admissions"].written(("race",)) is None:
        return "1.0"
    patients = tables["patients"]
    group = patients.written(("anchor_year_group",))
    if group is None:
        return "2.x"
    from data.sources.tables import column_values

    return "3.x" if _YEARS_OF_3 in column_values(patients, group) else "2.x"
