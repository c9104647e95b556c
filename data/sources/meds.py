"""A MEDS dataset (Parquet of subject_id, time, code, numeric_value, text_value) of any hospital.

Its rows are brought to the canonical tables that MIMIC's are brought to, so that one set of rules
and one schema serve every source. Nothing of a text_value ever enters a message.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from data.errors import InputError
from data.files import sha256_file, sha256_json
from data.sources.canonical import TABLES
from data.sources.marker import named
from data.sources.notes import DISCHARGE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from data.switches import MedsCodes

_NEEDED: Final = ("subject_id", "time", "code", "numeric_value")
_SPLITS: Final = {"train": "train", "tuning": "val", "held_out": "test"}
_BATCH_ROWS: Final = 1 << 18
_TEXTS: Final = (pl.String, pl.Categorical, pl.Enum)
_KINDS: Final = {
    "subject_id": "an integer",
    "time": "a timestamp",
    "code": "a text",
    "numeric_value": "a number",
    "text_value": "a text",
    "hadm_id": "a number",
}


@dataclass(frozen=True)
class Meds:
    """A MEDS folder.

    Attributes:
        name: meds, with the name that metadata/dataset.json gives.
        folder: The folder that was opened.
        files: Its event files, sorted.
    """

    name: str
    folder: Path
    files: tuple[Path, ...]

    def fingerprint(self) -> str:
        """A hash of the events' and the metadata's contents; no paths."""
        extra = sorted((self.folder / "metadata").glob("*.parquet"))
        return sha256_json([sha256_file(path) for path in (*self.files, *extra)])


def open_meds(folder: Path) -> Meds:
    """Find the event files of a MEDS folder: data/**/*.parquet.

    Raises:
        InputError: There is none, or a file lacks a column or has one of another type.
    """
    files = tuple(sorted((folder / "data").rglob("*.parquet")))
    if not files:
        raise InputError(
            f"{folder}: no data/*.parquet, so no MEDS dataset; give the folder that holds data/ "
            "and metadata/"
        )
    for path in files:
        _columns(path)
    about = folder / "metadata" / "dataset.json"
    name = ""
    if about.is_file():
        try:
            name = str(json.loads(about.read_text(encoding="utf-8")).get("dataset_name", ""))
        except (ValueError, AttributeError):
            raise InputError(f"{about}: not a JSON object; restore or remove it") from None
    plain = "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
    return Meds(named(f"meds-{plain}" if plain else "meds", folder), folder, files)


def _columns(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError):
        raise InputError(f"{path}: not a readable Parquet file; copy it again") from None
    missing = [name for name in _NEEDED if name not in schema.names]
    if missing:
        raise InputError(
            f"{path}: no column {', '.join(missing)} (found: {', '.join(schema.names[:12])}); "
            "restore the names of the MEDS schema"
        )
    found = [name for name in (*_NEEDED, "text_value", "hadm_id") if name in schema.names]
    for name in found:
        kind = schema.field(name).type
        what = _KINDS[name]
        if not _is(kind, what):
            raise InputError(f"{path}: column {name} is {kind}, not {what}; write it so")
    return found


def _is(kind: Any, what: str) -> bool:
    """Whether an Arrow type is one that a column of MEDS may have; an empty one may be null."""
    from pyarrow import types

    if what == "a text":
        inner = kind.value_type if types.is_dictionary(kind) else kind
        view = types.is_string_view(inner)
        return types.is_null(kind) or types.is_string(inner) or types.is_large_string(inner) or view
    if what == "a number":
        number = types.is_floating(kind) or types.is_integer(kind) or types.is_decimal(kind)
        return number or types.is_null(kind)
    return bool(types.is_integer(kind) if what == "an integer" else types.is_timestamp(kind))


def meds_rows(source: Meds, codes: MedsCodes) -> Iterator[pl.DataFrame]:
    """The rows whose code is read, streamed file by file, as the canonical `meds` table.

    Raises:
        InputError: A file is damaged, or a row has no subject, no code or an impossible time; the
            message names file, row and column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = pl.any_horizontal(
        pl.col("code").str.starts_with(prefix) for prefix in _prefixes(codes)
    )
    for path in source.files:
        columns, before = _columns(path), 0
        try:
            with pq.ParquetFile(path) as parquet:
                for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                    frame = pl.DataFrame(pa.Table.from_batches([batch]))
                    frame = frame.with_columns(pl.col("code").cast(pl.String))
                    _refuse_rows(path, frame, before)
                    before += frame.height
                    yield _typed(frame.filter(wanted))
        except (pa.ArrowException, OSError, pl.exceptions.PolarsError):
            raise InputError(
                f"{path}: damaged after row {before}, or a number too large for its column; write "
                "it again"
            ) from None


