"""A clinic of invented patients as canonical tables, drawn at random with every trap in it."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pytest

from data.sources.canonical import TABLES

if TYPE_CHECKING:
    from collections.abc import Callable

CODES = (
    (9, "4019"),
    (9, "428.0"),
    (9, "42731"),
    (9, " 25000"),
    (9, "25040"),
    (9, "5859"),
    (9, "V1582"),
    (10, "I10"),
    (10, "I5022"),
    (10, "j44.9"),
    (10, "E1121"),
    (10, "G20"),
)
SECTION = (
    "Chief Complaint:\nCough of {n} days\n\n",
    "History of Present Illness:\n[**Known lastname 12**] came in.\nOf note: no fever.\n\n",
    "Past Medical History:\n- gout {n}\n\n",
    "Medications on Admission:\n1. Aspirin {n} mg\n\n",
    "Discharge Diagnosis:\nHeart failure {n}\n\n",
    "Brief Hospital Course: Treated {n}.\n\n",
)
LABS = (
    # item, name, units that occur
    ("50983", "Sodium", ("mEq/L", "mmol/L")),
    ("50912", "Creatinine", ("mg/dL", "umol/L", None)),
    ("51222", "Hemoglobin", ("g/dL", "g/L")),
    ("51301", "White Blood Cells", ("K/uL", "x10^9/L")),
    ("99999", "Odd: test; name", ("furlong",)),
)


def frame(table: str, rows: list[dict[str, object]]) -> pl.DataFrame:
    """Rows as a canonical table; what is not given is null."""
    schema = TABLES[table]
    whole = [{name: row.get(name) for name in schema} for row in rows]
    return pl.DataFrame(whole, schema=schema, orient="row")


def draw_clinic(seed: int, patients: int = 12) -> dict[str, pl.DataFrame]:
    """Tables of a few patients with one to four admissions each."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[dict[str, object]]] = {name: [] for name in TABLES}
    hadm = 100
    for subject in range(1, patients + 1):
        start = datetime(2150, 1, 1) + timedelta(days=int(rng.integers(0, 900)))  # noqa: DTZ001
        age = int(rng.choice([0, 17, 18, 40, 200]))
        born = start - timedelta(days=int(age * 365.25) + 5)
        rows["patients"].append({"subject_id": subject, "sex": "FM"[subject % 2], "dob": born})
        for _ in range(int(rng.integers(1, 5))):
            hadm += 1
            end = start + timedelta(hours=float(rng.uniform(20, 200)))
            if rng.random() < 0.08:
                start, end = end, start
            who = {"subject_id": subject, "hadm_id": hadm}
            rows["admissions"].append({**who, "admittime": start, "dischtime": end})
            _diagnoses(rows, who, rng)
            _notes(rows, who, end, rng)
            _labs(rows, who, (min(start, end), max(start, end)), rng)
            start = max(start, end) + timedelta(days=float(rng.uniform(1, 200)))
    rows["lab_names"] = [{"item": item, "name": name} for item, name, _ in LABS[:-1]]
    rows["lab_names"].append({"item": "99999", "name": LABS[-1][1]})
    return {name: frame(name, rows[name]) for name in TABLES if name not in ("events", "icustays")}


def _diagnoses(rows: dict, who: dict, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(0, 5))):
        version, code = CODES[int(rng.integers(len(CODES)))]
        rows["diagnoses"].append({**who, "icd_code": code, "icd_version": version, "seq_num": 1})


def _notes(rows: dict, who: dict, end: datetime, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(0, 4))):
        kept = [part for part in SECTION if rng.random() < 0.5]
        text = "Name: x\n\n" + "".join(kept).format(n=int(rng.integers(1, 99)))
        day = end.replace(hour=23, minute=59, second=59, microsecond=0)
        rows["notes"].append(
            {
                **who,
                "charttime": day + timedelta(days=int(rng.choice([-1, 0, 0, 0, 1]))),
                "category": rng.choice(["Discharge summary"] * 4 + ["Nursing"]),
                "addendum": bool(rng.random() < 0.3),
                "text": text if rng.random() < 0.9 else None,
            }
        )


def _labs(rows: dict, who: dict, stay: tuple, rng: np.random.Generator) -> None:
    hours = (stay[1] - stay[0]).total_seconds() / 3600
    for _ in range(int(rng.integers(0, 14))):
        item, _, units = LABS[int(rng.integers(len(LABS)))]
        at = stay[0] + timedelta(hours=float(np.round(rng.uniform(-2, hours + 3), 1)))
        number = round(float(rng.uniform(1, 150)), 1)
        numeric = rng.random() < 0.85
        rows["labs"].append(
            {
                "subject_id": who["subject_id"],
                "hadm_id": who["hadm_id"] if rng.random() < 0.7 else None,
                "item": item,
                "charttime": at,
                "storetime": at + timedelta(minutes=37) if rng.random() < 0.8 else None,
                "value": str(number) if numeric else ">100",
                "valuenum": number if numeric else None,
                "unit": units[int(rng.integers(len(units)))],
                "flag": "abnormal" if rng.random() < 0.4 else rng.choice(["", "delta"]),
            }
        )


@pytest.fixture(scope="session")
def clinic() -> Callable[..., dict[str, pl.DataFrame]]:
    """`clinic(seed, patients=12)`: canonical tables."""
    return draw_clinic
