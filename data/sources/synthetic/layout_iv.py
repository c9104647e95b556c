"""MIMIC-IV 2.2 and 3.1: the tables' own columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from data.sources.synthetic import codes, items
from data.sources.synthetic.events import event_frame
from data.sources.synthetic.labs import ABNORMAL
from data.sources.synthetic.people import DAY
from data.sources.synthetic.writer import times

if TYPE_CHECKING:
    from data.sources.synthetic.charting import Rows
    from data.sources.synthetic.config import Release
    from data.sources.synthetic.people import Block
    from data.sources.synthetic.writer import Tables

UNITS_2 = (
    "Medical Intensive Care Unit (MICU)",
    "Surgical Intensive Care Unit (SICU)",
    "Medical/Surgical Intensive Care Unit (MICU/SICU)",
    "Cardiac Vascular Intensive Care Unit (CVICU)",
    "Coronary Care Unit (CCU)",
    "Trauma SICU (TSICU)",
)
RACES = ("WHITE", "BLACK/AFRICAN AMERICAN", "ASIAN", "HISPANIC OR LATINO", "UNKNOWN", "OTHER")
INSURANCE = ("Medicare", "Medicaid", "Other")


def pick(values: tuple[str, ...], index: np.ndarray) -> pl.Series:
    """Each row one of the values, by its number."""
    return pl.Series(values, dtype=pl.String).gather(pl.Series(index % len(values)).cast(pl.UInt32))


def death_columns(block: Block, rng: np.random.Generator, *, quirks: bool) -> pl.DataFrame:
    """deathtime, flag (per admission) and, per admission, whether the patient's dod is its end.

    With quirks an in-hospital death in six lacks its deathtime and one in six its dod, never both.
    """
    lot = rng.random(len(block.hadm))
    timed = block.died & ~((lot < 1 / 6) & quirks)
    dated = block.died & ~((lot > 5 / 6) & quirks)
    return pl.DataFrame(
        {
            "deathtime": times(block.discharge),
            "timed": timed,
            "dated": dated,
        }
    ).with_columns(pl.when("timed").then("deathtime").alias("deathtime"))


def death_days(block: Block, dated: np.ndarray) -> np.ndarray:
    """Each patient's date of death in days since 1970, 0 where none is known.

    A patient who left alive may have died some time after the last discharge.
    """
    days = np.zeros(len(block.subject), dtype=np.int64)
    inside = np.flatnonzero(dated)
    days[block.adm_patient[inside]] = block.discharge[inside] // DAY
    final = np.zeros(len(block.subject), dtype=np.int64)
    np.maximum.at(final, block.adm_patient, block.discharge)
    died = np.zeros(len(block.subject), dtype=bool)
    died[block.adm_patient[block.died]] = True
    later = (block.death_after > 0) & ~died
    days[later] = (final[later] + block.death_after[later]) // DAY
    return days


def first_admit(block: Block) -> np.ndarray:
    """Each patient's first admission time."""
    out = np.full(len(block.subject), np.iinfo(np.int64).max)
    np.minimum.at(out, block.adm_patient, block.admit)
    return out