def _refuse_rows(path: Path, frame: pl.DataFrame, before: int) -> None:
    """Refuse a batch that has a row which cannot be read."""
    rules = [
        ("subject_id", pl.col("subject_id").is_null(), "is missing"),
        ("code", pl.col("code").is_null(), "is missing"),
        (
            "time",
            ~pl.col("time").dt.year().is_between(1, 9999),
            "is outside the years 1 to 9999",
        ),
    ]
    if "hadm_id" in frame.columns and frame["hadm_id"].dtype.is_float():
        uneven = pl.col("hadm_id") != pl.col("hadm_id").floor()
        rules.append(("hadm_id", uneven, "is no integer"))
    for column, wrong, why in rules:
        places = frame.select(wrong.fill_null(value=False).arg_true()).to_series()
        if len(places):
            row = before + int(places[0]) + 1
            raise InputError(f"{path}: row {row}: {column} {why}; correct or remove that row")


def _prefixes(codes: MedsCodes) -> list[str]:
    kinds = ("admission", "discharge", "diagnosis_icd9", "diagnosis_icd10", "lab", "sex", "birth")
    return [*(getattr(codes, kind) for kind in kinds), codes.note + codes.discharge_note]


def _typed(frame: pl.DataFrame) -> pl.DataFrame:
    """The canonical columns; a float32 is read as the decimal it was written as (7.35, no less)."""
    if frame["numeric_value"].dtype == pl.Float32:
        frame = frame.with_columns(pl.col("numeric_value").cast(pl.String))
    return frame.select(
        (pl.col(name) if name in frame.columns else pl.lit(None)).cast(kind).alias(name)
        for name, kind in TABLES["meds"].items()
    )


def lab_names(source: Meds, codes: MedsCodes) -> pl.DataFrame:
    """item, name: the descriptions of metadata/codes.parquet; empty without that file."""
    path = source.folder / "metadata" / "codes.parquet"
    if not path.is_file():
        return pl.DataFrame(schema=TABLES["lab_names"])
    found = _metadata(path, {"code": pl.String(), "description": pl.String()})
    labs = found.drop_nulls("description").filter(pl.col("code").str.starts_with(codes.lab))
    return labs.select(
        _part(codes.lab, 0).alias("item"), pl.col("description").alias("name")
    ).unique(subset="item", keep="first", maintain_order=True)


def given_splits(source: Meds) -> pl.DataFrame:
    """subject_id, split of metadata/subject_splits.parquet; empty without that file.

    Raises:
        InputError: A split is not one of MEDS's three, or a subject is in two.
    """
    path = source.folder / "metadata" / "subject_splits.parquet"
    if not path.is_file():
        return pl.DataFrame(schema=TABLES["given_splits"])
    found = _metadata(path, {"subject_id": pl.Int64(), "split": pl.String()})
    unknown = sorted(set(found["split"].unique()) - _SPLITS.keys(), key=str)
    if unknown:
        raise InputError(
            f"{path}: unknown split {unknown[0]!r}; MEDS has {', '.join(_SPLITS)}, rename it"
        )
    pairs = found.select("subject_id", pl.col("split").replace_strict(_SPLITS)).unique()
    if pairs["subject_id"].is_duplicated().any():
        twice = pairs.filter(pl.col("subject_id").is_duplicated())["subject_id"].sort()[0]
        raise InputError(f"{path}: subject_id {twice} is in two splits; keep one of them")
    return pairs.sort("subject_id")


def _metadata(path: Path, columns: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """Columns of a file of metadata/, of these types.

    Raises:
        InputError: It is damaged, or lacks a column, or has one of another type.
    """
    try:
        found = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError):
        raise InputError(f"{path}: not a readable Parquet file; restore or remove it") from None
    if not columns.keys() <= set(found.columns):
        raise InputError(f"{path}: no columns {' and '.join(columns)}; restore or remove the file")
    for name, kind in columns.items():
        given = found[name].dtype
        same = given.is_integer() if kind.is_integer() else given in _TEXTS
        if not same and given != pl.Null:
            what = "an integer" if kind.is_integer() else "a text"
            raise InputError(f"{path}: column {name} is {given}, not {what}; write it so")
    return found.select(pl.col(name).cast(kind) for name, kind in columns.items())


def canonical_tables(meds: pl.DataFrame, codes: MedsCodes) -> Mapping[str, pl.DataFrame]:
    """patients, admissions, diagnoses, labs and notes from the MEDS rows of some subjects.

    An admission is a row of `codes.admission`; it ends at the first discharge from then on that
    comes before the next admission, or, where rows carry hadm_id, at the last discharge of that id.
    Without hadm_id, a diagnosis or a note belongs to the latest admission that began by its time,
    if that ended less than `codes.days_after` days before, else to none (null).
    """
    admissions = _admissions(meds, codes)
    diagnoses = [
        _of(meds, prefix).with_columns(
            pl.col("code").str.strip_prefix(prefix).alias("icd_code"),
            pl.lit(version, dtype=pl.Int8).alias("icd_version"),
        )
        for prefix, version in ((codes.diagnosis_icd9, 9), (codes.diagnosis_icd10, 10))
    ]
    notes = _of(meds, codes.note + codes.discharge_note)
    labs = _of(meds, codes.lab)
    return {
        "patients": _patients(meds, codes),
        "admissions": _conformed("admissions", admissions),
        "diagnoses": _conformed("diagnoses", _assigned(pl.concat(diagnoses), admissions, codes)),
        "labs": _conformed(
            "labs",
            labs.with_columns(
                _part(codes.lab, 0).alias("item"),
                _part(codes.lab, 1).replace({"UNK": None}).alias("unit"),
                pl.col("time").alias("charttime"),
                pl.col("text_value").alias("value"),
                pl.col("numeric_value").alias("valuenum"),
            ),
        ),
        "notes": _conformed(
            "notes",
            _assigned(notes, admissions, codes).with_columns(
                pl.col("time").alias("charttime"),
                pl.lit(DISCHARGE).alias("category"),
                pl.lit(value=False).alias("addendum"),
                pl.col("text_value").alias("text"),
            ),
        ),
    }


