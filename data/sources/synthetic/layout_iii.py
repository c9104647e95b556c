"""MIMIC-III 1.4: capital files, upper-case columns, CareVue and MetaVision side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from data.sources.synthetic import codes, items
from data.sources.synthetic.events import event_frame
from data.sources.synthetic.labs import ABNORMAL
from data.sources.synthetic.layout_iv import (
    INSURANCE,
    RACES,
    death_columns,
    death_days,
    first_admit,
    pick,
)
from data.sources.synthetic.people import DAY
from data.sources.synthetic.writer import times

if TYPE_CHECKING:
    from data.sources.synthetic.charting import Rows
    from data.sources.synthetic.people import Block
    from data.sources.synthetic.writer import Tables

UNITS = ("MICU", "SICU", "TSICU", "CSRU", "CCU", "MICU")


def _empty(*names: str) -> list[pl.Expr]:
    return [pl.lit(None, dtype=pl.String).alias(name) for name in names]


def _numbered(tables: Tables, name: str, frame: pl.DataFrame) -> None:
    """Append with ROW_ID in front and every column in capitals."""
    if tables.subjects is not None and "subject_id" in frame.columns:
        frame = frame.filter(pl.col("subject_id").is_in(tables.subjects.tolist()))
    start = tables.rows.get(name, 0) + 1
    row = pl.Series("row_id", np.arange(start, start + frame.height))
    frame = frame.select(row, pl.all())
    tables.append(name, frame.rename({c: c.upper() for c in frame.columns}))


def write_people(
    tables: Tables, block: Block, carevue: np.ndarray, rng: np.random.Generator, *, quirks: bool
) -> None:
    """PATIENTS, ADMISSIONS, ICUSTAYS of one block; a patient over 89 was born 300 years before."""
    death = death_columns(block, rng, quirks=quirks)
    _write_patients(tables, block, death_days(block, death["dated"].to_numpy()))
    _write_admissions(tables, block, death, rng)
    moved = block.transferred | ((rng.random(len(block.stay)) < 0.02) & quirks)
    _write_stays(tables, block, carevue, moved)


def _write_patients(tables: Tables, block: Block, day: np.ndarray) -> None:
    """PATIENTS; `day` is that of the known death since 1970, 0 for none."""
    age = np.where(block.birth_age > 89, 300, block.birth_age)
    birth = first_admit(block) // DAY - (age * 365.2425).astype(np.int64) - 30
    dod = times(day * DAY)
    known = pl.Series(day > 0)
    _numbered(
        tables,
        "PATIENTS.csv.gz",
        pl.DataFrame(
            {
                "subject_id": block.subject,
                "gender": np.where(block.male, "M", "F"),
                "dob": times(birth * DAY),
                "dod": dod,
                "dod_hosp": dod,
                "dod_ssn": dod,
                "expire_flag": (day > 0).astype(np.int8),
            }
        ).with_columns(
            pl.when(known).then(name).alias(name) for name in ("dod", "dod_hosp", "dod_ssn")
        ),
    )


def _write_admissions(
    tables: Tables, block: Block, death: pl.DataFrame, rng: np.random.Generator
) -> None:
    n = len(block.hadm)
    some = rng.integers(0, 1 << 30, n)
    _numbered(
        tables,
        "ADMISSIONS.csv.gz",
        pl.DataFrame(
            {
                "subject_id": block.subject[block.adm_patient],
                "hadm_id": block.hadm,
                "admittime": times(block.admit),
                "dischtime": times(block.discharge),
                "deathtime": death["deathtime"],
                "admission_type": pick(("EMERGENCY", "URGENT", "ELECTIVE"), some),
                "admission_location": pick(("EMERGENCY ROOM ADMIT", "CLINIC REFERRAL"), some),
                "discharge_location": np.where(block.died, "DEAD/EXPIRED", "HOME"),
                "insurance": pick(INSURANCE, some // 7),
                "language": pick(("ENGL", "SPAN"), some // 5),
                "religion": pick(("CATHOLIC", "UNOBTAINABLE"), some // 13),
                "marital_status": pick(("MARRIED", "SINGLE", "WIDOWED"), some // 11),
                "ethnicity": pick(RACES, block.adm_patient + block.subject[block.adm_patient]),
                "edregtime": times(block.admit - 7_200),
                "edouttime": times(block.admit + 600),
                "diagnosis": pick(("SEPSIS", "CHEST PAIN", "GI BLEED"), some // 17),
                "hospital_expire_flag": block.died.astype(np.int8),
                "has_chartevents_data": np.ones(n, np.int8),
            }
        ),
    )


def _write_stays(tables: Tables, block: Block, carevue: np.ndarray, moved: np.ndarray) -> None:
    """ICUSTAYS; `moved` stays end in another ward."""
    second = block.careunit + block.transferred
    ward = 10 + block.careunit
    _numbered(
        tables,
        "ICUSTAYS.csv.gz",
        pl.DataFrame(
            {
                "subject_id": block.subject[block.stay_patient],
                "hadm_id": block.hadm[block.stay_admission],
                "icustay_id": block.stay,
                "dbsource": np.where(carevue, "carevue", "metavision"),
                "first_careunit": pick(UNITS, block.careunit),
                "last_careunit": pick(UNITS, second),
                "first_wardid": ward,
                "last_wardid": np.where(moved, ward + 20, ward),
                "intime": times(block.intime),
                "outtime": times(block.outtime),
                "los": np.round((block.outtime - block.intime) / DAY, 4),
            }
        ),
    )


def write_events(
    tables: Tables,
    block: Block,
    carevue: np.ndarray,
    chart: Rows,
    labs: Rows,
    output: Rows,
    rng: np.random.Generator,
) -> None:
    """CHARTEVENTS, LABEVENTS and OUTPUTEVENTS of one block."""
    frame = event_frame(chart, block).rename({"stay_id": "icustay_id"})
    old = pl.col("itemid") < 200_000
    wrong = pl.Series("wrong", rng.random(frame.height) < 0.003)
    frame = frame.with_columns(wrong, pl.Series("cgid", rng.integers(14_000, 21_000, frame.height)))
    _numbered(
        tables,
        "CHARTEVENTS.csv.gz",
        frame.select(
            "subject_id",
            "hadm_id",
            "icustay_id",
            "itemid",
            "charttime",
            "storetime",
            "cgid",
            "value",
            "valuenum",
            "valueuom",
            pl.when(~old).then(pl.lit("0")).alias("warning"),
            pl.when(~old).then(pl.col("wrong").cast(pl.Int8)).cast(pl.String).alias("error"),
            *_empty("resultstatus"),
            pl.when(old).then(pl.lit("NotStopd")).alias("stopped"),
        ),
    )
    frame = event_frame(labs, block)
    _numbered(
        tables,
        "LABEVENTS.csv.gz",
        frame.select(
            "subject_id",
            "hadm_id",
            "itemid",
            "charttime",
            "value",
            "valuenum",
            "valueuom",
            ABNORMAL.alias("flag"),
        ),
    )
    frame = event_frame(output, block).rename({"stay_id": "icustay_id"})
    _numbered(
        tables,
        "OUTPUTEVENTS.csv.gz",
        frame.select(
            "subject_id",
            "hadm_id",
            "icustay_id",
            "charttime",
            "itemid",
            "value",
            "valueuom",
            "storetime",
            *_empty("cgid", "stopped", "newbottle", "iserror"),
        ),
    )


def write_diagnoses(tables: Tables, block: Block, rows: dict[str, np.ndarray]) -> None:
    """DIAGNOSES_ICD of one block, all ICD-9."""
    admission = rows["admission"]
    _numbered(
        tables,
        "DIAGNOSES_ICD.csv.gz",
        pl.DataFrame(
            {
                "subject_id": block.subject[block.adm_patient[admission]],
                "hadm_id": block.hadm[admission],
                "seq_num": rows["seq_num"],
                "icd9_code": pl.Series(rows["code"].tolist(), dtype=pl.String),
            }
        ),
    )


def write_dictionaries(tables: Tables) -> None:
    """D_ITEMS, D_LABITEMS and D_ICD_DIAGNOSES."""
    charted = [*items.ITEMS, *items.FILLER, *(i for i, _ in items.FILLER_TEXT)]
    charted += [items.OUTPUT, items.OUTPUT_CAREVUE]
    _numbered(
        tables,
        "D_ITEMS.csv.gz",
        pl.DataFrame(
            {
                "itemid": [i.itemid for i in charted],
                "label": [i.label for i in charted],
                "abbreviation": [i.label for i in charted],
                "dbsource": [i.source for i in charted],
                "linksto": [
                    "outputevents" if i.category == "Output" else "chartevents" for i in charted
                ],
                "category": [i.category for i in charted],
                "unitname": [i.unit or None for i in charted],
                "param_type": ["Numeric" for _ in charted],
            }
        ).with_columns(*_empty("conceptid")),
    )
    _numbered(
        tables,
        "D_LABITEMS.csv.gz",
        pl.DataFrame(
            {
                "itemid": [i.itemid for i in items.LABS],
                "label": [i.label for i in items.LABS],
                "fluid": ["Blood" for _ in items.LABS],
                "category": [i.category for i in items.LABS],
            }
        ).with_columns(*_empty("loinc_code")),
    )
    nine = [c for c, version in codes.TITLES_VERSION if version == 9]
    _numbered(
        tables,
        "D_ICD_DIAGNOSES.csv.gz",
        pl.DataFrame(
            {
                "icd9_code": nine,
                "short_title": [f"Diagnosis {c}" for c in nine],
                "long_title": [f"Diagnosis {c}, version 9" for c in nine],
            }
        ),
    )
