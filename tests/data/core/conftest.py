"""A small reader of raw folders into canonical tables, apart from the product's readers."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pytest

from data.events import ITEMS
from data.sources.canonical import TABLES, TIME
from data.switches import ExtractConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

REPOSITORY = Path(__file__).parents[3]
GOLDEN = REPOSITORY / "tests" / "fixtures" / "golden"
DEMOS = {"iii": REPOSITORY / "data" / "demo" / "mimic-iii", "iv": REPOSITORY / "data/demo/mimic-iv"}
RENAMED = {
    "gender": "sex",
    "race": "ethnicity",
    "icustay_id": "stay_id",
    "icd9_code": "icd_code",
}
FILES = {
    "patients": "patients",
    "admissions": "admissions",
    "icustays": "icustays",
    "diagnoses": "diagnoses_icd",
    "icd_dictionary": "d_icd_diagnoses",
}
CODE = ExtractConfig(
    outliers="keep",
    icd10_map="forward_last",
    icd_join="code",
    units="as_found",
    duplicates="text_maximum",
    derive=False,
    age="anchor",
    deaths="mixed",
    event_to_stay="as_found",
    error_rows="keep",
    availability="charttime",
)


def _text_table(folder: Path, name: str) -> pl.DataFrame:
    paths = [
        path
        for path in sorted(folder.rglob("*.csv*"))
        if path.name.lower().split(".")[0].removesuffix("_reconstructed") == name
    ]
    assert len(paths) == 1, (folder, name, paths)
    frame = pl.read_csv(paths[0], infer_schema_length=0)
    return frame.rename(str.lower).with_columns(pl.all().replace("", None))


def _typed(frame: pl.DataFrame, table: str) -> pl.DataFrame:
    schema = TABLES[table]
    frame = frame.rename({old: new for old, new in RENAMED.items() if old in frame.columns})
    columns = []
    for name, kind in schema.items():
        if name not in frame.columns:
            columns.append(pl.lit(None, dtype=kind).alias(name))
        elif frame.schema[name] != pl.String or kind == pl.String:
            columns.append(pl.col(name).cast(kind))
        elif kind == TIME:
            padded = pl.when(pl.col(name).str.len_chars() == 10)
            text = padded.then(pl.col(name) + " 00:00:00").otherwise(pl.col(name))
            columns.append(text.str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="us").alias(name))
        else:
            columns.append(pl.col(name).cast(pl.Float64, strict=name != "valuenum").cast(kind))
    return frame.select(columns)


def read_tables(folder: Path) -> dict[str, pl.DataFrame]:
    tables = {table: _typed(_text_table(folder, file), table) for table, file in FILES.items()}
    if tables["diagnoses"]["icd_version"].null_count():
        nine = pl.lit(9, dtype=pl.Int8).alias("icd_version")
        tables["diagnoses"] = tables["diagnoses"].with_columns(nine)
        tables["icd_dictionary"] = tables["icd_dictionary"].with_columns(nine)
    parts = []
    for source, file in (
        ("chart", "chartevents"),
        ("lab", "labevents"),
        ("output", "outputevents"),
    ):
        frame = _text_table(folder, file)
        if "error" in frame.columns:
            flagged = (pl.col("error").cast(pl.Float64) == 1).alias("error")
            frame = frame.with_columns(flagged)
        numbered = frame.with_columns(
            pl.lit(source).alias("source"),
            pl.Series("row", range(frame.height), dtype=pl.Int64),
        ).filter(pl.col("itemid").cast(pl.Int64).is_in(list(ITEMS)))
        parts.append(_typed(numbered, "events"))
    return {**tables, "events": pl.concat(parts)}


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def golden_tables() -> Mapping[str, pl.DataFrame]:
    return read_tables(GOLDEN / "raw")


@pytest.fixture(scope="session")
def demo_tables() -> Callable[[str], Mapping[str, pl.DataFrame]]:
    read: dict[str, dict[str, pl.DataFrame]] = {}

    def of(release: str) -> Mapping[str, pl.DataFrame]:
        if release not in read:
            read[release] = read_tables(DEMOS[release])
        return read[release]

    return of


@pytest.fixture(scope="session")
def code_config() -> ExtractConfig:
    return CODE


INTIME = datetime(2150, 3, 10, 6, 30)  # noqa: DTZ001


def _frame(table: str, rows: list[dict[str, object]]) -> pl.DataFrame:
    names = TABLES[table].keys()
    full = [{name: row.get(name) for name in names} for row in rows]
    return pl.DataFrame(full, schema=TABLES[table])


def tiny_tables(
    events: Sequence[Mapping[str, object]], **changes: Mapping[str, object]
) -> dict[str, pl.DataFrame]:
    """One patient of 60 with one stay of 60 hours; an event is {hour, item, value, ...}.

    `changes` overwrite columns of the one row of a table: `icustays={"los": None}`.
    """
    at = timedelta(hours=1)
    ids = {"subject_id": 7, "hadm_id": 70, "stay_id": 700}
    rows: dict[str, dict[str, object]] = {
        "patients": {"sex": "F", "anchor_age": 60, "anchor_year": 2148},
        "admissions": {"admittime": INTIME - 5 * at, "dischtime": INTIME + 90 * at},
        "icustays": {
            "first_careunit": "MICU",
            "last_careunit": "MICU",
            "intime": INTIME,
            "outtime": INTIME + 60 * at,
            "los": 2.5,
        },
        "diagnoses": {"seq_num": 1, "icd_code": "4019", "icd_version": 9},
    }
    tables = {
        table: _frame(table, [{**ids, **row, **changes.get(table, {})}])
        for table, row in rows.items()
    }
    charted = []
    for row, event in enumerate(events):
        hour = float(str(event["hour"]))
        time = INTIME + timedelta(microseconds=round(hour * 3_600_000_000))
        source = event.get("source", ITEMS[int(str(event["item"]))].source)
        known = {"row": row, "itemid": event["item"], "charttime": time, "source": source}
        charted.append(
            {**ids, **known, **{k: v for k, v in event.items() if k in TABLES["events"]}}
        )
    tables["events"] = _frame("events", charted)
    tables["icd_dictionary"] = _frame("icd_dictionary", [{"icd_code": "4019", "icd_version": 9}])
    return tables


@pytest.fixture(scope="session")
def tiny() -> Callable[..., dict[str, pl.DataFrame]]:
    return tiny_tables


@pytest.fixture(scope="session")
def with_images() -> Callable[[Mapping[str, pl.DataFrame]], dict[str, pl.DataFrame]]:
    """Give every stay a frontal image 10 h, 47 h and 49 h after intime, and one from the side."""

    def add(tables: Mapping[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
        parts = []
        for hour, view in ((10, "AP"), (47, "AP"), (49, "AP"), (47.5, "LATERAL")):
            name = pl.format("{}-{}-{}", "stay_id", pl.lit(str(hour)), pl.lit(view))
            parts.append(
                tables["icustays"].select(
                    "subject_id",
                    study_id="stay_id",
                    dicom_id=name,
                    view=pl.lit(view),
                    studytime=pl.col("intime") + pl.duration(minutes=round(hour * 60)),
                    path=name + ".jpg",
                    cxr_split=pl.lit("train"),
                    chexpert=pl.lit(pl.Series([[1.0, -1.0, None] + [0.0] * 11])).first(),
                )
            )
        schema = TABLES["cxr"]
        return {**tables, "cxr": pl.concat(parts).cast(schema)}  # type: ignore[arg-type]

    return add
