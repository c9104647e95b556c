"""Clinical notes of MIMIC-III (NOTEEVENTS) and MIMIC-IV-Note (discharge, radiology) as one table.

Notes are the most identifying data there is. No text of theirs ever enters a message: errors name
file, line and column only.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, cast

import polars as pl

from data.errors import InputError
from data.sources.canonical import TABLES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NOTE_SCHEMA = TABLES["notes"]
DISCHARGE, RADIOLOGY = "Discharge summary", "Radiology"
_NEEDED = {
    "noteevents": (
        "subject_id",
        "hadm_id",
        "chartdate",
        "charttime",
        "storetime",
        "category",
        "description",
        "iserror",
        "text",
    ),
    "discharge": ("subject_id", "hadm_id", "note_type", "charttime", "storetime", "text"),
    "radiology": ("subject_id", "hadm_id", "note_type", "charttime", "storetime", "text"),
}
_CATEGORIES = {"discharge": DISCHARGE, "radiology": RADIOLOGY}
_SUFFIXES = (".csv", ".csv.gz", ".parquet")
_FOLDERS = ("", "note", "notes")
_LARGEST_FIELD = 1 << 27
_TIME_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d")
_END_OF_DAY = pl.duration(days=1) - pl.duration(seconds=1)


@dataclass(frozen=True)
class NoteFile:
    """One table of notes: `noteevents`, `discharge` or `radiology`, and where it lies."""

    table: str
    path: Path

    @property
    def release(self) -> str:
        """The database that the table belongs to."""
        return "mimic-iii" if self.table == "noteevents" else "mimic-iv-note"


def find_notes(folder: Path) -> list[NoteFile]:
    """The tables of notes in a folder (or its `note` folder), whatever case their names have.

    Raises:
        InputError: There is none.
    """
    found: dict[str, Path] = {}
    for place in (folder / name for name in _FOLDERS):
        if not place.is_dir():
            continue
        for path in sorted(place.iterdir()):
            table, _, suffix = path.name.lower().partition(".")
            if table in _NEEDED and f".{suffix}" in _SUFFIXES:
                found.setdefault(table, path)
    if not found:
        raise InputError(
            f"{folder}: no table of notes (NOTEEVENTS of MIMIC-III, discharge or radiology of "
            "MIMIC-IV-Note, as .csv, .csv.gz or .parquet); give the folder that holds one"
        )
    return [NoteFile(table, path) for table, path in sorted(found.items())]


def read_notes(
    file: NoteFile, subjects: pl.Series | None = None, *, batch_rows: int = 20_000
) -> Iterator[pl.DataFrame]:
    """Stream one table of notes; memory is bounded by `batch_rows`.

    MIMIC-III knows only the day of some notes (all discharge summaries): their charttime is the
    last second of that day, so that no note seems known before it was written. Notes that
    MIMIC-III marks as errors are left out.

    Args:
        file: From `find_notes`.
        subjects: Keep only these subjects' notes; None keeps all.
        batch_rows: Rows read at a time.

    Yields:
        Frames of NOTE_SCHEMA in file order; some may be empty.

    Raises:
        InputError: A column is missing; an id or a time is malformed; the file is torn or not
            UTF-8. The message names file, line and column, never text.
    """
    batches = (
        _parquet(file, batch_rows) if file.path.suffix == ".parquet" else _csv(file, batch_rows)
    )
    before = 1
    for raw in batches:
        yield _typed(file, raw, before, subjects)
        before += raw.height


def _typed(
    file: NoteFile, raw: pl.DataFrame, rows_before: int, subjects: pl.Series | None
) -> pl.DataFrame:
    if "iserror" in raw.columns:
        kept = raw["iserror"].fill_null("").str.strip_chars().is_in(["", "0"])
    else:
        kept = pl.repeat(value=True, n=raw.height, eager=True)
    charttime = _time(file, raw, "charttime", rows_before)
    if "chartdate" in raw.columns:
        day = _time(file, raw, "chartdate", rows_before)
        last_second = pl.select(day.dt.truncate("1d") + _END_OF_DAY).to_series()
        charttime = charttime.fill_null(last_second)
    category = (
        pl.col("category").str.strip_chars()
        if file.table == "noteevents"
        else pl.lit(_CATEGORIES[file.table])
    )
    table = raw.select(
        _integer(file, raw, "subject_id", rows_before, required=True),
        _integer(file, raw, "hadm_id", rows_before, required=False),
        charttime.alias("charttime"),
        _time(file, raw, "storetime", rows_before),
        category.alias("category"),
        _addendum(file).alias("addendum"),
        "text",
    ).filter(kept)
    if subjects is not None:
        table = table.filter(pl.col("subject_id").is_in(subjects.implode()))
    return table.select(pl.col(name).cast(kind) for name, kind in NOTE_SCHEMA.items())


def _addendum(file: NoteFile) -> pl.Expr:
    """Whether a note adds to an earlier one: `Addendum` in MIMIC-III, AD or AR in MIMIC-IV."""
    if file.table == "noteevents":
        return pl.col("description").str.strip_chars().str.to_lowercase() == "addendum"
    return pl.col("note_type").str.strip_chars().is_in(["AD", "AR"])


def _integer(
    file: NoteFile, raw: pl.DataFrame, column: str, rows_before: int, *, required: bool
) -> pl.Series:
    text = raw[column].str.strip_chars().str.strip_suffix(".0")
    number = text.cast(pl.Int64, strict=False)
    blank = text.fill_null("") == ""
    wrong = number.is_null() if required else number.is_null() & ~blank
    _refuse(file, wrong, column, rows_before, "is no integer")
    return number.alias(column)


def _time(file: NoteFile, raw: pl.DataFrame, column: str, rows_before: int) -> pl.Series:
    text = raw[column].str.strip_chars()
    candidates = [
        text.str.to_datetime(layout, time_unit="us", strict=False) for layout in _TIME_FORMATS
    ]
    time = candidates[0].fill_null(candidates[1])
    blank = text.fill_null("") == ""
    _refuse(file, time.is_null() & ~blank, column, rows_before, "is no time YYYY-MM-DD HH:MM:SS")
    return time.alias(column)


def _refuse(file: NoteFile, wrong: pl.Series, column: str, rows_before: int, why: str) -> None:
    if wrong.any():
        row = (wrong.arg_max() or 0) + rows_before
        raise InputError(
            f"{file.release}: {file.path}: note {row}: {column} {why}; correct that row"
        )


def _require(file: NoteFile, columns: list[str]) -> None:
    missing = [name for name in _NEEDED[file.table] if name not in columns]
    if missing:
        shown = ", ".join(name[:40] for name in columns[:20])
        raise InputError(
            f"{file.release}: {file.path}: no column {', '.join(missing)} (found: {shown}); "
            "restore the released column names and the comma as delimiter"
        )


def _parquet(file: NoteFile, batch_rows: int) -> Iterator[pl.DataFrame]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as source:
            written = {name.lower(): name for name in source.schema_arrow.names}
            _require(file, list(written))
            columns = [written[name] for name in _NEEDED[file.table]]
            for batch in source.iter_batches(batch_size=batch_rows, columns=columns):
                frame = pl.DataFrame(pa.Table.from_batches([batch]))
                yield frame.rename(str.lower).with_columns(pl.all().cast(pl.String))
    except (pa.ArrowInvalid, OSError):
        raise InputError(
            f"{file.release}: {file.path}: not a readable Parquet file; copy it again"
        ) from None


def _csv(file: NoteFile, batch_rows: int) -> Iterator[pl.DataFrame]:
    csv.field_size_limit(_LARGEST_FIELD)
    needed = _NEEDED[file.table]
    row = 0
    try:
        with _open_bytes(file.path) as handle:
            lines = csv.reader(
                io.TextIOWrapper(handle, encoding="utf-8-sig", newline=""), strict=True
            )
            header = [name.strip().lower() for name in next(lines, [])]
            _require(file, header)
            chosen = [header.index(name) for name in needed]
            batch: list[list[str | None]] = []
            for row, line in enumerate(lines, start=1):  # noqa: B007
                if len(line) != len(header):
                    raise csv.Error
                batch.append([line[index] or None for index in chosen])
                if len(batch) == batch_rows:
                    yield _frame(batch, needed)
                    batch = []
            yield _frame(batch, needed)
    except UnicodeDecodeError:
        raise InputError(
            f"{file.release}: {file.path}: after note {row}: bytes that are not UTF-8; copy the "
            "released file again"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise InputError(
            f"{file.release}: {file.path}: the gzip file is cut off or damaged after note {row}; "
            "copy it again"
        ) from None
    except csv.Error:
        raise InputError(
            f"{file.release}: {file.path}: after note {row}: a row with other fields than the "
            "header or an open quote; copy the released file again"
        ) from None


def _open_bytes(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast("BinaryIO", gzip.open(path, "rb"))
    return path.open("rb")


def _frame(rows: list[list[str | None]], columns: tuple[str, ...]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row")
