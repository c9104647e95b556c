"""MIMIC-CXR-JPG 2.0.0 and 2.1.0: metadata, CheXpert labels and split into the `cxr` table.

Image paths are built from ids, for the published folders (files/p10/p10000032/s50414267/ID.jpg) or
for a flat folder of resized copies (ID.jpg). Which of the two lies there is decided by looking for
the images of the first metadata rows; the folder is never walked.
"""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import polars as pl

from data.errors import InputError
from data.flow import Quarantined
from data.sources.canonical import TABLES
from data.sources.marker import named
from data.tasks import CHEXPERT_LABELS

if TYPE_CHECKING:
    from pathlib import Path

KINDS = ("metadata", "chexpert", "split")
COLUMNS = {
    "metadata": (
        "dicom_id",
        "subject_id",
        "study_id",
        "viewposition",
        "studydate",
        "studytime",
    ),
    "chexpert": ("study_id", *(label.lower() for label in CHEXPERT_LABELS)),
    "split": ("dicom_id", "split"),
}
_FILE_NAME = re.compile(
    r"mimic-cxr-(?P<release>\d+\.\d+\.\d+)-(?P<kind>[a-z-]+)\.(?P<format>parquet|csv|csv\.gz)",
    re.IGNORECASE,
)
_FORMATS = ("parquet", "csv", "csv.gz")
_LAYOUTS = {
    "folders": "files/p{group}/p{subject}/s{study}/{dicom}.jpg",
    "folders without files/": "p{group}/p{subject}/s{study}/{dicom}.jpg",
    "flat": "{dicom}.jpg",
    "flat in files/": "files/{dicom}.jpg",
}
_PROBED_ROWS = 100
_LABEL_VALUES = (-1.0, 0.0, 1.0)


@dataclass(frozen=True)
class CxrSource:
    """What a MIMIC-CXR-JPG folder holds.

    Attributes:
        table: The canonical `cxr` table, one row an image, sorted by (subject_id, dicom_id).
        release: E.g. mimic-cxr-jpg-2.0.0; it ends in `-synthetic` where no patient is real.
        layout: Where images lie; a key of the layouts above, or `none` if none was looked for.
        quarantine: Images set aside because their study has no date or time.
    """

    table: pl.DataFrame
    release: str
    layout: str
    quarantine: list[Quarantined] = field(default_factory=list)