def write_people(
    tables: Tables, block: Block, rng: np.random.Generator, release: Release, *, quirks: bool
) -> None:
    """patients, admissions, icustays of one block."""
    groups = ["2008 - 2010", "2011 - 2013", "2014 - 2016", "2017 - 2019"]
    if release == "mimic-iv-3.1":
        groups.append("2020 - 2022")
    death = death_columns(block, rng, quirks=quirks)
    first = times(first_admit(block))
    day = death_days(block, death["dated"].to_numpy())
    tables.append(
        "hosp/patients.csv.gz",
        pl.DataFrame(
            {
                "subject_id": block.subject,
                "gender": np.where(block.male, "M", "F"),
                "anchor_age": np.where(block.birth_age > 89, 91, block.birth_age),
                "anchor_year": first.dt.year(),
                "anchor_year_group": pick(tuple(groups), block.subject),
                "dod": pl.Series(day).cast(pl.Int32).cast(pl.Date),
            }
        ).with_columns(pl.when(pl.Series(day > 0)).then("dod").alias("dod")),
    )
    n = len(block.hadm)
    some = rng.integers(0, 1 << 30, n)
    tables.append(
        "hosp/admissions.csv.gz",
        pl.DataFrame(
            {
                "subject_id": block.subject[block.adm_patient],
                "hadm_id": block.hadm,
                "admittime": times(block.admit),
                "dischtime": times(block.discharge),
                "deathtime": death["deathtime"],
                "admission_type": pick(("EW EMER.", "URGENT", "OBSERVATION ADMIT"), some),
                "admit_provider_id": pick(("P00AAA", "P11BBB", "P22CCC"), some // 3),
                "admission_location": pick(("EMERGENCY ROOM", "TRANSFER FROM HOSPITAL"), some),
                "discharge_location": pl.Series(np.where(block.died, "DIED", "HOME")),
                "insurance": pick(INSURANCE, some // 7),
                "language": pick(("ENGLISH", "?"), some // 5),
                "marital_status": pick(("MARRIED", "SINGLE", "WIDOWED"), some // 11),
                "race": pick(RACES, block.adm_patient + block.subject[block.adm_patient]),
                "edregtime": times(block.admit - 7_200),
                "edouttime": times(block.admit + 600),
                "hospital_expire_flag": block.died.astype(np.int8),
            }
        ),
    )
    second = np.where(block.transferred, block.careunit + 1, block.careunit)
    tables.append(
        "icu/icustays.csv.gz",
        pl.DataFrame(
            {
                "subject_id": block.subject[block.stay_patient],
                "hadm_id": block.hadm[block.stay_admission],
                "stay_id": block.stay,
                "first_careunit": pick(UNITS_2, block.careunit),
                "last_careunit": pick(UNITS_2, second),
                "intime": times(block.intime),
                "outtime": times(block.outtime),
                "los": (block.outtime - block.intime) / DAY,
            }
        ),
    )


def write_events(
    tables: Tables, block: Block, chart: Rows, labs: Rows, output: Rows, rng: np.random.Generator
) -> None:
    """chartevents, labevents and outputevents of one block."""
    frame = event_frame(chart, block)
    carer = rng.integers(10_000, 99_999, frame.height)
    warning = (rng.random(frame.height) < 0.02).astype(np.int8)
    tables.append(
        "icu/chartevents.csv.gz",
        frame.select(
            "subject_id",
            "hadm_id",
            "stay_id",
            pl.Series("caregiver_id", carer),
            "charttime",
            "storetime",
            "itemid",
            "value",
            "valuenum",
            "valueuom",
            pl.Series("warning", warning),
        ),
    )
    frame = event_frame(output, block)
    tables.append(
        "icu/outputevents.csv.gz",
        frame.select(
            "subject_id",
            "hadm_id",
            "stay_id",
            pl.Series("caregiver_id", rng.integers(10_000, 99_999, frame.height)),
            "charttime",
            "storetime",
            "itemid",
            "value",
            "valueuom",
        ),
    )
    frame = event_frame(labs, block)
    start = tables.rows.get("hosp/labevents.csv.gz", 0)
    empty = pl.lit(None, dtype=pl.String)
    tables.append(
        "hosp/labevents.csv.gz",
        frame.select(
            pl.Series("labevent_id", np.arange(start, start + frame.height)),
            "subject_id",
            "hadm_id",
            pl.Series("specimen_id", rng.integers(1, 99_999_999, frame.height)),
            "itemid",
            empty.alias("order_provider_id"),
            "charttime",
            "storetime",
            "value",
            "valuenum",
            "valueuom",
            empty.alias("ref_range_lower"),
            empty.alias("ref_range_upper"),
            ABNORMAL.alias("flag"),
            pl.lit("ROUTINE").alias("priority"),
            empty.alias("comments"),
        ),
    )


def write_diagnoses(tables: Tables, block: Block, rows: dict[str, np.ndarray]) -> None:
    """diagnoses_icd of one block."""
    admission = rows["admission"]
    tables.append(
        "hosp/diagnoses_icd.csv.gz",
        pl.DataFrame(
            {
                "subject_id": block.subject[block.adm_patient[admission]],
                "hadm_id": block.hadm[admission],
                "seq_num": rows["seq_num"],
                "icd_code": pl.Series(rows["code"].tolist(), dtype=pl.String),
                "icd_version": rows["version"],
            }
        ),
    )


def write_dictionaries(tables: Tables) -> None:
    """d_items, d_labitems and d_icd_diagnoses."""
    charted = [i for i in items.ITEMS if i.source == "metavision"]
    charted += [*items.FILLER, *(i for i, _ in items.FILLER_TEXT), items.OUTPUT]
    tables.append(
        "icu/d_items.csv.gz",
        pl.DataFrame(
            {
                "itemid": [i.itemid for i in charted],
                "label": [i.label for i in charted],
                "abbreviation": [i.label for i in charted],
                "linksto": [
                    "outputevents" if i.category == "Output" else "chartevents" for i in charted
                ],
                "category": [i.category for i in charted],
                "unitname": [i.unit or None for i in charted],
                "param_type": ["Numeric" for _ in charted],
            }
        ).with_columns(
            pl.lit(None, dtype=pl.String).alias("lownormalvalue"),
            pl.lit(None, dtype=pl.String).alias("highnormalvalue"),
        ),
    )
    tables.append(
        "hosp/d_labitems.csv.gz",
        pl.DataFrame(
            {
                "itemid": [i.itemid for i in items.LABS],
                "label": [i.label for i in items.LABS],
                "fluid": ["Blood" for _ in items.LABS],
                "category": [i.category for i in items.LABS],
            }
        ),
    )
    tables.append(
        "hosp/d_icd_diagnoses.csv.gz",
        pl.DataFrame(
            {
                "icd_code": [c for c, _ in codes.TITLES_VERSION],
                "icd_version": [v for _, v in codes.TITLES_VERSION],
                "long_title": [f"Diagnosis {c}, version {v}" for c, v in codes.TITLES_VERSION],
            }
        ),
    )
