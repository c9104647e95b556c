"""MIMIC-III's raw files: what was not known at the prediction time reaches no feature."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pytest

from data import pipeline
from data.switches import ExtractConfig, Sources

if TYPE_CHECKING:
    from collections.abc import Callable

    Tables = dict[str, pl.DataFrame]

pytestmark = pytest.mark.ray

DEMO = Path(__file__).parents[3] / "data" / "demo" / "mimic-iii"
STAMP = "%Y-%m-%d %H:%M:%S"
LIMIT = "limit"
HEART_RATE = ("211", "220045")
GLUCOSE = ("50809", "50931")


def _time(column: str) -> pl.Expr:
    return pl.col(column).str.to_datetime(STAMP)


def _with_limit(tables: Tables, name: str) -> pl.DataFrame:
    """The rows with `limit`: 48 hours after the patient's last intime."""
    last = tables["ICUSTAYS"].group_by("subject_id")
    limits = last.agg(_time("intime").max().dt.offset_by("48h").alias(LIMIT))
    return tables[name].join(limits, on="subject_id", how="left", maintain_order="left")


def _change(tables: Tables, name: str, condition: pl.Expr, **columns: pl.Expr) -> pl.DataFrame:
    """The table with columns overwritten where the condition holds, which it must somewhere."""
    rows = _with_limit(tables, name)
    hit = condition.fill_null(value=False)
    assert rows.filter(hit).height > 0, name
    changed = [
        pl.when(hit).then(new).otherwise(pl.col(column)).alias(column)
        for column, new in columns.items()
    ]
    return rows.with_columns(changed).drop(LIMIT)


def _later(column: str, by: str) -> pl.Expr:
    return _time(column).dt.offset_by(by).dt.strftime(STAMP)


def _output(tables: Tables) -> pl.DataFrame:
    """OUTPUTEVENTS, empty in the demo, with a late row for every patient."""
    stays = _with_limit(tables, "ICUSTAYS").filter(
        pl.col("intime") == pl.col("intime").max().over("subject_id")
    )
    time = pl.col(LIMIT).dt.offset_by("1s").dt.strftime(STAMP)
    rows = stays.select(
        row_id=pl.lit("1"),
        subject_id="subject_id",
        hadm_id="hadm_id",
        icustay_id="icustay_id",
        charttime=time,
        itemid=pl.lit("220045"),
        value=pl.lit("199"),
        valueuom=pl.lit("bpm"),
        storetime=time,
        iserror=pl.lit(None, pl.String),
    )
    return pl.concat([tables["OUTPUTEVENTS"], rows])


def _after(tables: Tables) -> Tables:
    """Every source table changed in what was not known at the patient's last prediction time."""
    late = pl.coalesce(_time("storetime"), _time("charttime")) > pl.col(LIMIT)
    new = {"value": pl.lit("55"), "valuenum": pl.lit("55")}
    last_stay = pl.col("intime") == pl.col("intime").max().over("subject_id")
    chart = _change(tables, "CHARTEVENTS", late, **new, itemid=pl.lit("220045"))
    early = chart.filter(pl.col("itemid").is_in(HEART_RATE)).unique("icustay_id", keep="first")
    stored_late = (
        _with_limit({"ICUSTAYS": tables["ICUSTAYS"], "early": early}, "early")
        .with_columns(**new, storetime=pl.col(LIMIT).dt.offset_by("1s").dt.strftime(STAMP))
        .drop(LIMIT)
    )
    return {
        **tables,
        "CHARTEVENTS": pl.concat([chart, stored_late]),
        "LABEVENTS": _change(tables, "LABEVENTS", _time("charttime") > pl.col(LIMIT), **new),
        "OUTPUTEVENTS": _output(tables),
        "ICUSTAYS": _change(
            tables,
            "ICUSTAYS",
            (_time("outtime") > pl.col(LIMIT)) & last_stay,
            outtime=_later("outtime", "1h"),
        ),
        "ADMISSIONS": _change(
            tables,
            "ADMISSIONS",
            _time("dischtime") > pl.col(LIMIT),
            dischtime=_later("dischtime", "1d"),
            deathtime=pl.lit(None),
        ),
        "PATIENTS": _change(
            tables, "PATIENTS", _time("dod") > pl.col(LIMIT), dod=_later("dod", "30d")
        ),
        "DIAGNOSES_ICD": tables["DIAGNOSES_ICD"].with_columns(icd9_code=pl.lit("41401")),
        "D_ICD_DIAGNOSES": tables["D_ICD_DIAGNOSES"].with_columns(long_title=pl.lit("other")),
    }


def _close(minutes: int) -> pl.Expr:
    """Charted, and known, within so many minutes before the limit."""
    before = pl.col(LIMIT).dt.offset_by(f"-{minutes}m")
    return (_time("charttime") > before) & (_time("charttime") <= pl.col(LIMIT))


BEFORE: dict[str, Callable[[Tables], Tables]] = {
    "chart": lambda tables: {
        "CHARTEVENTS": _change(
            tables,
            "CHARTEVENTS",
            _close(90) & (_time("storetime") <= pl.col(LIMIT)) & pl.col("itemid").is_in(HEART_RATE),
            value=pl.lit("199"),
            valuenum=pl.lit("199"),
        )
    },
    "lab": lambda tables: {
        "LABEVENTS": _change(
            tables,
            "LABEVENTS",
            _close(720) & pl.col("itemid").is_in(GLUCOSE),
            value=pl.lit("444"),
            valuenum=pl.lit("444"),
        )
    },
}


@pytest.fixture(scope="module")
def tables() -> Tables:
    """The demo's files as they are: every field text."""
    return {
        path.name.removesuffix(".csv.gz"): pl.read_csv(path, infer_schema=False)
        for path in sorted(DEMO.glob("*.csv.gz"))
    }


def _features(tables: Tables, folder: Path) -> tuple[pl.DataFrame, pl.Series]:
    """Write the tables as files, extract them; the shards' features, and their labels."""
    (folder / "raw").mkdir(parents=True)
    for name, table in tables.items():
        table.write_csv(folder / "raw" / f"{name}.csv")
    sources = Sources(mimic_iii=folder / "raw")
    config = ExtractConfig(partitions=1)
    pipeline.extract(sources, "mortality", config, folder / "out", preset="corrected")
    shards = pl.read_parquet(folder / "out" / "shards" / "*.parquet").sort("stay_id")
    return shards.drop("labels"), shards["labels"].list.first()


@pytest.mark.usefixtures("ray_session")
def test_of_raw_mimic_iii_only_what_was_known_reaches_a_feature(
    tables: Tables, tmp_path: Path
) -> None:
    expected, labels = _features(tables, tmp_path / "untouched")
    assert expected.height > 50
    found, survived = _features(_after(tables), tmp_path / "after")
    assert found.equals(expected)
    assert survived.sum() < labels.sum(), "the outcome did change"
    for name, change in BEFORE.items():
        changed, _ = _features({**tables, **change(tables)}, tmp_path / name)
        assert changed["stay_id"].equals(expected["stay_id"])
        assert not changed.equals(expected), name
