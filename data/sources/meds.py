"""A MEDS dataset (Parquet of subject_id, time, code, numeric_value, text_value) of any hospital.

Its rows are brought to the canonical tables that MIMIC's are brought to, so that one set of rules
and one schema serve every source. Nothing of a text_value ever enters a message.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

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
    kinds = {
        "subject_id": pa.types.is_integer(schema.field("subject_id").type),
        "time": pa.types.is_timestamp(schema.field("time").type),
    }
    for name, right in kinds.items():
        if not right:
            what = "an integer" if name == "subject_id" else "a timestamp"
            raise InputError(
                f"{path}: column {name} is {schema.field(name).type}, not {what}; write it so"
            )
    return [*_NEEDED, *(name for name in ("text_value", "hadm_id") if name in schema.names)]


def meds_rows(source: Meds, codes: MedsCodes) -> Iterator[pl.DataFrame]:
    """The rows whose code is read, streamed file by file, as the canonical `meds` table.

    Raises:
        InputError: A file is damaged, or a value is not of its column's type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = pl.any_horizontal(
        pl.col("code").str.starts_with(prefix) for prefix in _prefixes(codes)
    )
    for path in source.files:
        try:
            with pq.ParquetFile(path) as parquet:
                for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=_columns(path)):
                    frame = pl.DataFrame(pa.Table.from_batches([batch]))
                    yield _typed(frame.with_columns(pl.col("code").cast(pl.String)).filter(wanted))
        except (pa.ArrowException, OSError, pl.exceptions.PolarsError):
            raise InputError(
                f"{path}: damaged, or a value of another type than MEDS says; write it again"
            ) from None


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
    found = pl.read_parquet(path)
    if not {"code", "description"} <= set(found.columns):
        raise InputError(f"{path}: no columns code and description; restore or remove the file")
    labs = found.drop_nulls("description").filter(pl.col("code").str.starts_with(codes.lab))
    return labs.select(
        _part(codes.lab, 0).alias("item"), pl.col("description").cast(pl.String).alias("name")
    ).unique(subset="item", keep="first", maintain_order=True)


def given_splits(source: Meds) -> pl.DataFrame:
    """subject_id, split of metadata/subject_splits.parquet; empty without that file.

    Raises:
        InputError: A split is not one of MEDS's three, or a subject is in two.
    """
    path = source.folder / "metadata" / "subject_splits.parquet"
    if not path.is_file():
        return pl.DataFrame(schema=TABLES["given_splits"])
    found = pl.read_parquet(path)
    if not {"subject_id", "split"} <= set(found.columns):
        raise InputError(f"{path}: no columns subject_id and split; restore or remove the file")
    unknown = sorted(set(found["split"].unique()) - _SPLITS.keys(), key=str)
    if unknown:
        raise InputError(
            f"{path}: unknown split {unknown[0]!r}; MEDS has {', '.join(_SPLITS)}, rename it"
        )
    pairs = found.select(
        pl.col("subject_id").cast(pl.Int64), pl.col("split").replace_strict(_SPLITS)
    ).unique()
    if pairs["subject_id"].is_duplicated().any():
        twice = pairs.filter(pl.col("subject_id").is_duplicated())["subject_id"].sort()[0]
        raise InputError(f"{path}: subject_id {twice} is in two splits; keep one of them")
    return pairs.sort("subject_id")


def canonical_tables(meds: pl.DataFrame, codes: MedsCodes) -> Mapping[str, pl.DataFrame]:
    """patients, admissions, diagnoses, labs and notes from the MEDS rows of some subjects.

    An admission is a row of `codes.admission`; it ends at the first discharge from then on that
    comes before the next admission, or, where rows carry hadm_id, at the last discharge of that id.
    Without hadm_id, a diagnosis or a note belongs to the latest admission that began by its time,
    if that ended less than `codes.days_after` days before.
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
    """subject_id, hadm_id, admittime, dischtime; the latter null where no discharge fits."""
    begun = _of(meds, codes.admission).drop_nulls("time")
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
    timed = rows.filter(pl.col("time").is_not_null() | pl.col("hadm_id").is_not_null())
    begun = admissions.select(
        "subject_id",
        pl.col("admittime").alias("__begun"),
        "dischtime",
        pl.col("hadm_id").alias("__id"),
    ).sort("__begun")
    joined = timed.sort("time").join_asof(
        begun,
        left_on="time",
        right_on="__begun",
        by="subject_id",
        strategy="backward",
        check_sortedness=False,
    )
    ended = pl.col("time") <= pl.col("dischtime") + pl.duration(days=codes.days_after)
    own = pl.coalesce("hadm_id", pl.when(ended).then("__id"))
    return joined.with_columns(own.cast(pl.Int64).alias("hadm_id")).filter(
        pl.col("hadm_id").is_not_null()
    )