def find_tables(folder: Path) -> tuple[str, dict[str, Path]]:
    """The release and the file of each of the three tables.

    2.1.0 kept the 2.0.0 in the names of these tables and added files of its own: the highest
    version among the names is the release.

    Raises:
        InputError: The folder or one of the tables is missing.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of MIMIC-CXR-JPG's tables")
    found: dict[str, list[tuple[tuple[int, ...], int, Path]]] = {}
    versions = []
    for path in sorted(folder.iterdir()):
        match = _FILE_NAME.fullmatch(path.name)
        if match is None:
            continue
        version = tuple(int(part) for part in match["release"].split("."))
        versions.append(version)
        preference = -_FORMATS.index(match["format"].lower())
        found.setdefault(match["kind"].lower(), []).append((version, preference, path))
    release = f"mimic-cxr-jpg-{'.'.join(map(str, max(versions)))}" if versions else "MIMIC-CXR-JPG"
    for kind in KINDS:
        if kind not in found:
            names = sorted(path.name for paths in found.values() for *_, path in paths)
            raise InputError(
                f"{folder}: {release}: no table mimic-cxr-2.0.0-{kind}.csv[.gz] or .parquet "
                f"(found: {', '.join(names) or 'no table of MIMIC-CXR-JPG'}); put it there"
            )
    return named(release, folder), {kind: max(found[kind])[2] for kind in KINDS}


def read_mimic_cxr(folder: Path, *, images: bool = True) -> CxrSource:
    """Read the three tables of MIMIC-CXR-JPG.

    Args:
        folder: Holds the tables, and the images in one of the layouts.
        images: Find out where the images lie; without, the published layout is assumed.

    Raises:
        InputError: A table, a column or every probed image is missing; a file is not readable; an
            id, a time or a label is malformed; an image is listed twice. The message names
            release, file, column and row.
    """
    release, paths = find_tables(folder)
    metadata = _metadata(release, paths["metadata"])
    layout = _find_layout(folder, release, metadata) if images else "none"
    table = (
        metadata.join(_chexpert(release, paths["chexpert"]), on="study_id", how="left")
        .join(_split(release, paths["split"]), on="dicom_id", how="left")
        .with_columns(_path_expression("folders" if layout == "none" else layout))
        .select(pl.col(name).cast(kind) for name, kind in TABLES["cxr"].items())
        .sort("subject_id", "dicom_id")
    )
    untimed = table.filter(pl.col("studytime").is_null())
    quarantine = []
    if untimed.height:
        quarantine.append(
            Quarantined(
                place=paths["metadata"].name,
                reason="StudyDate or StudyTime is blank: the image cannot be placed in time",
                count=untimed.height,
                examples=tuple(untimed["dicom_id"].head(5)),
            )
        )
    timed = table.filter(pl.col("studytime").is_not_null())
    return CxrSource(timed, release, layout, quarantine)


def _metadata(release: str, path: Path) -> pl.DataFrame:
    found = _read(release, path, "metadata")
    _refuse_duplicates(release, path, found, "dicom_id")
    parsed = found.select(
        _blank_is_null("dicom_id"),
        _integer(release, path, found, "subject_id"),
        _integer(release, path, found, "study_id"),
        _blank_is_null("viewposition").alias("view"),
        _study_time(release, path, found),
    )
    for column in ("dicom_id", "subject_id", "study_id"):
        _refuse_rows(release, path, found, column, parsed[column].is_null(), "is blank")
    odd = ~parsed["dicom_id"].str.contains(r"^[\w-][\w.-]*$")
    _refuse_rows(release, path, found, "dicom_id", odd, "is no DICOM id")
    return parsed


def _chexpert(release: str, path: Path) -> pl.DataFrame:
    found = _read(release, path, "chexpert")
    _refuse_duplicates(release, path, found, "study_id")
    labels = []
    for name in COLUMNS["chexpert"][1:]:
        number = found[name].str.strip_chars().replace("", None).cast(pl.Float32, strict=False)
        blank = found[name].str.strip_chars().fill_null("") == ""
        wrong = ~blank & ~number.is_in(_LABEL_VALUES).fill_null(value=False)
        _refuse_rows(release, path, found, name, wrong, "is none of 1, 0, -1 and blank")
        labels.append(number.alias(name))
    return found.select(
        _integer(release, path, found, "study_id"),
        pl.concat_list(labels).alias("chexpert"),
    )


def _split(release: str, path: Path) -> pl.DataFrame:
    found = _read(release, path, "split")
    _refuse_duplicates(release, path, found, "dicom_id")
    return found.select(_blank_is_null("dicom_id"), _blank_is_null("split").alias("cxr_split"))


def _read(release: str, path: Path, kind: str) -> pl.DataFrame:
    """The needed columns of one table as text, with lower-case names."""
    place = f"{release}: {path}"
    try:
        if path.suffix == ".parquet":
            found = pl.read_parquet(path)
        else:
            raw = path.read_bytes()
            packed = path.suffix == ".gz"
            found = pl.read_csv(gzip.decompress(raw) if packed else raw, infer_schema=False)
    except (EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{place}: the gzip file is cut off ({error}); copy it again") from None
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"{place}: not readable ({first}); copy the released file again") from None
    found = found.rename({name: name.strip().lower() for name in found.columns})
    missing = [name for name in COLUMNS[kind] if name not in found.columns]
    if missing:
        hint = "is the delimiter a comma?" if found.width == 1 else "restore the released names"
        raise InputError(
            f"{place}: no column {', '.join(missing)} (found: {', '.join(found.columns)}); {hint}"
        )
    return found.select(pl.col(name).cast(pl.String) for name in COLUMNS[kind])


def _blank_is_null(column: str) -> pl.Expr:
    return pl.col(column).str.strip_chars().replace("", None)


def _integer(release: str, path: Path, found: pl.DataFrame, column: str) -> pl.Series:
    text = found[column].str.strip_chars()
    number = text.cast(pl.Int64, strict=False)
    wrong = number.is_null() & (text.fill_null("") != "")
    _refuse_rows(release, path, found, column, wrong, "is no integer")
    return number.alias(column)


def _study_time(release: str, path: Path, found: pl.DataFrame) -> pl.Series:
    """StudyDate YYYYMMDD and StudyTime HHMMSS[.ffffff], whose leading zeros are lost."""
    date = found["studydate"].str.strip_chars().str.strip_suffix(".0")
    clock = found["studytime"].str.strip_chars()
    blank = (date.fill_null("") == "") | (clock.fill_null("") == "")
    whole = clock.str.extract(r"^(\d{1,6})(?:\.\d*)?$").str.zfill(6)
    fraction = clock.str.extract(r"^\d{1,6}\.(\d+)$").fill_null("").str.slice(0, 6)
    day = date.str.to_date("%Y%m%d", strict=False)
    second = whole.str.to_time("%H%M%S", strict=False)
    _refuse_rows(release, path, found, "studydate", day.is_null() & ~blank, "is not YYYYMMDD")
    _refuse_rows(release, path, found, "studytime", second.is_null() & ~blank, "is not HHMMSS")
    text = date + whole + fraction.str.pad_end(6, "0")
    time = text.str.to_datetime("%Y%m%d%H%M%S%6f", time_unit="us", strict=False)
    return time.alias("studytime")


def _refuse_rows(
    release: str, path: Path, found: pl.DataFrame, column: str, wrong: pl.Series, why: str
) -> None:
    if wrong.any():
        row = wrong.arg_max() or 0
        raise InputError(
            f"{release}: {path}: row {row + 2}: {column} {found[column][row]!r} {why} "
            f"({wrong.sum()} such rows); correct or remove them"
        )


def _refuse_duplicates(release: str, path: Path, found: pl.DataFrame, key: str) -> None:
    _refuse_rows(release, path, found, key, ~found[key].is_first_distinct(), "appears twice")


def _find_layout(folder: Path, release: str, metadata: pl.DataFrame) -> str:
    """The layout in which an image of the first rows exists; single images may be missing."""
    for row in metadata.head(_PROBED_ROWS).iter_rows(named=True):
        for layout, pattern in _LAYOUTS.items():
            if (folder / _image_path(pattern, row)).is_file():
                return layout
    if metadata.is_empty():
        return "folders"
    first = metadata.row(0, named=True)
    tried = ", ".join(_image_path(pattern, first) for pattern in _LAYOUTS.values())
    raise InputError(
        f"{folder}: {release}: none of the first {min(_PROBED_ROWS, metadata.height)} images of "
        f"the metadata is there (tried for the first: {tried}); put the JPEG files into files/ as "
        "released, or flat beside the tables"
    )


def _image_path(pattern: str, row: dict[str, object]) -> str:
    subject = str(row["subject_id"])
    return pattern.format(
        group=subject[:2], subject=subject, study=row["study_id"], dicom=row["dicom_id"]
    )


def _path_expression(layout: str) -> pl.Expr:
    subject = pl.col("subject_id").cast(pl.String)
    parts = {
        "group": subject.str.slice(0, 2),
        "subject": subject,
        "study": pl.col("study_id").cast(pl.String),
        "dicom": pl.col("dicom_id"),
    }
    pattern = _LAYOUTS[layout]
    names = re.findall(r"{(\w+)}", pattern)
    return pl.format(re.sub(r"{\w+}", "{}", pattern), *(parts[name] for name in names)).alias(
        "path"
    )