def _of(meds: pl.DataFrame, prefix: str) -> pl.DataFrame:
    return meds.filter(pl.col("code").str.starts_with(prefix))


def _part(prefix: str, index: int) -> pl.Expr:
    """What follows the prefix up to `//`, or after it; null where there is none."""
    rest = pl.col("code").str.strip_prefix(prefix).str.splitn("//", 2)
    return rest.struct.field(f"field_{index}")


def _conformed(table: str, frame: pl.DataFrame) -> pl.DataFrame:
    return frame.select(
        (pl.col(name) if name in frame.columns else pl.lit(None)).cast(kind).alias(name)
        for name, kind in TABLES[table].items()
    )


def _patients(meds: pl.DataFrame, codes: MedsCodes) -> pl.DataFrame:
    born = _of(meds, codes.birth).group_by("subject_id").agg(pl.col("time").min().alias("dob"))
    sex = (
        _of(meds, codes.sex)
        .sort("code")
        .group_by("subject_id", maintain_order=True)
        .agg(pl.col("code").first().str.strip_prefix(codes.sex).alias("sex"))
    )
    subjects = meds.select(pl.col("subject_id").unique().sort())
    known = subjects.join(born, on="subject_id", how="left").join(sex, on="subject_id", how="left")
    return _conformed("patients", known)


def _admissions(meds: pl.DataFrame, codes: MedsCodes) -> pl.DataFrame:
    """subject_id, hadm_id, admittime, dischtime; the latter null where no discharge fits.

    An admission without a time stays, for the cohort's rules to count.
    """
    begun = _of(meds, codes.admission)
    ended = _of(meds, codes.discharge).drop_nulls("time")
    named_ids = begun.filter(pl.col("hadm_id").is_not_null())
    by_id = named_ids.group_by("subject_id", "hadm_id").agg(pl.col("time").min().alias("admittime"))
    ends = ended.filter(pl.col("hadm_id").is_not_null()).group_by("hadm_id")
    by_id = by_id.join(ends.agg(pl.col("time").max().alias("dischtime")), on="hadm_id", how="left")
    loose = (
        begun.filter(pl.col("hadm_id").is_null())
        .select("subject_id", pl.col("time").alias("admittime"))
        .unique()
        .sort("subject_id", "admittime")
    )
    until = pl.col("admittime").shift(-1).over("subject_id").alias("__next")
    others = ended.filter(pl.col("hadm_id").is_null())
    paired = loose.with_columns(until).join(
        others.select("subject_id", pl.col("time").alias("dischtime")), on="subject_id", how="left"
    )
    fits = (pl.col("dischtime") >= pl.col("admittime")) & (
        (pl.col("dischtime") < pl.col("__next")).fill_null(value=True)
    )
    by_time = paired.group_by("subject_id", "admittime", maintain_order=True).agg(
        pl.col("dischtime").filter(fits).min()
    )
    made = [_visit_id(*row) for row in by_time.select("subject_id", "admittime").rows()]
    by_time = by_time.with_columns(pl.Series("hadm_id", made, dtype=pl.Int64))
    columns = ["subject_id", "hadm_id", "admittime", "dischtime"]
    return pl.concat([by_id.select(columns), by_time.select(columns)]).sort(columns)


def _visit_id(subject_id: int, admittime: object) -> int:
    """A stable id of an admission that has none: 56 bits of a hash of subject and time."""
    digest = hashlib.blake2b(f"{subject_id}:{admittime}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def _assigned(rows: pl.DataFrame, admissions: pl.DataFrame, codes: MedsCodes) -> pl.DataFrame:
    """Rows with hadm_id: their own, else that of the latest admission begun by their time."""
    timed = rows.drop_nulls("time")
    begun = admissions.select(
        "subject_id",
        pl.col("admittime").alias("__begun"),
        "dischtime",
        pl.col("hadm_id").alias("__id"),
    ).sort("__begun")
    joined = timed.sort("time").join_asof(
        begun.drop_nulls("__begun"),
        left_on="time",
        right_on="__begun",
        by="subject_id",
        strategy="backward",
        check_sortedness=False,
    )
    ended = pl.col("time") <= pl.col("dischtime") + pl.duration(days=codes.days_after)
    own = pl.coalesce("hadm_id", pl.when(ended).then("__id"))
    assigned = joined.with_columns(own.cast(pl.Int64).alias("hadm_id")).select(rows.columns)
    return pl.concat([assigned, rows.filter(pl.col("time").is_null())])
