"""A tiny hospital in MIMIC's layouts, whose text tables a test may edit before they are written."""

from __future__ import annotations

import csv
import gzip
import io
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Table = list[dict[str, str]]

FOLDER = {
    "patients": "hosp",
    "admissions": "hosp",
    "diagnoses_icd": "hosp",
    "d_icd_diagnoses": "hosp",
    "labevents": "hosp",
    "icustays": "icu",
    "chartevents": "icu",
    "outputevents": "icu",
}
NUMBERS = {"220045": (80, 10), "220210": (18, 3), "220179": (120, 9), "220180": (70, 7)}
EYES = ("None", "To Pain", "Spontaneously")
CODES = ("4019", "42731", "5849", "25000", "0389")


def _stamp(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _patient_rows(rng: np.random.Generator, index: int, tables: dict[str, Table]) -> None:
    subject, hadm, stay = str(10_001 + index), str(20_001 + index), str(30_001 + index)
    admitted = datetime(2150, 1, 1) + timedelta(days=3 * index)  # noqa: DTZ001
    intime = admitted + timedelta(hours=2)
    hours = 50 + 4 * (index % 5)
    outtime = intime + timedelta(hours=hours)
    discharged = outtime + timedelta(hours=30)
    died = index % 4 == 0
    tables["patients"].append(
        {
            "subject_id": subject,
            "gender": "FM"[index % 2],
            "anchor_age": str(40 + index),
            "anchor_year": "2150",
            "anchor_year_group": "2014 - 2016",
            "dod": discharged.strftime("%Y-%m-%d") if died else "",
        }
    )
    tables["admissions"].append(
        {
            "subject_id": subject,
            "hadm_id": hadm,
            "admittime": _stamp(admitted),
            "dischtime": _stamp(discharged),
            "deathtime": _stamp(discharged) if died else "",
            "race": "OTHER",
            "note": 'a "quoted", text\nover two lines',
        }
    )
    tables["icustays"].append(
        {
            "subject_id": subject,
            "hadm_id": hadm,
            "stay_id": stay,
            "first_careunit": "MICU",
            "last_careunit": "MICU",
            "intime": _stamp(intime),
            "outtime": _stamp(outtime),
            "los": repr(hours / 24),
        }
    )
    for number, code in enumerate(rng.choice(CODES, 2, replace=False), 1):
        tables["diagnoses_icd"].append(
            {
                "subject_id": subject,
                "hadm_id": hadm,
                "seq_num": str(number),
                "icd_code": str(code),
                "icd_version": "9",
            }
        )
    keys = {"subject_id": subject, "hadm_id": hadm}
    for hour in range(hours):
        charted = intime + timedelta(hours=hour, minutes=10)
        times = {
            "charttime": _stamp(charted),
            "storetime": _stamp(charted + timedelta(minutes=5)),
        }
        chart = {**keys, "stay_id": stay, **times}
        for item, (mean, spread) in NUMBERS.items():
            value = f"{rng.normal(mean, spread):.0f}"
            tables["chartevents"].append(
                {**chart, "itemid": item, "value": value, "valuenum": value, "valueuom": ""}
            )
        eye = str(rng.choice(EYES))
        tables["chartevents"] += [
            {**chart, "itemid": "220739", "value": eye, "valuenum": "1", "valueuom": ""},
            {**chart, "itemid": "224015", "value": "not, needed", "valuenum": "", "valueuom": ""},
        ]
        if hour % 6 == 0:
            value = f"{rng.normal(130, 20):.0f}"
            tables["labevents"].append(
                {
                    **keys,
                    **times,
                    "itemid": "50931",
                    "value": value,
                    "valuenum": value,
                    "valueuom": "mg/dL",
                }
            )
            tables["outputevents"].append(
                {**chart, "itemid": "226559", "value": "100", "valueuom": "ml"}
            )


def _tables(patients: int, seed: int) -> dict[str, Table]:
    rng = np.random.default_rng(seed)
    tables: dict[str, Table] = {name: [] for name in FOLDER}
    for index in range(patients):
        _patient_rows(rng, index, tables)
    tables["d_icd_diagnoses"] = [
        {"icd_code": code, "icd_version": "9", "long_title": f"title, of {code}"} for code in CODES
    ]
    return tables


def as_csv(table: Table, *, upper: bool = False) -> bytes:
    stream = io.StringIO()
    names = list(table[0])
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writerow({name: name.upper() if upper else name for name in names})
    writer.writerows(table)
    return stream.getvalue().encode()


def _typed(column: str) -> pl.Expr:
    """As a Parquet file made by a careful hand has it."""
    lower = column.lower()
    if lower.endswith("time") or lower == "dod":
        form = "%Y-%m-%d" if lower == "dod" else "%Y-%m-%d %H:%M:%S"
        return pl.col(column).str.to_datetime(form, time_unit="ns")
    if lower in ("itemid", "seq_num", "icd_version") or lower in ("subject_id", "hadm_id"):
        return pl.col(column).cast(pl.Int32)
    return pl.col(column).cast(pl.Float64) if lower in ("los", "valuenum") else pl.col(column)


@pytest.fixture(scope="session")
def make_hospital() -> Callable[..., Path]:
    """`make_hospital(folder, patients=12, seed=0, form="csv.gz", upper=False, edit=None)`.

    Writes MIMIC-IV 2.2 tables; `edit(tables)` may change the rows (dicts of text) first.
    """

    def make(
        folder: Path,
        *,
        patients: int = 12,
        seed: int = 0,
        form: str = "csv.gz",
        upper: bool = False,
        edit: Callable[[dict[str, Table]], object] | None = None,
    ) -> Path:
        tables = _tables(patients, seed)
        if edit is not None:
            edit(tables)
        for name, table in tables.items():
            stem = name.upper() if upper else name
            path = folder / FOLDER[name] / f"{stem}.{form}"
            path.parent.mkdir(parents=True, exist_ok=True)
            content = as_csv(table, upper=upper)
            if form == "csv.gz":
                path.write_bytes(gzip.compress(content, mtime=0))
            elif form == "csv":
                path.write_bytes(content)
            else:
                text = pl.read_csv(content, infer_schema=False)
                text.select(_typed(column) for column in text.columns).write_parquet(path)
        return folder

    return make
